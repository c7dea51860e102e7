"""What does a PEFT adapter folder hold, and can the weights of its base hold it?"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from edgeft.errors import BadInput
from edgeft.machines import meter
from edgeft.models.checkpoint import TensorFile, load_plain

HADAMARD_KIND = "EDGEFT_HADAMARD"  # of `edgeft.engine.hadamard`
MAY_FOLD = ("LORA", "ADALORA", "IA3", "TRAINABLE_TOKENS", HADAMARD_KIND)
# rarer kinds, which PEFT itself folds, with the whole base in memory; each is tested
BY_PEFT = (
    "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA", "FOURIERFT", "LN_TUNING", "MISS", "C3A", "WAVEFT", "SHIRA", "DELORA",
    "RANDLORA", "VBLORA", "ROAD",
)  # fmt: skip
BESIDE = ("EDGEFT_BOTTLENECK", "PREFIX_TUNING", "PROMPT_TUNING")  # which lie beside the weights of a merge
CANNOT_FOLD = {
    "PREFIX_TUNING": "prefix tuning puts keys and values before the sequence, which no weight holds",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning puts virtual tokens before the input, which no weight holds",
    "P_TUNING": "p-tuning puts virtual tokens before the input, which no weight holds",
    "CPT": "context-aware prompt tuning puts virtual tokens before the input, which no weight holds",
    "CARTRIDGE": "a cartridge is a key-value cache before the sequence, which no weight holds",
    "ADAPTION_PROMPT": "an adaption prompt adds gated attention to extra tokens, which no weight holds",
    "XLORA": "X-LoRA mixes its adapters anew for every token",
    "POLY": "Poly mixes its adapters by task",
    "BOTTLENECK": "a bottleneck adapter has a non-linearity between its layers, which no weight holds",
}
LORA_CANNOT_FOLD = {
    "PREFIX_TUNING": "prefix tuning puts keys and values before the sequence, which no weight holds",
    "alora_invocation_tokens": "activated LoRA works only after its invocation tokens",
    "arrow_config": "Arrow chooses its adapters anew for every token",
    "use_qalora": "QALoRA pools its inputs, for a base quantised in groups",
    "kasa_config": "KaSA begins by cutting the base's own weights",
    "use_bdlora": "block-diagonal LoRA stores its factors in another form",
    "layer_replication": "the adapter's model has layers that the base has not",
    "target_parameters": "the adapter changes single parameters of mixture-of-experts layers",
}
# initialisations of LoRA that take the adapter's first value out of the base's weights
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")

PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l"
    r"|(?:token_adapter\.)?trainable_tokens_delta)(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)


class PickledFile:
    """adapter_model.bin as older tools wrote it, read without running anything in it. Raises BadInput."""

    def __init__(self, path: Path) -> None:
        try:
            self.entries: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
            reason = (str(problem) or type(problem).__name__).splitlines()[0]
            raise BadInput(path, f"cannot be read: {reason:.200}", "save the adapter as safetensors") from None

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.entries[name][rows] if self.entries[name].ndim else self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name].shape)


AdapterFile = TensorFile | PickledFile


def adapter_file(folder: Path) -> AdapterFile:
    """The adapter's tensors by name. Raises BadInput."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        return PickledFile(folder / "adapter_model.bin")
    return TensorFile(path)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json with its peft_type. Raises BadInput with the reason when it can be no part of a merge."""
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        # AdapterHub's bottleneck adapters have no peft_type, but name their non-linearity
        kind = str(config.get("peft_type") or ("BOTTLENECK" if "non_linearity" in str(config) else "an unknown kind"))
    except (OSError, ValueError, AttributeError) as problem:
        raise BadInput(path, f"is no adapter's configuration: {problem}") from None
    reasons = [] if kind in (*MAY_FOLD, *BY_PEFT, *BESIDE) else [CANNOT_FOLD.get(kind, f"{kind} is not known here")]
    reasons += [reason for key, reason in LORA_CANNOT_FOLD.items() if config.get(key)]
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGES_BASE):
        reasons.append(f"{start} begins by changing the base's own weights")
    if reasons:
        hint = "merge it with PEFT (merge_and_unload, save_pretrained) and give that folder, with --base"
        if kind in CANNOT_FOLD:
            hint = "train LoRA, DoRA, IA3 or full weights for a model that is to be merged"
        raise BadInput(folder, "is an adapter that cannot be merged: " + "; ".join(reasons), hint)
    return {**config, "peft_type": kind}


def lora_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, alpha / sqrt(r) for rsLoRA, alpha / initial r for AdaLoRA; alpha_pattern's first match wins."""
    alpha = float(config.get("lora_alpha") or 0.0)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    if config["peft_type"] == "ADALORA":  # PEFT divides by the rank it began with, plus 1e-5
        return (alpha if alpha > 0 else float(rank)) / (float(config.get("init_r", rank)) + 1e-5)
    if rank == 0:
        return 0.0
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def token_indices(config: dict[str, Any], module: str) -> list[int]:
    """The rows that were trained, of PEFT's two ways to say so."""
    named = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(named, dict):
        named = next((rows for layer, rows in named.items() if module == layer or module.endswith("." + layer)), [])
    return list(named)


def folded_by_peft(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """The tensors that an adapter changes, as PEFT folds them into the base loaded whole, in fp32. Raises BadInput."""
    meter.import_all()
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        with warnings.catch_warnings():  # what it does not find it leaves at its first values
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model: Any = PeftModel.from_pretrained(load_plain(base), folder)
        adapted = tuple(
            name.removeprefix("base_model.model.") + "."
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        )
        folded = model.merge_and_unload()
    except (
        ValueError,
        RuntimeError,
        NotImplementedError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        Warning,
    ) as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        raise BadInput(
            folder, f"cannot be folded by PEFT: {reason:.200}", "was it trained on this very base?"
        ) from None
    return {name: tensor.detach() for name, tensor in folded.named_parameters() if name.startswith(adapted)}
