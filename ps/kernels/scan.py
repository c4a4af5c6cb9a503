"""Kernels over whole slots: count, collect, drop, delete, compact, digest. Their cost is what the slots hold."""

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import inline, kernel
from ps.kernels.index import (
    CAPACITY,
    CHUNK_ENTRIES,
    FANOUT_BITS,
    FREE,
    GRANULE,
    PEAK,
    ROWS,
    SEED,
    TARGET,
    Index,
    token_of,
    warm_index,
)
from ps.kernels.segments import FILL_MAX, erase, fill, insert, node_free, row_free, row_new, segment_free, set_word

_STACK = 16 * 18
"""Words that a walk may have to remember: 16 children on each level that 64 bits allow."""


@kernel
def count_rows(slots: NDArray[np.int64], index: Index, counts: NDArray[np.int64]) -> None:
    """Rows of each slot, all tables: counts int64[s]. Reads words only."""
    stack = np.empty(_STACK, np.int64)
    for s in range(len(slots)):
        total = 0
        stack[0] = index.directory[slots[s]]
        depth = 1
        while depth > 0:
            depth -= 1
            word = stack[depth]
            if word < 0:
                for child in range(16):
                    stack[depth] = index.nodes[-word - 1, child]
                    depth += 1
            else:
                total += (word >> 6) & 0xFFFF
        counts[s] = total


@kernel
def collect(
    slots: NDArray[np.int64],
    starts: NDArray[np.uint64],
    bits: NDArray[np.int64],
    code: int,
    low: int,
    last: int,
    index: Index,
    ids: NDArray[np.int64],
    codes: NDArray[np.int32],
    rows: NDArray[np.int32],
    tokens: NDArray[np.uint64],
    offsets: NDArray[np.int64],
) -> int:
    """Entries of slots, of one code (or of all: -1), whose token lies in [low, last]; offsets int64[s + 1] by slot.

    starts uint64[s] and bits int64[s] give each slot's first token and how many bits chose it: leaves outside the
    interval are not visited. Returns how many were written (the caller sized the outputs with `count_rows`).
    """
    stack = np.empty(_STACK, np.int64)
    prefixes = np.empty(_STACK, np.uint64)
    used = np.empty(_STACK, np.int64)
    n = 0
    for s in range(len(slots)):
        offsets[s] = n
        stack[0], prefixes[0], used[0] = index.directory[slots[s]], starts[s], bits[s]
        depth = 1
        while depth > 0:
            depth -= 1
            word, prefix, taken = stack[depth], prefixes[depth], used[depth]
            span = ~np.uint64(0) if taken == 0 else (np.uint64(1) << np.uint64(64 - taken)) - np.uint64(1)
            if word == 0 or prefix > last or prefix + span < low:
                continue
            if word < 0:
                for child in range(15, -1, -1):  # the first child is popped first: leaves come in token order
                    stack[depth] = index.nodes[-word - 1, child]
                    prefixes[depth] = prefix + (np.uint64(child) << np.uint64(64 - FANOUT_BITS - taken))
                    used[depth] = taken + FANOUT_BITS
                    depth += 1
                continue
            base = (word >> 22) * GRANULE
            for at in range(base, base + CAPACITY[word & 63]):
                meta = index.entries[at, 1]
                if meta == 0 or (code >= 0 and (meta >> 32) - 1 != code):
                    continue
                owner = (meta >> 32) - 1
                token = token_of(index.entries[at, 0], index.codes[owner, SEED])
                if low <= token <= last:
                    ids[n], codes[n] = index.entries[at, 0], np.int32(owner)
                    rows[n], tokens[n] = np.int32(meta & 0x7FFFFFFF), token
                    n += 1
    offsets[len(slots)] = n
    return n


