"""What does a report say first? The verdict on a plan, or what came of a run, as one card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgeft.documents import Strict
from edgeft.errors import DoesNotFit
from edgeft.planning.alternatives import NOTHING_GIVEN_UP
from edgeft.planning.stage_checks import build_notes
from edgeft.reporting.matrix import DeviceCell, method
from edgeft.reporting.words import percent, show_rate, takes_days
from edgeft.units import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from edgeft.data.task_score import TaskScore
    from edgeft.exporting.bundle import Bundle
    from edgeft.models.metrics import Metrics, Pair
    from edgeft.planning.plan import Plan
    from edgeft.reporting.read_run import Run
    from edgeft.training.result import TrainResult

State = Literal["fits", "elsewhere", "no", "done", "failed"]
MARKS: dict[State, str] = {
    "fits": "\N{CHECK MARK}", "elsewhere": "\N{WARNING SIGN}\N{VARIATION SELECTOR-15}", "no": "\N{BALLOT X}",
    "done": "\N{CHECK MARK}", "failed": "\N{BALLOT X}",
}  # fmt: skip


class Fact(Strict):
    """One number of the card, what it is, and what makes it mean something."""

    name: str
    value: str
    note: str = ""


class Card(Strict):
    """The answer on the first screen. Bytes are of the training device's memory."""

    state: State
    title: str = Field(description="the verdict in capitals, as FITS or DOES NOT FIT")
    said: str = Field(description="what was, can or cannot be fine-tuned, on what and how")
    need_bytes: int | None = Field(default=None, description="least memory at this quality")
    need_note: str = ""
    uses_bytes: int | None = Field(default=None, description="of the chosen way, the fastest; after a run as measured")
    uses_note: str = ""
    limit_bytes: int
    facts: tuple[Fact, ...] = ()
    gave_up: tuple[str, ...] = Field(default=(), description="what the limit took from the best way, in words")
    hints: tuple[str, ...] = Field(default=(), description="what to do about what does not fit")

    @property
    def mark(self) -> str:
        """The state's sign, for those who see no colour."""
        return MARKS[self.state]


def name_of(model: str, parameters: int) -> str:
    """`llama-3.1-8b (8.03B parameters)`."""
    return f"{Path(model).name or model} ({show_count(parameters)} parameters)"


def plan_card(plan: Plan, devices: Sequence[DeviceCell] = ()) -> Card:
    """The verdict on a plan."""
    elsewhere = plan.stages.too_large()
    stages = list(dict.fromkeys(name.partition(":")[0] for name in elsewhere))
    title = f"Fits, {' and '.join(stages)} elsewhere" if stages else "Fits"
    title += ", tightly on the device" if not stages and plan.stages.tight_on_device() else ""
    if plan.stages.cannot_build:
        title = "Fits, export not possible"
    long = takes_days(plan)
    title += ", takes days" if long else ""
    name = name_of(plan.job.model, plan.spec.total_parameters)
    host = show_bytes(plan.stages.host_bytes or 0)
    hints = [f"{stage} needs up to {show_bytes(need)} of main memory, and {plan.profile.name} has {host}: "
             "run it on another machine" for stage, need in _highest(elsewhere).items()]  # fmt: skip
    hints += [note for note in plan.stages.notes() if note.startswith("the bundle may need")]
    hints += build_notes(plan.spec, plan.stages.target, plan.stages.cannot_build)
    hints += (
        [f"{long}: a faster machine, a smaller model, fewer rows or epochs; --max-seconds refuses it"] if long else []
    )
    return Card(
        state="elsewhere" if hints else "fits",
        title=title.upper(),
        said=f"{name} can be fine-tuned on {plan.profile.name}: {method(plan)}.",
        **_memory(plan),
        facts=(_time(plan), *_bundle(plan), *_device(plan, devices)),
        gave_up=given_up(plan),
        hints=tuple(hints),
    )


def _highest(elsewhere: dict[str, int]) -> dict[str, int]:
    """The most that each stage needs, over its parts."""
    found: dict[str, int] = {}
    for name, need in elsewhere.items():
        stage = name.partition(":")[0]
        found[stage] = max(need, found.get(stage, 0))
    return found


