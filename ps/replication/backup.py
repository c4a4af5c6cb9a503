"""The receiving side: blocks from primaries are taken exactly at their base, and forks are told."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.view import View
from ps.errors import MemoryFull, NotApplied, RequestError
from ps.kernels import as_input, replicate
from ps.kernels.replicate import APART, BEHIND, OLD, TAKEN
from ps.ragged import check_offsets
from ps.replication.actions import Arrays
from ps.rowblock import RowBlock
from ps.slots import NONE, OWNER, PRIMARY
from ps.store import Store

NOBODY = -2
"""The index of a server that the view does not know; -1 stands for no owner."""

_NONE = np.empty(0, np.int64)

Reply = tuple[dict[str, Any], Arrays]


def _block(fields: dict[str, Any], arrays: Arrays) -> RowBlock:
    """The block of a request, checked. Raises RequestError."""
    plain = fields.get("block")
    if not isinstance(plain, dict):
        raise RequestError("a row block's fields must be a map")
    return RowBlock.from_arrays(plain, arrays)


class Backup:
    """Answers `replicate`, `repair`, `fork` and `digest`, and takes what is restored."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._heard: dict[int, int] = {}
        self._distrusted: set[int] = set()
        self._sources: tuple[set[int], set[int]] = set(), set()
        self._terms: NDArray[np.int64] = np.empty(0, np.int64)
        self._owners: NDArray[np.int16] = np.empty((0, 1), np.int16)

    def install(self, view: View) -> None:
        """Judge by a newer view, and forget connections of processes that it does not know."""
        self._terms, self._owners = as_input(view.terms(), np.int64), as_input(view.owners(), np.int16)
        known = {s.incarnation for s in view.servers}
        self._heard = {peer: link for peer, link in self._heard.items() if peer in known}

    @property
    def sources(self) -> int:
        """How many others have copied to this server of late."""
        return len(set.union(*self._sources))

    def second(self) -> None:
        """About a second has gone by."""
        self._sources = set(), self._sources[0]

    def request(self, op: str, fields: dict[str, Any], arrays: Arrays) -> Reply:
        """Answer a request of a peer. Raises EmbringError."""
        sender, link = fields.get("from"), fields.get("link")
        if not isinstance(sender, int) or not isinstance(link, int):
            raise RequestError(f"{op} comes from no server: it must say from whom, and on which connection")
        if link < self._heard.get(sender, 0):
            raise NotApplied(f"{op} came on connection {link}, after connection {self._heard[sender]} had begun")
        self._heard[sender] = link
        if op == "fork":
            return self._fork(sender, arrays)
        if op == "digest":
            return self._digest(sender, fields, arrays)
        return self._absorb(sender, op, fields, arrays)

    def _verdicts(self, sender: int, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8[s] by term: may the sender, as primary, bring these slots here?"""
        servers = self.store.view.servers if self.store.view is not None else ()
        index = next((i for i, s in enumerate(servers) if s.incarnation == sender), NOBODY)
        out = np.empty(len(slots), np.uint8)
        replicate.judge(slots, positions, index, self._terms, self._owners, out)
        return out

    def _absorb(self, sender: int, op: str, fields: dict[str, Any], arrays: Arrays) -> Reply:
        block = _block(fields, arrays)
        verdicts = self._verdicts(sender, block.slots, block.last)
        slots = self.store.held.slots
        allowed = verdicts == TAKEN
        copied = bool(block.full.any())
        if copied:
            allowed &= (block.full == 0) | (slots.named[block.slots] == NONE)
        if copied or op == "repair":
            self._sources[0].add(sender)
        try:
            taken = self.store.absorb(block, op == "repair", allowed)
        except MemoryFull:
            raise
        except RequestError:  # tables come and go without new terms: the two may know of different ones
            theirs, mine = int(fields.get("at", 0)), self.store.epoch
            if theirs == mine:
                raise
            return {}, {"verdicts": np.full(len(block.slots), BEHIND if theirs > mine else OLD, np.uint8)}
        if self._distrusted:
            self._distrusted.difference_update(block.slots[taken & (block.full > 0)].tolist())
        if taken.all():
            return {}, {}
        verdicts[allowed & ~taken] = APART
        return {}, {"verdicts": verdicts}

    def restore(self, fields: dict[str, Any], arrays: Arrays) -> Reply:
        """Take slots of a checkpoint, as long as they are lost, in the term that began with the restore: nobody owns
        or copies those. What comes late, of this restore or one before it, meets another term, or an owner.

        foreign: rows of another cluster, or of other slots, whose positions mean nothing here."""
        block, term, view = _block(fields, arrays), fields.get("term"), self.store.view
        if type(term) is not int:
            raise RequestError(f"absorb names term {str(term)[:40]}; it must be that of the slots, a whole number")
        allowed = np.zeros(len(block.slots), np.bool_)
        if view is not None:
            known = block.slots < view.slots_total
            at = block.slots[known]
            allowed[known] = view.lost()[at] & (view.terms()[at] == term)
        taken = self.store.absorb(block, allowed=allowed)
        if fields.get("foreign"):
            self.store.held.slots.break_with_past(block.slots[taken], term)
        return {}, {"taken": taken.astype(np.uint8)}

    def _digest(self, sender: int, fields: dict[str, Any], arrays: Arrays) -> Reply:
        """Compare copies with the primary's digests: verdicts TAKEN (equal), APART, or BEHIND (not compared)."""
        slots, positions, digests = self._to_compare(arrays)
        low, last = fields.get("low"), fields.get("last")
        if not isinstance(low, int) or not isinstance(last, int) or not 0 <= low <= last < 2**64:
            raise RequestError("a digest is of tokens from low to last, which must be whole numbers of 64 bits")
        held = self.store.held.slots
        verdicts = np.full(len(slots), BEHIND, np.uint8)
        # Rows of a table go when a view drops it, without a new term: only by one view do copies have to be equal.
        same = self._verdicts(sender, slots, positions) == TAKEN
        same &= (fields.get("at") == self.store.epoch) & (held.positions[slots] == positions)
        same &= held.roles[slots] == OWNER
        verdicts[same] = np.where(self.store.digest(slots[same], low, last) == digests[same], TAKEN, APART)
        if fields.get("repair") is True:
            self._distrusted.update(slots[verdicts == APART].tolist())
        return {}, {"verdicts": verdicts}

    def _to_compare(self, arrays: Arrays) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """slots, positions and digests of a `digest`, checked against each other."""
        slots, positions = arrays.get("slots", _NONE), arrays.get("positions", _NONE)
        digests = arrays.get("digests", np.empty(0, np.uint64))
        if slots.dtype != np.int64 or positions.dtype != np.int64 or digests.dtype != np.uint64 or slots.ndim != 1:
            raise RequestError("slots and positions of a digest must be int64, digests uint64, of one dimension")
        if not slots.shape == positions.shape == digests.shape:
            raise RequestError(f"a digest of {slots.size} slots has {positions.size} positions, {digests.size} digests")
        if len(slots) and not 0 <= slots.min() <= slots.max() < self.store.held.slots.slots_max:
            raise RequestError(f"slots of a digest are {slots.min()} to {slots.max()}, beyond what a server holds")
        return as_input(slots, np.int64), as_input(positions, np.int64), as_input(digests, np.uint64)

    def _asked(self, arrays: Arrays) -> tuple[NDArray[np.int64], ...]:
        """slots, positions, lineage and offsets of a `fork`, checked against each other."""
        found = tuple(arrays.get(name, _NONE) for name in ("slots", "positions", "lineage", "offsets"))
        if any(array.dtype != np.int64 or array.ndim != 1 for array in found):
            raise RequestError("the arrays of a fork must be int64, of one dimension")
        slots, positions, lineage, offsets = (as_input(array, np.int64) for array in found)
        if len(positions) != len(slots) or len(offsets) != len(slots) + 1:
            raise RequestError(f"a fork of {len(slots)} slots has {len(positions)} positions, {len(offsets)} offsets")
        check_offsets(offsets, len(lineage), "offsets of a fork's lineage")
        if len(slots) and not 0 <= slots.min() <= slots.max() < self.store.held.slots.slots_max:
            raise RequestError(f"slots of a fork are {slots.min()} to {slots.max()}, beyond what a server holds")
        return slots, positions, lineage, offsets

    def _fork(self, sender: int, arrays: Arrays) -> Reply:
        slots, positions, lineage, offsets = self._asked(arrays)
        verdicts = self._verdicts(sender, slots, positions)
        verdicts[self.store.held.slots.named[slots] == PRIMARY] = OLD
        told = self.store.forks(slots, positions, lineage, offsets)
        if self._distrusted:  # wrong where it stands, whatever it has in common with others
            told.forks[np.isin(slots, list(self._distrusted))] = -1
        return {}, {
            "verdicts": verdicts,
            "positions": told.positions,
            "forks": told.forks,
            "undone.tables": told.undone.tables,
            "undone.ids": told.undone.ids,
            "undone.offsets": told.undone.offsets,
        }
