"""What do answers in the right form, a smaller cache and guesses do to a real model on the device?

    make bench-answers [rows=1000]     answers: which are right, what text costs; one thread, beside other work
    make bench-answers timed=1         seconds and memory of a few rows, on a quiet machine, minutes

The merged models of bench/smollm2.py (build/smollm2/TASK), each as bundles of the same weights: answers free, held to a
regular expression of the labels, and chosen among labels; keys and values in the runtime's 32 bits, in 8 and in 4, of
which edgeft offers no 4. Differences are paired with free answers and 32 bits. Guesses are tried where answers copy: a
description is to be written again, by the base model. A row is kept as soon as it is answered, so that an interrupted
bench goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run import ROOT, Kept, record
from smollm2 import FOLDER, TASKS, base_model, chats, in_points

from edgeft.data.dataset import Sample, TextTokenizer, read_samples
from edgeft.data.grammar import HeldTo
from edgeft.data.labels import Label
from edgeft.engine.label_scores import label_numbers
from edgeft.errors import BadInput
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.artifact_answers import answered
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import MANIFEST, Bundle
from edgeft.exporting.kv_scales import find_scales, rows_for_scales
from edgeft.exporting.outputs import Observer
from edgeft.exporting.row_logits import trained_at
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.intervals import paired_losses
from edgeft.models.spec import read_model_spec
from edgeft.planning.answers import read_held
from edgeft.planning.plan import Plan
from edgeft.planning.rows_read import read_data
from edgeft.targets import ort
from edgeft.targets.footprint import bundle_weights, kv_cache_bytes, predict, with_kv_bits
from edgeft.targets.kv_cache import CODES, CacheScales
from edgeft.targets.target import load_target

TARGETS = ("ort-int8", "ort-int4")
TUNING_ROWS, COPIED_ROWS, COPIED_CHARACTERS = 128, 60, 400
TIMED_ROWS, ROUNDS = 12, 2
FOUR_BIT_CODES = 7  # on either side of 0
COPYING = "Write this text again, word for word:\n\n{}"


class Way(NamedTuple):
    """One bundle: what its answers are held to, bits of its keys and values."""

    answers: str
    kv_bits: int

    @property
    def name(self) -> str:
        return f"{self.answers}, {self.kv_bits} bits"


SERVED = Path(__file__).with_name("answer_rows.py")
FIRST = Way("free", 32)  # what the others are compared with
WAYS = (FIRST, Way("held", 32), Way("labels", 32), Way("free", 8), Way("free", 4))


class Task(NamedTuple):
    """A merged model, the rows it answers, and what its answers may be held to."""

    name: str
    merged: Path
    plan: Plan
    tokenizer: TextTokenizer
    rows: list[Sample]
    tuning: list[Sample]
    labels: tuple[Label, ...]
    held: dict[str, HeldTo]
    refused: dict[str, str]  # forms of answers that this task cannot have, and why


def read_task(name: str, folder: Path, rows: int, work: Path, *, plain: bool) -> Task:
    """The task of a folder with merged/; the rows are chats unless it was trained on plain ones."""
    plan = MergedCheckpoint.read(folder / "merged" / "merged.json").train.plan
    tokenizer = TextTokenizer(folder / "merged")

    def samples(part: str, count: int) -> list[Sample]:
        source = ROOT / "examples" / f"debian-{name}" / f"{part}.jsonl"
        source = source if plain else chats(name, part, count, work / f"{name}-{part}.jsonl")
        found = read_samples(str(source), tokenizer, plan.training.max_length, count)
        return [each for each in found if each.trained_tokens]

    held, refused, labels = {"free": ()}, dict[str, str](), tuple[Label, ...]()
    job = plan.job.model_copy(update={"answers": "labels"})
    try:
        read = read_data(job, folder / "merged")
        labels = read_held(job, read.files if read else {}, tokenizer).labels
        held["labels"] = labels
        texts = sorted({re.escape(tokenizer.spell(list(each.ids[:-1]))) for each in labels})
        job = job.model_copy(update={"answers": "regex:(" + "|".join(texts) + ")"})
        held["held"] = read_held(job, read.files if read else {}, tokenizer).grammar or ()
    except BadInput as problem:
        refused |= {form: problem.problem for form in ("held", "labels") if form not in held}
    tuning = samples("train", TUNING_ROWS)
    return Task(name, folder / "merged", plan, tokenizer, samples("test", rows), tuning, labels, held, refused)


@contextlib.contextmanager
def four_bits() -> Iterator[None]:
    """Meanwhile the runtime's builder makes a cache of 4 bits where edgeft asks for one of 8."""
    run_builder = ort._run_builder

    def run(merged: Path, folder: Path, options: dict[str, Any]) -> int:
        options["attention"]["kv_cache"]["scheme"] = "int4_per_channel"
        return run_builder(merged, folder, options)

    ort._run_builder = run
    try:
        yield
    finally:
        ort._run_builder = run_builder


