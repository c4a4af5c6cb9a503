"""Blocks on their way into a store."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ps.arena import Arena
from ps.errors import RequestError
from ps.kernels import replicate
from ps.rowblock import TERM_SHIFT, RowBlock, Section, ragged_select
from ps.slots import NONE
from ps.store.holdings import Holdings


def absorb(
    held: Holdings, block: RowBlock, replace_clients: bool = False, allowed: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Take a block: bool[s], which of its slots were taken.

    A slot is taken when it stands exactly at `base`, or when the block is its whole content; of a slot in parts, the
    parts of one copy in order, and until the last of them the slot is neither read nor written. replace_clients: the
    block's windows are all that its slots remember from then on (else those in it are set, and the others stay).
    allowed bool[s]: slots that may be taken, of a block that was checked when it was decoded.

    RequestError (nothing is taken) for another cluster's changes, an unknown table, or an id outside its slot;
    MemoryFull where the rows do not fit.
    """
    if allowed is None:
        block.check()
    if block.cluster != held.cluster and not block.full.all():
        raise RequestError(f"the block changes slots of cluster {block.cluster}; this is cluster {held.cluster}")
    if len(block.slots) and block.slots.max() >= held.slots.slots_max:
        raise RequestError(
            f"slot {block.slots.max()} is beyond the {held.slots.slots_max} slots of a server (slots_max)"
        )
    taken, plain = _acceptable(held, block)
    if allowed is not None and not allowed.all():
        plain, taken = False, taken & allowed
    work = [_Incoming.of(held, block, section, taken) for section in block.sections]
    if not held.clients.room_for(block.clients.names()):
        raise RequestError("the block brings more clients than this server remembers (clients_max)")
    rows_new = [int(np.count_nonzero(w.rows < 0)) for w in work]
    held.check_memory(sum(rows_new), sum(w.arena.bytes_needed(n) for w, n in zip(work, rows_new, strict=True)))
    if replace_clients:
        held.clients.clear(block.slots[taken])
    if plain:
        _follow(held, block, work)
        return taken
    fresh = block.slots[taken & (block.full > 0) & (block.part == 0)]
    _reset(held, fresh)
    for incoming in work:
        incoming.write(held)
    _close(held, block, taken)
    return taken


def _follow(held: Holdings, block: RowBlock, work: "list[_Incoming]") -> None:
    """Take changes of complete slots, all of them: what a backup does for every push of its primary."""
    for incoming in work:
        incoming.write(held)
    if replicate.advance(block.slots, block.base, block.last, held.slots.positions):
        told = block.base >> TERM_SHIFT != block.last >> TERM_SHIFT
        held.slots.set_lineage(block.slots[told], *ragged_select(block.lineage, block.lineage_offsets, told))
    held.clients.put(block.slots, block.clients)


def _acceptable(held: Holdings, block: RowBlock) -> tuple[NDArray[np.bool_], bool]:
    """Which slots can be taken, bool[s]; and whether those are changes of complete slots, all of them."""
    filling = held.slots.filling
    taken = np.empty(len(block.slots), np.bool_)
    plain = replicate.accept(block.slots, block.base, block.full, block.part, block.final, held.slots.positions, taken)
    if not filling:  # of no slot the first part was taken
        return taken, plain
    for s in np.flatnonzero((block.part > 0) | (block.full == 0)):
        slot = int(block.slots[s])
        if block.part[s] > 0:
            taken[s] = filling.get(slot) == (block.copy, int(block.part[s]))
        else:
            taken[s] &= slot not in filling
    return taken, False


def _reset(held: Holdings, slots: NDArray[np.int64]) -> None:
    """Empty slots that are about to be given whole."""
    for arena in held.registry.arenas:
        arena.drop(slots)
    held.clients.clear(slots)


def _close(held: Holdings, block: RowBlock, taken: NDArray[np.bool_]) -> None:
    """Positions, lineages and client windows of slots that are complete; a note of those that are not."""
    slots = held.slots
    final = taken & (block.final > 0)
    for s in np.flatnonzero(taken & (block.final == 0)):
        slots.filling[int(block.slots[s])] = (block.copy, int(block.part[s]) + 1)
        slots.roles[block.slots[s]] = NONE
    for s in np.flatnonzero(final) if slots.filling else ():
        slots.filling.pop(int(block.slots[s]), None)
    done = block.slots[final]
    slots.roles[done] = slots.named[done]
    told = final & ((block.full > 0) | (block.base >> TERM_SHIFT != block.last >> TERM_SHIFT))  # else as it was
    if told.any():
        slots.set_lineage(block.slots[told], *ragged_select(block.lineage, block.lineage_offsets, told))
    slots.positions[done] = block.last[final]
    whole = final & (block.full > 0)
    slots.horizon[block.slots[whole]] = slots.positions[block.slots[whole]]
    held.clients.put(done, block.clients if final.all() else block.clients.select(final))


@dataclass(slots=True)
class _Incoming:
    """One section, of the slots that are taken: rows to write (rows int32[n], -1 = new), and ids to delete."""

    arena: Arena
    slots: NDArray[np.int32]
    codes: NDArray[np.int32]
    ids: NDArray[np.int64]
    rows: NDArray[np.int32]
    picked: NDArray[np.int32]
    section: Section
    gone_slots: NDArray[np.int32]
    gone: NDArray[np.bool_]

    @classmethod
    def of(cls, held: Holdings, block: RowBlock, section: Section, taken: NDArray[np.bool_]) -> "_Incoming":
        """Look the rows up; RequestError for an unknown table, or an id that does not belong to its slot."""
        arena = held.registry.find_arena(section.dim, section.optimizer)
        if arena is None:
            raise RequestError(f"no table here has rows of {section.dim} values with optimizer {section.optimizer!r}")
        counts = np.diff(section.offsets)
        slots = np.repeat(block.slots.astype(np.int32), counts)
        picked, tables, ids = np.arange(len(slots), dtype=np.int32), section.tables, section.ids
        if not taken.all():
            picked = np.flatnonzero(np.repeat(taken, counts)).astype(np.int32)
            slots, tables, ids = slots[picked], tables[picked], ids[picked]
        codes = held.registry.codes(tables, arena)
        wrong = arena.slots_of(codes, ids) != slots
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise RequestError(f"id {ids[at]} does not belong to slot {slots[at]} of the row block")
        rows = arena.find(slots, codes, ids)
        if block.full.any():
            fresh = np.repeat((block.full > 0) & (block.part == 0), counts)[picked]
            rows[fresh] = -1  # these slots are emptied first
        counts = np.diff(section.gone_offsets)
        return cls(
            arena, slots, codes, ids, rows, picked, section, np.repeat(block.slots, counts).astype(np.int32),
            np.repeat(taken, counts),
        )  # fmt: skip

    def write(self, held: Holdings) -> None:
        """Delete, then create and overwrite."""
        s, gone, arena = self.section, self.gone, self.arena
        slots, tables, ids = self.gone_slots[gone], s.gone_tables[gone], s.gone_ids[gone]
        if len(ids):
            codes = arena.codes_of(tables)
            known = codes >= 0
            arena.erase(slots[known], codes[known], ids[known])
            where = slots.astype(np.int64)
            held.tombstones.add(where, tables, ids, s.gone_versions[gone], held.slots.horizon)
            held.deleted += len(where)
            self.rows = arena.find(self.slots, self.codes, self.ids)
        arena.insert(self.slots, self.codes, self.ids, self.rows)
        replicate.scatter(self.picked, self.rows, s.values, s.state, s.meta, arena.values, arena.state, arena.meta)
