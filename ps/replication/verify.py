"""Copies are compared: by digests of slots that the primary and another owner take at the same position.

The request travels in the stream behind all blocks sent before, so that the owner, if it took them, stands where the
primary stood when it asked. Whoever stands elsewhere by then, or judges by another view, was not compared.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ps.errors import RequestError
from ps.kernels.replicate import APART, BEHIND, TAKEN
from ps.replication.links import Flight, Link
from ps.replication.members import HOPELESS, STREAM
from ps.replication.primary import Primary
from ps.rowblock import TERM_SHIFT
from ps.slots import PRIMARY

_LAST = 2**64 - 1


@dataclass(slots=True, eq=False)
class Verification:
    """One comparison that was asked for. token: who asked, None for the sweep. left: answers that are missing.

    compared: copies that were. different: (slot, incarnation, whether it will be copied anew). skipped: slots of which
    some copy was not compared. done, cursor: of the slots asked for, the first `done` are finished, and the one after
    them up to token `cursor`.
    """

    token: Hashable
    repair: bool = False
    done: int = 0
    cursor: int = 0
    left: int = 1
    compared: int = 0
    different: list[tuple[int, int, bool]] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What one owner was asked to compare."""

    verification: Verification
    slots: NDArray[np.int64]


class Verifier:
    """The asking side; `compared` and `different` count copies of slots since the start."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self.compared = self.different = 0
        self._due = 0.0
        self._slot, self._cursor = -1, 0
        self._sweeping = False

    def verify(self, token: Hashable, slots: NDArray[np.int64], start: int = 0, repair: bool = False) -> Verification:
        """Compare as many of the slots, from the front, as are cheap enough; the first of them from token `start` on.

        `Answer` when all owners have answered, or cannot. Raises RequestError for a `start` outside the first slot.
        """
        asked = Verification(token, repair)
        low, last = self._part(asked, slots, start)
        slots = slots[: max(asked.done, 1)]
        store, m = self._primary.store, self._primary.members
        mine = store.held.slots.roles[slots] == PRIMARY
        asked.skipped.update(slots[~mine].tolist())
        slots = slots[mine]
        taken = m.peers[slots, : m.owner_columns] >= 0
        slots = slots[taken.any(axis=1)]
        digests, positions = store.digest(slots, low, last), store.watermark(slots)
        for link in self._primary.by_index:
            columns = m.column_of(slots, link.index)
            owned = (columns >= 0) & (columns < m.owner_columns)
            level = owned & (m.modes[slots, np.maximum(columns, 0)] == STREAM) & (not link.resting)
            asked.skipped.update(slots[owned & ~level].tolist())
            if level.any():
                some = slots[level]
                flight = Flight("digest", some, positions[level], token=Comparison(asked, some))
                arrays = {"slots": some, "positions": positions[level], "digests": digests[level]}
                asked.left += 1
                self._primary.send(link, "digest", flight, {"low": low, "last": last, "repair": repair}, arrays)
        self._less(asked)
        return asked

    def _part(self, asked: Verification, slots: NDArray[np.int64], start: int) -> tuple[int, int]:
        """How far to go now, into `asked`; the tokens [low, last] that are compared."""
        held, rows_max = self._primary.store.held, self._primary.limits.verify_rows
        if not len(slots):
            return 0, _LAST
        # One row more for each: a slot without rows is not free. Those far behind what fits need not be counted.
        counts = np.ones(min(len(slots), rows_max), np.int64)
        for arena in held.registry.arenas:
            counts += arena.counts(slots[: len(counts)])
        if start == 0 and counts[0] <= rows_max:
            asked.done = int(np.searchsorted(np.cumsum(counts), rows_max, "right"))
            return 0, _LAST
        starts, bits = held.slots.bounds(slots[:1])
        first, span = int(starts[0]), 2 ** (64 - int(bits[0]))
        low, end = max(start, first), first + span - 1
        if start and not first < start <= end:
            raise RequestError(f"token {start} is outside of slot {slots[0]}, whose tokens are {first} to {end}")
        last = min(end, low + max(1, span * rows_max // int(counts[0])) - 1)  # tokens are spread evenly
        asked.done, asked.cursor = (1, 0) if last == end else (0, last + 1)
        return low, last

    def told(self, link: Link, flight: Flight, verdicts: NDArray[np.uint8] | None) -> None:
        """What an owner found."""
        assert isinstance(flight.token, Comparison)
        asked, slots = flight.token.verification, flight.slots
        if verdicts is None or verdicts.shape != slots.shape:
            verdicts = np.full(len(slots), BEHIND, np.uint8)
        apart = verdicts == APART
        compared = int((apart | (verdicts == TAKEN)).sum())
        asked.compared += compared
        self.compared += compared
        self.different += int(apart.sum())
        asked.skipped.update(slots[~apart & (verdicts != TAKEN)].tolist())
        leaving = np.zeros(len(slots), np.bool_)
        if asked.repair:
            leaving[apart] = self._give_up(link, slots[apart], flight.positions[apart])
        for slot, leaves in zip(slots[apart].tolist(), leaving[apart].tolist(), strict=True):
            asked.different.append((slot, link.incarnation, leaves))
        self._less(asked)

    def _give_up(self, link: Link, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Complain of an owner's copies, unless a term has begun meanwhile; of which, bool[s].

        It stands where it should, so that no fork could mend it; the owner itself refuses to tell one from now on.
        """
        m, held = self._primary.members, self._primary.store.held.slots
        columns = m.column_of(slots, link.index)
        owned = (columns >= 0) & (columns < m.owner_columns) & (held.named[slots] == PRIMARY)
        owned &= held.positions[slots] >> TERM_SHIFT == positions >> TERM_SHIFT
        m.modes[slots[owned], columns[owned]] = HOPELESS
        return owned

    def missed(self, comparison: Comparison) -> None:
        """An owner could not be asked, or its connection broke."""
        comparison.verification.skipped.update(comparison.slots.tolist())
        self._less(comparison.verification)

    def _less(self, asked: Verification) -> None:
        asked.left -= 1
        if asked.left:
            return
        if asked.token is None:
            self._sweeping = False
            return
        view = self._primary.store.view
        names = {s.incarnation: s.name for s in view.servers} if view else {}
        different = [[slot, peer, names.get(peer, ""), leaves] for slot, peer, leaves in asked.different]
        fields = {"done": asked.done, "cursor": asked.cursor, "compared": asked.compared, "different": different}
        self._primary.answer(asked.token, {**fields, "skipped": sorted(asked.skipped)})

    def sweep(self, elapsed: float) -> None:
        """Time goes by: compare the next slot of those of which this server is primary, one (or a part) at a time."""
        self._due = min(1.0, self._due + elapsed * self._primary.limits.verify_slots_per_s)
        if self._due < 1.0 or self._sweeping or not self._primary.members.any:
            return
        self._due = 0.0
        mine = np.flatnonzero(self._primary.store.held.slots.roles[: len(self._primary.members.peers)] == PRIMARY)
        if not len(mine):
            return
        if not self._cursor or self._slot not in mine:
            at = int(np.searchsorted(mine, self._slot, "right"))
            self._slot, self._cursor = int(mine[at % len(mine)]), 0
        self._sweeping = True
        self._cursor = self.verify(None, np.array([self._slot]), self._cursor).cursor
