"""Which numbers say how good a model is, and how near one form of it is to the next? (data only, no torch)"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeft.artifacts import Strict
from edgeft.settings import LayerScore
from edgeft.shares import Group, Shares

Select = Literal["best", "bounded", "fixed"]


MAX_ANSWER_TOKENS = 256  # of an answer that are compared


class Metrics(Strict):
    """Scores on `rows` rows. `exact_match` is a share of 1, None when the rows have no prompt.

    It compares token ids up to a stop id; other ids count where they spell the same text, white space around it left
    out. Of an answer longer than MAX_ANSWER_TOKENS only so many are compared, of one that was cut what is left of it.
    """

    rows: int
    loss: float
    perplexity: float
    exact_match: float | None
    long_answers: int = Field(0, description=f"rows whose answer has more than {MAX_ANSWER_TOKENS} tokens")


class Rung(Strict):
    """One step of the parity ladder: how far a form of the model is from the form before it, on the same prompts.

    `top1_agreement` and `mean_kl_nats` (KL(before || this)) are over the positions of the answers; `greedy_prefix` is
    the mean share of the greedy answer that both give, counted in tokens from its start.
    """

    name: str
    against: str
    top1_agreement: float
    mean_kl_nats: float
    loss: float
    loss_before: float
    exact_match: float | None
    exact_match_before: float | None
    greedy_prefix: float
    problems: tuple[str, ...]


class Proof(Strict):
    """The ladder from what was trained to what is shipped, and the scores of every form on the test rows."""

    prompts: int
    positions: int
    rungs: tuple[Rung, ...]
    scored_on: str
    scores: dict[str, Metrics]


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

    request_sha256: str = Field(default="", description="of what was asked for: another request, another choice")
    calibration: str
    size_budget_bytes: int | None
    predicted_bytes: int
    considered: int
    used_of_tolerance: float = Field(description="share of the target's parity tolerance that was allowed")
    simulated_before: Rung = Field(description="without any promotion")
    simulated: Rung
    ended: str
    promoted: tuple[Promoted, ...]


class EncoderProof(Strict):
    """How near an encoder's bundle is to PyTorch, over texts: its logits, or its mean last hidden states."""

    texts: int
    max_difference: float = Field(description="of any one value")
    min_cosine: float = Field(description="over the texts")
    label_agreement: float | None = Field(description="share of texts with the same label; None: embeddings")


class UnitRecord(Strict):
    """What training did to one unit of a model (a decoder layer, embedding, norm or head).

    `steps` is in how many optimizer steps it trained; `relative_change` is ||W - W0|| / ||W0|| over its tensors that
    may train, 0.0 exactly where nothing changed.
    """

    unit: str
    steps: int
    relative_change: float


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
