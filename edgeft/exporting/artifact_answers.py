"""What must a target's runtime offer to be compared, and what does a bundle answer to a row?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgeft.data.grammar import Grammar, HeldTo
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.exporting.label_search import known_enough
from edgeft.models.evaluate import answer_tokens, asked_for, cut_at, is_exact, judge, may_become


class Artifact(Protocol):
    """What a target's runtime must offer to be compared."""

    folder: Path

    def close(self) -> None: ...
    def with_full_cache(self) -> Artifact: ...
    def cached(self, ids: list[int], layers: int) -> list[tuple[Any, Any]]: ...
    def each_pass(self, ids: list[int], first: int = 0) -> Iterator[Any]: ...
    def follow(
        self, ids: list[int], first: int, prompt_tokens: int, max_new_tokens: int, stop_ids: Sequence[int],
        take: Callable[[Any], None], hopeless: Callable[[list[int]], bool],
    ) -> list[int]: ...  # fmt: skip
    def choose(self, ids: list[int], enough: Callable[[Any], bool] | None = None) -> Any: ...
    def write(self, ids: list[int], most: int) -> list[int] | None: ...
    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]: ...


def answered(
    artifact: Artifact, sample: Sample, at: Sequence[int], tokenizer: TextTokenizer, held_to: HeldTo,
    asked: Sequence[int], take: Callable[[Any], None], whole: bool,
) -> tuple[list[int], bool]:  # fmt: skip
    """(the ids of the bundle's answer, whether it is right); `take` gets the logits of the row's own tokens.

    Those from the first to the last of the positions `at`, whose next tokens are trained. `asked` begins with the label
    that the row asks for. An answer that is not wanted `whole` ends where it is decided whether it is right.
    """
    if not held_to and sample.prompt_tokens:
        hopeless = (lambda made: False) if whole else functools.partial(cannot_match, tokenizer, sample)
        most, stops = answer_tokens([sample]), tokenizer.stop_ids
        answer = artifact.follow(sample.ids[: at[-1] + 2], at[0], sample.prompt_tokens, most, stops, take, hopeless)
        return answer, is_exact(tokenizer, sample, answer)
    answer, right = list[int](), False
    if isinstance(held_to, Grammar):
        made = artifact.write(sample.prompt, answer_tokens([sample]))
        answer, right = made or [], made is not None and is_exact(tokenizer, sample, made)
    elif held_to:
        # enough for calibration too
        search = artifact.choose(sample.prompt, None if whole else known_enough(asked[0]))
        chosen = int(search.found[0][1])
        answer, right = cut_at(held_to[chosen].ids, tokenizer.stop_ids), chosen == asked[0]
    for logits in artifact.each_pass(sample.ids[: at[-1] + 1], at[0]):
        take(logits)
    return answer, right


def along(artifact: Artifact, sample: Sample, tokenizer: TextTokenizer, likely: Sequence[int]) -> bool:
    """Whether the bundle's answer is right, by its most likely token at each trained one; decoded where those are open.

    Read in one pass with the row's own answer: the same numbers as decoding gives but for the order of their sums.
    """
    if (right := judge(tokenizer, sample, likely)) is not None:
        return right
    return is_exact(tokenizer, sample, artifact.greedy(sample.prompt, answer_tokens([sample]), tokenizer.stop_ids))


def cannot_match(tokenizer: TextTokenizer, sample: Sample, made: list[int]) -> bool:
    """Whether no continuation of `made` can be what the row asks for."""
    return not may_become(tokenizer, asked_for(sample, tokenizer.stop_ids)[0], made)
