"""How does a number or a cell of a report read? The same words on the page and in Markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgeft.data.samples import held_out_count
from edgeft.memory.export_time import described, plans_repair, total_seconds
from edgeft.models.metrics import Attempt, Difference, Rung
from edgeft.planning.plan import Plan
from edgeft.planning.stage_checks import Stages
from edgeft.reporting.curve import last_fall
from edgeft.reporting.matrix import DeviceCell, Grade, Matrix, TrainingCell
from edgeft.settings.job import AUTO
from edgeft.settings.tuners import TUNERS
from edgeft.units import GIB, show_bytes, show_seconds

if TYPE_CHECKING:
    from edgeft.training.result import Rehearsal, TrainResult

SYMBOLS: dict[Grade, str] = {"full": "\u25cf", "4-bit": "\u25d0", "reduced": "\u25d4", "none": "\u25cb"}
SHORTENED = "\u25be"  # of a device: memory cuts the context
# behind a cell: a later stage wants another machine; the high estimate; training takes days
ELSEWHERE, MAY_EXCEED, DAYS = "\u2020", "\u2021", "\u00a7"
LONG_SECONDS = 24 * 3600.0  # of training, beyond which a verdict says that it takes days
MARKS: dict[Grade, str] = {
    "full": "16 or 32 bit, all layers",
    "4-bit": "over a 4-bit base, all layers: about half a point of quality lower",
    "reduced": "layers or rank given up: some points of quality lower",
    "none": "does not fit: what it would need",
}  # fmt: skip
DEVICE_MARKS = {
    SYMBOLS["full"]: "with the full context of the target or the model", SHORTENED: "memory cuts the context",
    SYMBOLS["none"]: "does not run",
}  # fmt: skip
BEHIND = {
    ELSEWHERE: "a later stage needs another machine",
    MAY_EXCEED: "may need more than the device has: its high estimate is above the limit",
    DAYS: "training on the rows that are assumed takes more than a day",
}  # fmt: skip
PAGES_MARK = "*"
STILL_FALLING, NEARLY_ALL = 0.2, 0.95  # shares: of the loss, and of answers beyond which more steps bring little
GIVEN_BACK = "above the limit by pages of weight files alone, which the system takes back when it needs them"


def symbol(cell: TrainingCell | DeviceCell) -> str:
    """The mark of a cell, which says without colour what the colour says."""
    if isinstance(cell, TrainingCell):
        return SYMBOLS[cell.grade]
    if cell.fits and cell.limited_by == "device memory":
        return SHORTENED
    return SYMBOLS["full" if cell.fits else "none"]


def behind(cell: TrainingCell | DeviceCell) -> str:
    """The mark behind a cell that fits but not in all; nothing for any other."""
    if isinstance(cell, TrainingCell):
        return (ELSEWHERE if cell.elsewhere else "") + (DAYS if (cell.seconds or 0) > LONG_SECONDS else "")
    return MAY_EXCEED if cell.tight else ""


def bundles_of(matrix: Matrix) -> str:
    """Which bundles a matrix is about: of one target, or of what the export is expected to choose for each model."""
    if matrix.target != AUTO:
        return f"Bundles are of the target {matrix.target}."
    found = sorted({cell.target for model in matrix.models for cell in model.devices if cell.target})
    expected = f", which is expected to be {' or '.join(found)}" if found else ""
    return f"Bundles are of the smallest target that keeps the fine-tune (auto){expected}; the export decides."


def cell_text(cell: TrainingCell | DeviceCell) -> str:
    """A cell in one line: `NF4 LoRA r64, all 32 layers, 9.6 of 14.0 GiB; uses 11.8 GiB, 35 min/Mtok`, or why not."""
    memory = "" if cell.need_bytes is None else of_gib(cell.need_bytes, cell.budget_bytes)
    if isinstance(cell, TrainingCell):
        if cell.fits:
            rest = f"; {show_days(cell.seconds)} of training" if (cell.seconds or 0) > LONG_SECONDS else ""
            rest += f"; {' and '.join(cell.elsewhere)} elsewhere" if cell.elsewhere else ""
            uses = f"uses {show_bytes(cell.uses_bytes or 0)}, {show_pace(cell.seconds_per_million_tokens)}"
            return f"{cell.method}, {memory}; {uses}{rest}"
        shorter = f"; samples of {cell.fits_at_tokens:,} tokens fit" if cell.fits_at_tokens else ""
        return f"{cell.problem}: needs {memory}{shorter}" if memory else cell.problem
    if cell.fits:
        bound = f", at most {show_rate(cell.tokens_per_second_bound)} tok/s" if cell.tokens_per_second_bound else ""
        cache = f" (KV cache of {cell.kv_bits} bits)" if cell.kv_bits else ""
        most = f", {show_bytes(cell.high_bytes or 0)} by the high estimate" if cell.tight else ""
        return f"context {cell.context_tokens:,}{cache}, {memory}{most}{bound}"
    return f"{cell.problem}: needs {memory}" if memory else cell.problem


def of_gib(need: int, budget: int) -> str:
    """`11.8 of 14.0 GiB`: rounded so that what fits never reads as more than the budget, nor the other way."""

    def digits(value: float) -> int:
        return 2 if value < 10 else 1

    places, limit_places = digits(need / GIB), digits(budget / GIB)
    limit = round(budget / GIB, limit_places)
    shown = round(need / GIB, places)
    shown = min(shown, limit) if need <= budget else max(shown, limit + 10**-places)
    return f"{shown:.{places}f} of {limit:.{limit_places}f} GiB"


def show_rate(value: float) -> str:
    """Three digits: `3.31`, `46.1`, `1,008`."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def show_pace(seconds: float | None) -> str:
    """`35 min/Mtok`: time for a million tokens, two digits."""
    if seconds is None:
        return "time unknown"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 0.995 * size:
            value = float(f"{seconds / size:.2g}")
            return f"{value:,.{1 if value < 10 else 0}f} {unit}/Mtok"
    return f"{seconds:.0f} s/Mtok"


