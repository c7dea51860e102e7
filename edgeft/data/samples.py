"""Which tokens is a row, and which of them train? Encoded as the device will encode its prompt. (no torch)"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from edgeft.data.conversation import Row
from edgeft.data.scoring_groups import Size
from edgeft.data.tokenizer import ENCODE_TEXTS, TextTokenizer, token_at
from edgeft.errors import BadInput

Held = TypeVar("Held")
HELD_OUT_SHARE = 0.05  # of the training rows, when no validation data is given
IGNORED = -100  # the label of a token that is read but not trained on (torch's cross_entropy default)
SPLIT = "the prompt alone has other tokens than in the whole text: its own are kept, the answer goes on behind them"
ENDED = "the chat template closes an answer with no end token: one is added behind the last answer"


class Sample:
    """One row as tokens: `ids` and `labels` have equal length; labels are IGNORED where nothing is trained.

    Kept in `packed_ids` and `packed_labels`, 4 bytes a token each; `len(sample)` is the number of tokens.
    `prompt_tokens` is where the last trained answer starts, 0 where nothing is asked. `trained_tokens` counts the
    labels that a token before them predicts.
    """

    __slots__ = ("cut_tokens", "packed_ids", "packed_labels", "prompt_tokens", "trained_tokens")

    def __init__(self, ids: Sequence[int], labels: Sequence[int], prompt_tokens: int, cut_tokens: int = 0) -> None:
        self.packed_ids = array("i", ids)
        self.packed_labels = self.packed_ids if labels == ids else array("i", labels)
        self.prompt_tokens, self.cut_tokens = prompt_tokens, cut_tokens
        trained = len(self) - self.packed_labels.count(IGNORED)
        self.trained_tokens = trained - (len(self) > 0 and self.packed_labels[0] != IGNORED)

    def __len__(self) -> int:
        return len(self.packed_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and all(getattr(self, key) == getattr(other, key) for key in self.__slots__)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Sample({self.ids}, {self.labels}, {self.prompt_tokens}, {self.cut_tokens})"

    @property
    def ids(self) -> list[int]:
        return self.packed_ids.tolist()

    @property
    def labels(self) -> list[int]:
        return self.packed_labels.tolist()

    @property
    def size(self) -> Size:
        """What scoring it takes."""
        return Size(len(self.ids), self.prompt_tokens, self.trained_tokens)

    @property
    def has_prompt(self) -> bool:
        return self.prompt_tokens > 0

    @property
    def prompt(self) -> list[int]:
        """The ids that a device is asked with."""
        return self.packed_ids[: self.prompt_tokens].tolist()


def to_samples(rows: Sequence[Row], tokenizer: TextTokenizer, max_length: int | None) -> list[Sample]:
    """Rows as tokens, in order. One longer than `max_length` loses the start of its prompt, then its answer's end.

    A row is encoded as a whole, and a token trains when all of it lies in a trained span. The tokens before the last
    answer are always those of the prompt encoded alone, which is what a device has when it answers: where the whole
    text's differ, or one of them reaches over the border, the answer is encoded as a text that goes on from there.
    """
    return [sample for sample, _ in each_sample(rows, tokenizer, max_length)]


def each_sample(
    rows: Iterable[Row], tokenizer: TextTokenizer, max_length: int | None, remarks: Counter[str] | None = None
) -> Iterator[tuple[Sample, Row]]:
    """`to_samples`, a few rows at a time; what was to be said of the rows is counted in `remarks`, by rows."""
    remarks = Counter() if remarks is None else remarks
    rows = iter(rows)
    while part := list(islice(rows, ENCODE_TEXTS)):
        encodings = tokenizer.encodings([row.text for row in part])
        prompts = iter(tokenizer.encode([row.prompt for row in part if row.has_prompt]))
        for row, encoding in zip(part, encodings, strict=True):
            sample, more = _sample(row, encoding, next(prompts) if row.has_prompt else [], tokenizer)
            remarks.update(dict.fromkeys((*row.remarks, *more), 1))
            yield _cut(sample, max_length, tokenizer.prefix_ids), row


def _sample(row: Row, encoding: Any, prompt: list[int], tokenizer: TextTokenizer) -> tuple[Sample, list[str]]:
    ids, length = list(encoding.ids), len(row.text)
    spans = _tokens_of(encoding, row.trained, 0, length)
    start, remarks = len(prompt), list[str]()
    if row.has_prompt and (token_at(encoding, row.border, length) != (start, False) or ids[:start] != prompt):
        encoding = tokenizer.encodings([row.prompt])[0]
        spans = _tokens_of(encoding, [span for span in row.trained if span[1] <= row.border], 0, row.border)
        answer, first, anchor = tokenizer.encode_after(row.text[row.border :])
        shift = row.border - anchor
        ids = [*prompt, *answer.ids[first:]]
        spans += [(max(start, lo - first + start), hi - first + start)
                  for lo, hi in _tokens_of(answer, [row.trained[-1]], shift, length - shift)]  # fmt: skip
        remarks.append(SPLIT)
    prefix = tokenizer.prefix_ids if row.format == "plain" else []  # a chat template writes its own
    labels = [IGNORED] * len(ids)
    for lo, hi in spans:
        labels[lo:hi] = ids[lo:hi]
    stops = tokenizer.stop_ids
    ends = bool(ids) and ids[-1] in stops if row.format == "plain" else any(token in stops for token in labels[start:])
    if not ends:
        ids.append(tokenizer.eos_id)
        labels.append(tokenizer.eos_id)
        remarks += [ENDED] if row.format == "chat" else []
    labels = [IGNORED] * len(prefix) + labels
    ids = [*prefix, *ids]
    return Sample(ids, labels, len(prefix) + start if row.has_prompt else 0), remarks


def _tokens_of(encoding: Any, spans: Sequence[tuple[int, int]], shift: int, length: int) -> list[tuple[int, int]]:
    """Ranges of the tokens that lie wholly in spans of characters; the encoded text starts `shift` behind the row's."""

    def first_inside(character: int) -> int:
        found, split = token_at(encoding, character, length)
        while split:
            found += 1
            split = found < len(encoding) and encoding.token_to_chars(found)[0] < character
        return found

    return [
        (first_inside(lo - shift) if lo > shift else 0, token_at(encoding, hi - shift, length)[0]) for lo, hi in spans
    ]


