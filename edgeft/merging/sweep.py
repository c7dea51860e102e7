"""Which share of a fine-tune is worth taking? Task and general text along W0 + a (Wft - W0), also as rounded.

One model is held in fp32 and moved from share to share: each share costs a pass over the base's file and the scoring,
no merge and no export. What rounding does is `rounding.round_model`, which gives the artifact's own weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeft.data.dataset import Sample, TextTokenizer, read_samples
from edgeft.data.grammar import HeldTo
from edgeft.engine.grammar_scores import held_rows
from edgeft.errors import BadInput
from edgeft.merging.change import Change, find_tensor
from edgeft.merging.merge import blend, check_trained
from edgeft.models.bottleneck import hang_kept
from edgeft.models.checkpoint import Checkpoint, load_plain, local_folder
from edgeft.models.evaluate import evaluate
from edgeft.models.layer_shares import Shares, check_shares, equal_groups, layer_of
from edgeft.models.metrics import Metrics, Select, Sweep, SweepPoint
from edgeft.models.parts import find_parts
from edgeft.progress import Progress, silent
from edgeft.settings.tuners import SAVED, TUNERS, WIDE, is_adapter
from edgeft.targets.rounding import round_model
from edgeft.targets.target import Target, check_beside
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult

GRID = tuple(round(0.1 * i, 1) for i in range(11))
GOLDEN = (5**0.5 - 1) / 2
GOLDEN_STEPS = 7  # the best share is then known to 0.06
ROWS = 500  # of the task and of general text: exact match is then known to 2 points
GENERAL_TOKENS = 512  # longest general text
# How much worse per token general text may become under `bounded`, as a share of what the whole fine-tune costs. No
# number of nats serves every job: the example's cost 1.9 (LoRA) and 2.3 (full), a bound of 0.1 leaves 7% exact match
# of 79; under half of the cost 73 and 77% are left. A careful fine-tune costs less than 0.1, which then binds nothing.
GENERAL_SHARE = 0.5
GROUP_STEP, GROUP_ROUNDS = 0.2, 3  # how far a group's share moves at a time, and how often at most


def sweep(
    trained: Path,
    target: Target,
    *,
    select: Select,
    wise_alpha: float = 1.0,
    general: str | None = None,
    max_general_increase_nats: float | None = None,
    golden: bool = False,
    groups: int = 1,
    request_sha256: str = "",
    progress: Progress = silent,
) -> Sweep:
    """Measure shares of what `edgeft train` wrote, on a grid of tenths or by golden-section search, and choose one.

    `wise_alpha` is measured too, and taken under select = fixed. `general` is a data file of text as the base was
    trained on, `max_general_increase_nats` what `bounded` allows: half of what the whole fine-tune costs when absent.
    With `groups`, equal parts of the layers get shares of their own, searched from the best one for all. Raises
    BadInput when bounded is asked for without general text, for a number of groups that the layers do not allow, and
    for what Data.read and Change refuse.
    """
    if select == "bounded" and general is None:
        hint = "name text as the base knows it: --general FILE"
        raise BadInput("--select bounded", "needs general text to bound the loss on", hint)
    started = time.monotonic()
    result = TrainResult.read(trained / "train.json")
    layers = result.plan.spec.num_hidden_layers
    _check_shares(select, groups, wise_alpha, layers)
    check_trained(trained, result)
    check_beside([target], beside=not result.training.folds)
    if not TUNERS[result.training.tuner].shared:
        problem = "keys and values before the text are there or not: a merge has no share of them to be found"
        raise BadInput("--sweep", problem, "merge without a sweep")
    data = Data.read(result.plan)
    curve = Curve(trained, result, target, data, general, progress)
    alone = GOLDEN_STEPS + 3 if golden else len({*GRID, wise_alpha})
    curve.total = alone + (GROUP_ROUNDS * groups * (groups + 1) if groups > 1 else 0)
    bound = search_one_share(curve, select, wise_alpha, max_general_increase_nats, golden=golden)
    if groups > 1:
        search_groups(layers, groups, curve, select, bound)
    progress("sweep", curve.total, curve.total, {})
    points = curve.sorted()
    chosen, why = (
        choose_point(points, select, bound) if select != "fixed" else (curve.points[f"{wise_alpha:g}"], "as given")
    )
    return Sweep(
        request_sha256=request_sha256,
        select=select,
        wise_alpha=chosen.wise_alpha,
        groups=chosen.groups,
        why=why,
        target=target.name,
        task_rows=f"{len(curve.rows)} validation rows",
        general_rows=f"{len(curve.texts)} rows of {general}" if general else None,
        max_general_increase_nats=bound,
        points=tuple(point.bare for point in points),
        pareto=pareto([point for point in points if not point.groups]),
        seconds=round(time.monotonic() - started, 2),
    )


def _check_shares(select: Select, groups: int, wise_alpha: float, layers: int) -> None:
    """Raise BadInput for shares that the model's layers do not allow."""
    check_shares(Shares(rest=wise_alpha), layers)
    if not 1 <= groups <= layers:
        raise BadInput("--groups", f"must be from 1 to the model's {layers} layers, got {groups}")
    if groups > 1 and select == "fixed":
        raise BadInput("--groups", "is a search, under --select fixed nothing is searched", "give --wise-alpha 0-3=0.5")


