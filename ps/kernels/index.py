"""The directory of an arena: (table, id) -> row number, one small open-addressing segment a slot.

    directory int64[slots]   one word a slot:  0 nothing | > 0 a leaf | < 0 a node, -(number + 1)
    nodes int64[*, 16]       a slot too big for one segment: the next 4 bits of the token choose the word
    entries int64[*, 2]      id, and (code + 1) << 32 | row; 0 = empty, so that every int64 is a valid id

A leaf word is `granule << 22 | count << 6 | class`: the segment's place (in granules of 4 entries, one cache line),
how many entries it holds, and its size class. Everything a lookup needs is in that one word.

The token's high bits choose the slot, the next ones the child of a node, its low 32 bits the line inside the
segment; so a leaf covers an interval of tokens, and leaves in order are in token order.

Size classes grow by a fourth root of two and are filled to 0.8, so load stays between 0.67 and 0.8: doubling would
leave 0.4, and 40 bytes an entry. Segments of one class fill chunks of 2**15 entries densely: whoever frees a segment
moves the class's last one into the hole, so there is no fragmentation to compact, and a growth costs two segments.

A `code` is the arena's own small number of a table; `codes int64[*, 4]` holds its token seed, the token bits that
choose its slot, its first slot, and its rows.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import BATCH, inline, kernel, prefetch, u64

CHUNK_ENTRIES = 2**15
GRANULE = 4
FANOUT_BITS = 4
LOAD_MAX = 0.8

SEED, BITS, FIRST, ROWS = 0, 1, 2, 3
CODE_COLUMNS = 4

LIVE, HIGH, FREE, TARGET, PEAK, CHUNKS, CHUNKS_FREE, NODES, NODE_FREE = range(9)
HEAP_FIELDS = 9
"""heap: live rows; rows ever used; free rows; compaction's target (or 2**62) and the highest row met above it; chunks
ever used, and free; nodes ever used; the first free node + 1 (a free node's first word names the next)."""

# The columns of a plan, one line a feature (int64[F, PLAN_COLUMNS]).
P_CODE, P_SEED, P_BITS, P_FIRST, P_IDS, P_IDS_END, P_BAGS, P_BAGS_END, P_OUT, P_MODE, P_ABSENT, P_ARENA = range(12)
PLAN_COLUMNS = 12


def _capacities() -> NDArray[np.int64]:
    sizes, size = [0], float(GRANULE)
    while size < CHUNK_ENTRIES * 1.001:
        rounded = min(int(np.ceil(size / GRANULE - 1e-9)) * GRANULE, CHUNK_ENTRIES)
        if rounded != sizes[-1]:
            sizes.append(rounded)
        size *= 2**0.25
    return np.array(sizes, np.int64)


CAPACITY = _capacities()
LIMIT = np.minimum(np.maximum((CAPACITY * LOAD_MAX).astype(np.int64), np.minimum(CAPACITY, 3)), CAPACITY)
CLASSES = len(CAPACITY)
assert CLASSES <= 64 and CAPACITY[-1] == CHUNK_ENTRIES  # noqa: PT018 - the packing of a leaf word rests on both
LAST_CLASS = CLASSES - 1

_LOW32 = np.uint64(0xFFFFFFFF)
_GOLDEN32 = np.uint64(0x9E3779B1)


class Index(NamedTuple):
    """The arrays of one directory, as kernels take them."""

    directory: NDArray[np.int64]
    nodes: NDArray[np.int64]
    entries: NDArray[np.int64]
    codes: NDArray[np.int64]
    heap: NDArray[np.int64]
    free_rows: NDArray[np.int32]
    free_chunks: NDArray[np.int32]
    class_count: NDArray[np.int64]
    class_chunks: NDArray[np.int32]


@inline
def token_of(id_: int, seed: int) -> Any:
    """uint64 token of an id; seed is the table's token seed, as int64 bits."""
    return mix64(np.uint64(id_) ^ np.uint64(seed))


@inline
def slot_of(token: int, bits: int, first: int) -> Any:
    """Global slot number; two shifts, since one by 64 (a `whole` table has 0 bits) is undefined."""
    return first + np.int64((token >> np.uint64(1)) >> np.uint64(63 - bits))


@inline
def child_of(token: int, used: int) -> Any:
    """The 4 bits of the token after its first `used` bits."""
    return np.int64((token >> np.uint64(64 - FANOUT_BITS - used)) & np.uint64(15))


@inline
def place_of(token: int, code: int, capacity: int) -> Any:
    """Home place in a segment: the first entry of a line, by the low 32 bits (capacities are no powers of two).

    The code is mixed in (Knuth's multiplicative hash): tables with equal seeds give equal ids equal tokens, and their
    entries would all want one place.
    """
    spread = (token ^ (np.uint64(code) * _GOLDEN32)) & _LOW32
    return np.int64((spread * np.uint64(capacity // GRANULE)) >> np.uint64(32)) * GRANULE


@inline
def leaf_word(directory: NDArray[np.int64], nodes: NDArray[np.int64], slot: int, token: int, bits: int) -> int:
    """The word of the leaf that covers `token` (0 where there is none)."""
    word = directory[u64(slot)]
    used = bits
    while word < 0:
        word = nodes[u64(-word - 1), u64(child_of(token, used))]
        used += FANOUT_BITS
    return word


@inline
def probe(entries: NDArray[np.int64], base: int, capacity: int, place: int, id_: int, code: int) -> int:
    """The entry of (code, id) in a segment, or -1; entries are (id, (code + 1) << 32 | row)."""
    if capacity == 0:
        return -1
    tag = code + 1
    home = base + place
    found = -1
    for at in range(home, home + GRANULE):  # no branch: where in its line an entry stands cannot be predicted
        found = at if entries[u64(at), 0] == id_ else found
    if found >= 0 and entries[u64(found), 1] >> 32 == tag:
        return found
    for _ in range(capacity):
        at = base + place
        meta = entries[u64(at), 1]
        if meta == 0:
            return -1
        if entries[u64(at), 0] == id_ and meta >> 32 == tag:
            return at
        place += 1
        if place == capacity:
            place = 0
    return -1


@kernel
def find(
    plan: NDArray[np.int64],
    arena: int,
    ids: NDArray[np.int64],
    roles: NDArray[np.uint8],
    role_min: int,
    directory: NDArray[np.int64],
    nodes: NDArray[np.int64],
    entries: NDArray[np.int64],
    slots: NDArray[np.int32],
    rows: NDArray[np.int32],
) -> int:
    """Rows of the ids of one arena's features: rows int32[n] (-1 absent), slots int32[n].

    Takes the index's arrays one by one: a named tuple that crosses into a kernel costs as much as 1,000 lookups.
    Returns -1, or the position of the first id whose slot has a role below `role_min` here.
    Three passes over a batch: token and directory word, home entry, probe; each asks for the next one's lines.
    """
    tokens = np.empty(BATCH, np.uint64)
    bases = np.empty(BATCH, np.int64)
    places = np.empty(BATCH, np.int64)
    sizes = np.empty(BATCH, np.int64)
    for f in range(plan.shape[0]):
        if plan[f, P_ARENA] != arena:
            continue
        code, seed, bits, first = plan[f, P_CODE], plan[f, P_SEED], plan[f, P_BITS], plan[f, P_FIRST]
        end = plan[f, P_IDS_END]
        for low in range(plan[f, P_IDS], end, BATCH):
            high = min(low + BATCH, end)
            for k in range(high - low):
                i = low + k
                token = token_of(ids[u64(i)], seed)
                slot = slot_of(token, bits, first)
                tokens[u64(k)] = token
                slots[u64(i)] = np.int32(slot)
                prefetch(directory, slot)
            for k in range(high - low):
                i = low + k
                slot, token = np.int64(slots[u64(i)]), tokens[u64(k)]
                if roles[u64(slot)] < role_min:
                    return i
                word = leaf_word(directory, nodes, slot, token, bits)
                size = CAPACITY[u64(word & 63)]
                place, base = place_of(token, code, size), (word >> 22) * GRANULE
                sizes[u64(k)], bases[u64(k)], places[u64(k)] = size, base, place
                prefetch(entries, 2 * (base + place))
            for k in range(high - low):
                i = low + k
                at = probe(entries, bases[u64(k)], sizes[u64(k)], places[u64(k)], ids[u64(i)], code)
                rows[u64(i)] = np.int32(-1) if at < 0 else np.int32(entries[u64(at), 1] & 0x7FFFFFFF)
    return -1


@kernel
def find_pairs(
    slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64], index: Index, rows: NDArray[np.int32]
) -> None:
    """Rows of (code, id) pairs whose slots are known: rows int32[n], -1 absent. Two passes over a batch, as `find`."""
    bases = np.empty(BATCH, np.int64)
    places = np.empty(BATCH, np.int64)
    sizes = np.empty(BATCH, np.int64)
    entries = index.entries
    for low in range(0, len(ids), BATCH):
        high = min(low + BATCH, len(ids))
        for i in range(low, high):
            prefetch(index.directory, np.int64(slots[i]))
        for i in range(low, high):
            code, k = np.int64(codes[i]), i - low
            token = token_of(ids[i], index.codes[code, SEED])
            word = leaf_word(index.directory, index.nodes, np.int64(slots[i]), token, index.codes[code, BITS])
            size = CAPACITY[word & 63]
            place, base = place_of(token, code, size), (word >> 22) * GRANULE
            sizes[k], bases[k], places[k] = size, base, place
            prefetch(entries, 2 * (base + place))
        for i in range(low, high):
            k = i - low
            at = probe(entries, bases[k], sizes[k], places[k], ids[i], np.int64(codes[i]))
            rows[i] = np.int32(-1) if at < 0 else np.int32(entries[at, 1] & 0x7FFFFFFF)


@kernel
def slots_of(
    codes: NDArray[np.int32], ids: NDArray[np.int64], columns: NDArray[np.int64], slots: NDArray[np.int32]
) -> None:
    """The slot of each (code, id) pair: slots int32[n]; columns are the index's codes."""
    for i in range(len(ids)):
        code = codes[i]
        token = token_of(ids[i], columns[code, SEED])
        slots[i] = np.int32(slot_of(token, columns[code, BITS], columns[code, FIRST]))


def empty_index(slots: int, rows: int, chunks: int, nodes: int, codes: int) -> Index:
    """A directory over ordinary memory: what warm-up and tests use (an arena reserves its own)."""
    return Index(
        np.zeros(slots, np.int64),
        np.zeros((nodes, 16), np.int64),
        np.zeros((chunks * CHUNK_ENTRIES, 2), np.int64),
        np.zeros((codes, CODE_COLUMNS), np.int64),
        np.array([0, 0, 0, 2**62, -1, 0, 0, 0, 0], np.int64),
        np.zeros(rows, np.int32),
        np.zeros(chunks, np.int32),
        np.zeros(CLASSES, np.int64),
        np.zeros((CLASSES, chunks), np.int32),
    )


def warm_index() -> Index:
    """One table of code 0, one slot, room for a few rows."""
    index = empty_index(1, 64, 4, 4, 1)
    index.codes[0] = (7, 0, 0, 0)
    return index


def warm_plan(ids: int) -> NDArray[np.int64]:
    """One feature of table 0 whose ids are bags of their own."""
    return np.array([[0, 7, 0, 0, 0, ids, 0, ids, 0, 0, 2, 0]], np.int64)


def warmup() -> None:
    """Compile this module's kernels."""
    ids = np.arange(3)
    index, slots, codes, rows = warm_index(), np.zeros(3, np.int32), np.zeros(3, np.int32), np.empty(3, np.int32)
    find(warm_plan(3), 0, ids, np.ones(1, np.uint8), 1, index.directory, index.nodes, index.entries, slots, rows)
    find_pairs(slots, codes, ids, index, rows)
    slots_of(codes, ids, index.codes, slots)