def show_days(seconds: float | None) -> str:
    """`4.8 days`: what takes more than one."""
    return f"{(seconds or 0) / 86400:,.1f} days"


def grouped(text: str) -> str:
    """Long numbers in a formula with their thousands apart: `8,030,261,248 in nf4`."""
    return re.sub(r"(?<![\d.])\d{5,}(?![\d.])", lambda match: f"{int(match[0]):,}", text)


def signed(value: float) -> str:
    """`+1.5`, `-0.1`, `0`."""
    return "0" if abs(value) < 0.05 else f"{value:+.1f}"


def amount(value: float, unit: str) -> str:
    """A compared number in its unit."""
    if unit == "bytes":
        return show_bytes(value)
    return show_seconds(value) if unit == "seconds" else f"{value:,.0f} {unit}"


def verdict(plan: Plan) -> str:
    """Whether a plan fits its machine, all stages of it, in a few words; where nothing fits there is no plan."""
    return "; ".join(filter(None, [_fits(plan), takes_days(plan)]))


def takes_days(plan: Plan) -> str:
    """`training takes 4.8 days`, where it is more than one; else nothing."""
    if plan.seconds <= LONG_SECONDS:
        return ""
    return f"training takes {show_days(plan.seconds)}{'' if plan.lengths else ' for the rows that are assumed'}"


def _fits(plan: Plan) -> str:
    elsewhere = plan.stages.too_large()
    if plan.stages.cannot_build:
        return f"fits, but {plan.stages.target.name} cannot be built: {plan.stages.cannot_build}"
    if not elsewhere:
        tight = plan.stages.tight_on_device()
        return f"fits, tightly on the device: {tight} at most" if tight else "fits"
    stages = list(dict.fromkeys(name.partition(":")[0] for name in elsewhere))
    most, host = max(elsewhere.values()), plan.stages.host_bytes or 0
    return f"fits, but {' and '.join(stages)} elsewhere: {show_bytes(most)} of main memory, here {show_bytes(host)}"