def _memory(plan: Plan) -> dict[str, Any]:
    """Of a card: what is needed, used and there."""
    slower = plan.need_seconds_per_step / plan.seconds_per_step - 1 if plan.seconds_per_step else 0.0
    same = plan.need_bytes >= plan.peak_bytes
    return {
        "need_bytes": plan.need_bytes,
        "need_note": "nothing smaller is as good" if same else f"at this quality, {slower:+.0%} time",
        "uses_bytes": plan.peak_bytes,
        "uses_note": "at most, the way that is planned" if same else "at most, the fastest way of this quality",
        "limit_bytes": plan.budget_bytes,
    }


def _time(plan: Plan) -> Fact:
    note = f"training, estimated, {plan.training.steps:,} steps"
    return Fact(name="time", value=show_seconds(plan.seconds), note=note)


def _bundle(plan: Plan) -> tuple[Fact, ...]:
    """The folder for the device, as far as it can be told before it is built."""
    weights = [term.bytes for term in plan.stages.phases[-1].terms if term.name == "weights"]
    if not weights:
        return ()
    note = f"of weights, {plan.stages.target.name}, context {plan.stages.context_tokens:,} tokens"
    return (Fact(name="bundle", value=f"about {show_bytes(weights[0])}", note=note),)


def _device(plan: Plan, devices: Sequence[DeviceCell]) -> tuple[Fact, ...]:
    """How it runs on the device that the job names, or on the smallest that is known to run it."""
    named = [cell for cell in devices if cell.machine == plan.stages.target_name]
    cells = named or [cell for cell in devices if cell.fits]
    if not cells:
        problem = devices[-1].problem if devices else ""
        return (Fact(name="on a device", value="none of those known", note=problem),) if devices else ()
    cell = min(cells, key=lambda cell: cell.budget_bytes)
    on = f"on {cell.machine}" if named else f"for example on {cell.machine}"
    if not cell.fits:
        return (Fact(name=on, value="does not run", note=cell.problem),)
    bound = cell.tokens_per_second_bound
    speed = f"at most {show_rate(bound)} tok/s" if bound else "runs"
    return (Fact(name=on, value=speed, note=f"context {cell.context_tokens:,} tokens"),)


def given_up(plan: Plan) -> tuple[str, ...]:
    """What the limit took from the best way that is known, quality first."""
    lines = [line for line in plan.gave_up if not line.startswith(NOTHING_GIVEN_UP)]
    if not lines:
        return ()
    chosen = next((row for row in plan.frontier if row.high_bytes == plan.peak_bytes), None)
    points = chosen.quality_cost - plan.frontier[0].quality_cost if chosen else 0.0
    said = f"about {points:.1f} points of quality: an order, measured on another task or published"
    return ((said,) if points >= 0.05 else ()) + tuple(lines)


def refusal_card(problem: DoesNotFit, model: str, parameters: int, profile: str, limit_bytes: int) -> Card:
    """The verdict where nothing fits."""
    return Card(
        state="no",
        title="DOES NOT FIT",
        said=f"{name_of(model, parameters)} cannot be fine-tuned on {profile} within {show_bytes(limit_bytes)}.",
        need_bytes=problem.need_bytes,
        need_note="by the smallest way there is",
        limit_bytes=limit_bytes,
        hints=(problem.hint,) if problem.hint else (),
    )


def run_card(run: Run) -> Card:
    """What came of a run: quality first, then whether what ships is what was trained, its size, the time."""
    plan, train, bundle = run.plan, run.train, run.bundle
    assert train is not None
    proven = bundle is not None and bundle.proof is not None
    failed = bundle is not None and (bool(bundle.failed) or _problems(bundle))
    name = name_of(plan.job.model, plan.spec.total_parameters)
    title = "Not what was trained" if failed else "Trained and proven" if proven else "Trained"
    elsewhere = any(deviation.what == "device" for deviation in train.deviations)
    memory = _memory(plan) | {"uses_bytes": train.measured_peak_bytes, "uses_note": "at most, measured"}
    facts = [_quality(train, bundle, plan.task_score), *_equal(bundle, plan.task_score), *_size(run), _took(run)]
    return Card(
        state="failed" if failed else "done",
        title=title.upper(),
        said=f"{name} was fine-tuned on {'another device' if elsewhere else plan.profile.name}: {method(plan)}.",
        **(_memory(plan) if elsewhere else memory),
        facts=tuple(facts),
        gave_up=given_up(plan),
        hints=(bundle.failed,) if bundle is not None and bundle.failed else (),
    )


