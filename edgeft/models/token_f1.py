"""How much of an answer's words are those that were asked for: F1 as SQuAD defines it? (no torch)"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from edgeft.models.metrics import Metrics

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Small letters without punctuation and English articles, as SQuAD's script splits them."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(NO_PUNCTUATION)).split()


def token_f1(expected: str, given: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common; 1 for two texts without any."""
    wanted, written = words(expected), words(given)
    if not wanted or not written:
        return float(wanted == written)
    common = sum((Counter(wanted) & Counter(written)).values())
    return 2 * common / (len(wanted) + len(written))


def with_f1(metrics: Metrics, pairs: Sequence[tuple[str, str]]) -> Metrics:
    """Scores with the F1 of (expected, given) answers of some rows; as they are where none were written."""
    if not pairs:
        return metrics
    each = tuple(round(token_f1(expected, given), 4) for expected, given in pairs)
    return metrics.model_copy(update={"f1": math.fsum(each) / len(each), "f1_rows": len(each), "row_f1": each})
