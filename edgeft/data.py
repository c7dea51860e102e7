"""What are the samples, how long are they in tokens, and which row is broken? (no torch: the planner reads data too)"""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from edgeft.artifacts import Strict, sha256_file
from edgeft.errors import BadInput, MissingExtra

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
IGNORED = -100  # the label of a token that is read but not trained on (torch's cross_entropy default)
COLUMNS = ("{'prompt', 'completion'}", "{'messages'}", "{'text'}")
TEMPLATE = "chat template"  # where an error is that a template itself raised
PromptFormat = Literal["plain", "chat"]
Each = TypeVar("Each")
ENCODE_TEXTS = 32  # at a time: an encoding takes a hundred times the bytes of the ids that are kept of it


@dataclass(frozen=True)
class Row:
    """One row of data: pieces of text in order, each trained on or only read. `format` says how a user will ask."""

    pieces: tuple[tuple[str, bool], ...]
    format: PromptFormat
    has_prompt: bool
    messages: tuple[dict[str, str], ...] | None = None  # a chat up to its last answer


@dataclass(frozen=True)
class Sample:
    """One row as tokens: `ids` and `labels` have equal length; labels are IGNORED where nothing is trained.

    `prompt_tokens` is where the last trained piece starts; `completion` is its text (empty when the row has no prompt).
    """

    ids: list[int]
    labels: list[int]
    prompt_tokens: int
    completion: str
    cut_tokens: int = 0

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


class Lengths(Strict):
    """Sample lengths of one data file, in tokens, after cutting to `max_length`."""

    path: str
    sha256: str
    rows: int
    longest: int
    median: int
    mean: float
    tokens: int
    longest_trained: int
    trained_tokens: int = Field(0, description="tokens that are trained, of all rows")
    cut_rows: int = 0
    quantiles: dict[str, int] = Field(default_factory=dict)  # share of the samples: tokens that it has at most


