"""How does a base model come into memory as its plan keeps it: dense, or NF4 with its codes kept on disk?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from edgeft.documents import cache_folder, saving, sha256_file, sha256_json, staging
from edgeft.engine.nf4_codes import nf4_settings, quantise_on
from edgeft.engine.ranks import ALONE, Ranks
from edgeft.engine.sharded import load_sharded
from edgeft.engine.streaming import load_streamed
from edgeft.engine.tensor_by_tensor import fill, load_packed, multiply_in
from edgeft.errors import BadInput
from edgeft.machines import processes
from edgeft.machines.limits import MALLOC_ENVIRONMENT
from edgeft.memory import disk
from edgeft.models.boundary import Weight
from edgeft.models.checkpoint import DTYPES, Checkpoint, load_plain, load_whole, quiet_transformers
from edgeft.models.headers import has_weights
from edgeft.models.identity import weights_sha256
from edgeft.models.spec import read_model_spec
from edgeft.progress import Progress, silent
from edgeft.settings.job import Training

FORM = 2  # of what `quantise` writes: another number where the same weights would give other codes


def load_base(
    folder: Path, training: Training, device: torch.device, compute: torch.dtype, progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Any:  # fmt: skip
    """The base model as the plan keeps it: dense in base_precision, or NF4 with double quantisation.

    Only several processes can hold it in parts: one that is alone has all of it.

    Quantising costs seconds per 100M parameters on a CPU, so the NF4 model is kept on disk under the hash of
    its weights and loaded from there next time. CUDA devices make the codes themselves.
    """
    if training.base_precision != "nf4":
        # a half-precision base on a device that cannot compute in it is held in the compute dtype instead
        dense = DTYPES[training.base_precision] if compute.itemsize == 2 else compute
        if training.stream_layers:
            return load_streamed(folder, training, dense, device)
        if training.shard_base and not ranks.alone:
            return load_sharded(folder, training, device, dense, ranks)
        model = load_plain(folder, dense)
        leave_files(model, Checkpoint(folder))
        return model.to(device)
    cached = keep_base(folder, training, device, progress)
    try:
        if training.stream_layers:
            return load_streamed(cached, training, compute, device)
        if training.shard_base and not ranks.alone:
            return load_sharded(cached, training, device, compute, ranks)
        return load_quantised(cached, compute, device)
    except BadInput as problem:
        raise BadInput(cached, problem.problem, "remove this folder: it is made again from the base") from None


def load_quantised(folder: Path, compute: torch.dtype, device: torch.device) -> Any:
    """The model of a 4-bit checkpoint, tensor by tensor; as transformers has it where it is put together from them."""
    found = load_packed(folder, compute, device)
    if found is None:
        found = load_whole(folder, dtype=compute, device_map={"": device})
        compute_in(found, compute)
    return found


def keep_base(folder: Path, training: Training, device: torch.device, progress: Progress = silent) -> Path:
    """Where what a plan loads of its base is: the folder itself, or its NF4 form's, which is made where it is not."""
    if training.base_precision != "nf4":
        return folder
    cached = quantised_folder(folder)
    if not has_weights(cached):
        disk.require(disk.nf4_disk(read_model_spec(str(folder)), training), cached)
        if device.type != "cuda" or not quantise_on(folder, cached, device, progress):
            quantise_aside(folder, cached)
    return cached


def quantise_aside(folder: Path, out: Path) -> None:
    """`quantise` in a process of its own: what it leaves in the heap would count against training. Raises BadInput."""
    code = "import sys; from pathlib import Path; from edgeft.engine.nf4_base import quantise; "
    code += "quantise(*map(Path, sys.argv[1:]))"
    # large matrices would fragment its heap to twice the size
    done = processes.run(code, folder, out, environment=MALLOC_ENVIRONMENT)
    if done.returncode:
        reason = processes.reason(done.returncode, done.stderr)
        raise BadInput(folder, f"cannot be quantised to NF4: {reason}", "use another --set base_precision")


def leave_files(model: Any, files: Checkpoint) -> None:
    """Give a model that was put together from pieces (its experts, say) memory of its own for the rest of it too.

    Weights that are what the files hold are pages of them. One that stays so keeps all pages of its file resident that
    loading has read, those of the pieces as well: experts would be there twice.
    """
    if all(files.find(name) is not None for name, _ in model.named_parameters()):
        return
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def compute_in(model: Any, compute: torch.dtype) -> None:
    """Make a 4-bit model compute in one dtype, forth and back, as plans count on: what is dense is kept in it too.

    transformers leaves what was not quantised in the dtype it was stored in: an fp32 checkpoint would hold more than
    planned, a bf16 one not run at all in fp32. Every tensor is copied: one that stays mapped keeps all pages of its
    file resident that loading has touched.
    """
    for parameter in model.parameters():
        dtype = compute if parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(dtype, copy=True)
        state = getattr(parameter, "quant_state", None)
        for part in (state, state.state2) if state is not None else ():
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, value.clone())
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            multiply_in(module, compute)


def make_nf4(linear: Any, compute: torch.dtype) -> Any:
    """A Linear's 4-bit form (NF4, double quantisation), frozen, as `load_base` has them."""
    from bitsandbytes import nn

    kinds: Any = nn
    made = kinds.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=compute, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = linear.weight.detach()
    made.weight = kinds.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    ).to(weight.device)
    made.bias, made.source_cls = linear.bias, linear.source_cls
    multiply_in(made, compute)
    return made


def read_back(dropped: Iterable[Weight], folder: Path, training: Training, device: torch.device) -> None:
    """Give a model the weights that it let go of, from its base in `folder`, one at a time, as `load_base` has them."""
    nf4 = training.base_precision == "nf4"
    fill(dropped, Checkpoint(quantised_folder(folder) if nf4 else folder, packed=nf4), device)


def quantised_folder(folder: Path) -> Path:
    """Where the NF4 form of these very weights and this config is kept."""
    key = sha256_json([FORM, weights_sha256(folder), sha256_file(folder / "config.json")])
    return cache_folder() / "nf4" / key[:24]


def quantise(folder: Path, out: Path) -> None:
    """Write the NF4 form of a checkpoint to `out`, whole or not at all: tensor by tensor where its files have them."""
    if quantise_on(folder, out, torch.device("cpu"), silent):
        return
    stored = getattr(torch, read_model_spec(str(folder)).dtype)  # whatever config.json says: rounded once, to 4 bits
    with quiet_transformers(), saving(out), staging(out) as temporary:
        model = load_whole(folder, quantization_config=nf4_settings(), device_map={"": "cpu"}, dtype=stored)
        model.save_pretrained(temporary)
