"""How is a base made NF4 on the device that is there, one tensor after the other, in the very bits a CPU gives it?

bitsandbytes' kernels for GPUs round by constants and an order of their own. Here the codes come from operations that
round alike everywhere (a maximum, a division, a product, comparisons), the statistics of a matrix, which are a sum,
from the CPU: the files are those that transformers writes on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeft.documents import saving, staging
from edgeft.memory.stages import NF4_FILE_BYTES
from edgeft.models.checkpoint import Checkpoint, quiet_transformers, write_index, write_tensors
from edgeft.models.parts import cap_scores
from edgeft.models.spec import read_model_spec
from edgeft.progress import Progress

BLOCK = 64  # weights that share a scale
AT_ONCE = 2**22  # weights whose fp32 forms exist at a time, 0.1 GiB


def nf4_settings() -> Any:
    """What transformers is told of the 4-bit form: NF4 with double quantisation."""
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    return settings(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def empty_nf4(config: Any, dtype: torch.dtype) -> Any:
    """The model of `config` on the meta device, with the matrices that transformers packs as its 4-bit Linears."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype).eval()
    cap_scores(model)
    give_4bit_linears(model, pre_quantized=False)
    return model


def give_4bit_linears(model: Any, *, pre_quantized: bool) -> None:
    """Put transformers' 4-bit Linears in place of the matrices that it packs; `pre_quantized`: their codes exist."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    kind: Any = Bnb4BitHfQuantizer
    quantizer = kind(nf4_settings(), pre_quantized=pre_quantized)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    quantizer.postprocess_model(model)


def quantise_on(folder: Path, out: Path, device: torch.device, progress: Progress) -> bool:
    """Write the NF4 form of a checkpoint to `out`, computed on `device`, whole or not at all.

    The host holds a file of codes and one tensor, the device one tensor. False, with nothing written, for a model whose
    tensors are not those of its files (experts that are put together, say).
    """
    from transformers import AutoConfig

    stored = getattr(torch, read_model_spec(str(folder)).dtype)  # rounded once, to 4 bits
    with quiet_transformers():
        model = empty_nf4(AutoConfig.from_pretrained(folder), stored)
    files = Checkpoint(folder)
    packed = {
        f"{name}.weight": module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"
    }
    found = own_names(model, files, packed)
    if found is None:
        return False
    with saving(out), staging(out) as temporary:
        shards = Shards(temporary)
        for done, (name, own) in enumerate(found.items()):
            value = files.read(own).to(stored)
            if name in packed:
                transposed = packed[name].source_cls.__name__ == "Conv1D"
                shards.add(packed_tensors(own, value.T if transposed else value, device))
            else:
                shards.add({own: value})
            progress("quantise", done + 1, len(found), {})
        shards.end()
        model.config.save_pretrained(temporary)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return True


def own_names(model: Any, files: Checkpoint, packed: dict[str, Any]) -> dict[str, str] | None:
    """The name in the files of every tensor of the model; None where one is not there in the shape it has."""
    seen: set[int] = set()
    found: dict[str, str] = {}
    buffers = {f"{place}.{key}" if place else key for place, module in model.named_modules()
               for key in module._non_persistent_buffers_set}  # fmt: skip
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if id(tensor) in seen or name in buffers:
            continue
        seen.add(id(tensor))
        own, module = files.find(name), packed.get(name)
        shape = tuple(tensor.shape) if module is None else (module.out_features, module.in_features)
        if module is not None and module.source_cls.__name__ == "Conv1D":
            shape = shape[::-1]
        if own is None or files.shape(own) != shape:
            return None
        found[name] = own
    return found


def packed_tensors(name: str, weight: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors that a 4-bit checkpoint has of one matrix (outputs, inputs), on the CPU."""
    from bitsandbytes.functional import QuantState, quantize_blockwise

    codes, scales = nf4_codes(weight, device)
    state: Any = QuantState
    offset = scales.mean()
    second, nested = quantize_blockwise(scales - offset, blocksize=256)
    made = state(
        absmax=second, shape=weight.shape, dtype=weight.dtype, blocksize=BLOCK, quant_type="nf4", offset=offset,
        code=nf4_values(), state2=nested,
    )  # fmt: skip
    return {name: codes, **{f"{name}.{key}": value for key, value in made.as_dict(packed=True).items()}}


def nf4_codes(weight: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, two a byte (n / 2, 1); the largest magnitude of each 64 weights): CPU tensors, computed on `device`."""
    flat = weight.contiguous().view(-1)
    parts = [_codes(part.to(device).float()) for part in torch.split(flat, AT_ONCE)]
    codes, scales = (torch.cat([part[n] for part in parts]) for n in range(2))
    return codes[:, None], scales


def _codes(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    short = -len(flat) % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, short)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    least = scales.clamp(min=1e-38)
    scaled = blocks * (1.0 / least)[:, None]
    if short:  # bitsandbytes divides a last block that is not full, and rounds once where a product rounds twice
        scaled[-1] = blocks[-1] / least[-1]
        scales[-1] = least[-1]
    scaled = scaled.clamp(-1, 1).view(-1)[: len(flat) + len(flat) % 2]
    codes = torch.bucketize(scaled, midpoints().to(flat.device), out_int32=True).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).cpu(), scales.cpu()


def midpoints() -> torch.Tensor:
    """Half way between neighbours of NF4's 16 values: where one code ends and the next begins."""
    values = nf4_values()
    return (values[:-1] + values[1:]) / 2


def nf4_values() -> torch.Tensor:
    """What the 16 codes stand for."""
    from bitsandbytes import functional

    library: Any = functional
    values: torch.Tensor = library.get_4bit_type("nf4", device="cpu")
    return values


class Shards:
    """Tensors as they come, in files of some size and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.size = folder, dict[str, torch.Tensor](), 0
        self.owner: dict[str, str] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        self.held |= tensors
        self.size += sum(tensor.nbytes for tensor in tensors.values())
        if self.size >= NF4_FILE_BYTES:
            self.write()

    def write(self) -> None:
        """One file of what is held; its readers want wide numbers first, where they lie at multiples of their size."""
        file = f"model-{len(set(self.owner.values())) + 1:05d}.safetensors"
        ordered = sorted(self.held.items(), key=lambda entry: -entry[1].element_size())
        write_tensors(self.folder / file, dict(ordered))
        self.owner |= dict.fromkeys(self.held, file)
        self.held, self.size = {}, 0

    def end(self) -> None:
        """The last file, and which file has which tensor."""
        if self.held:
            self.write()
        write_index(self.folder, self.owner)
