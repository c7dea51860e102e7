"""How do a plan, a run and a merge read on a screen? Text tables for people; the JSON files are for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeft.data.labels import labels_line
from edgeft.data.task_score import TaskScore
from edgeft.memory.disk import total
from edgeft.memory.simulated import Simulation
from edgeft.memory.stages import over_by_pages
from edgeft.memory.train_step import Phase
from edgeft.models.layer_shares import Shares
from edgeft.models.metrics import Importance, Metrics, Sweep, pair
from edgeft.planning.plan import Plan
from edgeft.planning.stage_checks import Stages
from edgeft.reporting.answers import (
    PROMPT_SHOWN,
    changes_text,
    end_of,
    in_a_line,
    score_cells,
    score_head,
    shown,
)
from edgeft.reporting.curve import curve_lines
from edgeft.reporting.learnt import loss_that_stays, nothing_learnt
from edgeft.reporting.tables import Line, ScreenTable
from edgeft.reporting.words import (
    GIVEN_BACK,
    PAGES_MARK,
    data_text,
    export_text,
    memory_line,
    method_text,
    percent,
    rehearsal_line,
    rehearsal_text,
    remarks,
    savings_head,
    step_time,
    verdict,
)
from edgeft.units import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from edgeft.merging.result import Merged
    from edgeft.merging.survival import Survival
    from edgeft.models.discover import Discovery
    from edgeft.training.result import SampleAnswer, TrainResult, Trial

LEADS: dict[TaskScore, str] = {
    "exact_match": "exact match leads", "f1": "loss leads, with F1 of words", "loss": "loss leads",
}  # fmt: skip
# terms of a step that no tensor of it accounts for
NOT_TENSORS = ("process", "data", "buffers", "pool", "cuBLAS workspace", "reserved")


def plan_text(plan: Plan) -> RenderableType:
    """A plan: what runs, the memory of each phase against the budget, what was given up."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(plan):
        facts.add_row(Text(name, style="bold"), Text(value))
    lines: list[RenderableType] = []
    lines += [Line(simulation_line(plan, plan.simulation), "  ")] if plan.simulation is not None else []
    lines += [Line(f"note: {note}", "  ") for note in plan.notes]
    if plan.savings:
        saved = (f"  - {s.choice} instead of {s.instead_of}: {show_bytes(s.bytes)} less" for s in plan.savings)
        lines += [Text(savings_head(plan), style="bold"), *(Line(each, "    ") for each in saved)]
    if plan.gave_up:
        lines.append(Text("given up to fit the budget:", style="bold"))
        lines += [Line(f"  - {line}", "    ") for line in plan.gave_up]
    return Group(facts, _phases(plan), *lines)


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """What runs on what, a line each: (name, text)."""
    training, spec = plan.training, plan.spec
    rows = [
        ("verdict", verdict(plan)),
        ("memory", memory_line(plan)),
        ("model", f"{plan.job.model}: {spec.architecture}, {show_count(spec.total_parameters)} parameters"),
        ("profile", f"{plan.profile.name}: {plan.profile.description}"),
    ]
    if plan.lengths is not None:
        rows.append(("data", data_text(plan)))
    if plan.labels:
        rows.append(("answers", labels_line(plan.labels)))
    elif plan.grammar is not None:
        rows.append(("answers", plan.grammar.line))
    rows.append(("method", method_text(plan)))
    if plan.importance is not None:
        rows.append(("importance", importance_text(plan.importance)))
    return [
        *rows,
        ("batch", _batch(plan)),
        ("schedule", f"{training.steps} steps, learning rate {training.learning_rate:g}, {training.optimizer}"),
        ("time", step_time(plan)),
        ("scoring", scoring_text(plan)),
        *([("rehearsal", rehearsal_text(plan.stages))] if plan.stages.rehearsal_seconds else []),
        *([("export", export_text(plan.stages))] if plan.stages.export else []),
        ("budget", _budget(plan)),
        ("bundle", _bundle(plan.stages)),
        ("disk", _disk(plan.stages)),
    ]