class TextTokenizer:
    """A checkpoint folder's tokenizer and chat template, without transformers.

    Chat templates are jinja programs from strangers: they run in jinja2's sandbox, as in transformers.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            hint = "save the model's tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            raise BadInput(folder, "there is no tokenizer.json", hint)
        try:
            self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as problem:  # tokenizers raises bare Exception for any malformed file
            raise BadInput(folder / "tokenizer.json", f"cannot be read: {problem}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.folder = folder
        self.config = _json_or_empty(folder / "tokenizer_config.json")
        self.template_text = self._find_template()
        self.eos_ids = self._find_eos()

    def _find_template(self) -> str | None:
        if (self.folder / "chat_template.jinja").is_file():
            return (self.folder / "chat_template.jinja").read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named templates: the default one
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        return template

    def _find_eos(self) -> list[int]:
        for source in ("generation_config.json", "config.json"):
            value = _json_or_empty(self.folder / source).get("eos_token_id")
            if value is not None:
                return list(value) if isinstance(value, list) else [value]
        token = self._special("eos_token")
        found = self.backend.token_to_id(token) if token else None
        if found is None:
            hint = "set eos_token_id in config.json: without an end token a model never stops"
            raise BadInput(self.folder, "no end-of-text token is defined", hint)
        return [found]

    def _special(self, name: str) -> str:
        token = self.config.get(name) or ""
        return token["content"] if isinstance(token, dict) else token

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids the tokenizer puts before every text, such as Llama's begin-of-text token."""
        bare = self.backend.encode("x", add_special_tokens=False).ids
        full = self.backend.encode("x").ids
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        return full[: starts[0]] if starts else []

    @cached_property
    def eos_id(self) -> int:
        """The id that closes a training sample: the tokenizer's own end token when it is one of the model's."""
        own = self.backend.token_to_id(self._special("eos_token") or "")
        return own if own in self.eos_ids else self.eos_ids[0]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens added."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), ENCODE_TEXTS):
            part = list(texts[start : start + ENCODE_TEXTS])
            ids += [encoding.ids for encoding in self.backend.encode_batch(part, add_special_tokens=False)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The chat template's text for messages [{role, content}, ...]. Raises BadInput without a template."""
        if self.template_text is None:
            hint = "use {'prompt', 'completion'} rows, or add chat_template.jinja to the model folder"
            raise BadInput(self.folder, "the tokenizer has no chat template, so {'messages'} rows cannot be used", hint)
        specials = {name: self._special(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        compiled = self._compiled
        try:
            text = compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **specials,
            )
            return str(text)
        except Exception as problem:  # whatever a template raises is a statement about these messages
            raise BadInput(TEMPLATE, str(problem), "check the order of the roles in 'messages'") from None

    @cached_property
    def _compiled(self) -> Any:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        class Generation(Extension):
            """{% generation %} marks what the assistant says; rendering cuts it out here, so the tag says nothing."""

            tags = {"generation"}  # noqa: RUF012 - the attribute as jinja2 declares it

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        extensions: list[Any] = ["jinja2.ext.loopcontrols", Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda style: datetime.datetime.now().strftime(style)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
        try:
            return environment.from_string(self.template_text or "")
        except TemplateSyntaxError as problem:
            raise BadInput(self.folder, f"the chat template is broken, line {problem.lineno}: {problem}") from None


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as problem:
        raise BadInput(path, f"is not JSON: {problem}") from None
    return value if isinstance(value, dict) else {}


def read_rows(source: str, tokenizer: TextTokenizer, most: int | None = None) -> list[Row]:
    """All rows of a data file, or its first `most`.

    Raises BadInput naming the file and the first broken lines, all kinds counted.
    """
    rows: list[Row] = []
    broken: list[str] = []
    for line, value in islice(_read_values(source), most):
        try:
            if isinstance(value, Exception):
                raise ValueError(str(value))
            rows.append(_to_row(value, tokenizer))
        except ValueError as problem:
            broken.append(f"line {line}: {problem}")
        except BadInput as problem:
            if problem.where != TEMPLATE:
                raise
            broken.append(f"line {line}: the chat template says: {problem.problem}")
    if broken:
        more = f"\n... and {len(broken) - 5} more" if len(broken) > 5 else ""
        count = f"{len(broken)} of {len(broken) + len(rows)} rows cannot be used"
        raise BadInput(source, f"{count}\n" + "\n".join(broken[:5]) + more, "a row is one of " + ", ".join(COLUMNS))
    if not rows:
        raise BadInput(source, "there are no rows in it", "a row is one of " + ", ".join(COLUMNS))
    if len({(row.format, row.has_prompt) for row in rows}) > 1:
        raise BadInput(source, "rows of different kinds are mixed", "use one of " + ", ".join(COLUMNS) + " throughout")
    return rows


def _read_values(source: str) -> Iterator[tuple[int, Any]]:
    """(line number, row as a dict or the error of that line). Line numbers count from 1, a csv header included."""
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if not path.exists():
        if path.suffix or source.count("/") != 1:
            raise BadInput(source, "no such data file", "give a .jsonl, .csv or .parquet file, or a hub dataset id")
        yield from enumerate(_hub_rows(source), start=1)
    elif path.is_dir():
        raise BadInput(source, "is a folder", "give one data file")
    elif name.endswith(".parquet"):
        yield from enumerate(_parquet_rows(path), start=1)
    elif name.endswith((".jsonl", ".json", ".csv")):
        try:
            opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
                if name.endswith(".csv"):
                    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KiB: a document can be longer
                    reader = csv.DictReader(lines)
                    for value in reader:
                        yield reader.line_num, value
                else:
                    for number, line in enumerate(lines, start=1):
                        if line.strip():
                            yield number, _parse_line(line)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as problem:
            raise BadInput(source, f"cannot be read: {problem}", "save it as UTF-8") from None
        except OSError as problem:
            raise BadInput(source, f"cannot be read: {problem.strerror or problem}") from None
    else:
        raise BadInput(source, f"unknown kind of data file {path.suffix!r}", "use .jsonl, .jsonl.gz, .csv or .parquet")


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as problem:
        return ValueError(f"not JSON: {problem}")


def _parquet_rows(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(path, "reading parquet needs pyarrow", "pip install 'edgeft[data]'") from None
    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as problem:
        raise BadInput(path, f"cannot be read: {problem}") from None


def _hub_rows(source: str) -> list[Any]:
    try:
        import datasets
    except ImportError:
        hint = "pip install 'edgeft[data]', or give a file"
        raise MissingExtra(source, "is no file; reading a hub dataset needs the package datasets", hint) from None
    try:
        return list(datasets.load_dataset(source, split="train"))
    except Exception as problem:  # datasets raises its own, huggingface_hub's and network errors
        raise BadInput(source, f"is no file and could not be loaded as a hub dataset: {problem}") from None


def _to_row(value: Any, tokenizer: TextTokenizer) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    if "messages" in value:
        pieces = tuple(_chat_pieces(value["messages"], tokenizer))
        messages = _parse_line(value["messages"]) if isinstance(value["messages"], str) else value["messages"]
        return Row(pieces, "chat", True, tuple(messages[:-1]))
    if "prompt" in value or "completion" in value:
        prompt, completion = _text(value, "prompt"), _text(value, "completion")
        return Row(((prompt, False), (completion, True)), "plain", True)
    if "text" in value:
        return Row(((_text(value, "text"), True),), "plain", False)
    raise ValueError(f"has none of the known columns, got {sorted(map(str, value))}")


def _text(value: dict[str, Any], key: str) -> str:
    if key not in value:
        raise ValueError(f"{key!r} is missing")
    if not isinstance(value[key], str) or not value[key]:
        raise ValueError(f"{key!r} must be a non-empty text, got {value[key]!r:.60}")
    return str(value[key])


def _chat_pieces(messages: Any, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """The rendered conversation, cut so that exactly what the assistant says (its end-of-turn token too) is trained."""
    if isinstance(messages, str):  # csv holds it as JSON text
        messages = _parse_line(messages)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list of {{'role', 'content'}}, got {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(f"a message must be {{'role', 'content'}}, got {message!r:.60}")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[-1] != len(messages) - 1:
        raise ValueError("the last message must be the assistant's")
    done, pieces = "", list[tuple[str, bool]]()
    for turn in turns:
        before = tokenizer.render(messages[:turn], add_generation_prompt=True)
        after = tokenizer.render(messages[: turn + 1], add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            # templates that rewrite earlier turns (dropping thoughts, say): only the last answer can be trained
            if turn != turns[-1]:
                continue
            pieces, done = [], ""
            if not after.startswith(before):
                raise ValueError("the chat template does not keep its own generation prompt before an answer")
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def to_samples(rows: Sequence[Row], tokenizer: TextTokenizer, max_length: int | None) -> list[Sample]:
    """Rows as tokens, in order. One longer than `max_length` loses the start of its prompt, then its answer's end."""
    texts = [text for row in rows for text, _ in row.pieces]
    encoded = iter(tokenizer.encode(texts))
    samples = []
    for row in rows:
        # a chat template writes its own begin-of-text token
        ids = list(tokenizer.prefix_ids) if row.format == "plain" else []
        labels = [IGNORED] * len(ids)
        start = len(ids)
        for _, trained in row.pieces:
            piece = next(encoded)
            if trained:
                start = len(ids)
            ids += piece
            labels += piece if trained else [IGNORED] * len(piece)
        if row.format == "plain":
            ids.append(tokenizer.eos_id)
            labels.append(tokenizer.eos_id)
        completion = row.pieces[-1][0] if row.has_prompt else ""
        samples.append(_cut(Sample(ids, labels, start, completion), max_length, len(tokenizer.prefix_ids)))
    return samples


def _cut(sample: Sample, max_length: int | None, prefix: int) -> Sample:
    excess = len(sample.ids) - (max_length or len(sample.ids))
    if excess <= 0:
        return sample
    from_prompt = min(excess, max(0, sample.prompt_tokens - prefix - 1))
    ids = sample.ids[:prefix] + sample.ids[prefix + from_prompt :]
    labels = sample.labels[:prefix] + sample.labels[prefix + from_prompt :]
    return Sample(ids[:max_length], labels[:max_length], sample.prompt_tokens - from_prompt, sample.completion, excess)


def measure_lengths(source: str, tokenizer: TextTokenizer, max_length: int | None = None) -> Lengths:
    """Row count and token lengths of a data file; every row is tokenised. Raises what `read_rows` raises."""
    samples = to_samples(read_rows(source, tokenizer), tokenizer, max_length)
    lengths = [len(sample.ids) for sample in samples]
    return Lengths(
        path=source,
        sha256=sha256_file(Path(source)) if Path(source).is_file() else "",
        rows=len(samples),
        longest=max(lengths),
        median=int(statistics.median(lengths)),
        mean=round(statistics.fmean(lengths), 2),
        tokens=sum(lengths),
        longest_trained=max(sample.trained_tokens for sample in samples),
        trained_tokens=sum(sample.trained_tokens for sample in samples),
        cut_rows=sum(sample.cut_tokens > 0 for sample in samples),
        quantiles={str(share): sorted(lengths)[math.ceil(share * len(lengths)) - 1] for share in QUANTILES},
    )


def hold_out(samples: list[Each], share: float, seed: int) -> tuple[list[Each], list[Each]]:
    """(training, held-out) rows or samples: the same seed holds out the same ones, at least one, at most 500."""
    import random

    count = min(500, max(1, round(len(samples) * share)))
    if len(samples) < 2:
        raise BadInput("data", "one row cannot be split into training and validation", "give --valid FILE or more rows")
    chosen = set(random.Random(f"hold out {seed}").sample(range(len(samples)), count))
    return (
        [sample for i, sample in enumerate(samples) if i not in chosen],
        [sample for i, sample in enumerate(samples) if i in chosen],
    )
