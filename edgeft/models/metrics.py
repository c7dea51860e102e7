"""Which numbers say how good a model is, and how near one form of it is to the next? (data only, no torch)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from edgeft.data.scoring_groups import MAX_ANSWER_TOKENS
from edgeft.documents import Strict
from edgeft.models.intervals import Interval, paired_losses, paired_means, paired_rates
from edgeft.models.layer_shares import Group, Shares
from edgeft.settings.job import LayerScore

Select = Literal["best", "bounded", "fixed"]


class Metrics(Strict):
    """Scores on `rows` rows. `exact_match` is a share of 1, None when the rows have no prompt.

    It compares token ids up to a stop id; other ids count where they spell the same text, white space around it left
    out. Of an answer longer than MAX_ANSWER_TOKENS only so many are compared, of one that was cut what is left of it.

    The last four are each row's own, in the order of the data, where they were kept: pairs are formed of them.
    """

    rows: int
    loss: float
    perplexity: float
    exact_match: float | None
    f1: float | None = Field(
        default=None, description="mean F1 of the words of the answers that were written out, where it suits the task"
    )
    f1_rows: int = Field(default=0, description="of so many rows")
    long_answers: int = Field(0, description=f"rows whose answer has more than {MAX_ANSWER_TOKENS} tokens")
    row_losses: tuple[float, ...] = Field(default=(), description="nats, summed over a row's trained tokens")
    row_tokens: tuple[int, ...] = Field(default=(), description="trained tokens of each row")
    row_exact: str = Field(default="", description="1 for each row whose answer is exact, 0 for each other")
    row_f1: tuple[float, ...] = Field(default=(), description="of each row whose answer was written out")
    drawn: tuple[int, ...] = Field(default=(), description="which rows, where they were enough to say what all would")
    of_rows: int = Field(default=0, description="how many there were, where not all were read")

    @property
    def bare(self) -> Metrics:
        """The same scores without the rows."""
        return self.marked.model_copy(update={"row_exact": ""})

    @property
    def marked(self) -> Metrics:
        """The same scores with which rows are exact, of each row's own numbers nothing else."""
        return self.model_copy(update={"row_losses": (), "row_tokens": (), "row_f1": ()})

    def named(self, name: str) -> str:
        """A form's name beside its scores: with how many rows they are of, where others have all."""
        return f"{name}, {self.rows} of {self.of_rows} rows" if self.of_rows else name

    def as_exact_as(self, other: Metrics) -> bool:
        """Whether the rows show no difference in exact match; without both forms' rows, whether it is the same."""
        both = on_the_same_rows(other, self)
        if both is None or not both[0].row_exact or not both[1].row_exact:
            return self.exact_match == other.exact_match
        return not exact_interval(*both).shown

    def of_numbers(self, numbers: Sequence[int]) -> Metrics:
        """With each row's own results of some rows alone, by their numbers among all; the scores are as they were."""
        place = {number: i for i, number in enumerate(self.drawn or range(self.rows))}
        at = [place[number] for number in numbers]

        def some(kept: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(kept[i] for i in at) if kept else ()

        exact = "".join(some(tuple(self.row_exact)))
        changes = {"row_losses": some(self.row_losses), "row_tokens": some(self.row_tokens), "row_exact": exact}
        return self.model_copy(update=changes)


def of_some_rows(found: Metrics, numbers: Sequence[int]) -> Metrics:
    """Rows and loss of some of the rows, where each row's own were kept; no share of them is known to be exact."""
    some = found.of_numbers(numbers)
    loss = math.fsum(some.row_losses) / max(1, sum(some.row_tokens))
    return some.model_copy(update={"rows": len(numbers), "loss": loss, "exact_match": None})


def on_the_same_rows(first: Metrics, second: Metrics) -> tuple[Metrics, Metrics] | None:
    """Two forms' scores with the results of the rows that both have read; None where they are not of the same rows."""
    if (first.of_rows or first.rows) != (second.of_rows or second.rows):
        return None
    if first.drawn == second.drawn:
        return first, second
    numbers = sorted({*(first.drawn or range(first.rows))} & {*(second.drawn or range(second.rows))})
    return first.of_numbers(numbers), second.of_numbers(numbers)


def exact_interval(first: Metrics, second: Metrics) -> Interval:
    """How much more rows are exact under the second form than under the first, from each row under both."""
    return paired_rates(*([bit == "1" for bit in each.row_exact] for each in (first, second)))


class Difference(Strict):
    """A paired difference on the same rows, second form less first, and its 95% interval."""

    difference: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> Difference | None:
        """An interval as data; None: one row says nothing."""
        return cls(**interval._asdict()) if math.isfinite(interval.low) else None

    @property
    def shown(self) -> bool:
        """Whether the rows show any difference at all."""
        return self.low > 0 or self.high < 0


class Pair(Strict):
    """Two forms of the model on the same scored rows."""

    before: str
    after: str
    loss: Difference | None = Field(description="nats per token")
    exact_match: Difference | None = Field(description="a share of 1")
    f1: Difference | None = Field(default=None, description="a share of 1, of the rows whose answers were written out")


def pair(before: str, first: Metrics, after: str, second: Metrics) -> Pair | None:
    """The pair of two forms' scores on the rows that both have read, None where those of one were not kept."""
    both = on_the_same_rows(first, second)
    if both is None or not first.row_losses or both[0].row_tokens != both[1].row_tokens:
        return None
    first, second = both
    exact = None
    if first.row_exact and second.row_exact:
        exact = exact_interval(first, second)
    loss = paired_losses(first.row_losses, second.row_losses, first.row_tokens)
    match = Difference.of(exact) if exact else None
    words = None
    if first.row_f1 and len(first.row_f1) == len(second.row_f1):
        words = Difference.of(paired_means(first.row_f1, second.row_f1))
    return Pair(before=before, after=after, loss=Difference.of(loss), exact_match=match, f1=words)


class Rung(Strict):
    """One step of the parity ladder: how far a form of the model is from what it must equal, or come near to.

    What was not compared is None: forms of a model are compared by their answers on the same rows, weights tensor by
    tensor. `mean_kl_nats` is KL(before || this) over the positions of the answers.
    """

    name: str
    against: str
    compared: str = Field(description="what was laid side by side")
    tolerance: str = Field(description="what had to hold")
    tensors: int = Field(default=0, description="compared one by one")
    top1_agreement: float | None = Field(default=None, description="share of positions with the same likeliest token")
    top1_or_tie: float | None = Field(default=None, description="the same, or one within 0.1 nats of it")
    mean_kl_nats: float | None = None
    loss: float | None = None
    loss_before: float | None = None
    loss_change: Difference | None = None
    problems: tuple[str, ...]


class Proof(Strict):
    """The ladder from what was trained to what is shipped, the scores of every form, and what each step changed."""

    prompts: int
    positions: int
    rungs: tuple[Rung, ...]
    scored_on: str
    scores: dict[str, Metrics]
    pairs: tuple[Pair, ...] = ()
    gain_nats: float | None = Field(default=None, description="loss of the base less that of the fine-tune, validation")


class Promoted(Strict):
    """One tensor that got 8 bits instead of 4, and why; the last three are None where fine-tuning left it alone."""

    module: str = Field(description="as a target's eight_bit names it")
    tensor: str
    why: Literal["lost", "sensitive"] = Field(description="lost: little of its change would arrive; else by mean KL")
    mean_kl_nats: float = Field(description="of the model's answers, with this tensor alone in 4 bits")
    extra_bytes: int
    cosine: float | None = Field(description="between its change and what arrives of it in 4 bits")
    projection: float | None
    delta_in_steps: float | None


class Promotion(Strict):
    """How a bundle's 8-bit tensors were chosen; `simulated` is what torch said of it before it was built."""

    calibration: str
    size_budget_bytes: int | None
    predicted_bytes: int
    considered: int
    used_of_tolerance: float = Field(description="share of the target's parity tolerance that was allowed")
    simulated_before: Rung = Field(description="without any promotion")
    simulated: Rung
    ended: str
    promoted: tuple[Promoted, ...]


class Attempt(Strict):
    """One artifact that was considered, against the merged model on the same validation rows.

    Its differences are those of PyTorch on the very weights that it would hold; None: not known.
    """

    name: str
    predicted_bytes: int = Field(description="of the whole bundle")
    kv_bits: int | None = Field(default=None, description="of the KV cache, where they are not the runtime's own")
    loss: Difference | None = Field(default=None, description="nats per token")
    exact_match: Difference | None = Field(default=None, description="a share of 1")
    built: bool = Field(default=False, description="whether it became a bundle, which its ladder then decided on")
    decision: Literal["passes", "fails", "skipped"]
    reason: str


class Repair(Strict):
    """How an artifact was chosen: all that were considered, in their order; the last one is the bundle's."""

    request_sha256: str = Field(default="", description="of what was asked for: another request, another choice")
    asked: str = Field(description="the target that was asked for: auto, or the one that was repaired")
    compared: str = Field(description="on which rows")
    by_test_rows: bool = Field(default=False, description="a bundle failed on test rows: they took part in the choice")
    attempts: tuple[Attempt, ...]


class EncoderProof(Strict):
    """How near an encoder's bundle is to PyTorch, over texts: its logits, or its mean last hidden states."""

    texts: int
    max_difference: float = Field(description="of any one value")
    min_cosine: float = Field(description="over the texts")
    label_agreement: float | None = Field(description="share of texts with the same label; None: embeddings")


class UnitRecord(Strict):
    """What training did to one unit of a model (a decoder layer, embedding, norm or head).

    `steps` is in how many optimizer steps it trained; `relative_change` is ||W - W0|| / ||W0|| over its tensors that
    may train, 0.0 exactly where nothing changed; None where what trained lies beside the weights.
    """

    unit: str
    steps: int
    relative_change: float | None


class Importance(Strict):
    """How much each decoder layer matters for a user's data, by one method; higher is more.

    `rows` and `tokens` are what was read of the training data. `chosen` are the layers that a sparse plan takes, `top`
    and `random` as many by no score at all: what a choice has to beat. All three are empty where nothing is chosen.
    """

    method: LayerScore
    scores: tuple[float, ...]
    rows: int
    tokens: int
    device: str
    seconds: float
    peak_bytes: int
    chosen: tuple[int, ...] = ()
    top: tuple[int, ...] = ()
    random: tuple[int, ...] = ()


class SweepPoint(Strict):
    """The model at one share of its change, as merged and as rounded for a target; None: not measured."""

    wise_alpha: float = Field(description="of every tensor that no group names")
    groups: tuple[Group, ...] = ()
    task: Metrics
    general: Metrics | None
    rounded_task: Metrics | None
    rounded_general: Metrics | None

    @property
    def shares(self) -> Shares:
        """The shares of all tensors."""
        return Shares(rest=self.wise_alpha, groups=self.groups)

    @property
    def bare(self) -> SweepPoint:
        """The same point without the rows."""
        scores = ("task", "general", "rounded_task", "rounded_general")
        return self.model_copy(update={name: found.bare for name in scores if (found := getattr(self, name))})

    @property
    def shipped(self) -> tuple[Metrics, Metrics | None]:
        """(task, general) of what the device would run."""
        return (self.rounded_task, self.rounded_general) if self.rounded_task else (self.task, self.general)


class Sweep(Strict):
    """How task and general text fare along W0 + a (Wft - W0), and which share was taken."""

    request_sha256: str = Field(description="of everything that was asked for: another request, another sweep")
    select: Select
    wise_alpha: float = Field(description="the share that was taken")
    groups: tuple[Group, ...] = Field(default=(), description="and those of groups of layers, where they were searched")
    why: str
    target: str = Field(description="whose rounding was simulated")
    task_rows: str
    general_rows: str | None
    max_general_increase_nats: float = Field(description="over the base, for select = bounded")
    points: tuple[SweepPoint, ...]
    pareto: tuple[float, ...] = Field(description="shares that no other beats in task and general loss together")
    seconds: float