def _batch(plan: Plan) -> str:
    training = plan.training
    text = f"{training.batch_size} samples a step in micro-batches of {training.micro_batch_size}"
    text += f", up to {training.max_length} tokens"
    text += ", activations recomputed" if training.checkpointing else ""
    lower = plan.spec.num_hidden_layers - training.kept_layers
    return text + (f" in the lower {lower} layers" if training.kept_layers else "")


def _phases(plan: Plan) -> ScreenTable:
    """The memory of each phase, of training and after it."""
    parts_of = "largest parts"
    table = ScreenTable("phase", "where", "expected", "high", "limit", parts_of, prose=[parts_of], below={parts_of: ""})
    given_back = False
    for phase in (*plan.phases, *plan.stages.phases):
        parts = sorted(phase.terms, key=lambda term: -term.bytes)[:3]
        limit = plan.budget_bytes if phase.where == "device" else plan.stages.limit_bytes(phase)
        pages = over_by_pages(phase, limit)
        given_back |= pages
        table.add_row(
            phase.name,
            _memory_of(plan, phase),
            show_bytes(phase.expected_bytes),
            show_bytes(phase.high_bytes) + (PAGES_MARK if pages else ""),
            show_bytes(limit) if limit is not None else "-",
            ", ".join(f"{term.name} {show_bytes(term.bytes)}" for term in parts),
        )
    table.caption = f"{PAGES_MARK} {GIVEN_BACK}" if given_back else ""
    return table


def scoring_text(plan: Plan) -> str:
    """What scoring before and after training takes, in one line."""
    rows = plan.scoring.rows
    if not rows:
        return "not estimated: no data given"
    more = ", without answers that must be generated" if plan.scoring.answers else ""
    written = ""
    if plan.sample_answers:
        written = f"; {show_seconds(plan.answering_seconds)} to write out {plan.sample_answers} of their answers"
    scored = f"about {show_seconds(plan.scoring_seconds)} for {rows} rows before and after training"
    return f"{scored}{more}{written} (estimate); {LEADS[plan.task_score]}"


def simulation_line(plan: Plan, simulation: Simulation) -> str:
    """What a simulated step holds against the closed form's tensors, in one line."""
    train = next(phase for phase in plan.phases if phase.name == "train")
    closed = sum(term.bytes for term in train.terms if term.name not in NOT_TENSORS)
    return (
        f"simulated step: {show_bytes(simulation.live_peak_bytes)} of tensors at most ({simulation.phase}, "
        f"{simulation.moment}); the closed form says {show_bytes(closed)}, "
        f"{100 * (closed / simulation.live_peak_bytes - 1):+.2f}% ({show_seconds(simulation.seconds)})"
    )


def _budget(plan: Plan) -> str:
    """The training device's budget and which limit decided it."""
    reason, whole = plan.profile.budget_reason, plan.profile.budget_bytes
    if plan.budget_bytes < whole:
        said = "each process's" if plan.training.processes > 1 else "as asked for"
        reason = f"{said}; without, {show_bytes(whole)}: {reason}"
    return f"{show_bytes(plan.budget_bytes)}: {reason}"


def _memory_of(plan: Plan, phase: Phase) -> str:
    """Whose memory a phase takes: on a CPU all but the bundle's is this machine's."""
    if phase.where == "target":
        return plan.stages.target_name or "any device"
    return "GPU" if phase.where == "device" and plan.profile.device != "cpu" else "host"


def _bundle(stages: Stages) -> str:
    weights = next(term.bytes for term in stages.phases[-1].terms if term.name == "weights")
    size = f"{stages.target.name}: about {show_bytes(weights)} of weights, context {stages.context_tokens} tokens"
    cache = f", KV cache of {stages.target.kv_bits} bits" if stages.target.kv_bits else ""
    return f"{size} (limited by the {stages.context_limited_by}){cache}"


