"""What the controller knows of each server process: pings counted, and what it said last. No clock decides."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ps.replication import NOTHING, Standing

REFUSED_MAX = 2
"""Pings for which nobody listened at any address of a process, after which it leaves its slots."""


@dataclass(slots=True)
class Health:
    """One process. missed: pings unanswered, one after another. refused: those since the last answer for which nobody
    was there any more. heard: whether it ever answered this controller."""

    incarnation: int
    missed: int = 0
    refused: int = 0
    awaiting: bool = False
    heard: bool = False
    epoch: int = 0
    standing: Standing = NOTHING

    @property
    def fresh(self) -> bool:
        """Whether the last ping but the present one was answered: what it said holds."""
        return self.heard and self.missed == 0


@dataclass(slots=True)
class Disputes:
    """Who complained of whom, and for how much longer that counts (in rounds of pings)."""

    rounds: int
    left: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, one: int, other: int) -> None:
        """`one` complains of `other`."""
        self.left[(one, other)] = self.rounds

    def age(self) -> None:
        """A round has passed."""
        self.left = {pair: n - 1 for pair, n in self.left.items() if n > 1}

    def settle(self, one: int) -> None:
        """It has no dispute any more."""
        self.left = {pair: n for pair, n in self.left.items() if one not in pair}

    def between(self, one: int, other: int) -> bool:
        """Whether either complained of the other lately."""
        return (one, other) in self.left or (other, one) in self.left

    def opponents(self, one: int) -> set[int]:
        """Everybody whom it is in dispute with."""
        return {b if a == one else a for a, b in self.left if one in (a, b)}


def silent(servers: dict[int, Health], limit: int) -> set[int]:
    """Processes that have left `limit` pings unanswered; none where more than half of all are quiet at once: then the
    fault is likely the controller's own, and only Ray's word counts. Where nobody listens any more, REFUSED_MAX pings
    are enough, and others do not matter."""
    gone = {h.incarnation for h in servers.values() if h.refused >= REFUSED_MAX}
    quiet = [h for h in servers.values() if h.missed > limit // 2 and h.incarnation not in gone]
    if 2 * len(quiet) > len(servers):
        return gone
    return gone | {h.incarnation for h in quiet if h.missed >= limit}


def incarnations(view_servers: tuple[object, ...]) -> NDArray[np.uint64]:
    """uint64[servers + 1] of a view's servers; 0 for "no owner"."""
    return np.array([s.incarnation for s in view_servers] + [0], np.uint64)  # type: ignore[attr-defined]