class Curve:
    """The points that were measured so far, each once, and what measures one more."""

    def __init__(
        self, trained: Path, result: TrainResult, target: Target, data: Data, general: str | None, progress: Progress
    ) -> None:
        self.target, self.data, self.progress = target, data, progress
        self.rows = data.valid[:ROWS]
        self.texts = general_samples(general, data.tokenizer, ROWS) if general else []
        folder = local_folder(result.plan.job.model)
        self.line = Line(trained, folder, tied=result.plan.spec.tie_word_embeddings)
        self.points: dict[str, SweepPoint] = {}
        self.total = 0  # points that the sweep may come to

    def at(self, shares: Shares) -> SweepPoint:
        """The scores at these shares, in fp32 and as the target rounds."""
        name = str(shares)
        if name not in self.points:
            self.progress("sweep", min(len(self.points), self.total), self.total, {})
            self.line.move_to(shares)
            task, general = self._scores()
            rounds = self.target.weight_bits < 16 and round_model(self.line.model, self.target)
            rounded = self._scores() if rounds else (None, None)
            assert task is not None  # a job without validation rows holds some out
            self.points[name] = SweepPoint(
                wise_alpha=shares.rest, groups=shares.groups, task=task, general=general,
                rounded_task=rounded[0], rounded_general=rounded[1],
            )  # fmt: skip
        return self.points[name]

    def _scores(self) -> tuple[Metrics | None, Metrics | None]:
        tokenizer, model = self.data.tokenizer, self.line.model
        return _score(model, self.rows, tokenizer, self.data.held_to), _score(model, self.texts, tokenizer)

    def sorted(self) -> tuple[SweepPoint, ...]:
        """One share for all layers before groups of them, each from base to fine-tune."""
        return tuple(sorted(self.points.values(), key=lambda p: (len(p.groups), p.wise_alpha, str(p.shares))))


class Line:
    """A model on the line between base and fine-tuned: its weights are what a merge at that share stores."""

    def __init__(self, tuned: Path, base: Path, *, tied: bool) -> None:
        self.base = Checkpoint(base)
        self.change = Change(tuned, self.base, tied=tied)
        self.model: Any = load_plain(base)
        self.change.give_biases()
        for name in self.change.added:
            module = self.model.get_submodule(name.removesuffix(".bias"))
            module.bias = torch.nn.Parameter(self.base.read(name).float())
        if self.change.untied is not None:
            head = self.model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        self.tensors: list[tuple[Any, str, str]] = []  # parameter, its name in the change, where the base keeps it
        for name, parameter in self.model.named_parameters():
            own = find_tensor(self.base, name)
            is_head = parameter is self.model.get_output_embeddings().weight
            stored = own or (self.change.embedding if is_head else None)
            if stored is None:
                hint = "merge with --wise-alpha instead: a merge reads the files as they are"
                raise BadInput(base, f"{name} is not in the files under this name: a sweep cannot move it", hint)
            self.tensors.append((parameter, own or str(self.change.untied), stored))
        self.beside: list[tuple[Any, torch.Tensor, int | None]] = []  # a last matrix, what trained, its layer
        if (kept := self.change.beside) is not None:
            hang_kept(self.model, {name.removeprefix(SAVED): kept.read(name).float() for name in kept.entries}, tuned)
            self.beside = [(parameter, parameter.detach().clone(), layer_of(name))
                           for name, parameter in self.model.named_parameters()
                           if is_adapter(name) and name.endswith(WIDE)]  # fmt: skip

    @torch.no_grad()
    def move_to(self, shares: Shares) -> None:
        """Give every parameter its value at its share, rounded to the base's dtype as `merge` does."""
        for parameter, name, source in self.tensors:
            stored, wise_alpha = self.base.read(source), shares.of(layer_of(name))
            if wise_alpha and name in self.change:
                blend(stored, self.change.open(name, stored), wise_alpha)
            parameter.copy_(stored)
        for parameter, whole, layer in self.beside:
            parameter.copy_(whole * shares.of(layer))


