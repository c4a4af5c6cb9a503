"""How fast a server copies slots to others: as fast as it may, and as the requests that it answers let it.

Requests come first. How long they wait, here and at whoever takes the copies, the shell sees: copies take what is left
while requests wait for LATE_S, less while they wait longer. The law is that of LEDBAT (RFC 6817): a rate that rises and
falls with the distance of a smoothed delay from its target.
"""

from dataclasses import dataclass

LATE_S = 0.001
"""How long requests may wait for a data thread, on the average."""

PERIOD_S = 0.05
SMOOTHING, STEP, FALL_MAX = 0.2, 0.15, 2.0
"""Weight of the newest PERIOD_S; what they change the rate by, at the most when it rises; how many times as fast it may
fall."""

START_LATE_S = LATE_S / 20
"""While requests wait no longer than this, as where there are none, the rate doubles in PERIOD_S."""

SLOWEST, FASTEST = 4 * 2**20, 512 * 2**20
"""Bytes a second: what copies get at least (slots lack a copy meanwhile), unless they are limited to less; and more
than a data thread can send."""

TOGETHER = 12 * 2**20
"""Bytes a second that those who copy to one server get at least, all told: whoever is left has what others had."""


@dataclass(slots=True)
class Pace:
    """An allowance of bytes for copies, that grows with time at a rate of bytes a second. late: seconds for which
    requests wait here."""

    allowance: float = SLOWEST / 10
    rate: float = SLOWEST
    late: float = 0.0

    def tick(self, elapsed: float, late: float, there: float, limit: float, burst_s: float, sources: int) -> None:
        """Time goes by, in which requests waited for `late` seconds; there: the same of whoever takes the copies.

        sources: how many copy to them. limit: bytes a second, 0 is none. burst_s: seconds for which an allowance that
        is not used adds up.
        """
        weight = elapsed / PERIOD_S
        self.late += (late - self.late) * min(1.0, SMOOTHING * weight)
        late = max(self.late, there)
        growth = weight if late < START_LATE_S else STEP * weight * max(-FALL_MAX, (LATE_S - late) / LATE_S)
        least = max(SLOWEST, TOGETHER / sources)
        self.rate = min(max(least, self.rate * (1 + growth)), limit or FASTEST, FASTEST)
        self.allowance = min(self.allowance + elapsed * self.rate, self.rate * burst_s)

    def rest(self) -> None:
        """Nothing is copied: what is copied next begins slowly."""
        self.rate = min(self.rate, SLOWEST)
