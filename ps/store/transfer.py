"""Rows on their way out of a store: token ranges and exports."""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.arena import Arena, Entries
from ps.errors import NotApplied, RequestError
from ps.rowblock import TERM_SHIFT, RowBlock, Section, Watermark
from ps.slots import NOTHING_GONE, OWNER, PRIMARY, Gone
from ps.store.holdings import Holdings
from ps.store.stream import section_of
from ps.window import ClientEntries

_RING = 2**64

SCAN = 4
"""Rows whose version is read in the time in which one is copied, at the least."""

_ROW_BYTES, _GONE_BYTES = 28, 20
"""What a block says of a row beside values and state, and of a deletion."""


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
    there at that moment. What was deleted is told by every part, since the one before it. NotApplied where more was
    deleted between two parts than is remembered: the slot must be begun anew. That ends, for each time takes as many
    deletions as the ring holds (of rows that were there) within the time of one part, not within that of the slot.

    What is more than `block_max` at one moment (windows of many clients, a last part that repeats much) leaves in
    several blocks, of which the last one says where the slot stood at that moment.
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
            began, number = held.slots.positions[batch], 0
            told = np.where(base > 0, base, began)
        else:
            _same_term(held, batch, began)
            if (held.slots.horizon[batch] > told).any():
                raise NotApplied(f"more of slot {batch[0]} was deleted than is remembered; it must be sent anew")
        blocks = cut(_block(held, batch, base, began, told, (part, parts), copy), held.block_max, number)
        told, number = held.slots.positions[batch], number + len(blocks)
        for i, block in enumerate(blocks):
            if i:
                held.require(block.slots, PRIMARY)
                _same_term(held, block.slots, block.last)
            yield block


def _same_term(held: Holdings, slots: NDArray[np.int64], before: NDArray[np.int64]) -> None:
    """Raise WrongView for a slot whose term has ended since: the copy would mix two histories."""
    ended = slots[held.slots.positions[slots] >> TERM_SHIFT != before >> TERM_SHIFT]
    if len(ended):
        raise held.wrong_view(int(ended[0]), PRIMARY)


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
    told: NDArray[np.int64],
    part: tuple[int, int],
    copy: int,
) -> RowBlock:
    """One part as of now. told: from where on deletions are told."""
    final = part[0] == part[1] - 1
    some = bool((held.slots.positions[slots] > told).any())
    gone = held.tombstones.of(slots, told) if some else NOTHING_GONE
    arenas = held.registry.arenas
    sections = [_with(arena, _section(held, arena, slots, base, began, part), gone, slots) for arena in arenas]
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
    everything = np.arange(len(found.rows), dtype=np.int32)
    return section_of(arena, everything, found.rows, found.codes, found.ids, found.offsets)


def _keep(found: Entries, owner: NDArray[np.int64], keep: NDArray[np.bool_], slots: int) -> Entries:
    offsets = np.zeros(slots + 1, np.int64)
    np.cumsum(np.bincount(owner[keep], minlength=slots), out=offsets[1:])
    return Entries(found.ids[keep], found.codes[keep], found.rows[keep], found.tokens[keep], offsets)


def _with(arena: Arena, section: Section, gone: Gone, slots: NDArray[np.int64]) -> Section:
    """The section with those of the deletions that are its arena's."""
    where, tables, ids, versions = gone
    if not len(ids):
        return section
    codes = arena.codes_of(tables)
    mine = codes >= 0
    where, tables, ids, versions = where[mine], tables[mine], ids[mine], versions[mine]
    rows = arena.find(slots[where].astype(np.int32), codes[mine], ids)
    away = rows < 0  # an id that was pushed again since is told as a row
    offsets = np.zeros(len(slots) + 1, np.int64)
    np.cumsum(np.bincount(where[away], minlength=len(slots)), out=offsets[1:])
    return replace(
        section, gone_ids=ids[away], gone_tables=tables[away], gone_versions=versions[away], gone_offsets=offsets
    )


# -- blocks that fit a frame


def cut(block: RowBlock, bytes_max: int, number: int = 0) -> list[RowBlock]:
    """The same content in blocks of up to about `bytes_max`: some slots each, or one slot in parts from `number` on."""
    if len(block.slots) == 1:
        return _parts(block, bytes_max, number)
    if block.nbytes <= bytes_max:
        return [block]
    first = np.arange(len(block.slots)) < len(block.slots) // 2
    return cut(block.select(first), bytes_max) + cut(block.select(~first), bytes_max)


def _parts(block: RowBlock, bytes_max: int, number: int) -> list[RowBlock]:
    """One slot in parts; the windows of clients are set by the last."""
    pieces = [block.sections]
    if block.nbytes > bytes_max:
        pieces = [(piece,) for section in block.sections for piece in _slices(section, bytes_max)] or pieces
    parts = [replace(block, part=np.array([number + i], np.int32), sections=p) for i, p in enumerate(pieces)]
    unfinished, nobody = np.zeros(1, np.uint8), ClientEntries.none(1)
    return [replace(part, final=unfinished, clients=nobody) for part in parts[:-1]] + parts[-1:]


def _slices(section: Section, bytes_max: int) -> Iterator[Section]:
    """The rows of one slot, some at a time, and then its deletions."""
    rows = max(1, bytes_max // (_ROW_BYTES + 4 * (section.dim + section.state.shape[1])))
    for at in range(0, len(section.ids), rows):
        yield _slice(section, slice(at, at + rows), slice(0))
    gone = max(1, bytes_max // _GONE_BYTES)
    for at in range(0, len(section.gone_ids), gone):
        yield _slice(section, slice(0), slice(at, at + gone))


def _slice(section: Section, rows: slice, gone: slice) -> Section:
    kept: dict[str, Any] = {name: getattr(section, name)[rows] for name in ("ids", "tables", "values", "state", "meta")}
    kept |= {name: getattr(section, name)[gone] for name in ("gone_ids", "gone_tables", "gone_versions")}
    offsets, gone_offsets = (np.array([0, len(kept[name])]) for name in ("ids", "gone_ids"))
    return replace(section, **kept, offsets=offsets, gone_offsets=gone_offsets)
