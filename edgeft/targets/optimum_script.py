"""What is a checkpoint as an ONNX graph of standard operators? Run by optimum's own interpreter, not by edgeft's.

optimum-onnx 0.1 asks for a transformers older than edgeft's, so this file is a script that imports nothing of edgeft:

    PYTHON optimum_script.py CHECKPOINT OUT TASK OPSET    writes OUT/model.onnx, OUT/versions.json, OUT/status
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")  # as edgeft itself does


BOTTLENECKS = "bottlenecks.safetensors"  # beside a checkpoint's weights


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 4 reads it: what 5 calls rope_parameters and dtype is looked for elsewhere there.

    Without this rotary positions would silently be those of a default base. Raises ValueError for what 4 cannot say.
    """
    made = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = config.get("rope_parameters")
    if rope is None:
        return made
    if "full_attention" in rope:  # two kinds of layers, each with its own positions
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local["rope_type"] != "default":
            raise ValueError("scaled rotary positions in the windowed layers")
        made["rope_local_base_freq"] = local["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    made |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    made["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return made


def hang_bottlenecks(model: Any, file: Path) -> None:
    """Give a model the adapters beside its weights: h + up(GELU(down(h))) of a module's output, or of its input."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    for name, down in tensors.items():
        place, end = name.removesuffix(".down.weight"), ".up.weight"
        if place == name:
            continue
        path, _, where = place.rpartition(".")
        module, up, of_input = model.get_submodule(path), tensors[place + end], where == "parallel_adapter"
        rank, width = down.shape
        parts: Any = torch.nn.Sequential(
            torch.nn.Linear(width, rank, bias=False), torch.nn.GELU(), torch.nn.Linear(rank, width, bias=False)
        )
        parts[0].weight.data, parts[2].weight.data = down, up
        module.add_module(where, parts)
        module.register_forward_hook(
            lambda _, given, made, parts=parts, of_input=of_input: made + parts(given[0] if of_input else made)
        )


def export(checkpoint: Path, out: Path, task: str, opset: int) -> None:
    """OUT/model.onnx in fp32, a tied table stored once."""
    import accelerate  # noqa: F401 - without it optimum does not see that a head is the embedding, and stores both
    import torch
    from optimum.exporters.onnx.convert import onnx_export_from_model
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    kinds = {
        "text-generation-with-past": AutoModelForCausalLM,
        "text-classification": AutoModelForSequenceClassification,
        "feature-extraction": AutoModel,
    }
    source = out / "source"
    source.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "config.json" and path.suffix in (".json", ".safetensors"):
            (source / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(older_config(config)), encoding="utf-8")
    # torch's fused attention has no cap on its scores and would leave Gemma 2's out
    how = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}
    model = kinds[task].from_pretrained(source, dtype=torch.float32, **how).eval()
    if (checkpoint / BOTTLENECKS).is_file():
        hang_bottlenecks(model, checkpoint / BOTTLENECKS)
    onnx_export_from_model(model, out, task=task, opset=opset, do_validation=False, device="cpu")
    shutil.rmtree(source)
    found = {name: version(name) for name in ("optimum", "optimum-onnx", "transformers", "torch", "onnx")}
    (out / "versions.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    finally:
        if os.path.exists("/proc/self/status"):
            shutil.copyfile("/proc/self/status", Path(sys.argv[2], "status"))