@kernel
def drop_slots(slots: NDArray[np.int64], index: Index) -> None:
    """Free everything that the slots hold: rows, segments, nodes."""
    for s in range(len(slots)):
        slot = slots[s]
        while index.directory[slot] != 0:
            where = slot
            word = index.directory[slot]
            while word < 0:  # to the first child that is left
                node = -word - 1
                child = 0
                while child < 16 and index.nodes[node, child] == 0:
                    child += 1
                if child == 16:
                    break
                where = ~(node * 16 + child)
                word = index.nodes[node, child]
            set_word(index, where, 0)
            if word < 0:
                node_free(index, -word - 1)
                continue
            base = (word >> 22) * GRANULE
            for at in range(base, base + CAPACITY[word & 63]):
                meta = index.entries[at, 1]
                if meta != 0:
                    row_free(index.heap, index.free_rows, meta & 0x7FFFFFFF)
                    index.codes[(meta >> 32) - 1, ROWS] -= 1
            segment_free(index, base, word & 63)


# `collect` tells a segment's entries in the order of their places. Put into a smaller segment in that order, or taken
# out of one, they pile up behind one another, and a slot costs the square of what it holds. So the entries of a slot
# are gone through in steps that lie evenly whatever their number (the golden section); slot by slot, for the cache.


@inline
def _run_end(slots: NDArray[np.int32], start: int) -> int:
    """The end of what stands behind one another for one slot, as much as a segment may hold."""
    end = start + 1
    while end < len(slots) and slots[end] == slots[start] and end - start < CHUNK_ENTRIES:
        end += 1
    return end


@inline
def _step(n: int) -> int:
    """The step that meets each of n places once."""
    step = max(1, int(n * 0.618))
    while True:
        a, b = n, step
        while b > 0:
            a, b = b, a % b
        if a == 1:
            return step
        step += 1


@kernel
def erase_many(
    slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64], index: Index, gone: NDArray[np.uint8]
) -> int:
    """Delete (code, id) pairs and free their rows; gone uint8[n] tells which were there. Returns how many."""
    total, start = 0, 0
    while start < len(ids):
        end = _run_end(slots, start)
        i, step = start, _step(end - start)
        for _ in range(start, end):
            row = erase(index, np.int64(slots[i]), np.int64(codes[i]), ids[i])
            gone[i] = row >= 0
            if row >= 0:
                row_free(index.heap, index.free_rows, row)
                total += 1
            i = i + step if i + step < end else i + step - (end - start)
        start = end
    return total


@kernel
def insert_many(
    slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64], index: Index, rows: NDArray[np.int32]
) -> None:
    """Give a new row to each (code, id) whose rows[i] is -1; the pairs are distinct. Contents are undefined.

    What stands behind one another for an empty slot is put into a segment of its size at once: growing class by class
    would move every entry of a slot that comes whole some six times.
    """
    i = 0
    while i < len(ids):
        if rows[i] >= 0:
            i += 1
            continue
        slot, end = np.int64(slots[i]), i + 1
        if index.directory[slot] == 0:
            while end < len(ids) and slots[end] == slot and rows[end] < 0 and end - i < FILL_MAX:
                end += 1
            fill(index, slot, i, end, codes, ids, rows)
        else:
            row = row_new(index.heap, index.free_rows)
            insert(index, slot, np.int64(codes[i]), ids[i], row)
            rows[i] = np.int32(row)
        i = end


@kernel
def detach_many(slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64], index: Index) -> None:
    """Take (code, id) pairs out of their slots; their rows stay as they are."""
    start = 0
    while start < len(ids):
        end = _run_end(slots, start)
        i, step = start, _step(end - start)
        for _ in range(start, end):
            erase(index, np.int64(slots[i]), np.int64(codes[i]), ids[i])
            i = i + step if i + step < end else i + step - (end - start)
        start = end


@kernel
def attach_many(
    slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64], rows: NDArray[np.int32], index: Index
) -> None:
    """Put (code, id) pairs, which are in no slot, into these, with rows that are theirs already."""
    start = 0
    while start < len(ids):
        end = _run_end(slots, start)
        i, step = start, _step(end - start)
        for _ in range(start, end):
            insert(index, np.int64(slots[i]), np.int64(codes[i]), ids[i], np.int64(rows[i]))
            i = i + step if i + step < end else i + step - (end - start)
        start = end


