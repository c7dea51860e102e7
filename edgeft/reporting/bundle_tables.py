"""How does a bundle read on a screen: its proof, its scores, what it costs, how its target was chosen?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from edgeft.models.metrics import Pair, Promotion, Proof, Repair
from edgeft.reporting.answers import pair_cells, pair_head, score_cells, score_head
from edgeft.reporting.label_words import BIN_HEAD, CERTAIN_HEAD, answers_lines, bin_rows, calibration_of, certain_rows
from edgeft.reporting.learnt import nothing_learnt
from edgeft.reporting.tables import ScreenTable
from edgeft.reporting.terminal import predicted_expected, samples_table
from edgeft.reporting.words import above_high, attempt_cells, percent, rung_cells
from edgeft.units import show_bytes

if TYPE_CHECKING:
    from edgeft.exporting.answers import Answers, HeldToGrammar
    from edgeft.exporting.bundle import Bundle, Measurement
    from edgeft.exporting.choose_target import Comparison
    from edgeft.exporting.result import Evaluation
    from edgeft.merging.result import MergedCheckpoint


def ladder_text(proof: Proof) -> RenderableType:
    """The parity ladder, a line per rung: what was compared, and how far apart it was."""
    gain = f", {proof.gain_nats:.4f} nats gained over the base" if proof.gain_nats is not None else ""
    title = f"parity, by validation rows{gain}"
    columns = ("rung", "against", "compared", "top-1", "or a tie", "mean KL", "loss", "before", "")
    table = ScreenTable(*columns, title=title, prose=["compared"], below={"against": "against", "compared": "by"})
    for rung in proof.rungs:
        table.add_row(rung.name, rung.against, rung.compared, *rung_cells(rung), "failed" if rung.problems else "ok")
    return table


def pairs_text(proof: Proof) -> RenderableType:
    """What each form changed of the one before it on the same rows, with 95% intervals."""
    return pairs_table(proof.pairs, f"the same {proof.scored_on} rows before and after, 95% intervals")


def pairs_table(pairs: Sequence[Pair], title: str) -> RenderableType:
    """Differences on the same rows, a line a pair."""
    head = pair_head(pairs)
    table = ScreenTable("from", "to", *head, title=title)
    for each in pairs:
        table.add_row(each.before, each.after, *pair_cells(each, head))
    return table


def evaluation_text(made: Evaluation) -> RenderableType:
    """Every form's scores on the same rows, what each changes of the one before it, and lm-eval's numbers."""
    parts: list[RenderableType] = []
    if made.scores:
        rows = next(iter(made.scores.values())).rows
        cut = f", {made.cut_rows} of them cut" if made.cut_rows else ""
        head = score_head(made.scores.values())
        table = ScreenTable("model", *head, title=f"{rows} rows of {made.data}{cut}")
        for name, metrics in made.scores.items():
            table.add_row(name, *score_cells(metrics, head))
        parts.append(table)
    if made.pairs:
        parts.append(pairs_table(made.pairs, "the same rows before and after, 95% intervals"))
    if made.tasks:
        names = list(made.tasks)
        table = ScreenTable("task", "metric", *names, title="lm-eval, each with its standard error")
        for line in zip(*made.tasks.values(), strict=True):
            numbers = [f"{each.value:.4f}" + (f" ± {each.stderr:.4f}" if each.stderr else "") for each in line]
            table.add_row(line[0].task, line[0].metric, *numbers)
        parts.append(table)
    return Group(*parts)


def answers_text(answers: Answers | HeldToGrammar) -> RenderableType:
    """What answers are held to, and what their probabilities are worth."""
    tables = []
    if (calibration := calibration_of(answers)) is not None:
        for head, cells in ((CERTAIN_HEAD, certain_rows), (BIN_HEAD, bin_rows)):
            table = ScreenTable(*head, title=calibration.compared if head is CERTAIN_HEAD else "")
            for row in cells(calibration):
                table.add_row(*row)
            tables.append(table)
    return Group(*tables, *map(Text, answers_lines(answers)))


def bundle_text(bundle: Bundle, merged: MergedCheckpoint | None, here: Measurement | None) -> RenderableType:
    """What an export ends with: the ladder, every form's scores, and size, memory and speed of the bundle."""
    parts: list[RenderableType] = []
    if bundle.proof is not None:
        parts.append(ladder_text(bundle.proof))
        rows = next(iter(bundle.proof.scores.values())).rows
        head = score_head(bundle.proof.scores.values())
        table = ScreenTable("model", *head, title=f"{rows} {bundle.proof.scored_on} rows")
        for name, metrics in bundle.proof.scores.items():
            table.add_row(metrics.named(name), *score_cells(metrics, head))
        parts.append(table)
        parts += [pairs_text(bundle.proof)] if bundle.proof.pairs else []
    if merged is not None and here is not None and here.answers:
        parts.append(samples_table(merged.train.samples, here.answers))
    parts += [answers_text(bundle.answers)] if bundle.answers is not None else []
    table = ScreenTable("", "predicted", "measured")
    if merged is not None:
        trained = predicted_expected(merged.train), merged.train.measured_peak_bytes
        table.add_row("training, peak memory", *map(show_bytes, trained))
        table.add_row("merge, peak memory", *map(show_bytes, (merged.predicted_peak_bytes, merged.measured_peak_bytes)))
    _add_costs(table, bundle, here)
    chosen = [promotion_text(bundle.promotion)] if bundle.promotion is not None else []
    chosen += [repair_text(bundle.repair, here)] if bundle.repair is not None else []
    doubts = [Text(line, style="bold") for line in nothing_learnt(merged.train)] if merged is not None else []
    return Group(*parts, table, *map(Text, _more_memory(merged, here)), *chosen, _size_text(bundle), *doubts)