def general_samples(source: str, tokenizer: TextTokenizer, rows: int) -> list[Sample]:
    """The first rows of a data file as samples that train every token, cut to GENERAL_TOKENS."""
    samples = read_samples(source, tokenizer, GENERAL_TOKENS, rows)
    return [sample for sample in samples if sample.trained_tokens]


def _score(model: Any, samples: Sequence[Sample], tokenizer: TextTokenizer, held_to: HeldTo = ()) -> Metrics | None:
    if not samples:
        return None
    held = held_rows(held_to, samples, tokenizer, model)
    return evaluate(model, find_parts(model), samples, tokenizer, device=torch.device("cpu"), held=held).marked


def general_increase(point: SweepPoint, base: SweepPoint) -> float:
    """Nats per token by which general text is worse than with the base, both as shipped; 0 when not measured."""
    return general_loss(point) - general_loss(base)


def choose(
    curve: Sequence[SweepPoint], select: Select, fixed: float, max_general_increase_nats: float
) -> tuple[float, str]:
    """(share, why), one share for all layers. Scores are those after rounding, where that was measured.

    best: the highest exact match; those that the rows show no difference from count as equal, and of them the one that
    keeps general text best is taken, or without general text the one of lowest loss. Rows without a prompt have no
    exact match: the lowest loss. bounded: the same among the shares whose general loss is at most so many
    nats above the base's; the base is always among them. fixed: as given.
    """
    if select == "fixed":
        return fixed, "as given"
    chosen, why = choose_point(curve, select, max_general_increase_nats)
    return chosen.wise_alpha, why


def choose_point(
    curve: Sequence[SweepPoint], select: Select, max_general_increase_nats: float
) -> tuple[SweepPoint, str]:
    """`choose` among points that may have shares of their own for groups of layers."""
    base = next(point for point in curve if point.shares.nothing)
    allowed = [
        point for point in curve if select == "best" or general_increase(point, base) <= max_general_increase_nats
    ]
    scored = [point for point in allowed if point.shipped[0].exact_match is not None]
    equal, least, why = allowed, task_loss, "lowest loss"
    if scored:
        equal = as_exact_as_the_best(scored, base)
        if all(point.shipped[1] is not None for point in equal):
            least, why = general_loss, "lowest general loss"
        why += f" of {len(equal)} whose rows show no difference in exact match from the best (95% interval)"
    chosen = min(equal, key=lambda point: (least(point), point.wise_alpha, len(point.groups)))
    if select == "bounded":
        why += f", general loss at most {max_general_increase_nats:g} nats over the base's"
        why += f" ({len(allowed)} of {len(curve)} shares)"
    return chosen, why


def as_exact_as_the_best(scored: Sequence[SweepPoint], base: SweepPoint) -> list[SweepPoint]:
    """The points whose rows show no difference in exact match from the best point's, but do show one from the base's.

    Rows too few to tell the best from the base show nothing of the others: then those of its very exact match.
    """
    best = max((point.shipped[0] for point in scored), key=lambda scores: scores.exact_match or 0.0)
    if best.as_exact_as(base.shipped[0]):
        return [point for point in scored if point.shipped[0].exact_match == best.exact_match]
    return [
        point
        for point in scored
        if point.shipped[0].as_exact_as(best) and not point.shipped[0].as_exact_as(base.shipped[0])
    ]


