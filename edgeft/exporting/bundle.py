"""What is in a bundle, where did it come from, and what does it need on the device? (data only, no torch, no onnx)"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from edgeft.data.grammar import Grammar, HeldTo
from edgeft.documents import Artifact, Strict, saving, sha256_json
from edgeft.exporting.answers import Answers, GoldenAnswer, GoldenLabel, HeldToGrammar
from edgeft.machines.runner import runner_module
from edgeft.models.metrics import EncoderProof, Metrics, Promotion, Proof, Repair
from edgeft.targets.footprint import LimitedBy, Predicted
from edgeft.targets.runtimes import needed_packages
from edgeft.targets.target import Target

MANIFEST = "bundle.json"
SBOM = "sbom.cdx.json"
README = "README.md"
PromptFormat = Literal["plain", "chat"]
Task = Literal["text-generation", "text-classification", "feature-extraction"]


class GoldenInput(Strict):
    """One prompt to record: a text as it is, or chat messages for the template."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_them(self) -> GoldenInput:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        return self


class Golden(Strict):
    """What the artifact gave for one prompt at export: run.py --verify replays it on the device.

    `messages` is None for plain prompts, and for templates that print the date: their text changes every day.
    `greedy_ids` are binding where their margin is more than twice the tolerance: below, another CPU may rightly
    choose the other.
    """

    messages: list[dict[str, Any]] | None
    text: str
    plain: bool
    ids: list[int]
    greedy_ids: list[int]
    top_ids: list[int]
    top_logits: list[float]
    margins: list[float] = Field(default=[], description="of each greedy step: the best logit less the second best")
    label: GoldenLabel | None = Field(default=None, description="where answers are held to labels")
    held: GoldenAnswer | None = Field(default=None, description="where answers are held to a grammar")


class Environment(Strict):
    """Where golden vectors were recorded; on another processor or runtime a token may move within its margin."""

    cpu: str = Field(description="model name, as the system gives it")
    features: list[str] = Field(description="instruction sets that matrix products are chosen by")
    runtime: str = Field(description="packages and versions")


def _stays_inside(name: str) -> str:
    """The name of a file in a bundle, by run.py's own rule."""
    if fault := runner_module().name_fault(name):
        raise ValueError(f"{name!r:.80} {fault}")
    return name


FileName = Annotated[str, pydantic.AfterValidator(_stays_inside)]


class BundledFile(Strict):
    sha256: str
    size_bytes: int


class BundledPrefix(Strict):
    """Keys and values of tokens before every text: run.py begins the graph's past with them."""

    file: FileName = Field(description="safetensors, by the names of the graph's inputs; (1, heads, tokens, width)")
    tokens: int = Field(ge=1, description="whose positions come before the text's, beside the context")


class BundledAdapter(Strict):
    """What run.py loads beside the model and switches to, fed to the graph's `adapter_inputs`: LoRA, or a prefix."""

    file: FileName
    base_sha256: str = Field(description="of the base weights it was trained on: the bundle must hold the same")
    train_sha256: str = Field(description="of its train.json")
    rank: int = Field(description="of LoRA; 0 of a prefix")
    kv_prefix: BundledPrefix | None = Field(default=None, description="what it puts before a text; null: nothing")
    prompt_format: PromptFormat
    system: str | None = Field(default=None, description="system message that every training row had")
    parameters: dict[str, list[int]] = Field(description="names and shapes in the file; the scale is in lora_B")
    golden: list[Golden]
    proof: Proof | None = None


class Measured(Strict):
    """What run.py --bench found on the machine that exported."""

    load_seconds: float
    prompt_tokens: int
    new_tokens: int
    time_to_first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    weight_bytes_per_token: int
    bandwidth_bytes_per_second: float
    bound_tokens_per_second: float
    fraction_of_bound: float
    cores: int


@dataclass
class Kept:
    """What a proof finds of single rows: each form's scores of them, and the bundle's answers to some."""

    scores: dict[str, Metrics] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)