@inline
def _compact_leaf(index: Index, word: int, old: NDArray[np.int32], new: NDArray[np.int32], moves: int) -> int:
    """Re-point a leaf's rows above the target to free ones below; stops when the pairs are full."""
    heap = index.heap
    base = (word >> 22) * GRANULE
    for at in range(base, base + CAPACITY[word & 63]):
        meta = index.entries[at, 1]
        row = meta & 0x7FFFFFFF
        if meta == 0 or row < heap[TARGET]:
            continue
        if heap[FREE] == 0 or index.free_rows[heap[FREE] - 1] >= heap[TARGET]:
            heap[PEAK] = max(heap[PEAK], row)
            continue
        if moves == len(old):
            return -1
        heap[FREE] -= 1
        lower = np.int64(index.free_rows[heap[FREE]])
        index.entries[at, 1] = (meta >> 32) << 32 | lower
        old[moves], new[moves] = np.int32(row), np.int32(lower)
        moves += 1
    return moves


@kernel
def compact(
    slot: int, slot_end: int, work_max: int, index: Index, old: NDArray[np.int32], new: NDArray[np.int32]
) -> tuple[int, int]:
    """One step of a compaction from `slot` on: (next slot, moves), pairs of rows in old and new.

    Ends when work_max entries were seen, or when the pairs are full (then the same slot is looked at again: what has
    moved stays below the target).
    """
    stack = np.empty(_STACK, np.int64)
    moves, work = 0, 0
    while slot < slot_end and work < work_max:
        stack[0] = index.directory[slot]
        depth = 1
        while depth > 0:
            depth -= 1
            word = stack[depth]
            if word < 0:
                for child in range(16):
                    stack[depth] = index.nodes[-word - 1, child]
                    depth += 1
            elif word > 0:
                work += CAPACITY[word & 63]
                moves = _compact_leaf(index, word, old, new, moves)
                if moves < 0:
                    return slot, len(old)
        work += 1
        slot += 1
    return slot, moves


@kernel
def digest(
    ids: NDArray[np.int64],
    tables: NDArray[np.int32],
    rows: NDArray[np.int32],
    offsets: NDArray[np.int64],
    values: NDArray[np.uint32],
    state: NDArray[np.uint32],
    out: NDArray[np.uint64],
) -> None:
    """Add to out uint64[s] a hash of each row's table, id, values and state: the same in any order of rows."""
    for s in range(len(offsets) - 1):
        total = np.uint64(0)
        for i in range(offsets[s], offsets[s + 1]):
            row = rows[i]
            h = mix64(np.uint64(ids[i]) ^ mix64(np.uint64(tables[i])))
            for j in range(values.shape[1]):
                h = (h ^ np.uint64(values[row, j])) * np.uint64(0x9E3779B97F4A7C15)
                h ^= h >> np.uint64(32)
            for j in range(state.shape[1]):
                h = (h ^ np.uint64(state[row, j])) * np.uint64(0x9E3779B97F4A7C15)
                h ^= h >> np.uint64(32)
            total += mix64(h)
        out[s] += total


def warmup() -> None:
    """Compile this module's kernels."""
    index = warm_index()
    one, slots = np.zeros(1, np.int64), np.zeros(1, np.int32)
    rows = np.full(1, -1, np.int32)
    insert_many(slots, slots, one, index, rows)
    count_rows(one, index, one.copy())
    last = np.uint64(2**64 - 1)
    tokens = np.zeros(1, np.uint64)
    collect(
        one, tokens, one, 0, np.uint64(0), last, index, one.copy(), slots, rows, tokens.copy(), np.zeros(2, np.int64)
    )
    detach_many(slots, slots, one, index)
    attach_many(slots, slots, one, rows, index)
    compact(0, 1, 8, index, slots.copy(), slots.copy())
    erase_many(slots, slots, one, index, np.zeros(1, np.uint8))
    drop_slots(one, index)
    bits = np.zeros((1, 1), np.uint32)
    digest(one, slots, slots, np.zeros(2, np.int64), bits, bits, tokens)