def search_one_share(
    curve: Curve, select: Select, wise_alpha: float, max_general_increase_nats: float | None, *, golden: bool
) -> float:
    """Measure base, fine-tune, `wise_alpha` and what lies between; the nats that `bounded` allows general text."""
    base, whole = (curve.at(Shares(rest=share)) for share in (0.0, 1.0))
    curve.at(Shares(rest=wise_alpha))
    half = max(0.0, GENERAL_SHARE * general_increase(whole, base))
    bound = half if max_general_increase_nats is None else max_general_increase_nats

    def loss(share: float) -> float:
        point = curve.at(Shares(rest=share))
        allowed = select != "bounded" or general_increase(point, base) <= bound
        return task_loss(point) if allowed else float("inf")

    if golden:
        golden_section(loss, GOLDEN_STEPS)
    else:
        for share in GRID:
            curve.at(Shares(rest=share))
    return bound


def search_groups(layers: int, count: int, curve: Curve, select: Select, max_general_increase_nats: float) -> None:
    """Measure shares for `count` groups of layers, from the best share for all, as long as a round finds better ones.

    A round tries each group higher and lower, and each pair with one higher and the other lower: under a bound the best
    share for all lies at its edge, where no group alone can rise. What is outside of the layers (embedding, head) is a
    group too where the fine-tune changed it.
    """
    best = choose_point(list(curve.points.values()), select, max_general_increase_nats)[0]
    outside = any(layer_of(name) is None for name in curve.line.change.steps)
    for _ in range(GROUP_ROUNDS):
        given = [group.wise_alpha for group in best.groups] or [best.wise_alpha] * count
        shares = [*given, best.wise_alpha]
        places = range(count + outside)
        for move in group_moves(shares, places):
            curve.at(equal_groups(layers, count, move[:-1], move[-1]))
        following = choose_point(list(curve.points.values()), select, max_general_increase_nats)[0]
        if following == best:
            break
        best = following


def group_moves(shares: Sequence[float], places: Sequence[int]) -> list[list[float]]:
    """Shares with one of `places` a step up or down, or one up and another down; none that leaves 0 to 1 or stays."""
    moves = []
    for up in (None, *places):
        for down in (None, *places):
            moved = list(shares)
            for place, step in ((up, GROUP_STEP), (down, -GROUP_STEP)):
                if place is not None:
                    moved[place] = round(min(1.0, max(0.0, moved[place] + step)), 3)
            if up != down and moved != list(shares):
                moves.append(moved)
    return moves


def task_loss(point: SweepPoint) -> float:
    return point.shipped[0].loss


def general_loss(point: SweepPoint) -> float:
    return point.shipped[1].loss if point.shipped[1] is not None else 0.0


def pareto(curve: Sequence[SweepPoint]) -> tuple[float, ...]:
    """Shares that no other share beats in task loss and general loss together, as shipped; all without general text."""

    def beaten(point: SweepPoint) -> bool:
        mine = task_loss(point), general_loss(point)
        others = [(task_loss(other), general_loss(other)) for other in curve]
        return any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in others)

    return tuple(point.wise_alpha for point in curve if not beaten(point))


def golden_section(loss: Callable[[float], float], steps: int) -> float:
    """Where a function with one valley on 0 to 1 is lowest, to 0.618^steps; infinite values lie beyond the valley.

    Shares are rounded to thousandths, so that they can be named and asked for again.
    """
    low, high = 0.0, 1.0
    left, right = round(high - GOLDEN * (high - low), 3), round(low + GOLDEN * (high - low), 3)
    at_left, at_right = loss(left), loss(right)
    for _ in range(steps - 1):
        if at_left <= at_right:  # also where both are infinite: what breaks the bound is the larger share
            high, right, at_right = right, left, at_left
            left = round(high - GOLDEN * (high - low), 3)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = round(low + GOLDEN * (high - low), 3)
            at_right = loss(right)
    return left if at_left <= at_right else right