class Measurement(Artifact):
    """BUNDLE.measured.json, beside the bundle: what it cost here. `input_sha256` is the hash of its bundle.json.

    Not a part of the bundle: the same inputs give the same bundle, byte for byte, and no clock says the same twice.
    """

    measured: Measured
    rows: dict[str, Metrics] = Field(default={}, description="each scored row's own results, by the form of the model")
    answers: tuple[str, ...] = Field(default=(), description="the bundle's, to the rows of train.json's `samples`")
    predicted_here_bytes: int = Field(description="peak memory as predicted for what was measured")
    predicted_peak_bytes: int | None = Field(default=None, description="of the export: this process and the builder's")
    measured_peak_bytes: int | None = Field(default=None, description="the same, measured; None where no /proc tells")
    seconds: float = Field(description="of the whole export")
    guesses_times_faster: float | None = Field(
        default=None, description="whole answers with guesses, prompt included; null: not timed"
    )


def measurement_path(bundle: Path) -> Path:
    """Where the measurement of a bundle folder is kept: beside it."""
    return bundle.with_name(f"{bundle.name}.measured.json")


def measurement_of(bundle: Path) -> Measurement | None:
    """What the export of a bundle folder measured on this machine, where that is still beside it."""
    path = measurement_path(bundle.resolve())
    return Measurement.read(path) if path.is_file() else None


def failed_path(bundle: Path) -> Path:
    """Where a bundle that fails its proof is kept: beside the folder that it was meant for."""
    return bundle.with_name(f"{bundle.name}.failed")


def adapters_digest(train_sha256: Mapping[str, str]) -> str:
    """What a bundle of adapters was made from, as one hash: each one's name and train.json."""
    return sha256_json(dict(train_sha256))


SILENT = """run.py writes no file, but a batch's answers, and opens no connection; with `--serve PORT` it listens, on
this machine alone unless a host is named. onnxruntime since 1.29 and onnxruntime-genai since 0.18 carry telemetry that
is on by default; run.py switches it off. A program of your own that loads this model has to do that before it loads the
runtime: set `ORT_DISABLE_TELEMETRY=1` in its environment. `ORT_DISABLE_TELEMETRY=0` lets it on."""
EXAMPLE_CHARACTERS = 1000  # of a prompt that is shown


HELD = """It answers with one of {count} labels, the most probable one. `--json` adds its probability and the next best
label's; `--min-probability 0.6` answers "none of these" below; `--free` lets the model write what it wants. What the
probabilities are worth is in bundle.json, `answers.calibration`; null: too few rows were there to tell."""


WRITTEN = """Its answers are held to the grammar in {file}: they parse, always, or there is none (exit 1: it has no end
within the context or `--max-tokens`). `--free` lets the model write what it wants."""


def readme(
    target: Target, prompt_format: PromptFormat, system: str | None, adapters: Sequence[str] = (), held_to: HeldTo = (),
    prompts: Sequence[GoldenInput] = (),
) -> str:  # fmt: skip
    """What a person who finds the folder on a device has to know, in a page, one of the prompts as an example."""
    how = "a prompt goes through the model's chat template" if prompt_format == "chat" else "a text goes in as it is"
    lines = [
        "# A language model to run on a device",
        "",
        "    python3 -m venv ../runtime && . ../runtime/bin/activate",
        f"    pip install {' '.join(needed_packages(target, held_to))}",
        '    python run.py "a prompt"',
        *(["    python run.py                # a conversation"] if prompt_format == "chat" else []),
        f"    python run.py --serve 8080    # POST to /v1/{'chat/' if prompt_format == 'chat' else ''}completions",
        "    python run.py --bench",
        "    python run.py --verify",
        "",
        f"Built for {target.runtime} ({target.name}); {how}. `python run.py --help` shows every option.",
    ]
    if example := next(filter(None, map(_example, prompts)), None):
        lines += ["", "It was trained on prompts like this one:", "", _quoted(example)]
    if system:
        lines += ["", "It was trained with this system message, and run.py gives it (`--system ''`: none):", ""]
        lines += [_quoted(system)]
    if isinstance(held_to, Grammar):
        lines += ["", WRITTEN.format(file=held_to.file)]
    elif held_to:
        lines += ["", HELD.format(count=len(held_to))]
    if adapters:
        lines += ["", "Adapters for `--adapter`: " + ", ".join(adapters) + "."]
    lines += ["", SILENT]
    return "\n".join(lines) + "\n"


