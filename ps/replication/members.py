"""Who else holds the slots of which this server is primary: owners by the view, and learners."""

import numpy as np
from numpy.typing import NDArray

from hashring.columns import any_of, first_of
from hashring.view import View
from ps.kernels.replicate import (
    ADMITTED,
    ASKED,
    COPIED,
    COPY,
    HOPELESS,
    IDLE,
    JOINING,
    LEARNING,
    OWNER,
    STREAM,
    WAITED,
)
from ps.rowblock import TERM_SHIFT

__all__ = [
    "ADMITTED",
    "ASKED",
    "COPIED",
    "COPY",
    "HOPELESS",
    "IDLE",
    "JOINING",
    "LEARNING",
    "OWNER",
    "STREAM",
    "WAITED",
    "Members",
]

COUNTER_MAX = (1 << TERM_SHIFT) - 1

LEARNERS = 2
"""Learners of one slot at a time."""


class Members:
    """Arrays[slots, C]: the columns of other owners, then LEARNERS columns (see ps.kernels.replicate).

    targets int64: the position from which a learner that is waited for is level. any, learning: whether there may be
    members, and learners, at all.
    """

    def __init__(self, slots: int, owners: int) -> None:
        shape = (slots, owners + LEARNERS)
        self.owner_columns = owners
        self.peers: NDArray[np.int16] = np.full(shape, -1, np.int16)
        self.modes: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        self.ranks: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        self.acked: NDArray[np.int64] = np.full(shape, -1, np.int64)
        self.targets: NDArray[np.int64] = np.zeros(shape, np.int64)
        self.any = self.learning = False

    @classmethod
    def of(
        cls, view: View, me: int, numbers: NDArray[np.int16], before: "Members", same: NDArray[np.bool_]
    ) -> "Members":
        """Members of the slots whose primary is server `me`; numbers int16[servers + 1]: of the living ones.

        same bool[slots]: slots whose term goes on, which keep what is known of them.
        """
        owners = view.owners()
        new = cls(len(owners), owners.shape[1] - 1)
        mine = owners[:, 0] == me
        fresh, kept = np.flatnonzero(mine & ~same), np.flatnonzero(mine & same)
        n = new.owner_columns
        columns = [(c, c) for c in range(min(n, before.owner_columns))]
        columns += [(n + c, before.owner_columns + c) for c in range(LEARNERS if before.learning else 0)]
        for name in ("peers", "modes", "ranks", "acked", "targets"):
            old, now = getattr(before, name), getattr(new, name)
            for here, there in columns:
                now[kept, here] = old[kept, there]
        new.peers[fresh, :n] = numbers[owners[fresh, 1:]]
        new.modes[fresh, :n] = STREAM
        new.ranks[fresh, :n] = OWNER
        if before.learning:
            learners = new.peers[:, n:]
            slots, at = np.nonzero((learners >= 0) & ~np.isin(learners, numbers))
            new.drop(slots, n + at)  # a learner whose process is dead can be named by no view
        new.any = bool((new.peers >= 0).any())
        new.learning = bool((new.peers[:, n:] >= 0).any())
        return new

    def behind(self, positions: NDArray[np.int64]) -> int:
        """Changes that the other owner which is farthest behind in its slot lacks; positions: of the slots."""
        n = self.owner_columns
        slots, columns = np.nonzero(self.peers[:, :n] >= 0)
        counters = positions[slots] & COUNTER_MAX
        # Whoever stands in an older term lacks all of this one.
        lacking = np.minimum(positions[slots] - self.acked[slots, columns], counters)
        return int(lacking.max(initial=0))

    def column_of(self, slots: NDArray[np.int64], peer: int) -> NDArray[np.int64]:
        """The column of a peer in each slot, -1 where it is no member."""
        at = self.peers[slots] == peer
        return first_of(at)

    def where(self, peer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(slots, columns) of a peer."""
        slots, columns = np.nonzero(self.peers == peer)
        return slots, columns

    def add_learner(self, slots: NDArray[np.int64], peer: int) -> NDArray[np.int64]:
        """Give a peer a learner's column in slots where it is no member and one is free; those slots."""
        slots = slots[~any_of(self.peers[slots] == peer)]
        free = first_of(self.peers[slots, self.owner_columns :] < 0)
        slots, columns = slots[free >= 0], free[free >= 0] + self.owner_columns
        self.peers[slots, columns] = peer
        self.modes[slots, columns] = IDLE
        self.ranks[slots, columns] = LEARNING
        self.acked[slots, columns] = -1
        if len(slots):
            self.any = self.learning = True
        return slots

    def rouse(self, slots: NDArray[np.int64], columns: NDArray[np.int64] | None = None) -> NDArray[np.int16]:
        """Copies in these slots (all, or in one column of each) rest no longer; the peers that have them."""
        if columns is None:
            slots, columns = np.repeat(slots, self.modes.shape[1]), np.tile(np.arange(self.modes.shape[1]), len(slots))
        rested = self.modes[slots, columns] == COPIED
        slots, columns = slots[rested], columns[rested]
        self.modes[slots, columns] = IDLE
        return np.unique(self.peers[slots, columns])

    def drop(self, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """Forget learners."""
        self.peers[slots, columns] = -1
        self.modes[slots, columns] = IDLE
        self.ranks[slots, columns] = LEARNING
        self.acked[slots, columns] = -1
