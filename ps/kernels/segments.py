"""Changing a directory: segments and nodes taken and freed, entries inserted and erased, rows handed out."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import inline
from ps.kernels.index import (
    BITS,
    CAPACITY,
    CHUNK_ENTRIES,
    CHUNKS,
    CHUNKS_FREE,
    FANOUT_BITS,
    FIRST,
    FREE,
    GRANULE,
    HIGH,
    LAST_CLASS,
    LIMIT,
    LIVE,
    NODE_FREE,
    NODES,
    PEAK,
    ROWS,
    SEED,
    TARGET,
    Index,
    child_of,
    place_of,
    probe,
    slot_of,
    token_of,
)

FILL_MAX = int(LIMIT[LAST_CLASS]) // 2
"""Entries that one segment holds before it may be split."""


@inline
def _move(entries: NDArray[np.int64], source: int, target: int) -> None:
    # element by element: slices of two dimensions cost numba seconds to compile
    entries[target, 0] = entries[source, 0]
    entries[target, 1] = entries[source, 1]


@inline
def _segment_new(index: Index, class_: int) -> int:
    """An empty segment of a class; returns its first entry. The caller has made sure that memory suffices."""
    capacity = CAPACITY[class_]
    per_chunk = CHUNK_ENTRIES // capacity
    number = index.class_count[class_]
    if number % per_chunk == 0:
        if index.heap[CHUNKS_FREE] > 0:
            index.heap[CHUNKS_FREE] -= 1
            chunk = np.int64(index.free_chunks[index.heap[CHUNKS_FREE]])
        else:
            chunk = index.heap[CHUNKS]
            index.heap[CHUNKS] += 1
        index.class_chunks[class_, number // per_chunk] = np.int32(chunk)
    index.class_count[class_] = number + 1
    base = np.int64(index.class_chunks[class_, number // per_chunk]) * CHUNK_ENTRIES + (number % per_chunk) * capacity
    for at in range(base, base + capacity):
        index.entries[at, 0] = 0
        index.entries[at, 1] = 0
    return base


@inline
def _locate(index: Index, slot: int, token: int, bits: int) -> int:
    """Where the leaf word of a token stands: a slot, or ~(node * 16 + child)."""
    where = slot
    word = index.directory[slot]
    used = bits
    while word < 0:
        where = ~((-word - 1) * 16 + child_of(token, used))
        word = index.nodes[(~where) >> 4, (~where) & 15]
        used += FANOUT_BITS
    return where


@inline
def _get_word(index: Index, where: int) -> int:
    return index.directory[where] if where >= 0 else index.nodes[(~where) >> 4, (~where) & 15]


@inline
def set_word(index: Index, where: int, word: int) -> None:
    if where >= 0:
        index.directory[where] = word
    else:
        index.nodes[(~where) >> 4, (~where) & 15] = word


@inline
def _word_of_entry(index: Index, at: int) -> int:
    """Where the leaf word stands whose segment holds entry `at`."""
    code = (index.entries[at, 1] >> 32) - 1
    token = token_of(index.entries[at, 0], index.codes[code, SEED])
    bits = index.codes[code, BITS]
    return _locate(index, slot_of(token, bits, index.codes[code, FIRST]), token, bits)


@inline
def segment_free(index: Index, base: int, class_: int) -> None:
    """Free a segment that no word names any more: the class's last segment moves into the hole."""
    capacity = CAPACITY[class_]
    per_chunk = CHUNK_ENTRIES // capacity
    number = index.class_count[class_] - 1
    last_chunk = np.int64(index.class_chunks[class_, number // per_chunk])
    last = last_chunk * CHUNK_ENTRIES + (number % per_chunk) * capacity
    if last != base:
        for k in range(capacity):
            _move(index.entries, last + k, base + k)
        at = base
        while index.entries[at, 1] == 0:  # no live segment is empty
            at += 1
        where = _word_of_entry(index, at)
        word = _get_word(index, where)
        set_word(index, where, (base // GRANULE) << 22 | (word & 0x3FFFFF))
    index.class_count[class_] = number
    if number % per_chunk == 0:
        index.free_chunks[index.heap[CHUNKS_FREE]] = np.int32(last_chunk)
        index.heap[CHUNKS_FREE] += 1


@inline
def _put(index: Index, base: int, capacity: int, token: int, id_: int, meta: int) -> None:
    place = place_of(token, (meta >> 32) - 1, capacity)
    while index.entries[base + place, 1] != 0:
        place += 1
        if place == capacity:
            place = 0
    index.entries[base + place, 0] = id_
    index.entries[base + place, 1] = meta


@inline
def _resize(index: Index, where: int, class_: int) -> None:
    """Move a leaf (count >= 1) into a segment of another class."""
    word = _get_word(index, where)
    old, old_class = (word >> 22) * GRANULE, word & 63
    base = _segment_new(index, class_)
    capacity = CAPACITY[class_]
    for at in range(old, old + CAPACITY[old_class]):
        meta = index.entries[at, 1]
        if meta != 0:
            id_ = index.entries[at, 0]
            _put(index, base, capacity, token_of(id_, index.codes[(meta >> 32) - 1, SEED]), id_, meta)
    set_word(index, where, (base // GRANULE) << 22 | (word & 0x3FFFC0) | class_)
    segment_free(index, old, old_class)


@inline
def _node_new(index: Index) -> int:
    if index.heap[NODE_FREE] > 0:
        node = index.heap[NODE_FREE] - 1
        index.heap[NODE_FREE] = index.nodes[node, 0]
    else:
        node = index.heap[NODES]
        index.heap[NODES] += 1
    for child in range(16):
        index.nodes[node, child] = 0
    return node


@inline
def node_free(index: Index, node: int) -> None:
    """Return a node whose children are gone."""
    index.nodes[node, 0] = index.heap[NODE_FREE]
    index.heap[NODE_FREE] = node + 1


@inline
def _append(index: Index, where: int, token: int, id_: int, meta: int) -> None:
    """Add an entry to the leaf at `where`, growing its segment by one class where it is full."""
    word = _get_word(index, where)
    class_, count = word & 63, (word >> 6) & 0xFFFF
    if word == 0:
        base = _segment_new(index, 1)
        set_word(index, where, (base // GRANULE) << 22 | 1)
    elif count == LIMIT[class_]:
        _resize(index, where, class_ + 1)
    word = _get_word(index, where)
    _put(index, (word >> 22) * GRANULE, CAPACITY[word & 63], token, id_, meta)
    set_word(index, where, word + 64)


@inline
def _split_at(where: int) -> int:
    """How many entries a leaf may hold before it is split: from half of the largest segment's limit to all of it.

    Leaves of one node fill alike. Were their limits alike too, 16 of them (or 256) would split in one push.
    """
    half = LIMIT[LAST_CLASS] // 2
    return half + np.int64(mix64(np.uint64(where)) % np.uint64(half + 1))


@inline
def _split(index: Index, where: int, used: int) -> None:
    """Replace a leaf by a node of 16 leaves, each made at its size: one part of a big slot grows at a time."""
    word = _get_word(index, where)
    base, class_ = (word >> 22) * GRANULE, word & 63
    counts, bases, sizes = np.zeros(16, np.int64), np.zeros(16, np.int64), np.zeros(16, np.int64)
    for at in range(base, base + CAPACITY[class_]):
        meta = index.entries[at, 1]
        if meta != 0:
            counts[child_of(token_of(index.entries[at, 0], index.codes[(meta >> 32) - 1, SEED]), used)] += 1
    node = _node_new(index)
    for child in range(16):
        count = counts[child]
        if count == 0:
            continue
        child_class = 1
        while LIMIT[child_class] < count:
            child_class += 1
        bases[child], sizes[child] = _segment_new(index, child_class), CAPACITY[child_class]
        index.nodes[node, child] = (bases[child] // GRANULE) << 22 | count << 6 | child_class
    for at in range(base, base + CAPACITY[class_]):
        meta = index.entries[at, 1]
        if meta != 0:
            id_ = index.entries[at, 0]
            token = token_of(id_, index.codes[(meta >> 32) - 1, SEED])
            child = child_of(token, used)
            _put(index, bases[child], sizes[child], token, id_, meta)
    set_word(index, where, -node - 1)
    segment_free(index, base, class_)


@inline
def insert(index: Index, slot: int, code: int, id_: int, row: int) -> None:
    """Add (code, id) -> row, which must not be there yet."""
    bits = index.codes[code, BITS]
    token = token_of(id_, index.codes[code, SEED])
    where, used = slot, bits
    while True:
        word = _get_word(index, where)
        if word < 0:
            where = ~((-word - 1) * 16 + child_of(token, used))
            used += FANOUT_BITS
        elif (word >> 6) & 0xFFFF >= _split_at(where):
            _split(index, where, used)
        else:
            break
    _append(index, where, token, id_, (code + 1) << 32 | row)
    index.codes[code, ROWS] += 1


@inline
def fill(
    index: Index,
    slot: int,
    start: int,
    end: int,
    codes: NDArray[np.int32],
    ids: NDArray[np.int64],
    rows: NDArray[np.int32],
) -> None:
    """Put entries start to end (FILL_MAX at most) into an empty slot, with new rows."""
    class_ = 1
    while LIMIT[class_] < end - start:
        class_ += 1
    base, capacity = _segment_new(index, class_), CAPACITY[class_]
    for i in range(start, end):
        code = np.int64(codes[i])
        row = row_new(index.heap, index.free_rows)
        _put(index, base, capacity, token_of(ids[i], index.codes[code, SEED]), ids[i], (code + 1) << 32 | row)
        index.codes[code, ROWS] += 1
        rows[i] = np.int32(row)
    set_word(index, slot, (base // GRANULE) << 22 | (end - start) << 6 | class_)


@inline
def erase(index: Index, slot: int, code: int, id_: int) -> int:
    """Remove (code, id) and return its row, or -1. Later entries move back: there are no tombstones to probe over."""
    bits = index.codes[code, BITS]
    token = token_of(id_, index.codes[code, SEED])
    where = _locate(index, slot, token, bits)
    word = _get_word(index, where)
    base, class_ = (word >> 22) * GRANULE, word & 63
    capacity = CAPACITY[class_]
    at = probe(index.entries, base, capacity, place_of(token, code, capacity), id_, code)
    if at < 0:
        return -1
    row = index.entries[at, 1] & 0x7FFFFFFF
    hole = at - base
    here = hole
    while True:
        here = here + 1 if here + 1 < capacity else 0
        meta = index.entries[base + here, 1]
        if meta == 0 or here == at - base:
            break
        other = (meta >> 32) - 1
        home = place_of(token_of(index.entries[base + here, 0], index.codes[other, SEED]), other, capacity)
        if (here - home) % capacity >= (here - hole) % capacity:
            _move(index.entries, base + here, base + hole)
            hole = here
    index.entries[base + hole, 0] = 0
    index.entries[base + hole, 1] = 0
    index.codes[code, ROWS] -= 1
    word -= 64
    set_word(index, where, word)
    count = (word >> 6) & 0xFFFF
    if count == 0:
        set_word(index, where, 0)
        segment_free(index, base, class_)
    elif class_ > 3 and count < LIMIT[class_ - 3]:
        _resize(index, where, class_ - 2)
    return row


@inline
def row_new(heap: NDArray[np.int64], free_rows: NDArray[np.int32]) -> Any:
    """A free row; a compaction on its way learns of one above its target."""
    heap[LIVE] += 1
    if heap[FREE] > 0:
        heap[FREE] -= 1
        row = np.int64(free_rows[heap[FREE]])
    else:
        row = heap[HIGH]
        heap[HIGH] += 1
    if row >= heap[TARGET]:
        heap[PEAK] = max(heap[PEAK], row)
    return row


@inline
def row_free(heap: NDArray[np.int64], free_rows: NDArray[np.int32], row: int) -> None:
    """Give a row back."""
    heap[LIVE] -= 1
    free_rows[heap[FREE]] = np.int32(row)
    heap[FREE] += 1