def memory_line(plan: Plan) -> str:
    """What training needs at least at this quality, and what the chosen way uses of the budget."""
    uses = f"{show_bytes(plan.peak_bytes)} of {show_bytes(plan.budget_bytes)}"
    if plan.need_bytes >= plan.peak_bytes:
        return f"needs {uses}; nothing smaller is as good"
    slower = plan.need_seconds_per_step / plan.seconds_per_step - 1
    return f"needs {show_bytes(plan.need_bytes)} at this quality ({slower:+.0%} time), uses {uses}"


def savings_head(plan: Plan) -> str:
    """What the choices that save memory did: whether without one of them the plan would not fit."""
    needed = plan.peak_bytes + max(saving.bytes for saving in plan.savings) > plan.budget_bytes
    return f"what makes it {'fit' if needed else 'smaller'}, each by itself:"


def step_time(plan: Plan) -> str:
    """The estimate of a plan's seconds, and what decides it where that is not the GPU itself."""
    bound = f"; {plan.launches:,} launches bind, not the GPU" if plan.launches else ""
    rows = "" if plan.lengths else " for the rows that are assumed"
    whole = f"{show_seconds(plan.seconds)} in all (estimate{rows}{bound})"
    return f"about {show_seconds(plan.seconds_per_step)} a step, {whole}"


def data_text(plan: Plan) -> str:
    """What of the training data trains, and how many of its rows are held out."""
    if plan.lengths is None:
        return ""
    held = held_out_count(plan.lengths.rows) if plan.job.valid is None else 0
    return plan.lengths.line + (
        f"; {held:,} of the rows are held out, {plan.lengths.rows - held:,} train" if held else ""
    )


def method_text(plan: Plan) -> str:
    """How a plan trains: the tuner, the layers, what the base is held and computed in."""
    training = plan.training
    layers = f"{len(training.trained_layers)} of {plan.spec.num_hidden_layers} layers"
    if training.layers == "lisa":
        layers = f"{training.active_layers} of {len(training.trained_layers)} layers at a time"
        layers += f" (LISA, {training.lisa_schedule}, drawn every {training.lisa_interval} steps)"
    row = TUNERS[training.tuner]
    how = row.method.format(rank=training.rank, tokens=training.prefix_tokens, layers=layers)
    if row.placed and len(training.target_modules) < len(plan.spec.linears):
        how += f", {', '.join(training.target_modules)} alone"
    if training.lora_alpha and (plan.job.lora_alpha is not None or plan.job.lora_scale != "rslora"):
        how += f", alpha {training.lora_alpha:g} as a scale of {training.adapter_scale:.3g}"
        if training.lora_scale == "rslora" and training.rank:
            how += f" (elsewhere {training.lora_alpha / training.rank:.3g}: --set lora_scale=plain)"
    rounded = f", weights rounded as {training.quantize_aware.name}" if training.quantize_aware else ""
    return f"{how}, base in {training.base_precision}, computed in {training.compute_dtype}{rounded}"


def percent(share: float | None) -> str:
    """A share of 1 as it is shown; - where there is none."""
    return "-" if share is None else f"{100 * share:.1f}%"


def rung_cells(rung: Rung) -> tuple[str, ...]:
    """(top-1 agreement, the same or a tie, mean KL, loss, loss before) as shown; - where a rung has none."""
    kl = "-" if rung.mean_kl_nats is None else f"{max(0.0, rung.mean_kl_nats):.1e}"
    losses = ("-" if loss is None else f"{loss:.4f}" for loss in (rung.loss, rung.loss_before))
    return (percent(rung.top1_agreement), percent(rung.top1_or_tie), kl, *losses)


def difference_text(found: Difference | None, scale: float = 1.0, digits: int = 4, unit: str = "") -> str:
    """+0.0123 (+0.0100 to +0.0146) nats, and that no difference is shown where the interval covers zero."""
    if found is None:
        return "-"
    middle, low, high = (f"{scale * value:+.{digits}f}" for value in (found.difference, found.low, found.high))
    amount = f"{middle} ({low} to {high})" + (f" {unit}" if unit else "")
    return amount + ("" if found.shown else ": no difference shown")