def _disk(stages: Stages) -> str:
    """Highest bytes beside the plan when the stages run one after the other, and each stage's own."""
    each = ", ".join(f"{disk.stage} {show_bytes(disk.peak_bytes)}" for disk in stages.disk if disk.where == "out")
    cached = "".join(f", and {show_bytes(disk.peak_bytes)} in the cache" for disk in stages.disk if disk.where != "out")
    return f"up to {show_bytes(total(disk for disk in stages.disk if disk.where == 'out'))} ({each}){cached}"


def trial_text(trial: Trial) -> RenderableType:
    """Real steps with random weights against the plan."""
    table = ScreenTable("on " + trial.device, "predicted", "at most", "measured", "error")
    table.add_row("training, peak memory", show_bytes(trial.predicted_bytes), show_bytes(trial.high_bytes),
                  show_bytes(trial.measured_bytes), f"{100 * trial.error:+.1f}%")  # fmt: skip
    seconds = trial.estimated_seconds_per_step / trial.measured_seconds_per_step - 1
    table.add_row("a step of longest samples", f"{show_seconds(trial.estimated_seconds_per_step)} (typical ones)", "-",
                  show_seconds(trial.measured_seconds_per_step), f"{100 * seconds:+.0f}%")  # fmt: skip
    return table


def importance_text(importance: Importance) -> str:
    """How layers were scored, every score (* where the layer was chosen), and what the choice has to beat."""
    scores = (f"{i}{'*' * (i in importance.chosen)} {score:.3g}" for i, score in enumerate(importance.scores))
    seconds = show_seconds(importance.seconds)
    text = f"{importance.method} of {importance.rows} rows, {seconds} on the {importance.device}, "
    text += f"peak {show_bytes(importance.peak_bytes)}: " + ", ".join(scores)
    if importance.chosen:
        same = " (the same)" if set(importance.chosen) == set(importance.top) else ""
        text += f". Chosen {_layers(importance.chosen)}, topmost {_layers(importance.top)}{same}, "
        text += f"random {_layers(importance.random)}"
    return text


def _layers(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))


def layers_text(found: Discovery) -> RenderableType:
    """A model's units, a row for each kind of layer of a stack."""
    size = f"{show_count(found.total_parameters)} parameters, {show_bytes(found.total_bytes)} in {found.dtype}"
    table = ScreenTable("unit", "module", "parameters", "bytes", left=["module"])
    for stack in found.stacks:
        numbers: dict[tuple[str, int, int], list[str]] = {}
        for group in stack.groups:
            several = f"{group.first}-{group.last}" if group.last > group.first else f"{group.first}"
            numbers.setdefault((group.module, group.parameters, group.bytes), []).append(several)
        for (module, parameters, layer_bytes), ranges in numbers.items():
            is_one = ranges[0].isdigit() and len(ranges) == 1
            word, each = ("layer", "") if is_one else ("layers", " each")
            table.add_row(
                f"{stack.name} {word} {', '.join(ranges)}".lstrip(),
                f"{stack.path}: {module}",
                show_count(parameters) + each,
                show_bytes(layer_bytes) + each,
            )
    units = {unit.name: unit for unit in found.units}
    for name in ("embedding", "norm", "other", "head"):
        unit = units.get(name)
        lines = list(unit.modules) if unit is not None else []
        if name == "head" and found.tied_head:
            lines.append("weight tied to the embedding")
        if lines:
            counts = ("", "") if unit is None else (show_count(unit.parameters), show_bytes(unit.bytes))
            table.add_row(name, "\n".join(lines), *counts)
    return Group(Text(f"{found.model}: {found.architecture}, {size}"), table)


def metrics_cells(metrics: Metrics) -> tuple[str, str, str]:
    """(loss, perplexity, exact match) as shown."""
    exact = percent(metrics.exact_match)
    return f"{metrics.loss:.4f}", f"{metrics.perplexity:.2f}", exact


