"""Where is the file that runs a bundle on a device, and how is the same file used here?"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from edgeft.documents import shipped_folder
from edgeft.errors import EdgeftError

RUNNER = "run.py"


def runner_module() -> ModuleType:
    """export/run.py as a module: this version's, of which bundles get a copy. A bundle's own is never imported."""
    path = shipped_folder("export") / RUNNER
    name = "edgeft_bundle_runner"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise EdgeftError(path, "cannot be loaded", "reinstall edgeft")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
