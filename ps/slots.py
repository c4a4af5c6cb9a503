"""What belongs to a slot as a whole, beside the arenas: role, position, lineage, and the deletions it remembers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashring.columns import any_of, count_of
from hashring.view import View
from ps.errors import RequestError
from ps.memory import Reservation, reserve
from ps.rowblock import LINEAGE, TERM_SHIFT

NONE, OWNER, PRIMARY = 0, 1, 2
"""Roles: an owner answers pulls; the primary also takes pushes and exports."""

Gone = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]
"""Deletions: which slot of those asked for, table numbers, ids, versions."""

NOTHING_GONE: Gone = (np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class Span:
    """Slots [first, first + count) of a group; `bits` of a token choose one."""

    first: int
    count: int
    bits: int


class SlotTable:
    """Arrays over global slot numbers, of reserved memory: what is never touched costs nothing.

    roles uint8 (what may be done now), positions int64, horizon int64 (deletions up to it may be forgotten).
    """

    def __init__(self, slots_max: int, shared: bool = False) -> None:
        self.slots_max = slots_max
        self.roles_memory = Reservation((slots_max,), np.uint8, huge=False, shared=shared)
        self.roles: NDArray[np.uint8] = self.roles_memory.array
        self.named: NDArray[np.uint8] = reserve((slots_max,), np.uint8, huge=False)
        self.positions: NDArray[np.int64] = reserve((slots_max,), np.int64, huge=False)
        self.horizon: NDArray[np.int64] = reserve((slots_max,), np.int64, huge=False)
        self.terms: NDArray[np.int64] = reserve((slots_max,), np.int64, huge=False)
        self._lineage: NDArray[np.int64] = reserve((slots_max, LINEAGE), np.int64, huge=False)
        self._starts: NDArray[np.uint64] = reserve((slots_max,), np.uint64, huge=False)
        self._bits: NDArray[np.int64] = reserve((slots_max,), np.int64, huge=False)
        self.spans: tuple[Span, ...] = ()
        self.filling: dict[int, tuple[int, int]] = {}
        """Slots that are being copied here: (copy, next part). They are neither read nor written meanwhile."""

    def install(self, view: View, incarnation: int) -> NDArray[np.int64]:
        """Take roles and terms from a view; returns the slots whose copies are to be freed, int64[k].

        `named` is the role that the view gives, `roles` the same save for slots that are still being filled. A copy
        that the view does not name (a former owner's, or a learner's) is kept, unread, through its term, and beyond
        while the slot has fewer owners than it should: whoever returns with it needs only what it missed.
        """
        if view.slots_total > self.slots_max:
            raise RequestError(f"the view has {view.slots_total} slots; a server takes {self.slots_max} (slots_max)")
        self.spans = tuple(
            Span(g.first, g.slots, g.slots.bit_length() - 1) for g in sorted(view.groups, key=lambda g: g.first)
        )
        for span in self.spans:
            inside = slice(span.first, span.first + span.count)
            self._bits[inside] = span.bits
            if span.bits:
                self._starts[inside] = np.arange(span.count, dtype=np.uint64) << np.uint64(64 - span.bits)
        me = next((i for i, s in enumerate(view.servers) if s.incarnation == incarnation), -2)
        owners = view.owners()
        named = np.where(any_of(owners == me), OWNER, NONE).astype(np.uint8)
        named[owners[:, 0] == me] = PRIMARY
        held = (self.positions[: len(named)] > 0) | (self.named[: len(named)] != NONE)
        for slot in self.filling:
            held[slot] = True
        renewed = self.terms[: len(named)] != view.terms()
        gone = np.flatnonzero((named == NONE) & held & renewed & complete(view, owners))
        self.terms[: len(named)] = view.terms()
        self.named[: len(named)] = named
        self.roles[: len(named)] = named
        for slot in self.filling:
            self.roles[slot] = NONE
        terms = view.terms() << TERM_SHIFT
        opened = np.flatnonzero((named == PRIMARY) & (terms > self.positions[: len(terms)]))
        self._open(opened, terms[opened])
        return gone

    def abandoned(self, view: View, incarnation: int) -> NDArray[np.int64]:
        """Slots that are being copied here, and that a view makes this server the primary of: they were given up in the
        middle of a restore, and nobody sends the rest. int64[k]"""
        some = np.array([slot for slot in self.filling if slot < view.slots_total], np.int64)
        primaries = view.owners()[some, 0]
        return some[[i >= 0 and view.servers[i].incarnation == incarnation for i in primaries]]

    def _open(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Begin terms at counter 0; the positions reached so far join the lineage."""
        held = slots[self.positions[slots] > 0]
        self.add_lineage(held, self.positions[held])
        self.positions[slots] = positions

    def lineage(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Last positions of earlier terms, newest first: int64[l], offsets int64[s + 1]."""
        rows = self._lineage[slots]
        offsets = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(count_of(rows > 0), out=offsets[1:])
        return rows[rows > 0], offsets

    def set_lineage(self, slots: NDArray[np.int64], lineage: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        """The inverse of `lineage`."""
        self._lineage[slots] = 0
        counts = np.minimum(np.diff(offsets), LINEAGE)
        for depth in range(int(counts.max(initial=0))):
            has = counts > depth
            self._lineage[slots[has], depth] = lineage[offsets[:-1][has] + depth]

    def inherit(self, sources: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Slots stand where others do, with their past."""
        for array in (self.positions, self.horizon, self._lineage):
            array[slots] = array[sources]

    def add_lineage(self, slots: NDArray[np.int64], lasts: NDArray[np.int64]) -> None:
        """A term more, of which these are the last positions."""
        self._lineage[slots, 1:] = self._lineage[slots, :-1]
        self._lineage[slots, 0] = lasts

    def on_lineage(self, slots: NDArray[np.int64], since: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the positions `since` are on their slot's lineage: a change after each can be told, bool[s]."""
        now = self.positions[slots]
        good = (now >> TERM_SHIFT == since >> TERM_SHIFT) & (since <= now)
        past = self._lineage[slots]
        same = (past >> TERM_SHIFT == since[:, None] >> TERM_SHIFT) & (since[:, None] <= past)
        return (good | any_of(same)) & (since > 0)

    def break_with_past(self, slots: NDArray[np.int64], term: int) -> None:
        """What these hold is of another history, whose positions may look like older ones of this: from none up to
        `term`, nor up to the term that they stand in, can changes be told."""
        self.horizon[slots] = (np.maximum(term, self.positions[slots] >> TERM_SHIFT) + 1) << TERM_SHIFT

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Forget slots whose rows were freed."""
        self.positions[slots], self.horizon[slots], self._lineage[slots] = 0, 0, 0
        for slot in self.filling.keys() & set(slots.tolist()):
            del self.filling[slot]

    def live(self) -> NDArray[np.int64]:
        """Every slot of the view, int64."""
        return np.concatenate([np.arange(s.first, s.first + s.count) for s in self.spans] or [np.empty(0, np.int64)])

    def bounds(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Each slot's first token uint64[s], and how many bits of a token chose it int64[s]."""
        return self._starts[slots], self._bits[slots]


def complete(view: View, owners: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Slots that have as many owners as their group asks for, bool[slots]; those of no group any more too."""
    wanted = np.zeros(len(owners), np.int64)
    for g in view.groups:
        wanted[g.first : g.first + g.slots] = len(view.servers) if g.replicas == "all" else g.replicas
    enough: NDArray[np.bool_] = count_of(owners >= 0) >= wanted
    return enough


class Tombstones:
    """The newest deletions of a server, a bounded ring: what an incremental export tells besides changed rows.

    Where the ring has moved on, the slot's horizon rises: an export from before it sends the whole slot.
    """

    def __init__(self, capacity: int) -> None:
        self._slots = np.full(capacity, -1, np.int64)
        self._tables = np.zeros(capacity, np.int32)
        self._ids = np.zeros(capacity, np.int64)
        self._versions = np.zeros(capacity, np.int64)
        self._next = 0

    def add(
        self,
        slots: NDArray[np.int64],
        tables: NDArray[np.int32],
        ids: NDArray[np.int64],
        versions: NDArray[np.int64],
        horizon: NDArray[np.int64],
    ) -> None:
        """Remember deletions; raises the horizon of slots whose oldest ones are overwritten."""
        capacity = len(self._slots)
        if len(slots) > capacity:
            over = len(slots) - capacity
            np.maximum.at(horizon, slots[:over], versions[:over])
            slots, tables, ids, versions = slots[over:], tables[over:], ids[over:], versions[over:]
        at = (self._next + np.arange(len(slots))) % capacity
        old = at[self._slots[at] >= 0]
        np.maximum.at(horizon, self._slots[old], self._versions[old])
        self._slots[at], self._tables[at], self._ids[at], self._versions[at] = slots, tables, ids, versions
        self._next = int((self._next + len(slots)) % capacity)

    def move(self, table: int, slots_of: Callable[[NDArray[np.int64]], NDArray[np.int32]]) -> None:
        """A table's deletions lie in other slots from now on: those of their ids."""
        mine = np.flatnonzero((self._slots >= 0) & (self._tables == table))
        self._slots[mine] = slots_of(self._ids[mine])

    def of(self, slots: NDArray[np.int64], since: NDArray[np.int64]) -> Gone:
        """Deletions in these slots after `since`: index into slots, tables, ids, versions; by slot, oldest first."""
        if not len(slots):
            return NOTHING_GONE
        order = np.argsort(slots, kind="stable")
        known = slots[order]
        used = np.flatnonzero((self._slots >= known[0]) & (self._slots <= known[-1]) & (self._versions > since.min()))
        if not len(used):
            return NOTHING_GONE
        at = np.minimum(np.searchsorted(known, self._slots[used]), len(known) - 1)
        where = order[at]
        hit = (known[at] == self._slots[used]) & (self._versions[used] > since[where])
        used, where = used[hit], where[hit]
        order = np.lexsort((self._versions[used], where))
        used, where = used[order], where[order]
        return where, self._tables[used], self._ids[used], self._versions[used]

    def __len__(self) -> int:
        return int(np.count_nonzero(self._slots >= 0))