def train_text(result: TrainResult) -> RenderableType:
    """A training run: scores before and after, memory predicted and measured."""
    found = [each for each in (result.base_valid, result.valid, result.base_test, result.test) if each is not None]
    head = score_head(found)
    table = ScreenTable("scored on", "rows", *head)
    rounded = f", as {result.scored_as}" if result.scored_as else ""
    for name, metrics in (
        ("validation, base", result.base_valid),
        (f"validation, fine-tuned{rounded}", result.valid),
        ("test, base", result.base_test),
        (f"test, fine-tuned{rounded}", result.test),
    ):
        if metrics is not None:
            table.add_row(name, str(metrics.rows), *score_cells(metrics, head))
    changes = [
        Text(f"{name}, base to fine-tuned: {changes_text(change)}")
        for name, base, tuned in (
            ("validation", result.base_valid, result.valid), ("test", result.base_test, result.test)
        )
        if base is not None and tuned is not None and (change := pair("base", base, "fine-tuned", tuned)) is not None
    ]  # fmt: skip
    speed = f"{result.steps} steps in {show_seconds(result.seconds)}, {result.tokens_per_second:,.0f} tokens/s"
    predicted, measured = (show_bytes(each) for each in (predicted_expected(result), result.measured_peak_bytes))
    plot = [Text(line) for line in curve_lines(result.loss_curve, result.validations)]
    speed = f"{show_count(result.trained_parameters)} parameters trained, {speed}"
    lines = [*plot, *changes, Text(speed), Text(f"peak memory: predicted {predicted}, measured {measured}")]
    lines += [Text(continued(result))] if result.resumed_at else []
    if result.prefix_cache:
        how = f"made in {show_seconds(result.prefix_seconds)}" if result.prefix_seconds else "found"
        below = result.plan.training.cached_layers - 1
        lines.append(Text(f"outputs of layers 0 to {below}: {how}, kept in {result.prefix_cache}"))
    if result.plan.labels:
        lines.append(Text(f"exact match: the most probable of {len(result.plan.labels)} labels is the right one"))
    elif result.plan.grammar is not None:
        lines.append(Text(f"exact match: of answers {result.plan.grammar.line}"))
    lines += map(Text, [*remarks(result), *loss_that_stays(result)])
    if result.cut_rows:
        lines.append(Text(f"{result.cut_rows} rows were cut to {result.plan.training.max_length} tokens"))
    if result.skipped_steps:
        lines.append(Text(f"{result.skipped_steps} updates overflowed in fp16 and were made again at a smaller scale"))
    lines.append(Text(rehearsal_line(result.rehearsal)))
    lines += [Text(f"not as planned: {d.what} {d.done} instead of {d.planned}") for d in result.deviations]
    lines += [Text(line, style="bold") for line in nothing_learnt(result)]
    samples = [samples_table(result.samples)] if result.samples else []
    return Group(table, *samples, *lines)


def continued(result: TrainResult) -> str:
    """At which steps a run went on that had been stopped."""
    steps = ", ".join(f"{step + 1:,}" for step in result.resumed_at)
    return f"was stopped, and continued at step {steps} of {result.plan.training.steps:,}"


def predicted_expected(result: TrainResult) -> int:
    """The highest phase's expected bytes, which the measured peak is compared with."""
    return result.predicted_expected_bytes or max(phase.expected_bytes for phase in result.plan.phases)


def merge_text(merged: Merged) -> RenderableType:
    """A merge in two lines, a third when the head is no longer tied."""
    percent = f"{100 * merged.relative_change:.2f}% of their norm"
    share = f"{merged.changed_tensors} of {merged.tensors} tensors changed by {percent}"
    if merged.beside:
        share = f"{merged.beside} adapters beside {merged.tensors} tensors of the base"
    memory = f"peak memory: predicted {show_bytes(merged.predicted_peak_bytes)}, "
    memory += f"measured {show_bytes(merged.measured_peak_bytes)}"
    lines = [Text(f"wise_alpha {merged.shares}: {share}, stored in {merged.dtype}"), Text(memory)]
    if merged.untied_head:
        lines.append(Text("head and embedding changed apart: they are two tensors now (tie_word_embeddings false)"))
    lines += [Text(f"note: {note}") for note in merged.notes]
    return Group(*lines)