def bundle_of(model: Path, target_name: str, way: Way, tuning: Sequence[Sample], held: HeldTo, out: Path) -> Path:
    """A bundle of the model, built unless it is there, without a proof."""
    if (out / MANIFEST).is_file():
        return out
    spec, target, given = read_model_spec(str(model)), load_target(target_name), dict[str, Any]()
    if way.kv_bits < 32:
        target = with_kv_bits(target, spec, 8)
        found = find_scales(model, target, rows_for_scales(tuning, spec))
        if way.kv_bits == 4:
            found = CacheScales(*([each * (CODES / FOUR_BIT_CODES) for each in side] for side in found))
        given["scales"] = lambda codes: found
    with four_bits() if way.kv_bits == 4 else contextlib.nullcontext():
        build_bundle(model, target, out, prompts=[], measure=False, held_to=held, **given)
    return out


def answer_row(task: Task, way: Way, artifact: ArtifactModel, number: int) -> dict[str, Any]:
    """What a bundle says of one row: its loss, its answer, whether that is right and whether it is a label at all."""
    row = task.rows[number]
    held, seen = task.held[way.answers], Observer([row], 0)
    asked = label_numbers(task.labels, [row], task.tokenizer) if way.answers == "labels" else []
    answer, right = answered(
        artifact, row, trained_at(row), task.tokenizer, held, asked, seen.taker(0), whole=True,
    )  # fmt: skip
    known = {task.tokenizer.spell(list(each.ids[:-1])) for each in task.labels}  # which other tokens may spell
    said = task.tokenizer.spell(answer)
    return {"loss": seen.losses[0], "tokens": seen.tokens[0], "exact": right, "label": said in known}


def answers_of(task: Task, target: str, way: Way, work: Path) -> dict[int, dict[str, Any]]:
    """Every row of a form, those that were answered before not again."""
    kept = Kept(f"answers-{task.name}-{target}-{way.answers}-{way.kv_bits}-{len(task.rows)}")
    missing = [number for number in range(len(task.rows)) if str(number) not in kept.rows]
    if missing:
        out = work / f"{task.name}-{target}-{way.answers}-{way.kv_bits}"
        artifact = ArtifactModel(bundle_of(task.merged, target, way, task.tuning, task.held[way.answers], out))
        started = time.process_time()
        for done, number in enumerate(missing, start=1):
            kept.add({"run": str(number), **answer_row(task, way, artifact, number)})
            if done % 50 == 0 or done == len(missing):
                each = (time.process_time() - started) / done
                print(f"{task.name} {target} {way.name}: {done} of {len(missing)} rows, {each:.2f} core-s each",
                      file=sys.stderr, flush=True)  # fmt: skip
    return {int(number): row for number, row in kept.rows.items()}


