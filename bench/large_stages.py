"""Do merge, export and proof of a model of billions of parameters keep to their plan where the system gives 8 GiB?

    make bench-stages large=1
    python bench/large_stages.py --model llama-3.2-1b --limit-gib 4    # a smaller one in less

Random weights of bf16, written a layer at a time; one step of LoRA; then every stage's processes in a control group
(limited.py), one target after the other. Planned is without pages of weight files, which the system takes back, and so
is what is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from limited import Group, limited, limited_verb
from run import CONFIGS, ROOT, SECTIONS, pins, record, with_tokenizer
from safetensors.torch import save_file
from stages import loosened, summary
from transformers import AutoConfig, AutoModelForCausalLM

from edgeft.models.checkpoint import write_index

LIMIT_GIB = 8.0
# Of every weight, its sign at random: a block of NF4 holds such weights exactly, so that no rung of the proof fails by
# what 4 bits do to noise. With 0.02 logits differ by more than the proof allows where activations are int8.
SIZE = 2.0**-7
MODEL, ROWS = "llama-3.2-3b", 8  # the model that is meant where none is named
SETTINGS = {
    "max_steps": 1, "batch_size": 1, "max_length": 64, "eval_rows": 4, "rank": 8, "base_precision": "nf4",
    "sample_answers": 0,
}  # fmt: skip
TARGETS = ("ort-int4", "ort-int8")
# which phase of a plan the stages of an export's progress belong to
PHASES = {"build": "export: build", "calibrate": "export: calibrate"} | dict.fromkeys(
    ("golden", "parity", "guesses", "measure"), "export: prove"
)  # fmt: skip


def prepare(scratch: Path, model: str) -> list[str]:
    """The model and rows of data, where they are not there yet; the arguments of a plan for them."""
    if not (scratch / "model" / "tokenizer.json").is_file():  # the last file that is written
        shutil.rmtree(scratch / "model", ignore_errors=True)
        random_shards(scratch / "model", model)
    files = []
    for name, option in (("train", "--data"), ("valid", "--valid")):
        rows = [json.loads(line) for line in (SECTIONS / f"{name}.jsonl").read_text().splitlines()[:ROWS]]
        texts = [json.dumps({"text": row["prompt"] + row["completion"]}) for row in rows]  # every position is compared
        (scratch / f"{name}.jsonl").write_text("\n".join(texts) + "\n")
        files += [option, str(scratch / f"{name}.jsonl")]
    return ["plan", "--model", str(scratch / "model"), *files, *pins(SETTINGS)]


def trained(build: Path, plan: list[str], group: Group) -> list[dict[str, Any]]:
    """Train and merge in the group; the merge's row, nothing where it was there already."""
    limited_verb(group, *plan, "--out", str(build / "plan.json"))
    limited_verb(group, "train", "--no-rehearsal", str(build / "plan.json"))
    there = (build / "merged" / "merged.json").is_file()
    merged, peaks = limited_verb(group, "merge", str(build / "train"))
    return [] if there else [row("", "merge", merged["train"]["plan"]["stages"]["phases"], max(peaks.values()))]


def exported(build: Path, plan: list[str], target: str, group: Group) -> list[dict[str, Any]]:
    """The rows of one target's export, whose bundle goes away again."""
    planned, _ = limited_verb(group, *plan, "--set", f"target={target}", "--out", "-")
    # random weights: parity of their near ties is not what is measured here
    loose = build / f"{target}.toml"
    loose.write_text(loosened((ROOT / "export" / f"{target}.toml").read_text()))
    _, peaks = limited_verb(group, "export", str(build / "merged"), "--target", str(loose))
    shutil.rmtree(build / "bundle")
    measured: dict[str, int] = {}
    for stage, held in peaks.items():
        phase = PHASES.get(stage.partition(":")[0])
        if phase is not None:
            measured[phase] = max(held, measured.get(phase, 0))
    wanted = [each["name"] for each in planned["stages"]["phases"] if each["name"].startswith("export")]
    if missing := [name for name in wanted if name not in measured]:
        raise SystemExit(f"nothing was measured of {', '.join(missing)}: {peaks}")
    return [row(target, phase, planned["stages"]["phases"], measured[phase]) for phase in wanted]


def row(target: str, name: str, phases: list[dict[str, Any]], measured: int) -> dict[str, Any]:
    """Planned against measured bytes of one phase, without pages of weight files."""
    [phase] = [each for each in phases if each["name"] == name]
    pages = sum(term["bytes"] for term in phase["terms"] if term["name"] == "weight file")
    planned, high = phase["expected_bytes"] - pages, phase["high_bytes"] - pages
    error = planned / measured - 1
    print(f"{target:10} {name:18} planned {planned / 2**20:7.1f}  high {high / 2**20:7.1f}  "
          f"measured {measured / 2**20:7.1f} MiB  {100 * error:+.1f}%", flush=True)  # fmt: skip
    return {"target": target, "stage": name, "predicted_bytes": planned, "high_bytes": high,
            "measured_bytes": measured, "error": round(error, 4)}  # fmt: skip


def random_shards(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model of a known config's shape with random weights, a layer to a file, and a tokenizer."""
    config = AutoConfig.from_pretrained(CONFIGS / name)
    config.eos_token_id = config.bos_token_id = 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes = [(each, tuple(tensor.shape)) for each, tensor in model.named_parameters()]
    shards = [list(members) for _, members in groupby(shapes, lambda named: named[0].split(".")[:3])]
    generator = torch.Generator().manual_seed(0)
    owner, size_bytes = {}, 0
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {each: random_tensor(shape, dtype, generator) for each, shape in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        owner |= dict.fromkeys(tensors, file)
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, owner, total_size=size_bytes)
    return with_tokenizer(folder, config.vocab_size)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A matrix as an untrained model has it; ones where a norm has them."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    signs = torch.randint(0, 2, shape, dtype=torch.int8, generator=generator).mul_(2).sub_(1)
    return signs.to(dtype).mul_(SIZE)


def note(new: list[dict[str, Any]], model: str, limit_bytes: int) -> None:
    """Record rows beside those of other targets that were recorded before."""
    path = ROOT / "bench" / "results" / ("large_stages.json" if model == MODEL else "smaller_stages.json")
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    replaced = {(each["target"], each["stage"]) for each in new}
    rows = [each for each in old if (each["target"], each["stage"]) not in replaced] + new
    made = {"model": model, "limit_bytes": limit_bytes, "summary": summary(rows), "rows": rows}
    if model == MODEL:
        record("large_stages", made)
    else:
        record("smaller_stages", made)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument(
        "--scratch", type=Path, help="a folder that stays, with 30 GiB of room: what is made is not again"
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--limit-gib", type=float, default=LIMIT_GIB)
    given = parser.parse_args()
    limit_bytes = int(given.limit_gib * 2**30)
    with tempfile.TemporaryDirectory() as temporary, limited(limit_bytes) as group:
        scratch = given.scratch or Path(temporary)
        plan = prepare(scratch, given.model)
        if rows := trained(scratch / "build", plan, group):
            note(rows, given.model, limit_bytes)
        for target in given.targets:
            note(exported(scratch / "build", plan, target, group), given.model, limit_bytes)


if __name__ == "__main__":
    main()
