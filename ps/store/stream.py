"""Blocks that tell other owners of a change: what pushes changed, a term that begins, clients that are forgotten."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ps.arena import Arena
from ps.kernels import replicate
from ps.rowblock import RowBlock, Section
from ps.slots import PRIMARY
from ps.store.changes import Applied, Changed, Forgotten, Streams
from ps.store.holdings import Holdings
from ps.window import ClientEntries

_NO_ROWS = np.empty(0, np.int32)


def block_of(
    held: Holdings,
    slots: NDArray[np.int64],
    base: NDArray[np.int64],
    clients: ClientEntries,
    sections: tuple[Section, ...] = (),
    lineage: bool = False,
) -> RowBlock:
    """A block of changes from `base` to where the slots stand; without lineages where the term is the same."""
    k = len(slots)
    values, offsets = held.slots.lineage(slots) if lineage else (np.empty(0, np.int64), np.zeros(k + 1, np.int64))
    return RowBlock(
        cluster=held.cluster,
        copy=0,
        slots=slots,
        base=base,
        last=held.slots.positions[slots],
        full=np.zeros(k, np.uint8),
        part=np.zeros(k, np.int32),
        final=np.ones(k, np.uint8),
        lineage=values,
        lineage_offsets=offsets,
        clients=clients,
        sections=sections,
    )


def opening(held: Holdings, slots: NDArray[np.int64], base: NDArray[np.int64]) -> RowBlock:
    """See `Store.opening`."""
    return block_of(held, slots, base, ClientEntries.none(len(slots)), lineage=True)


def cut(held: Holdings, pushes: Sequence[Applied], to: Streams, peer: int, local: NDArray[np.int32]) -> RowBlock | None:
    """What pushes changed, as it now stands, in the slots that are streamed to `peer`; None without any.

    pushes: those since the last block for that peer, in order; one that deletes ids comes alone. A row that several of
    them wrote is in the block once. local int32[slots]: scratch. Costs what the rows of that peer cost to copy.
    """
    slots, base, k = _chosen(pushes, to, peer, local)
    if not k:
        return None
    clients = _windows(held, slots, {applied.client for applied in pushes})
    written: dict[Arena, list[Changed]] = {}
    for applied in pushes:
        for change in applied.written:
            written.setdefault(change.arena, []).append(change)
    sections = [_written(arena, *_merged(arena, changes), local, k) for arena, changes in written.items()]
    sections += [_erased(held, change, local, k) for applied in pushes for change in applied.erased]
    return block_of(held, slots, base, clients, tuple(s for s in sections if len(s.ids) or len(s.gone_ids)))


def _chosen(
    pushes: Sequence[Applied], to: Streams, peer: int, local: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The changed slots that are streamed to a peer, where each stood before, and how many they are."""
    for applied in pushes:
        local[applied.slots] = -1
    most = sum(len(applied.slots) for applied in pushes)
    slots, base, k = np.empty(most, np.int64), np.empty(most, np.int64), 0
    for applied in pushes:
        k = replicate.choose(applied.slots, applied.before, to.peers, to.modes, peer, local, slots, base, k)
    return slots[:k], base[:k], k


def _windows(held: Holdings, slots: NDArray[np.int64], names: set[int]) -> ClientEntries:
    """What some clients' windows have of slots."""
    if len(names) > 1:
        return held.clients.entries(slots, names)
    (name,) = names
    window, k = held.clients.of(name), len(slots)
    return ClientEntries(np.full(k, name, np.uint64), window.last[slots], window.mask[slots], np.arange(k + 1))


def _merged(
    arena: Arena, changes: list[Changed]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """(slots, rows, codes, ids) of the rows that changes wrote; each is told by the last one that wrote it."""
    if len(changes) == 1:
        return changes[0].slots, changes[0].rows, changes[0].codes, changes[0].ids
    rows = np.concatenate([change.rows for change in changes])
    last = np.flatnonzero(arena.meta[rows, 0] == np.concatenate([change.versions for change in changes]))
    slots, codes, ids = (
        np.concatenate([getattr(c, name) for c in changes])[last] for name in ("slots", "codes", "ids")
    )
    return slots, rows[last], codes, ids


def _written(
    arena: Arena,
    slots: NDArray[np.int32],
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    ids: NDArray[np.int64],
    local: NDArray[np.int32],
    k: int,
) -> Section:
    offsets, order = np.empty(k + 1, np.int64), np.empty(len(ids), np.int32)
    replicate.group(slots, local, offsets, order)
    return section_of(arena, order, rows, codes, ids, offsets)


def section_of(
    arena: Arena,
    order: NDArray[np.int32],
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> Section:
    """Rows order[0..n) of rows, codes and ids as they stand now, n = offsets[-1]; without deletions."""
    section = Section.room(arena.key.dim, arena.key.optimizer, arena.key.state_width, offsets)
    replicate.cut(
        order, rows, codes, ids, arena.numbers, arena.values, arena.state, arena.meta,
        section.ids, section.tables, section.values, section.state, section.meta,
    )  # fmt: skip
    return section


def _erased(held: Holdings, change: Changed, local: NDArray[np.int32], k: int) -> Section:
    there = np.flatnonzero(change.rows >= 0)
    offsets, order = np.empty(k + 1, np.int64), np.empty(len(there), np.int32)
    n = replicate.group(change.slots[there], local, offsets, order)
    gone = there[order[:n]]
    return replace(
        _written(change.arena, _NO_ROWS, _NO_ROWS, _NO_ROWS, np.empty(0, np.int64), local, k),
        gone_ids=change.ids[gone],
        gone_tables=change.arena.numbers[change.codes[gone]],
        gone_versions=held.slots.positions[change.slots[gone]],
        gone_offsets=offsets,
    )


def forget(held: Holdings, clients: list[int]) -> Forgotten:
    """Forget clients in every slot of which this server is primary: one numbered change of each such slot.

    An entry whose last sequence is 0 tells a backup to forget. Slots of which it is a backup keep theirs until their
    primary tells them, so that no two owners differ.
    """
    primary = np.flatnonzero(held.slots.named == PRIMARY)
    where, who = [], []
    for client in clients:
        window = held.clients.window(client)
        if window is not None:
            known = primary[window.last[primary] > 0]
            window.last[known], window.mask[known] = 0, 0
            where.append(known)
            who.append(np.full(len(known), client, np.uint64))
    if not sum(map(len, where)):
        return Forgotten(None)
    at, names = np.concatenate(where), np.concatenate(who)
    order = np.argsort(at, kind="stable")
    slots, counts = np.unique(at, return_counts=True)
    held.slots.positions[slots] += 1
    offsets = np.zeros(len(slots) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    zeros = np.zeros(len(at), np.int64)
    entries = ClientEntries(names[order], zeros, zeros.view(np.uint64), offsets)
    return Forgotten(block_of(held, slots, held.slots.positions[slots] - 1, entries))
