"""How does llama.cpp's own quantiser write its k-quants, and how is it told which inputs of a matrix matter?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from edgeft.errors import EdgeftError
from edgeft.machines import processes
from edgeft.machines.extras import missing
from edgeft.machines.limits import resident_bytes

if TYPE_CHECKING:
    import torch

FILE_TYPES = {4: 15, 5: 17, 6: 18}  # llama.cpp's Q4_K_M, Q5_K_M, Q6_K, by weight_bits
QUANTISE = """
import ctypes, os, shutil, sys, numpy, llama_cpp as l
source, out, kind, status, *weights = sys.argv[1:]
p = l.llama_model_quantize_default_params()
p.ftype, p.nthread = int(kind), 0
if weights:
    given = numpy.load(weights[0])
    held = [(name.encode(), numpy.ascontiguousarray(given[name], numpy.float32)) for name in given.files]
    p.imatrix = (l.llama_model_imatrix_data * (len(held) + 1))(*(  # one without a name ends them
        (name, each.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), each.size) for name, each in held
    ))
code = l.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(p))
os.path.exists("/proc/self/status") and shutil.copyfile("/proc/self/status", status)
sys.exit(code != 0)
"""


def quantise(source: Path, out: Path, weight_bits: int, weights: Mapping[str, torch.Tensor] | None = None) -> int:
    """Let llama.cpp's own quantiser write `out`, in a process of its own: its highest resident bytes, 0 if not told.

    `weights`: of each input of a tensor of the file, by the tensor's name; what an error there counts.
    """
    status, given = source.with_suffix(".status"), source.with_suffix(".npz")
    if weights is not None:
        arrays: dict[str, Any] = {name: each.numpy() for name, each in weights.items()}
        numpy.savez(given, **arrays)
    done = processes.run(QUANTISE, source, out, FILE_TYPES[weight_bits], status, *([given] if weights else []))
    given.unlink(missing_ok=True)
    if "No module named 'llama_cpp'" in done.stderr:
        raise missing("llama-cpp-python", "is not installed", "llama")
    if "llama_model_imatrix_data" in done.stderr:
        raise missing("llama-cpp-python", "is too old to weigh inputs", "llama")
    if done.returncode != 0 or not out.is_file():
        raise EdgeftError(source, "llama.cpp's quantiser failed: " + processes.reason(done.returncode, done.stderr, 3))
    peak = resident_bytes(highest=True, status=status)
    status.unlink(missing_ok=True)
    return peak
