"""What can a user ask for? Each setting is declared once, here, with its meaning, unit and default.

`None` means: the planner chooses. What the user sets is never changed; if it cannot fit, planning fails and says so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field

from edgeft.documents import NameIn, Strict, invalid
from edgeft.errors import BadInput
from edgeft.settings.other_names import hint_for
from edgeft.settings.tuners import SCALES, TUNERS, Form

Precision = Literal["fp32", "bf16", "fp16", "nf4"]
# as a target: the smallest artifact that keeps the fine-tune; every one that fits, side by side
AUTO, ALL_THAT_FIT = "auto", "all-that-fit"
Tuner = Annotated[str, NameIn(TUNERS)]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
Layers = Literal["all", "sparse", "lisa"]
LayerScore = Literal["top", "random", "gradient", "hidden", "ablation", "progressive"]
Schedule = Literal["uniform", "cycle", "weighted"]
LoraScale = Literal["rslora", "plain"]
Init = Literal["random", "pissa"]
AdapterAt = Literal["both", "mlp", "parallel"]
EndMode = Literal["off", "on", "rotate"]
CachedDtype = Literal["computed", "bf16"]
Malloc = Literal["fast", "tight"]
Bits = Literal[4, 5, 6, 8, 16, 32]
ENDS = ("embedding", "norm", "head")


def parse_layers(value: Any) -> Any:
    """`"0,5,12-15"` as (0, 5, 12, 13, 14, 15); anything else as it is. Raises ValueError for what is no such list."""
    if not isinstance(value, str):
        return value
    found: set[int] = set()
    for part in value.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise ValueError("expected numbers of layers, as in 0,5,12-15")
        found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(found))


def parse_names(value: Any) -> Any:
    """`"q_proj,v_proj"` as ("q_proj", "v_proj"); anything else as it is. Raises ValueError where a name is missing."""
    if not isinstance(value, str):
        return value
    names = tuple(part.strip() for part in value.split(","))
    if not all(names):
        raise ValueError("expected names with commas between them, as in q_proj,v_proj, or attention, mlp, all")
    return names


def parse_answers(value: Any) -> Any:
    """A form of answers as it was given. Raises ValueError for what is none."""
    known = isinstance(value, str) and (value in ("free", "labels") or value.startswith("regex:"))
    if known or (isinstance(value, str) and value.endswith((".json", ".lark"))):
        return value
    raise ValueError("expected free, labels, regex:EXPRESSION, a JSON Schema (FILE.json) or a Lark grammar (FILE.lark)")


def parse_kv_bits(value: Any) -> Any:
    """The bits of a cache as a number, where they came as text."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


KvBits = Annotated[Literal["auto", 8, 16, 32], BeforeValidator(parse_kv_bits)]
AnswerForm = Annotated[str, BeforeValidator(parse_answers)]
LayerSet = Annotated[tuple[int, ...], BeforeValidator(parse_layers)]
ModuleSet = Annotated[tuple[str, ...], BeforeValidator(parse_names), Field(min_length=1)]