def _more_memory(merged: MergedCheckpoint | None, here: Measurement | None) -> list[str]:
    """A line for each stage that took more than its plan's high estimate."""
    if merged is None:
        return []
    plan = merged.train.plan
    lines = above_high(plan, "merge", merged.measured_peak_bytes)
    return lines + (above_high(plan, "export", here.measured_peak_bytes, here.predicted_peak_bytes) if here else [])


def repair_text(repair: Repair, here: Measurement | None) -> RenderableType:
    """All that was considered, what each costs in bytes, and what of it was measured here."""
    title = f"{repair.asked}: against the merged model on {repair.compared}, by PyTorch, 95% intervals"
    columns = ("artifact", "bundle, predicted", "loss, nats", "exact match, points", "tok/s here", "decision")
    below = {"decision": "", "loss, nats": "loss", "exact match, points": "exact match"}
    table = ScreenTable(*columns, title=title, prose=["decision"], below=below)
    for each in repair.attempts:
        name, *costs, decided = attempt_cells(each)
        last = each is repair.attempts[-1]
        speed = f"{here.measured.decode_tokens_per_second:,.0f}" if here is not None and last else "-"
        table.add_row(name, *costs, speed, decided)
    by_test = "A bundle failed on test rows, so they took part in the choice: its test scores flatter it a little."
    return Group(table, *([Text(by_test)] if repair.by_test_rows else []))


def promotion_text(promotion: Promotion) -> RenderableType:
    """The tensors that got 8 bits, and why those."""
    before, after = promotion.simulated_before, promotion.simulated
    title = f"8 bits for {len(promotion.promoted)} of {promotion.considered} tensors, by {promotion.calibration}"
    table = ScreenTable("tensor", "why", "KL alone in 4 bits", "cosine of its change", "bytes more", title=title)
    for each in promotion.promoted:
        cosine = f"{each.cosine:.3f}" if each.cosine is not None else "-"
        table.add_row(each.module, each.why, f"{each.mean_kl_nats:.1e}", cosine, show_bytes(each.extra_bytes))
    kl = f"mean KL by torch {before.mean_kl_nats or 0:.4f} nats without, {after.mean_kl_nats or 0:.4f} with them"
    return Group(*([table] if promotion.promoted else [Text(title)]), Text(f"{kl}: {promotion.ended}"))


