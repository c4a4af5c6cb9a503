"""Rows on their way out of a store: token ranges and exports."""

import secrets
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ps.arena import Arena, Entries
from ps.errors import RequestError
from ps.rowblock import TERM_SHIFT, RowBlock, Section, Watermark
from ps.slots import NOTHING_GONE, OWNER, PRIMARY, Gone
from ps.store.holdings import Holdings
from ps.store.stream import section_of
from ps.window import ClientEntries

_RING = 2**64

SCAN = 4
"""Rows whose version is read in the time in which one is copied, at the least."""


# -- ranges


def token_range(
    held: Holdings,
    table: int,
    start: int,
    stop: int | None,
    rows_max: int,
    slots: NDArray[np.int64] | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """See `Store.range`."""
    entry = held.registry.entry(table)
    end = _RING if stop is None else stop
    if not 0 <= start <= end <= _RING:
        raise RequestError(f"the range [{start}, {stop}) is not an interval of tokens (0 to 2**64)")
    if start == end:
        return
    arena = held.registry.arenas[entry.arena]
    shift = 64 - entry.bits
    numbers = np.arange(entry.first + (start >> shift), entry.first + ((end - 1) >> shift) + 1)
    if slots is not None:
        foreign = slots[(slots < entry.first) | (slots >= entry.first + entry.slots)]
        if len(foreign):  # by a view in which the table had others
            raise held.wrong_view(int(foreign[0]), OWNER)
        numbers = np.intersect1d(numbers, slots, assume_unique=True)
    held.require(numbers, OWNER)
    for batch, part, parts in _pieces([arena], numbers, rows_max):
        if table not in held.registry.entries:
            raise RequestError(f"table number {table} was dropped while a range of it was read")
        held.require(batch, OWNER)
        low, last = _interval(held, batch, part, parts)
        low, last = max(low, start), min(last, end - 1)
        if low > last:
            continue
        found = arena.collect(batch, *held.slots.bounds(batch), entry.code, low, last)
        if len(found.ids):
            yield found.ids, np.take(arena.values, found.rows, axis=0)


def _pieces(
    arenas: list[Arena], slots: NDArray[np.int64], rows_max: int
) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """Runs of slots with up to rows_max rows, as (slots, 0, 1); a bigger slot comes alone, as (slot, part, parts)."""
    if rows_max < 1:
        raise RequestError(f"rows_max is {rows_max}; it must be at least 1")
    counts = sum((arena.counts(slots) for arena in arenas), np.zeros(len(slots), np.int64))
    sums = np.concatenate([[0], np.cumsum(counts)])
    at = 0
    while at < len(slots):
        end = max(int(np.searchsorted(sums, sums[at] + rows_max, side="right")) - 1, at + 1)
        parts = max(1, -(-int(sums[end] - sums[at]) // rows_max))
        for part in range(parts):
            yield slots[at:end], part, parts
        at = end


def _interval(held: Holdings, slots: NDArray[np.int64], part: int, parts: int) -> tuple[int, int]:
    """First and last token of a part; of everything where there is only one."""
    if parts == 1:
        return 0, _RING - 1
    starts, bits = held.slots.bounds(slots)
    base, span = int(starts[0]), _RING >> int(bits[0])
    return base + span * part // parts, base + span * (part + 1) // parts - 1


# -- exports


def export(
    held: Holdings, slots: NDArray[np.int64], since: Watermark | None, rows_max: int, copy: int | None = None
) -> Iterator[RowBlock]:
    """Blocks that bring an empty copy, or one that stands at `since`, to where the slots stand.

    A slot whose `since` is off its lineage, or older than the deletions kept, is sent whole; one of a later term, or
    of another cluster, is refused. Changes are found by looking at the version of every row, which costs far less than
    copying it: they are looked for among SCAN times as many rows as a block may hold.

    A slot of more rows than that is cut by token intervals, which name the same ids however its segments grow
    meanwhile; its last part repeats what was changed since the first, so that the slot at `last` is exactly what stood
    there at that moment.
    """
    if since is not None and since.cluster != held.cluster:
        raise RequestError(f"the watermark is of cluster {since.cluster}; this is cluster {held.cluster}")
    if len(slots) and (slots.min() < 0 or slots.max() >= held.slots.slots_max or len(np.unique(slots)) != len(slots)):
        raise RequestError("slots of an export must be distinct slot numbers")
    held.require(slots, PRIMARY)
    if copy is None:
        copy = secrets.randbits(62)
    looked_at = rows_max if since is None else rows_max * SCAN
    for batch, part, parts in _pieces(held.registry.arenas, slots, looked_at):
        held.require(batch, PRIMARY)
        if part == 0:
            base = np.zeros(len(batch), np.int64) if since is None else _bases(held, batch, since)
            began = held.slots.positions[batch]
        elif held.slots.positions[batch[0]] >> TERM_SHIFT != began[0] >> TERM_SHIFT:
            raise held.wrong_view(int(batch[0]), PRIMARY)  # the term ended: the copy would mix two histories
        yield _block(held, batch, base, began, (part, parts), copy)


def _bases(held: Holdings, slots: NDArray[np.int64], since: Watermark) -> NDArray[np.int64]:
    """The position that each slot's changes are told from; 0: the whole slot."""
    asked, now = since.of(slots), held.slots.positions[slots]
    ahead = np.flatnonzero(asked >> TERM_SHIFT > now >> TERM_SHIFT)
    if len(ahead):
        slot, term = slots[ahead[0]], int(asked[ahead[0]] >> TERM_SHIFT)
        raise RequestError(f"the watermark of slot {slot} is of term {term}, which is later than this server's")
    good = held.slots.on_lineage(slots, asked) & (asked >= held.slots.horizon[slots])
    return np.where(good, asked, 0)


def _block(
    held: Holdings,
    slots: NDArray[np.int64],
    base: NDArray[np.int64],
    began: NDArray[np.int64],
    part: tuple[int, int],
    copy: int,
) -> RowBlock:
    final = part[0] == part[1] - 1
    sections = [_section(held, arena, slots, base, began, part) for arena in held.registry.arenas]
    lineage, offsets = held.slots.lineage(slots)
    return RowBlock(
        cluster=held.cluster,
        copy=copy,
        slots=slots,
        base=base,
        last=held.slots.positions[slots],
        full=(base == 0).astype(np.uint8),
        part=np.full(len(slots), part[0], np.int32),
        final=np.full(len(slots), final, np.uint8),
        lineage=lineage,
        lineage_offsets=offsets,
        clients=held.clients.entries(slots) if final else ClientEntries.none(len(slots)),
        sections=tuple(s for s in sections if len(s.ids) or len(s.gone_ids)),
    )


def _section(
    held: Holdings,
    arena: Arena,
    slots: NDArray[np.int64],
    base: NDArray[np.int64],
    began: NDArray[np.int64],
    part: tuple[int, int],
) -> Section:
    """Rows of one arena that a part brings: of its token interval those after base, and at last all after `began`."""
    number, parts = part
    low, last = _interval(held, slots, number, parts)
    final = number == parts - 1
    again = final and parts > 1 and bool((held.slots.positions[slots] > began).any())
    interval = (0, _RING - 1) if again else (low, last)
    found = arena.collect(slots, *held.slots.bounds(slots), -1, *interval)
    if again or base.any():
        owner = np.repeat(np.arange(len(slots)), np.diff(found.offsets))
        versions = arena.meta[found.rows, 0]
        keep = versions > base[owner]
        if again:
            inside = (found.tokens >= np.uint64(low)) & (found.tokens <= np.uint64(last))
            keep &= inside | (versions > began[owner])
        found = _keep(found, owner, keep, len(slots))
    gone = None
    if final and (parts > 1 or base.any()):  # of a slot that is told whole, at one moment, nothing is gone
        gone = held.tombstones.of(slots, np.where(base > 0, base, began if parts > 1 else held.slots.positions[slots]))
    return _fill(arena, found, gone, len(slots), slots)


def _keep(found: Entries, owner: NDArray[np.int64], keep: NDArray[np.bool_], slots: int) -> Entries:
    offsets = np.zeros(slots + 1, np.int64)
    np.cumsum(np.bincount(owner[keep], minlength=slots), out=offsets[1:])
    return Entries(found.ids[keep], found.codes[keep], found.rows[keep], found.tokens[keep], offsets)


def _fill(arena: Arena, found: Entries, gone: Gone | None, slots: int, numbers: NDArray[np.int64]) -> Section:
    where, tables, ids, versions = gone if gone is not None else NOTHING_GONE
    if not len(ids):
        return _section_of(arena, found, NOTHING_GONE, np.zeros(slots + 1, np.int64))
    codes = arena.codes_of(tables)
    mine = codes >= 0
    where, tables, ids, versions = where[mine], tables[mine], ids[mine], versions[mine]
    rows = arena.find(numbers[where].astype(np.int32), codes[mine], ids)
    away = rows < 0  # an id that was pushed again since is told as a row
    offsets = np.zeros(slots + 1, np.int64)
    np.cumsum(np.bincount(where[away], minlength=slots), out=offsets[1:])
    return _section_of(arena, found, (where[away], tables[away], ids[away], versions[away]), offsets)


def _section_of(arena: Arena, found: Entries, gone: Gone, gone_offsets: NDArray[np.int64]) -> Section:
    _, tables, ids, versions = gone
    everything = np.arange(len(found.rows), dtype=np.int32)
    section = section_of(arena, everything, found.rows, found.codes, found.ids, found.offsets)
    return replace(section, gone_ids=ids, gone_tables=tables, gone_versions=versions, gone_offsets=gone_offsets)
