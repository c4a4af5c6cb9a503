"""The fork exchange: how two copies of a slot part, and the one block that brings the second to where the first is.

The *fork* is the newest position on both lineages. Resulting rows cannot be cut back, so what the second copy changed
after the fork is named by it (ids, rows or deletions), and the first sends its own rows, or deletions, for just those
and for all that itself changed after the fork, with its whole client table.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ps.arena import Arena, Entries
from ps.kernels import replicate
from ps.rowblock import RowBlock, Section
from ps.store.holdings import Holdings
from ps.store.stream import block_of


@dataclass(frozen=True, slots=True)
class Undone:
    """Ids that a copy changed after the fork: tables int32[n], ids int64[n], offsets int64[s + 1] by slot."""

    tables: NDArray[np.int32]
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forks:
    """positions int64[s]: where the copies stand. forks int64[s]: -1 where there is none. undone: see `Undone`."""

    positions: NDArray[np.int64]
    forks: NDArray[np.int64]
    undone: Undone


def find(
    held: Holdings,
    slots: NDArray[np.int64],
    positions: NDArray[np.int64],
    lineage: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> Forks:
    """How the copies here and those that stand at `positions` with `lineage` part.

    There is no fork where a copy is incomplete, or where deletions since then are no longer remembered.
    """
    mine = held.slots.positions[slots]
    mine_lineage, mine_offsets = held.slots.lineage(slots)
    forks = np.empty(len(slots), np.int64)
    replicate.forks(mine, mine_lineage, mine_offsets, positions, lineage, offsets, forks)
    forgotten = (forks < held.slots.horizon[slots]) & (forks < mine)
    filling = np.array([int(s) in held.slots.filling for s in slots], bool) if held.slots.filling else False
    forks[(forgotten & (mine > 0)) | filling] = -1
    behind = np.flatnonzero((forks >= 0) & (forks < mine))
    return Forks(mine, forks, _undone(held, slots, behind, forks))


def _undone(held: Holdings, slots: NDArray[np.int64], some: NDArray[np.int64], forks: NDArray[np.int64]) -> Undone:
    where, tables, ids = [], [], []
    asked = slots[some]
    if len(some):
        bounds = held.slots.bounds(asked)
        for arena in held.registry.arenas:
            found = arena.collect(asked, *bounds)
            owner = np.repeat(np.arange(len(asked)), np.diff(found.offsets))
            after = arena.meta[found.rows, 0] > forks[some][owner]
            where.append(some[owner[after]])
            tables.append(arena.numbers[found.codes[after]])
            ids.append(found.ids[after])
        gone, numbers, gone_ids, _ = held.tombstones.of(asked, forks[some])
        where.append(some[gone])
        tables.append(numbers)
        ids.append(gone_ids)
    if not where:
        return Undone(np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(len(slots) + 1, np.int64))
    at = np.concatenate(where)
    order = np.argsort(at, kind="stable")
    offsets = np.zeros(len(slots) + 1, np.int64)
    np.cumsum(np.bincount(at, minlength=len(slots)), out=offsets[1:])
    return Undone(np.concatenate(tables)[order], np.concatenate(ids)[order], offsets)


def tellable(held: Holdings, slots: NDArray[np.int64], forks: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Slots whose deletions after the fork are remembered here; a copy of nothing (fork 0) needs none."""
    return (forks == 0) | (forks >= held.slots.horizon[slots])


def repair(
    held: Holdings, slots: NDArray[np.int64], base: NDArray[np.int64], forks: NDArray[np.int64], undone: Undone
) -> RowBlock:
    """One block for copies that stand at `base`: what was changed here after the forks, and the rows (or deletions) of
    what was undone; to be absorbed with its clients in place of those known there."""
    at = np.repeat(np.arange(len(slots)), np.diff(undone.offsets))
    sections = (_section(held, arena, slots, forks, at, undone) for arena in held.registry.arenas)
    kept = tuple(s for s in sections if len(s.ids) or len(s.gone_ids))
    return block_of(held, slots, base, held.clients.entries(slots), kept, lineage=True)


def _section(
    held: Holdings,
    arena: Arena,
    slots: NDArray[np.int64],
    forks: NDArray[np.int64],
    at: NDArray[np.int64],
    undone: Undone,
) -> Section:
    found = arena.collect(slots, *held.slots.bounds(slots))
    owner = np.repeat(np.arange(len(slots)), np.diff(found.offsets))
    keep = arena.meta[found.rows, 0] > forks[owner]
    codes = arena.codes_of(undone.tables)
    mine = np.flatnonzero(codes >= 0)
    rows = arena.find(slots[at[mine]].astype(np.int32), codes[mine], undone.ids[mine])
    keep |= np.isin(found.rows, rows[rows >= 0])
    absent = mine[rows < 0]
    gone_at, gone_tables, gone_ids, gone_versions = held.tombstones.of(slots, forks)
    here = arena.codes_of(gone_tables)
    away = here >= 0
    away[away] = arena.find(slots[gone_at[away]].astype(np.int32), here[away], gone_ids[away]) < 0
    gone_at = np.concatenate([gone_at[away], at[absent]])
    gone_tables = np.concatenate([gone_tables[away], undone.tables[absent]])
    gone_ids = np.concatenate([gone_ids[away], undone.ids[absent]])
    gone_versions = np.concatenate([gone_versions[away], held.slots.positions[slots[at[absent]]]])
    order = np.argsort(gone_at, kind="stable")
    picked = _picked(found, owner, keep, len(slots))
    return Section(
        dim=arena.key.dim,
        optimizer=arena.key.optimizer,
        ids=picked.ids,
        tables=arena.numbers[picked.codes],
        offsets=picked.offsets,
        values=arena.values[picked.rows],
        state=arena.state[picked.rows],
        meta=arena.meta[picked.rows],
        gone_ids=gone_ids[order],
        gone_tables=gone_tables[order],
        gone_versions=gone_versions[order],
        gone_offsets=_offsets(gone_at, len(slots)),
    )


def _picked(found: Entries, owner: NDArray[np.int64], keep: NDArray[np.bool_], slots: int) -> Entries:
    return Entries(
        found.ids[keep], found.codes[keep], found.rows[keep], found.tokens[keep], _offsets(owner[keep], slots)
    )


def _offsets(owner: NDArray[np.int64], slots: int) -> NDArray[np.int64]:
    out = np.zeros(slots + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=slots), out=out[1:])
    return out
