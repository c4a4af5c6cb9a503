"""How fast a server copies slots to others: as fast as it may, and as the requests that it answers let it.

Requests come first. That they wait, for the data thread or for a core of the host, shows in the shell's ticks, which
wait just as long: copies take what is left while ticks are about LATE_S late, less while they are later. The law is
that of LEDBAT (RFC 6817): a rate that rises and falls with the distance of a smoothed delay from its target.
"""

from dataclasses import dataclass

LATE_S = 0.0015
"""How late ticks may be on the average. On a busy machine of two cores, half of the requests took ten times as long as
on a quiet one at 2 ms, and twice as long at 0.8."""

SMOOTHING, STEP, FALL_MAX = 0.2, 0.15, 2.0
"""Weight of the newest tick; what one tick changes the rate by, at the most when it rises; how many times as fast it
may fall."""

SLOWEST, FASTEST = 2 * 2**20, 512 * 2**20
"""Bytes a second: what copies get at least (slots lack a copy meanwhile), unless they are limited to less; and more
than a data thread can send."""


@dataclass(slots=True)
class Pace:
    """An allowance of bytes for copies, that grows with time at a rate of bytes a second."""

    allowance: float = SLOWEST / 10
    rate: float = SLOWEST
    late: float = 0.0

    def tick(self, elapsed: float, late: float, limit: float, burst_s: float) -> None:
        """Time goes by: the last tick came `late` seconds after it was due. limit: bytes a second, 0 is none.

        burst_s: seconds for which an allowance that is not used adds up.
        """
        self.late += (late - self.late) * SMOOTHING
        distance = max(-FALL_MAX, (LATE_S - self.late) / LATE_S)
        self.rate = min(max(SLOWEST, self.rate * (1 + STEP * distance)), limit or FASTEST, FASTEST)
        self.allowance = min(self.allowance + elapsed * self.rate, self.rate * burst_s)

    def rest(self) -> None:
        """Nothing is copied: what is copied next begins slowly."""
        self.rate = min(self.rate, SLOWEST)
