"""Blocks that tell other owners of a change: what a push changed, a term that begins, clients that are forgotten."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

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


def cut(held: Holdings, applied: Applied, to: Streams, peer: int, local: NDArray[np.int32]) -> RowBlock | None:
    """The rows that a push changed in the slots that are streamed to `peer`, as they now stand; None without any.

    Each slot moves by one position. local int32[slots]: scratch. Costs what the rows of that peer cost to copy.
    """
    slots = np.empty(len(applied.touched), np.int64)
    k = replicate.choose(applied.touched, applied.verdicts, to.peers, to.modes, peer, local, slots)
    if not k:
        return None
    slots = slots[:k]
    window = held.clients.of(applied.client)
    base, last, mask = np.empty(k, np.int64), np.empty(k, np.int64), np.empty(k, np.uint64)
    replicate.stand(slots, held.slots.positions, window.last, window.mask, base, last, mask)
    clients = ClientEntries(np.full(k, applied.client, np.uint64), last, mask, np.arange(k + 1))
    written = [_written(change, local, k) for change in applied.written]
    erased = [_erased(held, change, local, k) for change in applied.erased]
    sections = tuple(s for s in (*written, *erased) if len(s.ids) or len(s.gone_ids))
    return block_of(held, slots, base, clients, sections)


def _written(change: Changed, local: NDArray[np.int32], k: int) -> Section:
    arena, u = change.arena, len(change.ids)
    offsets, order = np.empty(k + 1, np.int64), np.empty(u, np.int32)
    n = replicate.group(change.slots, local, offsets, order)
    section = Section(
        dim=arena.key.dim,
        optimizer=arena.key.optimizer,
        ids=np.empty(n, np.int64),
        tables=np.empty(n, np.int32),
        offsets=offsets,
        values=np.empty((n, arena.key.dim), np.float32),
        state=np.empty((n, arena.key.state_width), np.float32),
        meta=np.empty((n, 2), np.int64),
        gone_ids=np.empty(0, np.int64),
        gone_tables=np.empty(0, np.int32),
        gone_versions=np.empty(0, np.int64),
        gone_offsets=np.zeros(k + 1, np.int64),
    )
    replicate.cut(
        order, change.rows, change.codes, change.ids, arena.numbers, arena.values, arena.state, arena.meta,
        section.ids, section.tables, section.values, section.state, section.meta,
    )  # fmt: skip
    return section


def _erased(held: Holdings, change: Changed, local: NDArray[np.int32], k: int) -> Section:
    there = np.flatnonzero(change.rows >= 0)
    offsets, order = np.empty(k + 1, np.int64), np.empty(len(there), np.int32)
    n = replicate.group(change.slots[there], local, offsets, order)
    gone = there[order[:n]]
    nothing = replace(change, slots=_NO_ROWS, codes=_NO_ROWS, ids=np.empty(0, np.int64), rows=_NO_ROWS)
    return replace(
        _written(nothing, local, k),
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