def attempt_cells(found: Attempt) -> tuple[str, str, str, str, str]:
    """(artifact, bundle's size, loss, exact match in points, what was decided) of one that was considered."""
    decided = found.reason if found.decision == "passes" else f"{found.decision}: {found.reason}"
    size, match = show_bytes(found.predicted_bytes), difference_text(found.exact_match, 100, 1)
    cache = f", KV cache of {found.kv_bits} bits" if found.kv_bits else ""
    return found.name + cache, size, difference_text(found.loss), match, decided


def kept_step(result: TrainResult) -> list[str]:
    """A line on the step that was kept, where steps were validated."""
    if not result.best_step:
        return []
    steps, loss = result.plan.training.steps, dict(result.validations)[result.best_step]
    ended = f", the run ended at step {result.steps} of {steps}" if result.steps < steps else ""
    return [f"kept: step {result.best_step}, loss {loss:.4f} of rows that are not scored{ended}"]


def remarks(result: TrainResult) -> list[str]:
    """What is to be known of a run besides its numbers: a line each."""
    earlier = f"the base's scores are an earlier run's, on the same rows, and were checked: {result.base_kept}"
    return [*([earlier] if result.base_kept else []), *kept_step(result), *still_falling(result)]


def still_falling(result: TrainResult) -> list[str]:
    """A line where more steps promise more: the loss fell to the end, and answers are not all right yet.

    Of nine runs at hand the one whose answers were all right fell by 2%, one of 70% whose rows contradict each other by
    10%, and the others, of 25% to 87%, by 27% to 36%.
    """
    exact, job = result.valid.exact_match, result.plan.job
    fall = last_fall(result.loss_curve)
    if fall < STILL_FALLING or (exact is not None and exact > NEARLY_ALL) or result.best_step:
        return []
    steps = result.plan.training.steps
    more = f"max_steps={2 * steps}" if steps == job.max_steps else f"epochs={2 * job.epochs:g}"
    return [
        f"the loss fell to the end, by {fall:.0%} from the middle third of the steps to the last: more may bring more "
        f"(--set {more})"
    ]


def export_text(stages: Stages) -> str:
    """What building and proving a bundle takes, in one line."""
    proof = total_seconds([each for each in stages.export if each.stage.startswith("parity")])
    every = show_seconds(total_seconds(stages.export))
    more = f"; more where {stages.target.name} fails and another is tried" if plans_repair(stages.export) else ""
    parts = f"its proof {show_seconds(proof)}: {described(stages.export)}"
    return f"about {every} where all rows are read, {parts} (estimate{more})"


def rehearsal_text(stages: Stages) -> str:
    """What letting a few layers go the whole way takes, in one line."""
    way = f"about {show_seconds(stages.rehearsal_seconds)} (estimate) before the first step"
    return f"{way}, for two layers on the whole way to the bundle; kept for later runs of the same base and data"


def rehearsal_line(rehearsal: Rehearsal) -> str:
    """What came of a rehearsal, or why there was none."""
    if rehearsal.skipped:
        return f"not rehearsed{f' for {rehearsal.target}' if rehearsal.target else ''}: {rehearsal.skipped}"
    way = f"{rehearsal.layers} layers went from merge to {rehearsal.target} and answered"
    when = (
        f"before an earlier run ({rehearsal.earlier})" if rehearsal.earlier else f"in {show_seconds(rehearsal.seconds)}"
    )
    return f"rehearsed: {way}, {when}{', kept from before the run was stopped' if rehearsal.kept else ''}"


def above_high(plan: Plan, stage: str, measured: int | None, predicted: int | None = 0) -> list[str]:
    """A line where a stage took more than its high estimate; `predicted`: what it was given for another target."""
    found = [phase for phase in plan.stages.phases if phase.name.partition(":")[0] == stage]
    most = max([predicted or 0, *(phase.high_bytes for phase in found)])
    if not found or measured is None or measured <= most:
        return []
    return [
        f"WARNING: {stage} took {show_bytes(measured)}, at most {show_bytes(most)} were planned: report this plan.json"
    ]