def first_said(prompt: GoldenInput | Golden) -> object:
    """The text, or what a user says first in a conversation: a later turn makes no sense without those before it."""
    if prompt.messages is None:
        return prompt.text
    return next((each.get("content") for each in prompt.messages if each.get("role") == "user"), None)


def _example(prompt: GoldenInput) -> str | None:
    """What a user says in a prompt, where that is short enough to show."""
    said = first_said(prompt)
    return said if isinstance(said, str) and said.strip() and len(said) <= EXAMPLE_CHARACTERS else None


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


class Guesses(Strict):
    """What guessing an answer's next tokens, by what followed the same ones before, saves on validation rows."""

    on: bool = Field(description="whether run.py guesses unless it is told not to")
    rows: int
    tokens: int = Field(description="behind the first of each answer: passes without guesses")
    passes: int = Field(description="with guesses; of the rows' own answers where those promised too little")
    guessed: int = Field(description="tokens that were guessed")
    same_answers: float | None = Field(
        default=None, description="share that is the same without guesses: a pass of several tokens rounds otherwise"
    )


class Bundle(Artifact):
    """bundle.json: what is in the folder, where it came from, what it needs and what it must give."""

    format_version: Literal[1] = 1
    target: Target
    prompt_format: PromptFormat
    system: str | None = Field(
        default=None, description="system message that every training row had; run.py puts it before a prompt"
    )
    prefix_ids: list[int] = Field(description="ids before every plain prompt, such as begin-of-text")
    stop_ids: list[int] = Field(description="ids that end an answer")
    context_tokens: int
    context_limited_by: LimitedBy
    golden_logit_tolerance: float
    environment: Environment | None = Field(default=None, description="where the golden vectors were recorded")
    weight_bytes_per_token: int = Field(description="read for each new token: all but tables of which one row is read")
    size_bytes: int = Field(description="all files but bundle.json and a signature")
    answers: Annotated[Answers | HeldToGrammar, Field(discriminator="form")] | None = Field(
        default=None, description="how answers are held; null: they are free"
    )
    kv_prefix: BundledPrefix | None = Field(default=None, description="what lies before every text; null: nothing")
    guesses: Guesses | None = Field(default=None, description="of free answers; null: not looked at")
    files: dict[FileName, BundledFile]
    golden: list[Golden]
    provenance: dict[str, str] = Field(description="sha256 of what this was made from, by name")
    predicted: Predicted
    proof: Proof | None = None
    failed: str = Field(default="", description="why its proof failed: not to be shipped, kept to be looked at")
    promotion: Promotion | None = Field(default=None, description="how the 8-bit tensors were chosen, where they were")
    repair: Repair | None = Field(default=None, description="what else was considered, where the target was chosen")
    task: Task = Field(default="text-generation", description="an encoder gives a label or an embedding")
    labels: list[str] = Field(default=[], description="of a text-classification, in the order of its logits")
    encoder_proof: EncoderProof | None = None
    adapters: dict[str, BundledAdapter] = Field(default={}, description="by the name that --adapter takes")
    adapter_inputs: dict[str, list[int]] = Field(default={}, description="shapes, with 0 where an adapter has its rank")
    self_sha256: str = Field(default="0" * 64, description="sha256 of this file with 64 zeros here")

    def write(self, path: Path) -> None:
        """Write with `self_sha256` over the very bytes of the file, so that any later change to it shows."""
        blank = self.model_copy(update={"self_sha256": "0" * 64}).model_dump_json(indent=1) + "\n"
        digest, key = hashlib.sha256(blank.encode()).hexdigest(), '"self_sha256": '
        with saving(path):
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(blank.replace(f'{key}"{"0" * 64}"', f'{key}"{digest}"').encode())
            temporary.replace(path)
