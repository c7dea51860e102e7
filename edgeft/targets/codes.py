"""Where are the codes of a calibrated model kept until they are built into a bundle?"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from edgeft.targets.grid import Encoded

INPUTS = "inputs.safetensors"


class Codes:
    """A folder of calibrated codes, a file a decoder layer, by the names of tensors in the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def _places(self) -> dict[str, Path]:
        from safetensors import safe_open

        places: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                keys = file.keys()
            places |= {key.removesuffix("/codes"): path for key in keys if key.endswith("/codes")}
        return places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> Encoded:
        """The codes of one tensor."""
        from safetensors import safe_open

        with safe_open(self._places[name], "pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 - no dict
            parts = {key.rpartition("/")[2]: file.get_tensor(key) for key in keys}
        block_size, bits = map(int, parts.pop("kind"))
        codes, scale, zero = parts["codes"].float(), parts["scale"], parts["zero"]
        return Encoded(codes, scale, zero, block_size, bits, parts.get("least"))  # type: ignore[arg-type]

    def write_input_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """What each input of a matrix counts, by the names of tensors: in the place of codes, for k-quants."""
        from safetensors.torch import save_file

        save_file(weights, self.folder / INPUTS)

    def input_weights(self) -> dict[str, torch.Tensor]:
        """The same as it was written."""
        from safetensors.torch import load_file

        return load_file(self.folder / INPUTS)

    def write(self, file: str, encoded: dict[str, Encoded]) -> None:
        """One file of the folder."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name, each in encoded.items():
            small = torch.int8 if each.codes.amin() < 0 else torch.uint8
            parts = {"codes": each.codes.to(small), "scale": each.scale, "zero": each.zero, "least": each.least}
            parts["kind"] = torch.tensor([each.block_size, each.bits])
            tensors |= {f"{name}/{key}": part.contiguous() for key, part in parts.items() if part is not None}
        save_file(tensors, self.folder / f"{file}.safetensors")
