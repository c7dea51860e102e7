"""How is one recorded run made: the real verbs in processes of their own, results as JSON with their environment?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeft.engine.lisa import draw
from edgeft.machines.environment import environment
from edgeft.memory import train_step
from edgeft.planning.plan import Plan
from edgeft.reporting.terminal import NOT_TENSORS

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ROOT / "examples" / "debian-sections"
BASE = ROOT / "examples" / "debian-tiny"
CONFIGS = ROOT / "examples" / "configs"


AT_START = environment(ROOT)  # a bench is its own load: what else ran is seen before it begins


def verb(*arguments: str, as_json: bool = True) -> dict[str, Any]:
    """The JSON result of one edgeft verb, run as a user runs it; progress goes to this process's stderr."""
    command = [sys.executable, "-m", "edgeft", *arguments, *(["--json"] if as_json else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout) if as_json and done.stdout.strip() else {}


def pins(settings: dict[str, Any]) -> list[str]:
    """The settings as arguments of `edgeft plan`."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


class Kept:
    """Rows by the names of their runs, in build/bench-NAME.jsonl as soon as each ends: an interrupted bench goes on."""

    def __init__(self, name: str) -> None:
        self.path = ROOT / "build" / f"bench-{name}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows: dict[str, dict[str, Any]] = {row["run"]: row for row in map(json.loads, lines)}

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["run"]] = row
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def train(folder: Path, settings: dict[str, Any], *, model: Path = BASE, data: Path = SECTIONS / "train.jsonl",
          valid: Path = SECTIONS / "valid.jsonl", test: Path | None = None, profile: str = "cpu",
          rehearsal: bool = True) -> dict[str, Any]:  # fmt: skip
    """train.json of one job, planned for this machine's CPU or another profile."""
    files = ["--data", str(data), "--valid", str(valid), *(["--test", str(test)] if test else [])]
    verb(
        "plan", "--model", str(model), "--profile", profile, *files, *pins(settings), "--out", str(folder / "plan.json")
    )
    verb("train", str(folder / "plan.json"), "--out", str(folder / "train"), *([] if rehearsal else ["--no-rehearsal"]))
    return json.loads((folder / "train" / "train.json").read_text())


def interval_plans(plan: Plan) -> list[tuple[tuple[str, ...], int]]:
    """(units, predicted bytes) of each interval: the plan's closed form for the very layers that are drawn."""
    training = plan.training
    pool = tuple(f"layer {i}" for i in training.trained_layers)
    train_phase = next(phase for phase in plan.phases if phase.name == "train")
    fixed = sum(term.bytes for term in train_phase.terms if term.name in NOT_TENSORS)
    found = []
    for interval in range(-(-training.steps // training.lisa_interval)):
        units = draw(pool, training.active_layers, training.lisa_schedule, (), training.seed, interval)
        layers = tuple(int(unit.split()[1]) for unit in units)
        fixed_set = training.model_copy(update={"layers": "sparse", "trained_layers": layers, "active_layers": 0})
        terms = train_step.step_terms(plan.spec, fixed_set, plan.work)
        found.append((units, fixed + sum(term.bytes for term in terms)))
    return found


def random_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Llama of that shape with random weights, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = shape["hidden_size"] // 64
    values = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64, **shape}
    config = LlamaConfig(**values, max_position_embeddings=1024, eos_token_id=0, bos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return with_tokenizer(folder, shape["vocab_size"])


def random_135m(folder: Path) -> Path:
    """SmolLM2-135M's shape with random weights in fp32, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CONFIGS / "smollm2-135m")
    config.eos_token_id = config.bos_token_id = 0
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return with_tokenizer(folder, config.vocab_size)


def with_tokenizer(folder: Path, words: int) -> Path:
    """Give a model the example's tokenizer, its ids spread over the vocabulary as those of a larger one would be.

    Of an embedding that stays in its file only the pages with words that occur are ever in memory.
    """
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BASE / name, folder / name)
    tokenizer = json.loads((BASE / "tokenizer.json").read_text())
    apart = words // len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {piece: n * apart for piece, n in tokenizer["model"]["vocab"].items()}
    for added in tokenizer["added_tokens"]:
        added["id"] *= apart
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def record(name: str, result: dict[str, Any]) -> None:
    """Write bench/results/<name>.json and say so."""
    path = ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": AT_START, **result}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
