"""What did fine-tuning do to each tensor of its base? Read from an adapter folder, changed tensors or a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgeft.errors import BadInput
from edgeft.merging.beside import beside_problems
from edgeft.merging.peft_folder import (
    BESIDE,
    BY_PEFT,
    HADAMARD_KIND,
    PART,
    AdapterFile,
    adapter_file,
    folded_by_peft,
    lora_scale,
    read_adapter_config,
    token_indices,
)
from edgeft.merging.steps import Rows, Step, low_rank, multiply, replaced_by, rows_replaced, shift
from edgeft.models.checkpoint import Checkpoint, TensorFile, read_changed
from edgeft.models.families import in_conv1d
from edgeft.models.headers import EMBEDDINGS, HEADS, blocks
from edgeft.models.output_biases import absent_biases
from edgeft.models.spec import read_model_spec
from edgeft.settings.tuners import GAIN, SHIFT, adapter_parts

Source = AdapterFile | Checkpoint


def find_tensor(base: Checkpoint, name: str) -> str | None:
    """A tensor's name in a checkpoint's files, which may lack a leading 'model.' or so; None when it is not there."""
    return base.find(name)


class Change:
    """What fine-tuning did to a base, by the tensor names of the base; `tied`: its head is its embedding.

    `untied` is the head's name when the two are no longer one: an adapter changed one of them alone, or each in its
    own way. Raises BadInput for an adapter that no weight can hold, and where a change has no tensor of its name and
    shape in the base: all such names at once.
    """

    def __init__(self, tuned: Path, base: Checkpoint, *, tied: bool) -> None:
        self.folder, self.base, self.kind = tuned, base, "changed tensors"
        self.steps: dict[str, list[Step]] = {}
        self.factor_bytes: dict[str, int] = {}  # fp32 bytes of adapter tensors that a change needs as a whole
        self.untied: str | None = None
        self.added: dict[str, str] = {}  # biases that the base lacks and gets, with the weights that they go with
        self.beside: AdapterFile | None = None  # what no weight can hold
        self._whole: dict[str, tuple[Source, str]] = {}  # what replaces a tensor
        self._follows: set[str] = set()  # trained tokens: PEFT lets a tied head follow them
        self._problems: list[str] = []
        self.embedding = next((name for name in base.owner if name.endswith(EMBEDDINGS)), None)
        self._head = next((name for name in base.owner if name.endswith(HEADS)), None)
        self._tied = tied and self.embedding is not None
        together = True  # whether head and embedding trained as one tensor
        if (tuned / "adapter_config.json").is_file():
            together = self._read_adapter()
        elif (changed := read_changed(tuned)) is not None:
            self._read_whole(changed)
        else:
            self.kind = "checkpoint"
            self._read_whole(Checkpoint(tuned))
            absent = [name for name in base.owner if name not in self.steps and not (self._tied and name == self._head)]
            self._problems += [f"{name}: not in the fine-tuned checkpoint" for name in absent]
        if self._problems:
            hint = "merge into the very base it was trained on"
            if any("more rows" in line for line in self._problems):
                hint = "tokens were added: give the base as many (model.resize_token_embeddings), and merge into that"
            raise BadInput(tuned, "does not fit the base:\n" + "\n".join(self._problems[:8]), hint)
        if self._tied:
            self._tie(together)

    def __contains__(self, name: str) -> bool:
        return name in self.steps

    def open(self, name: str, stored: torch.Tensor) -> Rows:
        """A reader of the fine-tuned tensor's rows, given the base's own.

        A block is read before its rows of `stored` are overwritten; opening reads all that an earlier block needs.
        """
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32

        def rows(part: slice) -> torch.Tensor:
            return (stored[part] if stored.ndim else stored).to(wide)

        reader: Rows = rows
        for step in self.steps.get(name, ()):
            reader = step(reader, stored.shape[0] if stored.ndim else 1)
        return reader

    def _find(self, name: str) -> str | None:
        """The tensor's name in the base's files; a tied head's also where the base stores the embedding alone."""
        found = find_tensor(self.base, name)
        if found is not None:
            return found
        if self._tied and name.endswith(HEADS):  # a tied head need not be stored
            self._head = self._head or name
            return self._head
        return None

    def _stored_shape(self, found: str | None) -> tuple[int, ...]:
        if found is None:
            return ()
        return self.base.shape(found if found in self.base else self.embedding or found)

    def _add(self, name: str, shape: tuple[int, ...], step: Step, factor_bytes: int = 0) -> str | None:
        """Let `step` change tensor `name`, after what changes it already; its name in the base."""
        found = self._find(name)
        if found is None:
            self._problems.append(f"{name}: not in the base")
            return None
        stored = self._stored_shape(found)
        if stored != shape:
            line = f"{name}: {shape} in the fine-tune, {stored} in the base"
            more = shape[1:] == stored[1:] and shape[0] > stored[0] and name.endswith((*EMBEDDINGS, *HEADS))
            self._problems.append(line + (f", {shape[0] - stored[0]} more rows" if more else ""))
            return None
        self.steps.setdefault(found, []).append(step)
        self.factor_bytes[found] = self.factor_bytes.get(found, 0) + factor_bytes
        return found

    def _replace(self, name: str, source: Source, key: str) -> None:
        """Tensor `name` trained itself: its new value is stored whole."""

        def step(rows: Rows, count: int) -> Rows:
            return lambda part: source.read(key, part).float()

        found = self._add(name, source.shape(key), step)
        if found is not None:
            self._whole[found] = (source, key)

    def _read_whole(self, source: TensorFile | Checkpoint) -> None:
        for name in source.owner if isinstance(source, Checkpoint) else source.entries:
            self._replace(name, source, name)

    def _read_adapter(self) -> bool:
        """Add the steps of an adapter; whether it says that a tied head and embedding trained as one."""
        config = read_adapter_config(self.folder)
        self.kind = config["peft_type"]
        if self.kind in BY_PEFT:
            for name, tensor in folded_by_peft(self.folder, self.base.folder).items():
                self._add(name, tuple(tensor.shape), replaced_by(tensor))
            if self._tied and self.steps.keys() & {self.embedding, self._head}:
                self._problems.append(f"{self.embedding}: {self.kind} on an embedding that is also the head")
            return True
        source = adapter_file(self.folder)
        if self.kind in BESIDE:
            self.beside = source
            self._problems += beside_problems(source, self.base, self.kind)
            return True
        if self.kind == HADAMARD_KIND:
            self._read_hadamard(source)
            return True
        modules: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for key in source.entries:
            name = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)\.", r"\1", key).removeprefix("base_model.model.")
            if match := PART.fullmatch(name):
                part = match["part"].removeprefix("token_adapter.") + (".bias" if match["leaf"] == "bias" else "")
                modules.setdefault(match["module"], {})[part] = key
            else:
                whole[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = key
        for name, key in whole.items():  # first: an embedding that is saved whole may carry an adapter as well
            self._replace(name, source, key)
        for module, parts in modules.items():
            self._add_module(module, parts, source, config)
        return bool(config.get("ensure_weight_tying"))

    def _read_hadamard(self, source: AdapterFile) -> None:
        """w * h + b of a projection's output h: its rows and its bias times w, and b added to that."""
        self.added = absent_biases(read_model_spec(str(self.base.folder)), self.base.owner)
        axis = int(in_conv1d(_model_type(self.base.folder)))

        def read(key: str) -> Callable[[], torch.Tensor]:
            return lambda: source.read(key).float()

        for module, parts in adapter_parts(source.entries).items():
            if parts.keys() != {GAIN, SHIFT}:
                self._problems.append(f"{module}: {GAIN} and {SHIFT} are wanted, there is {', '.join(parts)}")
                continue
            (outputs,) = source.shape(parts[GAIN])
            found = self._find(f"{module}.weight")
            stored = self._stored_shape(found)
            fits = len(stored) == 2 and stored[axis] == outputs
            self._add(f"{module}.weight", stored if fits else (outputs,), multiply(read(parts[GAIN]), axis))
            bias = f"{str(found).removesuffix('weight')}bias"
            steps = [multiply(read(parts[GAIN]), 0), shift(read(parts[SHIFT]))]
            if bias in self.added:
                self.steps[bias] = steps
                continue
            for step in steps if self._find(f"{module}.bias") else steps[:1]:
                self._add(f"{module}.bias", (outputs,), step)

    def give_biases(self) -> None:
        """Let the base have the biases that it lacks, all zeros so far."""
        for name, weight in self.added.items():
            self.base.give_zeros(name, weight, _outputs(self.base, weight))

    def _add_module(self, module: str, parts: dict[str, str], source: AdapterFile, config: dict[str, Any]) -> None:
        """Add the steps of one adapted module: its weight's, and its bias's where that changes too."""
        weight = module + ".weight"
        have = parts.keys() - {"lora_magnitude_vector"}
        shapes = {part: source.shape(key) for part, key in parts.items()}
        of_vocabulary = weight.endswith((*EMBEDDINGS, *HEADS))
        transposed = in_conv1d(_model_type(self.base.folder)) and not of_vocabulary

        def read(part: str) -> torch.Tensor:
            return source.read(parts[part]).float()

        if config.get("use_dora") and len(have) == len(parts):
            self._problems.append(f"{module}: DoRA's magnitudes are missing")
            return
        magnitude = (lambda: read("lora_magnitude_vector").flatten()) if len(have) < len(parts) else None
        if {"lora_A", "lora_B"} <= have <= {"lora_A", "lora_B", "lora_E", "lora_B.bias"}:
            if len(shapes["lora_A"]) != 2:
                self._problems.append(f"{module}: a factor of shape {shapes['lora_A']}, only matrices are merged")
                return
            rank, inner, outer = *shapes["lora_A"], shapes["lora_B"][0]
            scale = lora_scale(config, module, rank)

            def factors() -> tuple[torch.Tensor, torch.Tensor]:
                right = read("lora_A") * read("lora_E") if "lora_E" in have else read("lora_A")
                return (right.T, read("lora_B").T) if transposed else (read("lora_B"), right)

            step = low_rank(factors, scale, magnitude, unit_is_row=not transposed)
            shape = (inner, outer) if transposed else (outer, inner)
            self._add(weight, shape, step, 8 * rank * (inner + outer))
            if "lora_B.bias" in have:
                self._add(module + ".bias", (outer,), shift(lambda: read("lora_B.bias") * scale))
        elif have == {"lora_embedding_A", "lora_embedding_B"}:
            rank, tokens, width = *shapes["lora_embedding_A"], shapes["lora_embedding_B"][0]
            step = low_rank(
                lambda: (read("lora_embedding_A").T, read("lora_embedding_B").T),
                lora_scale(config, module, rank), magnitude, unit_is_row=False,
            )  # fmt: skip
            self._add(weight, (tokens, width), step, 8 * rank * (tokens + width))
        elif have == {"ia3_l"}:
            of_inputs = shapes["ia3_l"][0] == 1  # (1, in), or (out, 1)
            length, axis = max(shapes["ia3_l"]), int(of_inputs != transposed)
            stored = self._stored_shape(self._find(weight))
            fits = len(stored) == 2 and stored[axis] == length
            scales = multiply(lambda: read("ia3_l").flatten(), axis)
            self._add(weight, stored if fits else shapes["ia3_l"], scales)
            if not of_inputs and self._find(module + ".bias"):
                self._add(module + ".bias", (length,), multiply(lambda: read("ia3_l").flatten(), 0))
        elif have == {"trainable_tokens_delta"}:
            indices = token_indices(config, module)
            stored = self._stored_shape(self._find(weight))
            count, width = shapes["trainable_tokens_delta"][:2]
            fits = stored[1:] == (width,) and len(indices) == count and max(indices, default=0) < stored[0]
            found = self._add(
                weight,
                stored if fits else (max(indices, default=0) + 1, width),
                rows_replaced(indices, lambda: read("trainable_tokens_delta")),
            )
            self._follows |= {found} if found else set()
        else:
            self._problems.append(f"{module}: tensors that make no known adapter: {', '.join(sorted(parts))}")

    def _is_base(self, name: str) -> bool:
        """Whether what replaces a tensor is what the base holds there."""
        stored = name if name in self.base else str(self.embedding)
        return _equal(self._whole[name], (self.base, stored))

    def _tie(self, together: bool) -> None:
        """Give the head and embedding of a tied base one change, or name the head as no longer tied."""
        embedding, head = self.embedding, self._head
        assert embedding is not None
        for name in (embedding, head):
            if name in self._whole and len(self.steps[name]) == 1 and self._is_base(name):
                del self.steps[name]  # stored whole, but not trained
                together = False  # where the other one trained
        changed = [name for name in (embedding, head) if name in self.steps and name is not None]
        if not changed:
            return
        if len(changed) == 2 and all(name in self._whole and len(self.steps[name]) == 1 for name in changed):
            together = _equal(self._whole[changed[0]], self._whole[changed[1]])
        elif changed == [embedding] and embedding in self._follows:
            together = True
        if not together:
            self.untied = head or _head_name(self.base.folder)
            return
        for name in (embedding, head):
            if name is not None and name in self.base:
                self.steps[name], self.factor_bytes[name] = self.steps[changed[0]], self.factor_bytes[changed[0]]
            elif name is not None:
                self.steps.pop(name, None)


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return ""


def _outputs(base: Checkpoint, weight: str) -> int:
    return base.shape(weight)[int(in_conv1d(_model_type(base.folder)))]


def _head_name(folder: Path) -> str:
    """The name of the output head's weight, from a model without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is head)) + ".weight"


def _equal(one: tuple[Source, str], other: tuple[Source, str]) -> bool:
    """Whether two stored tensors hold the same values."""
    (first, a), (second, b) = one, other
    shape = first.shape(a)
    return shape == second.shape(b) and all(
        torch.equal(first.read(a, part).double(), second.read(b, part).double()) for part in blocks(shape)
    )