def survival_text(survival: Survival) -> RenderableType:
    """What rounding leaves of a change: per layer, then the tensors that lose most."""
    title = f"what of the change survives in {survival.target}"
    table = ScreenTable("layer", "tensors", "projection", "cosine", "noise", title=title)
    for layer in survival.layers:
        name = "ends" if layer.layer is None else str(layer.layer)
        cells = (f"{layer.projection:.3f}", f"{layer.cosine:.3f}", f"{layer.noise:.2f}")
        table.add_row(name, str(layer.tensors), *cells)
    table.add_row(
        "all", str(sum(x.tensors for x in survival.layers)), f"{survival.projection:.3f}", f"{survival.cosine:.3f}", ""
    )
    by_name = {tensor.name: tensor for tensor in survival.tensors}
    worst = ScreenTable("first to promote to 8 bits", "change in steps", "codes changed", "cosine")
    for name in survival.promote[:8]:
        tensor = by_name[name]
        cells = (f"{tensor.delta_in_steps:.3f}", f"{100 * tensor.codes_changed:.1f}%", f"{tensor.cosine:.3f}")
        worst.add_row(name, *cells)
    return Group(table, worst) if survival.promote else Group(table)


def sweep_text(sweep: Sweep) -> RenderableType:
    """A line per share: task and general text as merged and as rounded, the chosen one marked."""
    title = f"{sweep.task_rows}" + (f", {sweep.general_rows}" if sweep.general_rows else "")
    columns = ("wise_alpha", "task loss", "exact match", "general loss")
    table = ScreenTable(*columns, *(f"{name}, {sweep.target}" for name in columns[1:]), "", title=title)
    for point in sweep.points:
        cells = []
        for task, general in ((point.task, point.general), (point.rounded_task, point.rounded_general)):
            loss, _, exact = metrics_cells(task) if task else ("-", "", "-")
            cells += [loss, exact, f"{general.loss:.4f}" if general else "-"]
        taken = (sweep.wise_alpha, sweep.groups) == (point.wise_alpha, point.groups)
        marks = ["taken"] if taken else []
        on_front = sweep.general_rows and not point.groups and point.wise_alpha in sweep.pareto
        marks += ["Pareto"] if on_front else []
        table.add_row(str(point.shares), *cells, ", ".join(marks))
    shares = Shares(rest=sweep.wise_alpha, groups=sweep.groups)
    return Group(table, Text(f"wise_alpha {shares} ({sweep.select}): {sweep.why}"))


def samples_table(samples: Sequence[SampleAnswer], bundle: Sequence[str] = ()) -> Table:
    """A line a row, no wider than the screen; = where the last form answers what was expected."""
    rows = shown(samples, bundle)
    with_bundle = any(answer for _, answer in rows)
    title = f"answers to {len(rows)} of the scored validation rows"
    title += f", {len(samples)} are in train.json" if len(samples) > len(rows) else ""
    table = Table(box=None, title=title, title_justify="left", pad_edge=False, expand=True)
    table.add_column("", width=1)
    table.add_column("prompt", no_wrap=True, width=PROMPT_SHOWN)
    for name in ("expected", "base", "fine-tuned", *(["bundle"] if with_bundle else [])):
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1)
    for row, answer in rows:
        last = answer if with_bundle else row.tuned
        cells = (end_of(row.prompt), row.expected, row.base, row.tuned, *([answer] if with_bundle else []))
        table.add_row("=" if last == row.expected else "", *(Text(in_a_line(cell)) for cell in cells))
    return table