class Job(Strict):
    """One fine-tuning job: what to train, on what, and whatever the user pins."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(description="folder of a Hugging Face checkpoint, or a hub id when online")
    data: str | None = Field(None, description="training data: jsonl, csv, parquet, or a hub dataset id")
    valid: str | None = Field(None, description="validation data; held out of the training data when absent")
    test: str | None = Field(None, description="test data, scored before and after training and after export")
    profile: str = Field("cpu", description="hardware profile: a name in profiles/ or a path to a TOML file")

    answers: AnswerForm = Field(
        "free",
        description="labels: one of the data's completions, with a probability; regex:..., FILE.json (a JSON Schema), "
        "FILE.lark: they always parse",
    )

    tuner: Tuner | None = Field(
        None,
        description="lora: low-rank adapters; dora: and lengths of rows; adalora: whose ranks are "
        "taken away where they matter least; ia3: scales; h-adapter: scales and sums "
        "after attention; adapter: small networks between the parts; prefix: keys and values before the text; "
        "prompt: embeddings before the text; full: all weights",
    )
    rank: int | None = Field(None, ge=1, description="LoRA rank; an adapter's inner width")
    target_rank: int | None = Field(None, ge=1, description="rank that AdaLoRA leaves on average; half of rank")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA scale before division, see lora_scale")
    lora_scale: LoraScale = Field(
        "rslora", description="what lora_alpha is divided by: rslora: the root of the rank, plain: the rank"
    )
    target_modules: ModuleSet | None = Field(
        None,
        description="projections that lora, dora, adalora adapt: all, attention, mlp, or names as in q_proj,v_proj",
    )
    lora_plus: float = Field(1.0, ge=1, description="learning rate of LoRA's B, in times A's (LoRA+; 16 is usual)")
    init: Init = Field(
        "random", description="LoRA's start: nothing yet, or pissa: the largest singular values of each weight"
    )
    adapter_at: AdapterAt = Field(
        "both", description="where adapters lie: both: after attention and MLP, mlp: after the MLP, parallel: beside it"
    )
    prefix_tokens: int | None = Field(None, ge=1, description="tokens of a prefix or a soft prompt, before every text")
    layers: Layers | None = Field(
        None, description="all decoder layers, sparse: a fixed few, lisa: a few at a time, drawn anew"
    )
    active_layers: int | None = Field(None, ge=1, description="layers that train at a time (sparse, lisa)")
    layer_score: LayerScore = Field("top", description="which layers sparse takes; others than top, random read data")
    trained_layers: LayerSet | None = Field(None, description="exactly these layers, as in 0,5,12-15 (sparse, lisa)")
    embedding: EndMode | None = Field(None, description="the embedding trains: off, on, or rotates with the layers")
    norm: EndMode | None = Field(None, description="the final norm: off, on, rotate")
    head: EndMode | None = Field(None, description="the head: off, on, rotate; a tied head follows the embedding")
    lisa_interval: int | None = Field(None, ge=1, description="optimizer steps between two draws of layers")
    lisa_schedule: Schedule = Field(
        "cycle", description="uniform: independent draws; cycle: each once a round; weighted"
    )
    lisa_state: Literal["drop", "park"] = Field(
        "drop", description="optimizer state of a layer that leaves; park: on disk"
    )
    base_precision: Precision | None = Field(None, description="how the frozen weights are kept in memory")
    micro_batch_size: int | None = Field(None, ge=1, description="samples per forward pass; more where they are short")
    batch_size: int = Field(16, ge=1, description="samples per optimizer step, of all processes together")
    processes: int = Field(1, ge=1, description="processes that share each step, started by torchrun")
    machines: int = Field(1, ge=1, description="machines that the processes are on, as many on each")
    max_length: int | None = Field(None, ge=8, description="longest sample in tokens; longer ones are cut and counted")
    checkpointing: bool | None = Field(None, description="recompute activations in the backward pass")
    kept_layers: int | None = Field(
        None, ge=0, description="topmost layers whose activations are kept all the same (checkpointing)"
    )
    loss_chunk_tokens: int | None = Field(None, ge=16, description="tokens whose logits exist at the same time")
    optimizer: Optimizer | None = Field(None, description="AdamW in 32 bit, 8 bit, or 8 bit paged to the host (CUDA)")
    malloc: Malloc | None = Field(
        None, description="freed memory of a CPU run: fast keeps small blocks for reuse, tight returns all at once"
    )

    stream_layers: bool | None = Field(
        None,
        description="frozen layers stay in their files and come when they compute (CPU, CUDA); if nothing else fits",
    )
    shard_base: bool | None = Field(
        None, description="each process holds a part of every frozen layer, gathered when it computes; if nothing fits"
    )
    prefix_cache: bool | Literal["bf16"] | None = Field(
        None,
        description="outputs of the layers below all that train are kept on disk, computed once for each row; "
        "bf16: rounded, in half the bytes of fp32",
    )

    epochs: float = Field(3.0, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    rows: int | None = Field(None, ge=1, description="training rows to plan for where no data is given; else 1,000")
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate")
    warmup_fraction: float = Field(0.05, ge=0, le=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    seed: int = Field(0, description="seed of initialisation and data order")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints; about a minute when absent"
    )
    eval_rows: int = Field(200, ge=1, description="validation rows scored before and after training")
    sample_answers: int | None = Field(
        None, ge=0, description="rows of each scored file whose answers are written out: 10, of free text 30; 0: none"
    )
    patience: int | None = Field(
        None, ge=1, description="validations in a row without a lower loss that end a run; its best step is kept"
    )
    valid_steps: int | None = Field(None, ge=1, description="optimizer steps between two validations (patience)")

    quantize_aware: bool = Field(
        False, description="train what will be shipped: every product sees its weight rounded as the target does"
    )
    target: str = Field(
        AUTO,
        description="what is exported: a name in export/, a TOML file, or auto: the smallest that keeps the fine-tune",
    )
    device: str | None = Field(None, description="target device profile that the bundle must fit")
    kv_bits: KvBits = Field(
        "auto", description="of each key and value that the device keeps; auto: 8 where it would hold less context else"
    )

    max_memory_bytes: int | None = Field(
        None, gt=0, description="memory budget of a process; the profile's when absent"
    )
    max_seconds: float | None = Field(None, gt=0, description="time limit for all training steps, by the estimate")


def parse_settings(assignments: list[str]) -> dict[str, object]:
    """`["rank=8", "checkpointing=true"]` as a dict of raw values for `Job`. Raises BadInput on an unknown key."""
    values: dict[str, object] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise BadInput("--set", f"expected key=value, got {assignment!r}")
        values[key] = None if value in ("", "none") else value
    check_known("--set", "", values, Job.model_fields)
    return values


def check_known(where: object, lead: str, asked: Iterable[str], known: Collection[str]) -> None:
    """Raise one BadInput for all names of settings that are unknown, with what each is called here."""
    unknown = [name for name in asked if name not in known]
    if len(unknown) == 1:
        raise BadInput(where, f"{lead}unknown setting {unknown[0]!r}", hint_for(unknown[0], known))
    if unknown:
        hints = "\n".join(f"  {name}: {hint_for(name, known)}" for name in unknown)
        raise BadInput(where, f"{lead}unknown settings {', '.join(map(repr, unknown))}", f"one by one\n{hints}")


def make_job(**values: object) -> Job:
    """A Job from raw values, strings included. Raises BadInput listing every value that does not fit."""
    try:
        return Job.model_validate(values)
    except pydantic.ValidationError as problem:
        raise invalid("job", problem, Job) from None


class Rounding(Strict):
    """How a target rounds weights: what of it decides their codes (`edgeft.targets.kinds`)."""

    name: str = Field(description="the file's name without .toml")
    runtime: str = Field(description="what runs it on the device")
    weight_bits: Bits = Field(description="bits per weight of the matmuls")
    method: Literal["rtn", "k_quant"] = Field(
        default="rtn", description="how weights are rounded: to nearest, or fitted"
    )
    calibration: Literal["none", "gptq", "imatrix"] = Field(
        default="none",
        description="on training rows; gptq: codes chosen for what the layers' outputs see, imatrix: k_quant's scales "
        "weighted by its inputs' mean squares",
    )
    block_size: Literal[0, 16, 32, 64, 128, 256] = Field(
        description="weights that share one scale; 0: all of an output"
    )
    symmetric: bool = Field(description="no zero points")
    head_bits: Bits = Field(description="bits per weight of the output head, and of embeddings tied to it")
    embedding_bits: Bits = Field(description="bits per weight of embeddings that are not tied to the head")
    mixed_layers: bool = Field(
        default=False, description="8 bits for value and down projections of a third of the layers"
    )
    eight_bit: tuple[str, ...] = Field(default=(), description="modules with 8 bits: a layer, or one projection of it")


class Training(Strict):
    """How one run trains: every choice made, nothing left open. Written by the planner, executed by `train`."""

    device: Literal["cpu", "cuda", "mps"]
    tuner: Tuner
    base_precision: Precision
    compute_dtype: Literal["fp32", "bf16", "fp16"]
    rank: int = 0
    target_rank: int = 0  # that is left on average when a run ends; 0: no rank goes
    lora_alpha: float = 0.0
    lora_scale: LoraScale = "rslora"
    lora_plus: float = 1.0  # learning rate of the second factors, in times all others'
    init: Init = "random"
    adapter_at: AdapterAt = "both"
    prefix_tokens: int = 0  # whose keys and values, or embeddings, lie before the text; 0: none do
    target_modules: tuple[str, ...] = ()
    layers: Layers = "all"
    trained_layers: tuple[int, ...] = Field(description="what may train; under lisa, what is drawn from")
    # whose adapters compute and do not train: of one set of layers that lisa draws, the others; of a prefix, which is
    # in every layer, all that never train
    resting_layers: tuple[int, ...] = ()
    active_layers: int = 0  # lisa: units (layers, rotating ends) that train at a time
    embedding: EndMode = "off"
    norm: EndMode = "off"
    head: EndMode = "off"
    lisa_interval: int = 0
    lisa_schedule: Schedule = "cycle"
    lisa_state: Literal["drop", "park"] = "drop"
    layer_weights: tuple[float, ...] = ()  # lisa_schedule=weighted: one per trained layer
    micro_batch_size: int
    batch_size: int
    processes: int = 1  # that share each step's samples
    machines: int = 1  # that those are on
    max_length: int
    max_trained: int = Field(description="trained tokens of the sample that has most")
    checkpointing: bool
    kept_layers: int = 0  # topmost layers whose activations are kept under checkpointing: freed first on the way back
    loss_chunk_tokens: int
    optimizer: Optimizer
    malloc: Malloc = "tight"
    stream_layers: bool = False  # frozen matrices stay in their files and are read when their layer computes
    shard_base: bool = False  # of each frozen layer a process holds a part; it is gathered when it computes
    cached_layers: int = 0  # the lowest ones, whose outputs are on disk for every row; 0: all are computed
    cached_tokens: int = 0  # of those rows
    cached_dtype: CachedDtype = "computed"  # which those outputs are kept in
    learning_rate: float
    steps: int
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    seed: int
    checkpoint_steps: int | None
    eval_rows: int
    patience: int = 0  # validations in a row without a lower loss that end the run; 0: no step is validated
    valid_steps: int = 0  # between two of them
    quantize_aware: Rounding | None = None  # products see the weights as this target will hold them
    stored_dtype: str = ""  # quantize_aware: what a merge rounds to before the target does

    @property
    def share(self) -> int:
        """Samples of a step that one process computes, at most."""
        return -(-self.batch_size // self.processes)

    @property
    def neighbours(self) -> int:
        """Processes of one machine."""
        return self.processes // self.machines

    @property
    def adapts(self) -> bool:
        """Whether adapters train, beside weights that stay as they are."""
        return TUNERS[self.tuner].adapters

    @property
    def embeds(self) -> bool:
        """Whether embeddings before the text train, which are in no layer."""
        return TUNERS[self.tuner].embedded

    @property
    def adapted_layers(self) -> tuple[int, ...]:
        """The layers that have adapters."""
        return tuple(sorted({*self.trained_layers, *self.resting_layers}))

    @property
    def scaled_inputs(self) -> tuple[str, ...]:
        """Of `target_modules` those whose inputs are scaled: none unless a tuner scales elements."""
        return self.target_modules[-1:]

    @property
    def form(self) -> Form:
        """How projections compute that train."""
        tuner = TUNERS[self.tuner]
        return tuner.forms[getattr(self, tuner.chosen_by)]

    @property
    def folds(self) -> bool:
        """Whether a weight can hold what is learnt; else it lies beside the weights, on the device too."""
        return TUNERS[self.tuner].folds

    @property
    def densely(self) -> bool:
        """Whether layers that train are dense fp32 ones in a base of another precision (`engine.fp32_layers`)."""
        return not self.adapts and self.layers != "all" and (self.base_precision != "fp32" or self.stream_layers)

    @property
    def holds_others(self) -> bool:
        """Whether the modules of a base hold something else than its weights: codes, what lies in files, in parts."""
        return self.base_precision == "nf4" or self.stream_layers or self.shard_base

    def recomputes(self, layer: int, layers: int) -> bool:
        """Whether a layer of a model with so many recomputes its activations, if autograd sees it at all."""
        return self.checkpointing and layer < layers - self.kept_layers

    @property
    def trains_ends(self) -> bool:
        """Whether embedding, final norm and head train all the time, as in full fine-tuning."""
        return self.embedding == self.norm == self.head == "on"

    @property
    def group_tokens(self) -> int:
        """Padded tokens scored at once: no more than a training step holds, so that scoring always fits."""
        return max(self.max_length, min(1024, self.micro_batch_size * self.max_length))

    @property
    def adapter_scale(self) -> float:
        """What an adapter's product is multiplied by."""
        scale = TUNERS[self.tuner].scale or SCALES[self.lora_scale]
        return float(scale(self.lora_alpha, self.rank)) if self.rank else 0.0