def _cut(sample: Sample, max_length: int | None, prefix_ids: list[int]) -> Sample:
    excess = len(sample) - (max_length or len(sample))
    if excess <= 0:
        return sample
    ids, labels = sample.ids, sample.labels
    prefix = len(prefix_ids) if ids[: len(prefix_ids)] == prefix_ids else 0
    from_prompt = min(excess, max(0, sample.prompt_tokens - prefix - 1))
    ids = ids[:prefix] + ids[prefix + from_prompt :]
    labels = labels[:prefix] + labels[prefix + from_prompt :]
    start = sample.prompt_tokens - from_prompt
    return Sample(ids[:max_length], labels[:max_length], start, excess)


def validation_rows(valid: Sequence[Held], patience: int | None, most: int) -> tuple[list[Held], list[Held]]:
    """(rows that are scored, rows that say when a run stops): with patience every second one, so that none is both.

    Raises BadInput where there are too few for that.
    """
    if not patience:
        return list(valid), []
    if len(valid) < 2:
        problem = f"{len(valid)} validation row cannot both stop a run and score it"
        raise BadInput("patience", problem, "give --valid FILE with more rows, or leave patience out")
    return list(valid[::2]), list(valid[1::2][:most])


def held_out_count(rows: int, share: float = HELD_OUT_SHARE) -> int:
    """How many of so many training rows are held out where no validation data is given: at least one, at most 500."""
    return min(500, max(1, round(rows * share)))


def hold_out(samples: Sequence[Held], share: float, seed: int) -> tuple[list[Held], list[Held]]:
    """(training, held-out) samples: every run with the same seed holds out the same ones, at least one, at most 500."""
    import random

    count = held_out_count(len(samples), share)
    if len(samples) < 2:
        raise BadInput("data", "one row cannot be split into training and validation", "give --valid FILE or more rows")
    chosen = set(random.Random(f"hold out {seed}").sample(range(len(samples)), count))
    return (
        [sample for i, sample in enumerate(samples) if i not in chosen],
        [sample for i, sample in enumerate(samples) if i in chosen],
    )
