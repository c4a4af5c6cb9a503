"""What is copied to learners: how fast, in which lots, and when a copy rests."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from ps.replication.actions import ReplicationLimits
from ps.replication.links import GATHER_S, Link
from ps.replication.pace import Pace
from ps.slots import complete
from ps.store import Store

_WINDOW_BYTES = 24
"""What a client that is known takes in a block, for each slot of it."""

_LOT_MAX = 4
"""How many times as many slots are brought up to date together, at the most, where few of their rows have changed: to
find those takes a look at all of them."""


def row_bytes(store: Store) -> int:
    """Bytes of the widest row, with its state."""
    return max((arena.key.row_bytes for arena in store.held.registry.arenas), default=0)


class Copies:
    """Those of one server. made, rows, bytes: copies that were begun, and what was sent in them. elsewhere: whether any
    are being made, by the last word of the controller."""

    def __init__(self, store: Store, limits: ReplicationLimits) -> None:
        self.store = store
        self.limits = limits
        self.made = self.rows = self.bytes = 0
        self.elsewhere = False
        self.pace = Pace()

    def begin(self, link: Link, slots: NDArray[np.int64]) -> None:
        """Have slots copied to a peer from the beginning, behind those before."""
        self.made += 1
        rows_max = max(1, self.limits.copy_bytes // max(1, row_bytes(self.store)))
        link.copies.append(self.store.copy(slots, self.made, rows_max))

    def tick(self, links: Collection[Link], elapsed: float, late: float) -> None:
        """Time goes by, in which requests waited so long here: so much more may be spent on copies."""
        move = self.store.view.move if self.store.view is not None else None
        limits = (self.limits.copy_bytes_per_s, move.bytes_per_s if move is not None else 0)
        busy = [link for link in links if link.copying]
        if not busy:
            self.pace.rest()
        there = max((link.late for link in busy), default=0.0)
        limit = min((limit for limit in limits if limit), default=0)
        sources = max((link.sources for link in busy), default=1)
        self.pace.tick(elapsed, late, there, limit, 2 * self.limits.tick_max_s, sources)

    def may_mend(self, link: Link) -> bool:
        """Whether the next lot of late copies may be brought up to date: one after another, at the rate of copies."""
        return self.pace.allowance > 0 and not link.mending

    def lot(self, link: Link, slots: NDArray[np.int64]) -> int:
        """How many of these slots, from the first on, are brought up to date together: as many as make a part of a
        copy if up to twice as many of their rows have changed as in the lot before; at least one."""
        sizes = self._whole(slots[: self.limits.repair_slots])
        most = self.limits.bulk_bytes_max / min(1.0, max(1 / _LOT_MAX, 2 * link.changed))
        return max(1, int(np.searchsorted(np.cumsum(sizes), most, "right")))

    def mended(self, link: Link, slots: NDArray[np.int64], size: int) -> None:
        """A lot was sent, in so many bytes."""
        self.pace.allowance -= size
        link.changed = size / max(1, int(self._whole(slots).sum()))

    def _whole(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes that each of the slots would take if all of its rows had changed."""
        held = self.store.held
        sizes = np.full(len(slots), len(held.clients) * _WINDOW_BYTES)
        for arena in held.registry.arenas:
            sizes += arena.counts(slots) * arena.key.row_bytes
        return sizes

    def gathered(self, link: Link, links: Collection[Link]) -> bool:
        """Whether slots of a peer that rest are to be brought up to date: all copies are there, of whomever, or have
        not come for GATHER_S. What is streamed to until the last is there costs a message for every push."""
        if link.copied_s is None:
            return False
        others = (other for other in links if other.silent < self.limits.silent_s)  # who hangs is not waited for
        going_on = self.elsewhere or any(other.copies or other.bulk_bytes for other in others)
        return not going_on or link.copied_s >= GATHER_S

    def may_rest(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which slots may rest once they are copied: while servers join or leave, those with all copies."""
        view = self.store.view
        if view is None or view.move is None:
            return np.zeros(len(slots), np.bool_)
        return complete(view, view.owners())[slots]
