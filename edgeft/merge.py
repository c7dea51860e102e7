"""What is the model between base and fine-tuned? W0 + a (Wft - W0), tensor by tensor, in the base's own precision.

Wise-FT (arXiv 2109.01903) on tensors: one code path for LoRA and for weights that trained themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgeft import ledger
from edgeft.artifacts import Artifact, sha256_file, staging, versions
from edgeft.checkpoint import Checkpoint, TensorFile, copy_side_files, local_folder, write_checkpoint
from edgeft.errors import BadInput
from edgeft.train import TrainResult

# fp32 forms of a changed tensor that exist at the same time; one that did not change is only read and written
TENSORS_AT_ONCE = 5


class MergedCheckpoint(Artifact):
    """merged.json: which share of the change was taken, and what it did."""

    wise_alpha: float
    dtype: str
    changed_tensors: int
    tensors: int
    relative_change: float
    train: TrainResult
    predicted_peak_bytes: int
    measured_peak_bytes: int
    seconds: float


class Change:
    """What fine-tuning did to a base checkpoint, by tensor name: adapters or the changed tensors themselves.

    Raises BadInput when a change has no tensor of its name and shape in the base: all such names at once.
    """

    def __init__(self, tuned: Path, base: Checkpoint, tied_head: str | None) -> None:
        self.adapter: dict[str, tuple[str, str]] = {}
        self.whole: dict[str, str] = {}
        self.scale, self.transposed = 0.0, False
        if (tuned / "adapter_config.json").is_file():
            self.file = TensorFile(tuned / "adapter_model.safetensors")
            self._read_adapter(json.loads((tuned / "adapter_config.json").read_text()))
        else:
            self.file = TensorFile(tuned / "changed.safetensors")
            self.whole = {name: name for name in self.file.entries}
        self._match(base, tied_head)

    def _read_adapter(self, config: dict[str, Any]) -> None:
        unknown = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
        if config.get("peft_type") != "LORA" or unknown or config.get("bias", "none") != "none":
            what = ", ".join(unknown) or config.get("peft_type")
            raise BadInput(
                self.file.path.parent,
                f"is an adapter that cannot be merged: {what}",
                "use plain LoRA or rsLoRA",
            )
        self.scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        self.transposed = bool(config.get("fan_in_fan_out"))
        for name in self.file.entries:
            if name.endswith(".lora_A.weight"):
                target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
                self.adapter[target] = (name, name.replace(".lora_A.", ".lora_B."))

    def _match(self, base: Checkpoint, tied_head: str | None) -> None:
        """Give every change the name its tensor has in the base's files, which may lack a leading 'model.' or so."""
        missing = []
        for changes in (self.adapter, self.whole):
            for name in list(changes):
                found = [n for n in base.owner if n == name or name.endswith("." + n) or n.endswith("." + name)]
                if len(found) != 1:
                    missing.append(name)
                elif found[0] != name:
                    changes[found[0]] = changes.pop(name)  # type: ignore[assignment]
        wrong = [
            f"{name}: {self.shape(name)} in the fine-tune, {base.shape(name)} in the base"
            for name in (*self.adapter, *self.whole)
            if name in base and self.shape(name) != base.shape(name)
        ]
        if missing or wrong:
            lines = wrong + [f"{name}: not in the base" for name in missing]
            hint = "merge into the very base it was trained on"
            raise BadInput(self.file.path.parent, "does not fit the base:\n" + "\n".join(lines[:8]), hint)
        embedding = next(
            (n for n in self.whole if n.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))),
            None,
        )
        if tied_head is not None and tied_head in base and embedding is not None:
            self.whole.setdefault(tied_head, self.whole[embedding])  # a file that stores the tied tensor twice

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.whole:
            return tuple(self.file.entries[self.whole[name]]["shape"])
        a, b = self.adapter[name]
        rows, columns = self.file.entries[b]["shape"][0], self.file.entries[a]["shape"][1]
        return (columns, rows) if self.transposed else (rows, columns)

    def __contains__(self, name: str) -> bool:
        return name in self.adapter or name in self.whole

    def apply(self, name: str, base: torch.Tensor, wise_alpha: float) -> torch.Tensor:
        """W0 + a (Wft - W0) in fp32; exactly W0 at 0, exactly Wft at 1."""
        if name not in self or wise_alpha == 0.0:
            return base
        if name in self.whole:
            tuned = self.file.read(self.whole[name]).float()
            return tuned if wise_alpha == 1.0 else base.float().lerp_(tuned, wise_alpha)
        a, b = (self.file.read(part).float() for part in self.adapter[name])
        change = b @ a
        return base.float().add_(change.T if self.transposed else change, alpha=wise_alpha * self.scale)


def merge(
    trained: Path,
    out: Path,
    *,
    wise_alpha: float,
    progress: Callable[[str, int, int, dict[str, float]], None],
) -> MergedCheckpoint:
    """Write the merged checkpoint, a standard folder, to `out`. Raises BadInput for an alpha outside 0 to 1."""
    if not 0.0 <= wise_alpha <= 1.0:
        raise BadInput("--wise-alpha", f"must be from 0 (base) to 1 (fine-tuned), got {wise_alpha}")
    started = time.monotonic()
    ledger.control_malloc()
    result = TrainResult.read(trained / "train.json")
    folder = local_folder(result.plan.job.model)
    base = Checkpoint(folder)
    spec = result.plan.spec
    head = next((name for name in base.owner if name.endswith(("lm_head.weight", "embed_out.weight"))), None)
    change = Change(trained, base, head if spec.tie_word_embeddings else None)
    largest = max(
        torch.Size(base.shape(name)).numel() * (4 * TENSORS_AT_ONCE if name in change else base.itemsize(name))
        for name in base.owner
    )
    cpu = torch.device("cpu")
    ledger.reset_peak(cpu)
    predicted = ledger.rss_bytes() + largest
    moved = total = 0.0

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal moved, total
        if name not in change:
            return tensor
        merged = change.apply(name, tensor, wise_alpha)
        total += float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2
        moved += float(torch.dist(merged.float(), tensor.float())) ** 2
        return merged

    with staging(out) as temporary:
        copy_side_files(folder, temporary)
        for _, done, count in write_checkpoint(base, temporary, changed):
            progress("merge", done, count, {"bytes_now": ledger.rss_bytes()})
        merged = MergedCheckpoint(
            input_sha256=sha256_file(trained / "train.json"),
            versions=versions(),
            wise_alpha=wise_alpha,
            dtype=spec.dtype,
            changed_tensors=sum(name in change for name in base.owner),
            tensors=len(base.owner),
            relative_change=(moved / total) ** 0.5 if total else 0.0,
            train=result,
            predicted_peak_bytes=predicted,
            measured_peak_bytes=ledger.peak_rss_bytes(),
            seconds=round(time.monotonic() - started, 2),
        )
        merged.write(temporary / "merged.json")
    return merged
