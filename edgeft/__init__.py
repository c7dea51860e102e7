"""edgeft: fine-tune a language model inside a memory budget and ship it to a small device, proven equal.

    plan = edgeft.make_plan(edgeft.make_job(model="folder", data="rows.jsonl", profile="t4"))
    with edgeft.wise(model, 0.5):  # a live model, half way between base and fine-tuned
        model.generate(...)

The stages: edgeft.training.train.train, edgeft.merging.merge.merge, edgeft.exporting.export.export.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Packages that call home unless told before they are imported: onnxruntime since 1.29 and onnxruntime-genai since 0.18
# write a device id into the home folder. What a user has set stays; processes that edgeft starts inherit it.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")

if TYPE_CHECKING:
    from edgeft.merging.wise import wise
    from edgeft.planning.plan import make_plan
    from edgeft.settings import make_job

__version__ = "0.1.0"
__all__ = ["make_job", "make_plan", "wise"]


def __getattr__(name: str) -> Any:
    """Import what is named on first use only: importing edgeft costs nothing."""
    import importlib

    homes = {"make_job": "settings", "make_plan": "planning.plan", "wise": "merging.wise"}
    if name in homes:
        return getattr(importlib.import_module(f"edgeft.{homes[name]}"), name)
    raise AttributeError(f"module 'edgeft' has no attribute {name!r}")