def _problems(bundle: Bundle) -> bool:
    return bundle.proof is not None and any(rung.problems for rung in bundle.proof.rungs)


def scores_of(train: TrainResult | None, bundle: Bundle | None) -> tuple[dict[str, Metrics], str]:
    """(scores of every form of the model, on which rows): the bundle's proof has all of them, a run the first two."""
    if bundle is not None and bundle.proof is not None:
        return bundle.proof.scores, bundle.proof.scored_on
    if train is None:
        return {}, ""
    if train.base_test is not None and train.test is not None:
        return {"base": train.base_test, "fine-tuned": train.test}, "test"
    return {"base": train.base_valid, "fine-tuned": train.valid}, "validation"


def _quality(train: TrainResult, bundle: Bundle | None, score: TaskScore) -> Fact:
    """The score of what ships, or of what was trained, beside the base's: the one that suits the task."""
    scores, rows = scores_of(train, bundle)
    base, last = scores["base"], list(scores.values())[-1]
    on = f"on {last.rows:,} {rows} rows; the base"
    if score == "exact_match" and last.exact_match is not None:
        return Fact(name="exact match", value=percent(last.exact_match), note=f"{on}: {percent(base.exact_match)}")
    words = ""
    if last.f1 is not None and base.f1 is not None:
        words = f"; F1 of words {percent(last.f1)} on {last.f1_rows:,} rows, the base {percent(base.f1)}"
    return Fact(name="loss", value=f"{last.loss:.3f}", note=f"{on}: {base.loss:.3f}; less is better{words}")


def _equal(bundle: Bundle | None, score: TaskScore) -> tuple[Fact, ...]:
    """Whether the bundle answers as what was trained."""
    if bundle is None or bundle.proof is None:
        return ()
    name = f"{bundle.target.name} equals trained"
    failed = bundle.failed or _problems(bundle)
    rounded = [each for each in bundle.proof.pairs if each.before == "merged"]
    note = _rounding(rounded[-1], score) if rounded else ""
    return (Fact(name=name, value="failed" if failed else "passed", note=note),)


def _rounding(found: Pair, score: TaskScore) -> str:
    """What the last step to the device changed of the answers, or of the loss where text is free."""
    exact = score == "exact_match"
    change = found.exact_match if exact else found.loss
    if change is None or not change.shown:
        return "rounding: no difference shown"
    if not exact:
        return f"rounding: loss {change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
    return f"rounding: {100 * change.difference:+.1f} points ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def _size(run: Run) -> tuple[Fact, ...]:
    if run.bundle is None:
        return ()
    note = f"context {run.bundle.context_tokens:,} tokens"
    if run.here is not None:
        note += f", {run.here.measured.decode_tokens_per_second:,.0f} tok/s here"
    return (Fact(name="bundle", value=show_bytes(run.bundle.size_bytes), note=note),)


def _took(run: Run) -> Fact:
    """Measured seconds of all stages that ran."""
    stages = {"training": run.train, "merge": run.merged, "export": run.here}
    seconds = {name: made.seconds for name, made in stages.items() if made is not None}
    parts = [f"{name} {show_seconds(each)}" for name, each in seconds.items()]
    note = ", ".join(parts) if len(parts) > 1 else f"training; {show_seconds(run.plan.seconds)} were estimated"
    return Fact(name="time", value=show_seconds(sum(seconds.values())), note=note)


def headline(card: Card) -> tuple[str, ...]:
    """The card in two sentences, for where there is no picture of it."""
    if card.state in ("done", "failed"):
        facts = "; ".join(f"{fact.name} {fact.value}" + (f" ({fact.note})" if fact.note else "") for fact in card.facts)
        return f"{card.mark} {card.title}. {card.said}", facts[:1].upper() + facts[1:] + "."
    needs = [f"needs {show_bytes(card.need_bytes)}, {card.need_note}"] if card.need_bytes is not None else []
    uses = [f"uses {show_bytes(card.uses_bytes)}, {card.uses_note}"] if card.uses_bytes is not None else []
    memory = "; ".join([*needs, *uses, f"the limit is {show_bytes(card.limit_bytes)}"])
    return f"{card.mark} {card.title}. {card.said}", memory[:1].upper() + memory[1:] + "."