def adapters_text(bundle: Bundle, here: Measurement | None) -> RenderableType:
    """What an export of adapters ends with: how near the base and each of them are, and the bundle's costs."""
    proofs = [proof for proof in (bundle.proof, *(each.proof for each in bundle.adapters.values())) if proof]
    scores = ScreenTable("adapter", "rank", "base loss", "fine-tuned", bundle.target.name, "exact match")
    for name, adapter in bundle.adapters.items():
        if adapter.proof is not None:
            found = adapter.proof.scores
            last = found[bundle.target.name]
            match = percent(last.exact_match)
            losses = [f"{found[form].loss:.4f}" for form in ("base", "fine-tuned", bundle.target.name)]
            scores.add_row(name, str(adapter.rank), *losses, match)
    costs = ScreenTable("", "predicted", "measured")
    _add_costs(costs, bundle, here)
    return Group(*(ladder_text(proof) for proof in proofs), scores, costs, _size_text(bundle))


def _add_costs(table: ScreenTable, bundle: Bundle, here: Measurement | None) -> None:
    if here is not None and here.measured_peak_bytes is not None and here.predicted_peak_bytes is not None:
        table.add_row(
            "export, peak memory", show_bytes(here.predicted_peak_bytes), show_bytes(here.measured_peak_bytes)
        )
    if here is not None:
        measured = here.measured
        table.add_row(
            "bundle here, peak memory",
            show_bytes(here.predicted_here_bytes),
            show_bytes(measured.peak_memory_bytes),
        )
        bound = f"at most {measured.bound_tokens_per_second:,.0f} tok/s"
        table.add_row("bundle here, decode", bound, f"{measured.decode_tokens_per_second:,.0f} tok/s")
    if bundle.predicted.device_memory_bytes:
        need = f"{show_bytes(bundle.predicted.memory_bytes)} of {show_bytes(bundle.predicted.device_memory_bytes)}"
        table.add_row(f"on {bundle.provenance.get('device', 'device')}, full context", need, "-")
        if bundle.predicted.tokens_per_second_bound:
            table.add_row(
                "on the device, decode", f"at most {bundle.predicted.tokens_per_second_bound:,.0f} tok/s", "-"
            )


def _size_text(bundle: Bundle) -> Text:
    size = f"{bundle.target.name}: {show_bytes(bundle.size_bytes)} with all files, "
    size += f"context {bundle.context_tokens} tokens"
    cache = f", KV cache of {bundle.target.kv_bits} bits" if bundle.target.kv_bits else ""
    return Text(f"{size} (limited by the {bundle.context_limited_by}){cache}")


def comparison_text(made: Comparison) -> RenderableType:
    """Every target that fits side by side, why the others are out, and the one to ship."""
    table = ScreenTable("target", "size", "loss", "exact match", "mean KL", "memory", "decode at most", "decode here")
    left_out = []
    for row in made.candidates:
        if row.scores is None:
            left_out.append(Text(f"{row.name}: {' '.join(row.problem.split())}"))
            continue
        bound, here = row.tokens_per_second_bound, row.tokens_per_second_here
        exact = row.scores.exact_match
        table.add_row(
            ("> " if row.name == made.ship else "  ") + row.name,
            show_bytes(row.size_bytes),
            f"{row.scores.loss:.4f}",
            percent(exact),
            f"{max(0.0, row.mean_kl_nats):.1e}",
            show_bytes(row.memory_bytes),
            f"{bound:,.0f} tok/s" if bound else "-",
            f"{here:,.0f} tok/s" if here else "-",
        )
    return Group(table, *left_out, Text(f"ship {made.ship}: {made.reason}"))