def compared(rows: dict[int, dict[str, Any]], first: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A form's scores on the rows, and its differences to the first form's."""
    numbers = sorted(rows)
    mine, other = ([each[i] for i in numbers] for each in (rows, first))
    tokens = [each["tokens"] for each in mine]
    return {
        "rows": len(numbers), "exact_match": statistics.fmean(each["exact"] for each in mine),
        "labels_at_all": statistics.fmean(each["label"] for each in mine),
        "loss": math.fsum(each["loss"] for each in mine) / sum(tokens),
        "points_to_free": in_points([each["exact"] for each in other], [each["exact"] for each in mine]),
        "loss_to_free": paired_losses([each["loss"] for each in other], [each["loss"] for each in mine],
                                      tokens)._asdict(),
    }  # fmt: skip


def sizes(task: Task, target_name: str, way: Way, out: Path) -> dict[str, Any]:
    """What a bundle weighs, and what is predicted of a process that holds its longest row."""
    spec, target = read_model_spec(str(task.merged)), load_target(target_name)
    target = with_kv_bits(target, spec, 8) if way.kv_bits < 32 else target
    tokens = max(len(row.ids) for row in task.rows)
    here = predict(spec, target, bundle_weights(spec, target), tokens).memory_bytes
    here -= kv_cache_bytes(spec, target, tokens) // 2 if way.kv_bits == 4 else 0
    return {"bundle_bytes": Bundle.read(out / MANIFEST).size_bytes, "predicted_bytes": here, "longest_row": tokens}


def bench_task(task: Task, targets: Sequence[str], work: Path) -> dict[str, Any]:
    """Every form of one task."""
    found: dict[str, Any] = {"refused": task.refused, "labels": len(task.labels)}
    for target in targets:
        first = answers_of(task, target, FIRST, work)
        forms = found.setdefault(target, {})
        for way in (each for each in WAYS if each.answers in task.held):
            rows = first if way == FIRST else answers_of(task, target, way, work)
            out = work / f"{task.name}-{target}-{way.answers}-{way.kv_bits}"
            forms[way.name] = compared(rows, first) | sizes(task, target, way, out)
            print(line(task.name, target, way.name, forms[way.name]), flush=True)
    return found


def line(task: str, target: str, way: str, form: dict[str, Any]) -> str:
    moved, loss = form["points_to_free"], form["loss_to_free"]
    return (
        f"{task} {target:9} {way:15} exact {100 * form['exact_match']:5.1f}%  labels {100 * form['labels_at_all']:5.1f}"
        f"%  to free {moved['difference']:+5.1f} [{moved['low']:+.1f}, {moved['high']:+.1f}]  loss {form['loss']:.4f} "
        f"({loss['difference']:+.4f} [{loss['low']:+.4f}, {loss['high']:+.4f}])"
    )


def copying(folder: Path, target: str, work: Path) -> tuple[Path, list[list[int]]]:
    """(a bundle of the base, prompts that ask to write a description again)."""
    tokenizer = TextTokenizer(folder)
    with open(ROOT / "examples" / "debian-descriptions" / "valid.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(text)["text"][:COPIED_CHARACTERS] for text in lines][:COPIED_ROWS]
    asked = [[{"role": "user", "content": COPYING.format(text)}] for text in texts]
    out = bundle_of(folder, target, FIRST, (), (), work / f"copying-{target}")
    prompts = [tokenizer.encode([tokenizer.render(each, True)])[0] for each in asked] if tokenizer.template_text else [
        tokenizer.encode([COPYING.format(text)])[0] for text in texts
    ]  # fmt: skip
    return out, prompts


def bench_guesses(folder: Path, target: str, work: Path, rows: int) -> dict[str, Any]:
    """What guesses save where answers copy: passes and answers that stay the same, row by row."""
    from edgeft.exporting.guesses import passes_of

    out, prompts = copying(folder, target, work)
    prompts, kept = prompts[:rows], Kept(f"answers-copying-{target}-{folder.resolve().parent.name}")
    artifact = ArtifactModel(out)
    for number, ids in enumerate(prompts):
        if str(number) in kept.rows:
            continue
        made = {guess: artifact.answer(ids, 160, guess=guess) for guess in (False, True)}
        passes = passes_of([(ids, made[True])])
        kept.add({"run": str(number), "same": made[True] == made[False], **passes._asdict(), "worth": passes.worth})
    mine = [kept.rows[str(number)] for number in range(len(prompts))]
    passes, tokens = (sum(each[name] for each in mine) for name in ("passes", "tokens"))
    same = statistics.fmean(each["same"] for each in mine)
    worth = statistics.median(each["worth"] for each in mine)
    return {"rows": len(mine), "tokens": tokens, "passes": passes, "same_answers": same, "worth_by_passes": worth}


# Speed: by the clock, each form in a process of its own


def timed(forms: dict[str, tuple[Path, Path, bool]]) -> dict[str, dict[str, Any]]:
    """Rows and tokens a second and peak memory of each form (bundle, prompts, whether it guesses), in turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, (bundle, rows, guess) in forms.items():
            command = [sys.executable, str(SERVED), str(bundle), str(rows), "01"[guess]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout))
    return {
        name: {
            "rows_per_second": max(each["rows"] / each["seconds"] for each in found),
            "tokens_per_second": max(each["tokens"] / each["seconds"] for each in found),
            "peak_bytes": max(each["peak_bytes"] for each in found),
        }
        for name, found in runs.items()
    }


