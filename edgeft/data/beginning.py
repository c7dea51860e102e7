"""What do all rows begin with (a chat template's system message), and is that worth reading once for all? (no torch)"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from edgeft.data.samples import IGNORED, Sample
from edgeft.data.scoring_groups import worth_sharing

MOST_TOKENS = 256  # of a beginning: a cache of more would take what no plan counts


class Common:
    """Tokens that all rows seen so far begin with, before anything that a trained token is predicted from."""

    def __init__(self) -> None:
        self.first: array[int] | None = None
        self.tokens = MOST_TOKENS

    def see(self, sample: Sample) -> None:
        """One more row."""
        ids, most = sample.packed_ids, min(self.tokens, _before_trained(sample, self.tokens))
        if self.first is None:
            self.first = ids[:most]
        if ids[:most] != self.first[:most]:
            most = next(place for place in range(most) if ids[place] != self.first[place])
        self.tokens = most


def shared_tokens(samples: Sequence[Sample]) -> int:
    """Tokens that all of some rows begin with, 0 where reading them once would save too little."""
    common = Common()
    for sample in samples:
        common.see(sample)
    return worth_sharing(common.tokens, [len(sample) for sample in samples])


def _before_trained(sample: Sample, most: int) -> int:
    """Tokens before the one that the first trained one is predicted from, at most so many; 0 where none trains."""
    labels = sample.packed_labels[1 : most + 2]
    if labels.count(IGNORED) == len(labels):
        return most if sample.trained_tokens else 0
    return next(place for place, label in enumerate(labels) if label != IGNORED)
