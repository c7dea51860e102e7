"""How much memory does this process use, now and at its highest, and which tensor bytes are alive?"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import mmap
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from edgeft.machines.limits import reset_resident_peak, resident_bytes

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
MAPPED_BYTES = 65536


def import_all() -> None:
    """Import at once what any training run may import, so that every process has the same baseline.

    bitsandbytes asks for compiled functions as it is imported, which loads PyTorch's compiler (42 MiB, a second)
    though nothing here compiles: it gets the functions as they are. What importing made, a million objects, is then no
    longer looked through for garbage: 0.3 s of each `give_back`.
    """
    if "bitsandbytes" in sys.modules and "peft" in sys.modules:
        return
    compiled = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compiled
    for name in ("peft", "transformers", "tokenizers", "safetensors.torch"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _uncompiled(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda other: other


class _Mallinfo(ctypes.Structure):
    """What glibc tells of its heaps, mallinfo2(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def taken_bytes() -> int:
    """Bytes that glibc has given out, in its heaps and mapped; 0 before its version 2.33."""
    library = glibc()
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = _Mallinfo
    found = library.mallinfo2()
    return int(found.uordblks + found.hblkhd)


@functools.cache
def glibc() -> Any:
    """glibc, None where the system has another C library (musl has neither the file nor the threshold)."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
        return library if library.mallopt and library.malloc_trim else None
    return None


def control_malloc() -> bool:
    """True when glibc was told to return every tensor of 64 KiB or more to the system at once.

    glibc's own threshold grows to 32 MiB as tensors are freed; from then on activations fragment the heap, and peak
    RSS is 10 to 73% above the tensors' bytes and never the same twice. Must run before the model is built.
    """
    library = glibc()
    if library is None:
        return False
    return all(bool(library.mallopt(what, MAPPED_BYTES)) for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def give_back() -> None:
    """Let glibc return all that was freed to the system.

    It keeps a dropped model's pages for tensors to come: 530 MiB of a 135M model in fp32 after its second loading.
    """
    gc.collect()
    trim()


def trim() -> None:
    """`give_back`, as far as it is known to be free already."""
    if (library := glibc()) is not None:
        library.malloc_trim(0)


def rss_bytes() -> int:
    """Resident bytes of this process now (0 where the system does not tell)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def peak_rss_bytes() -> int:
    """Highest resident bytes since the start or the last `reset_peak`."""
    if peak := resident_bytes(highest=True):
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Start a new phase: the high-water mark falls to what is used now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reset_resident_peak()  # not on macOS; there a phase's peak includes earlier ones


def peak_bytes(device: torch.device) -> int:
    """The device's own peak: CUDA's reserved allocator bytes, else this process's RSS."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else peak_rss_bytes()


def bytes_now(device: torch.device) -> int:
    """What is used on the device now: CUDA's reserved bytes, else this process's RSS."""
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else rss_bytes()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor storage made or seen while it is on: `live_bytes` now and `peak_bytes`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._seen = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]

    def count(self, value: Any) -> None:
        """Count the storages of all tensors in `value`, each once."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage not in self._seen:
                    self._seen[storage] = True
                    weakref.finalize(storage, self.forget, *self.born(leaf, storage.nbytes()))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def overlook(self, tensors: Any) -> None:
        """Never count these, nor views of them: pages of files, say."""
        for leaf in tree_leaves(tensors):
            self._seen[leaf.untyped_storage()] = True

    def born(self, tensor: torch.Tensor, size: int) -> tuple[int, ...]:
        """Count a storage of `size` bytes first seen as `tensor`; the result goes to `forget` when it is freed."""
        self.live_bytes += size
        return (size,)

    def forget(self, size: int) -> None:
        self.live_bytes -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = as_unwatched(function, args)(*args, **(kwargs or {}))
        self.count(result)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + hidden_bytes(function, args))
        return result


def as_unwatched(function: Any, args: Any) -> Any:
    """What runs in place of an operation when no dispatch mode looks on.

    Where two gradients of one tensor meet, autograd adds the second to the first in place if nothing else refers to the
    first or to its storage, but makes a third tensor under a mode (torch/csrc/autograd/input_buffer.cpp): one more copy
    of a tied embedding. The counts include references of the call itself, three to the tensor and one to the storage.
    """
    if function is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
        return function
    if torch._C._current_graph_task_id() == -1 or not isinstance(args[1], torch.Tensor):
        return function
    old, new = args[:2]
    alone = old._use_count() == 4 and torch._C._storage_Use_Count(old.untyped_storage()._cdata) == 2
    same = old.shape == new.shape and old.dtype == new.dtype and old.is_contiguous()
    return torch.ops.aten.add_.Tensor if alone and same else function


def hidden_bytes(function: Any, args: Any) -> int:
    """Bytes that an operation holds only while it runs, where no dispatch mode sees them.

    bitsandbytes multiplies with a dense copy of the 4-bit matrix, made beside its unpacked fp32 scales.
    """
    if getattr(function, "namespace", "") != "bitsandbytes" or function._opname != "gemm_4bit":
        return 0
    inputs, _, shape, _, block = args[:5]
    elements = int(shape[0]) * int(shape[1])
    return elements * int(inputs.element_size()) + 4 * -(-elements // int(block))
