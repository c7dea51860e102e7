"""How many rows decide? They are drawn at random until it is known what all of them would say.

The question is whether the mean of a number over *all* rows is at most zero. Rows come one at a time, none twice, and
one may look after each of them: what is fixed is how often the answer is another than that of all rows, LEVEL at most,
whatever the rows are and however often one looks.

Each row is a bet against "no". Its odds are fair where the mean of all rows is zero: what is left then has a mean that
is known, and the stake is set before the row is seen. Money that does not grow on average reaches 1 / LEVEL times what
it was with a chance of LEVEL at most (Ville's inequality). Waudby-Smith and Ramdas, Confidence sequences for sampling
without replacement (NeurIPS 2020); votes are audited so (Stark, ALPHA: Audit that learns from previously hand-audited
ballots, 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEVEL = 0.025  # that rows pass what all of them would not let pass, and as much the other way round
STAKE = 0.9  # of what a row can lose: one at its worst leaves a tenth


@dataclass
class Mean:
    """Is the mean of `rows` numbers at most zero? `reach` is how far from zero a row can lie where it is `sure`.

    Else it is twice as far as any row that was seen, if that is more. A row that lies further off ends the bet that it
    stands against, and all rows are drawn; one that is not drawn is not guarded against.
    """

    rows: int
    reach: float
    sure: bool = True
    seen: int = 0
    total: float = 0.0
    squares: float = 0.0
    below: float = 0.0  # log of the money that is bet on a mean of at most zero
    above: float = 0.0  # of that on one above it

    def know(self, value: float) -> None:
        """A row that was taken in any case: no bet, but what is left has another mean."""
        self.seen += 1
        self.total += value
        self.squares += value * value
        if not self.sure:
            self.reach = max(self.reach, 2 * abs(value))

    def draw(self, value: float) -> None:
        """The next row at random."""
        left = -self.total / (self.rows - self.seen)  # the mean of what is left, were that of all zero
        self.below = _after(self.below, self._stake(left, 1.0), left - value, self.reach - left)
        self.above = _after(self.above, self._stake(left, -1.0), value - left, self.reach + left)
        self.know(value)

    def _stake(self, left: float, sign: float) -> float:
        """What would have grown fastest on the rows so far (Kelly), as far as a row can bear it."""
        mean = self.total / self.seen if self.seen else 0.0
        gain, room = sign * (left - mean), self.reach - sign * left
        if gain <= 0 or room <= 0:
            return 0.0
        spread = (self.squares - self.seen * mean * mean + self.reach**2 / 100) / (self.seen + 1)
        return min(gain / (spread + gain * gain), STAKE / room)

    @property
    def low(self) -> bool:
        """Whether it is decided that the mean is at most zero."""
        return self.total <= 0 and (self.seen == self.rows or self.below >= -math.log(LEVEL))

    @property
    def high(self) -> bool:
        """Whether it is decided that it is above."""
        return self.total > 0 and (self.seen == self.rows or self.above >= -math.log(LEVEL))


def _after(money: float, stake: float, gain: float, room: float) -> float:
    """Log of the money after a bet; nothing is left of it where a row goes further than it could."""
    return -math.inf if room < -gain else money + math.log1p(stake * gain)