def speeds(tasks: Sequence[Task], targets: Sequence[str], base: Path, work: Path) -> dict[str, Any]:
    """Every form's speed, and that of guesses. Refuses beside other work."""
    from decode import MOST_BY_OTHERS, work_of_others

    forms: dict[str, tuple[Path, Path, bool]] = {}
    for task in tasks:
        asked = work / f"{task.name}-asked.json"
        asked.write_text(
            json.dumps([(row.prompt, len(row.ids) - row.prompt_tokens + 8) for row in task.rows[:TIMED_ROWS]])
        )
        for target in targets:
            for way in (each for each in WAYS if each.answers in task.held):
                out = work / f"{task.name}-{target}-{way.answers}-{way.kv_bits}"
                bundle_of(task.merged, target, way, task.tuning, task.held[way.answers], out)
                forms[f"{task.name} {target} {way.name}"] = out, asked, False
    for target in targets:
        out, prompts = copying(base, target, work)
        asked = work / "copying-asked.json"
        asked.write_text(json.dumps([(ids, 96) for ids in prompts[:5]]))
        forms |= {f"copying {target} guesses {word}": (out, asked, word == "on") for word in ("off", "on")}
    if (others := work_of_others()) > MOST_BY_OTHERS:
        raise SystemExit(f"other work takes {others:.2f} of a core: wait until it takes less than {MOST_BY_OTHERS}")
    return timed(forms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--task", choices=TASKS, action="append", help="one of the tasks; both when absent")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument(
        "--folder", type=Path, help="a folder with merged/ of one --task; build/smollm2/TASK when absent"
    )
    parser.add_argument("--base", type=Path, help="the model that copies; the package's when absent")
    parser.add_argument(
        "--plain", action="store_true", help="the model was trained on prompts and completions, no chats"
    )
    parser.add_argument("--time", action="store_true", help="measure seconds and memory instead, on a quiet machine")
    parser.add_argument("--print", action="store_true", help="record nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = ROOT / "build" / "answers" / (given.folder.resolve().name if given.folder else "smollm2")
    work.mkdir(parents=True, exist_ok=True)
    names, targets = given.task or list(TASKS), given.targets.split(",")
    base = given.base or base_model(FOLDER)
    tasks = [
        read_task(name, given.folder or FOLDER / name, given.rows, work, plain=given.plain) for name in names
    ]  # fmt: skip
    path = ROOT / "bench" / "results" / "answers.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    if given.time:
        found = {"speed": result.get("speed", {}) | speeds(tasks, targets, base, work)}
        print(json.dumps(found, indent=1))
    else:
        made = {task.name: bench_task(task, targets, work) for task in tasks}
        guesses = {target: bench_guesses(base, target, work, min(COPIED_ROWS, given.rows)) for target in targets}
        before = result.get("tasks", {})  # of other targets too
        made = before | {name: before.get(name, {}) | each for name, each in made.items()}
        found = {"tasks": made, "guesses": result.get("guesses", {}) | guesses}
        print(json.dumps(guesses, indent=1))
    if not given.print:
        record("answers", {name: each for name, each in result.items() if name != "environment"} | found)


if __name__ == "__main__":
    main()
