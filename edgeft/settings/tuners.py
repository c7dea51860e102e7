"""What differs between ways of tuning? A tuner is a row of TUNERS: what trains, its sizes, its scale, its words.

Adapters are what PEFT makes, under PEFT's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

# Names of what an adapter holds: all of it, its factors' weights.
ADAPTER, DOWN, UP = ".lora_", ".lora_A.", ".lora_B."
LENGTHS = "lora_magnitude_vector"  # of DoRA: what each row is scaled to
ELEMENTS = "ia3_l"  # of IA3: what each output or input is multiplied by
# of bottlenecks (`models.bottleneck`): on a module's output, or beside it from its input, by the name they hang under
BOTTLENECKS = AFTER, BESIDE = "adapter", "parallel_adapter"
NARROW, WIDE = "down.weight", "up.weight"
HADAMARD = "hadamard"  # of what multiplies a module's output and is added to it, by the name it hangs under
GAIN, SHIFT = f"{HADAMARD}.weight", f"{HADAMARD}.bias"
PREFIX = "kv_prefix"  # of keys and values before the text (`models.kv_prefix`), by the name they hang under
PROMPT = "soft_prompt"  # of embeddings before the text (`models.soft_prompt`), by the name they hang under
# Names in a saved adapter's file.
SAVED = "base_model.model."
BETWEEN = "lora_E"  # of AdaLoRA: the number between a row of one factor and a column of the other
PARTS = f"lora_A|lora_B|{BETWEEN}|{LENGTHS}|{ELEMENTS}|{GAIN}|{SHIFT}"
PART = re.compile(rf"{re.escape(SAVED)}(?P<module>.+)\.(?P<part>{PARTS})(?:\.weight)?")
HANGING = re.compile(rf"(?P<module>.+)\.(?P<where>{AFTER}|{BESIDE})\.(?P<part>{NARROW}|{WIDE})")
# What an adapter's product is multiplied by, of alpha and rank: rsLoRA's (arXiv 2312.03732), so that the same learning
# rate serves every rank, and LoRA's as it was published.
SCALES: dict[str, Callable[[float, int], float]] = {
    "rslora": lambda alpha, rank: alpha / rank**0.5,
    "plain": lambda alpha, rank: alpha / rank,
}


@dataclass(frozen=True)
class Form:
    """How a projection computes that trains so. Sizes are in elements, `made` in elements for each token.

    `made`: see `memory.timing`; tensors of a layer that trains, of hidden, MLP, query and key widths and the rank.
    """

    operation: str  # of adapters: a row of `engine.forms` and of `memory.adapters`
    made: tuple[float, ...]
    joined: tuple[float, ...] = ()  # `made` where the projection and what is beside it are one operation: in fp32
    beside: Callable[[int, int, int], int] = lambda inputs, outputs, rank: 0  # fp32 numbers that do not train
    roles: tuple[str, ...] = ("attention_in", "attention_out", "mlp_in", "mlp_out")  # of adapted projections
    around: bool = False  # it takes the input of the whole MLP, which must be a module of its own


@dataclass(frozen=True)
class Tuning:
    """One tuner."""

    adapters: bool  # what trains lies beside frozen weights, on projections; else the weights themselves train
    sizes: Callable[[int, int, int, bool], tuple[int, ...]]  # of what trains: inputs, outputs, rank, last of the MLP
    forms: Mapping[str, Form]  # by the setting that `chosen_by` names
    rate: Callable[[int], float]  # default learning rate, by the hidden size
    title: str
    short: str  # with {rank} or {tokens}
    method: str  # with {rank} or {tokens}, and {layers}
    sentence: str  # with {rank} or {tokens}, {layers}, {ends}, for somebody who does not know the library's names
    chosen_by: str = "init"
    asks: bool = True  # whether the projection of queries is adapted, where it is one of its own
    needs_roles: bool = False  # whether it cannot do without a projection of each role
    shifts: bool = False  # whether what it adds needs a bias of the attention's output
    ranked: bool = False  # whether a rank is chosen
    scaled: bool = False  # whether a scale is
    placed: bool = False  # whether `target_modules` may say which projections it adapts
    scale: Callable[[float, int], float] | None = None  # its own, of alpha and rank; none: `lora_scale` says which
    pruned: bool = False  # whether ranks go while it trains
    prefixed: bool = False  # whether it trains what lies before the text: so many tokens in every layer
    embedded: bool = False  # whether that is embeddings, which the model itself makes keys and values of: in no layer
    folds: bool = True  # whether a weight can hold what it learnt; else it lies beside the weights, on the device too
    shared: bool = True  # whether a share of what it learnt is between base and fine-tune
    rounded: bool = False  # whether training folds its change into weights as a target rounds them
    switched: bool = False  # whether a device can switch between adapters of the kind
    faster: str = ""  # in the names of what `lora_plus` lets learn faster (arXiv 2402.12354); empty: it has none
    peft: Mapping[str, object] = field(default_factory=dict)  # options of LoraConfig beside rank, scale and modules


TUNERS: dict[str, Tuning] = {
    "lora": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (rank * inputs, rank * outputs),
        ranked=True,
        scaled=True,
        placed=True,
        rounded=True,
        forms={
            "random": Form("product", made=(46, 18, 20, 22, 14), joined=(31, 8, 14, 14, 14)),
            # arXiv 2404.02948: the factors begin as the largest singular values of W, which keeps the rest
            "pissa": Form("less", made=(55, 23, 23, 26, 28), beside=lambda i, o, rank: rank * (i + o)),
        },
        rate=lambda hidden: 2e-4 * (2000 / hidden) ** 0.775,
        switched=True,
        faster=UP,
        title="LoRA",
        short="LoRA r{rank}",
        method="LoRA rank {rank} in {layers}",
        sentence="Small adapter matrices of rank {rank} (LoRA) train in {layers}; the model itself stays as it is",
    ),
    # arXiv 2402.09353: the lengths of the weight's rows train apart from their directions
    "dora": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (rank * inputs, rank * outputs, outputs),
        ranked=True,
        scaled=True,
        placed=True,
        forms={"random": Form("lengths", made=(52, 24, 23, 28, 14), beside=lambda i, outputs, rank: outputs)},
        rate=lambda hidden: 2e-4 * (2000 / hidden) ** 0.775,
        faster=UP,
        peft={"use_dora": True},
        title="DoRA",
        short="DoRA r{rank}",
        method="DoRA rank {rank} in {layers}",
        sentence="Small adapter matrices of rank {rank} and the lengths of the weights' rows (DoRA) train in {layers}; "
        "the model itself stays as it is",
    ),
    # arXiv 2303.10512
    "adalora": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (rank * inputs, rank * outputs, rank),
        ranked=True,
        scaled=True,
        placed=True,
        faster=UP,
        scale=lambda alpha, rank: alpha / (rank + 1e-5),  # as PEFT has it, of the rank that it begins with
        pruned=True,
        # how important each number is and how much that varies, which triplets are left, PEFT's rank
        forms={
            "random": Form(
                "triplets", made=(46, 18, 20, 22, 38), beside=lambda i, o, rank: 2 * rank * (i + o + 1) + rank + 1
            )
        },
        rate=lambda hidden: 2e-3 * (2000 / hidden) ** 0.775,  # ten times LoRA's; others: make bench-methods
        title="AdaLoRA",
        short="AdaLoRA r{rank}",
        method="AdaLoRA from rank {rank} in {layers}",
        sentence="Small adapter matrices that begin at rank {rank} and lose what matters least (AdaLoRA) train in "
        "{layers}; the model itself stays as it is",
    ),
    # arXiv 2205.05638
    "ia3": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (inputs if last else outputs,),
        forms={"random": Form("scales", made=(33, 11, 14, 20, 0), roles=("attention_in", "mlp_out"))},
        rate=lambda hidden: 3e-2,  # ten times the paper's, which moved the example too little: bench/LOG.md
        asks=False,
        needs_roles=True,
        title="IA3",
        short="IA3",
        method="IA3 in {layers}",
        sentence="A factor for each element of keys, values and the MLP's inside (IA3) trains in {layers}; the model "
        "itself stays as it is",
    ),
    # arXiv 2407.11033
    "h-adapter": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (outputs, outputs),
        forms={"random": Form("hadamard", made=(37, 8, 14, 14, 0), roles=("attention_out",))},
        rate=lambda hidden: 3e-2,  # IA3's; others: make bench-methods
        needs_roles=True,
        shifts=True,
        title="Hadamard adapter",
        short="Hadamard",
        method="Hadamard adapters in {layers}",
        sentence="A factor and a number to add for each element of what attention gives (Hadamard adapter) train in "
        "{layers}; the model itself stays as it is",
    ),
    # arXiv 1902.00751; beside the MLP: 2110.04366
    "adapter": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (rank * outputs, rank * outputs),
        ranked=True,
        needs_roles=True,
        folds=False,
        chosen_by="adapter_at",
        forms={
            "both": Form("after", made=(41, 8, 14, 14, 8), roles=("attention_out", "mlp_out")),
            "mlp": Form("after", made=(37, 8, 14, 14, 4), roles=("mlp_out",)),
            "parallel": Form("beside", made=(36, 8, 14, 14, 4), roles=("mlp_out",), around=True),
        },
        rate=lambda hidden: 8e-4 * (2000 / hidden) ** 0.775,  # four times LoRA's: bench/LOG.md
        title="Adapters",
        short="adapter r{rank}",
        method="bottleneck adapters of {rank} in {layers}",
        sentence="Small networks of {rank} inner values between the model's parts (adapters) train in {layers}; the "
        "model itself stays as it is",
    ),
    # arXiv 2101.00190, without the network that makes them there
    "prefix": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (),  # of projections; `memory.train_step` has its own
        prefixed=True,
        folds=False,
        shared=False,
        forms={"random": Form("past", made=(33, 8, 18, 18, 0), roles=())},
        rate=lambda hidden: 0.3,  # the best of five on the example's validation rows: bench/LOG.md
        title="Prefix tuning",
        short="prefix of {tokens}",
        method="a prefix of {tokens} tokens in {layers}",
        sentence="Keys and values of {tokens} tokens that lie before every text (a prefix) train in {layers}; the "
        "model itself stays as it is",
    ),
    # arXiv 2104.08691
    "prompt": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank, last: (),  # of projections; `memory.train_step` has its own
        prefixed=True,
        embedded=True,
        folds=False,
        shared=False,
        forms={"random": Form("read", made=(33, 8, 18, 18, 0), roles=())},
        rate=lambda hidden: 0.1,  # the best of four on the example's validation rows: bench/LOG.md
        title="Prompt tuning",
        short="prompt of {tokens}",
        method="a soft prompt of {tokens} tokens",
        sentence="Embeddings of {tokens} tokens that lie before every text (a soft prompt) train; the model itself "
        "stays as it is",
    ),
    "full": Tuning(
        adapters=False,
        sizes=lambda inputs, outputs, rank, last: (inputs * outputs,),
        rounded=True,
        forms={"random": Form("", made=(35, 8, 14, 14, 0))},
        rate=lambda hidden: 0.075 / hidden,
        title="Full fine-tuning",
        short="full",
        method="full fine-tuning of {layers}",
        sentence="The model's own weights train: {layers}{ends}",
    ),
}
# What is planned where none is named: adapters; the weights where ends train, or the model is small.
ADAPTERS, WEIGHTS = "lora", "full"


def adapts(name: str | None) -> bool | None:
    """Whether a tuner trains adapters; None where none is named."""
    return None if name is None else TUNERS[name].adapters


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name in the model, is an adapter's."""
    ours = is_scale(name) or is_prefix(name) or f".{HADAMARD}." in name or HANGING.fullmatch(name) is not None
    return ours or ADAPTER in name


def is_scale(name: str) -> bool:
    """Whether a parameter multiplies, element by element: no decay draws it to zero."""
    return f".{ELEMENTS}" in name


def is_prefix(name: str) -> bool:
    """Whether a parameter lies before the text: no decay draws it to zero, which is no neutral place."""
    return f".{PREFIX}." in name or is_prompt(name)


def is_prompt(name: str) -> bool:
    """Whether a parameter is embeddings before the text."""
    return PROMPT in name.split(".")


def saved_name(name: str) -> str:
    """The name in a saved adapter's file of a parameter of one, as PEFT has it."""
    return SAVED + name.replace(".default", "").replace(f".{LENGTHS}.weight", f".{LENGTHS}")


def adapter_parts(saved: Iterable[str]) -> dict[str, dict[str, str]]:
    """The names of a saved adapter's tensors by the module that they change and their part in that."""
    found: dict[str, dict[str, str]] = {}
    for name in saved:
        if match := PART.fullmatch(name):
            found.setdefault(match["module"], {})[match["part"]] = name
    return found
