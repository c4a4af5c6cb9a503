"""Reading the rows of this host's servers in place, as `pool.pull` does on a server; see ps/shared.py.

The memory of S servers lies behind one another in one range of addresses, so that one array is all of theirs: the
directory of server s begins at s * sizes[SLOTS], its nodes at s * sizes[NODES], and so on. All of it may change at any
time. So every number is checked before it is followed, and what was read counts only if the server's sequence stands
where it stood.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ps.kernels import BATCH, inline, kernel, prefetch
from ps.kernels.index import (
    CAPACITY,
    CLASSES,
    FANOUT_BITS,
    GRANULE,
    P_ABSENT,
    P_ARENA,
    P_BAGS,
    P_BAGS_END,
    P_BITS,
    P_CODE,
    P_FIRST,
    P_IDS,
    P_IDS_END,
    P_MODE,
    P_OUT,
    P_SEED,
    PLAN_COLUMNS,
    child_of,
    place_of,
    probe,
    slot_of,
    token_of,
)
from ps.kernels.pool import gather_rows, pool_bags

INCARNATION, SEQUENCE, GENERATION, BEAT, LEASE = range(5)
HEADER_FIELDS = 8
"""Words of a server's header, int64: see ps/shared.py."""

SLOTS, NODES, ENTRIES, ROWS = range(4)
"""sizes: how much of each kind one server has."""

OWNER = 1
_UNUSABLE = -1


def _fence(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


_fenced: Any = intrinsic(_fence)


@kernel
def fence() -> None:
    """No load or store moves across."""
    _fenced()


@kernel
def begin(headers: NDArray[np.int64], generations: NDArray[np.int64], now: int, seen: NDArray[np.int64]) -> bool:
    """Note each server's sequence in seen int64[S]; -1 where it cannot be read at this moment.

    headers int64[S, HEADER_FIELDS]; generations int64[S]: those that the reader's codes are of; now: nanoseconds.
    False where a server's tables are others by now.
    """
    known = True
    for s in range(headers.shape[0]):
        sequence = headers[s, SEQUENCE]
        same = headers[s, GENERATION] == generations[s]
        alive = now - headers[s, BEAT] < headers[s, LEASE]
        seen[s] = sequence if same and alive and (sequence & 1) == 0 else _UNUSABLE
        known &= same
    _fenced()
    return known


@inline
def _leaf(
    directory: NDArray[np.int64], nodes: NDArray[np.int64], at: int, node: int, nodes_n: int, token: int, bits: int
) -> int:
    """`index.leaf_word` that cannot go astray: 0 where what it meets makes no sense."""
    word = directory[at]
    used = bits
    while word < 0:
        number = -(word + 1)  # not -word - 1, which overflows for the least of all words
        if number >= nodes_n or used > 64 - FANOUT_BITS:
            return 0
        word = nodes[node + number, child_of(token, used)]
        used += FANOUT_BITS
    return word


@inline
def _find(
    plan: NDArray[np.int64],
    f: int,
    ids: NDArray[np.int64],
    where: NDArray[np.int8],
    codes: NDArray[np.int64],
    roles: NDArray[np.uint8],
    directory: NDArray[np.int64],
    nodes: NDArray[np.int64],
    entries: NDArray[np.int64],
    sizes: NDArray[np.int64],
    used: NDArray[np.uint8],
    scratch: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> bool:
    """Rows of one feature's ids in the servers' joint matrix, -1 absent; False where one cannot be read."""
    code, seed, bits, first = plan[f, P_CODE], plan[f, P_SEED], plan[f, P_BITS], plan[f, P_FIRST]
    end = plan[f, P_IDS_END]
    for low in range(plan[f, P_IDS], end, BATCH):
        high = min(low + BATCH, end)
        for i in range(low, high):
            scratch[0, i - low] = np.int64(token_of(ids[i], seed))
        lost = np.int64(0)
        for k in range(high - low):
            slot = slot_of(np.uint64(scratch[0, k]), bits, first)
            server = np.int64(where[slot])
            lost |= server
            at = server * sizes[SLOTS] + slot
            scratch[1, k], scratch[2, k] = at, server
            prefetch(directory, at)
        if lost < 0:
            return False
        for i in range(low, high):
            k = i - low
            token, at, server = np.uint64(scratch[0, k]), scratch[1, k], scratch[2, k]
            used[server] = 1
            if roles[at] < OWNER:
                return False
            word = _leaf(directory, nodes, at, server * sizes[NODES], sizes[NODES], token, bits)
            class_, base = word & 63, (word >> 22) * GRANULE
            size = CAPACITY[class_] if class_ < CLASSES else np.int64(0)
            if base + size > sizes[ENTRIES]:
                size, base = np.int64(0), np.int64(0)
            place = place_of(token, codes[server, code], size)
            base += server * sizes[ENTRIES]
            scratch[0, k], scratch[1, k], scratch[3, k] = place, base, size
            prefetch(entries, 2 * (base + place))
        for i in range(low, high):
            k = i - low
            server = scratch[2, k]
            at = probe(entries, scratch[1, k], scratch[3, k], scratch[0, k], ids[i], codes[server, code])
            row = np.int64(-1)
            if at >= 0:
                row = entries[at, 1] & 0x7FFFFFFF
                row = row + server * sizes[ROWS] if row < sizes[ROWS] else np.int64(-1)
            rows[i] = row
    return True


@kernel
def lay_out(
    tables: NDArray[np.int64],
    starts: NDArray[np.int64],
    offsets: NDArray[np.int64],
    places: NDArray[np.int64],
    modes: NDArray[np.uint8],
    absent: int,
    plan: NDArray[np.int64],
) -> None:
    """Fill plan int64[F, PLAN_COLUMNS] from the lines `tables` of the same shape; absent -1: as the table says."""
    for f in range(tables.shape[0]):
        for column in range(PLAN_COLUMNS):
            plan[f, column] = tables[f, column]
        low, high = starts[f], starts[f + 1]
        plan[f, P_BAGS], plan[f, P_BAGS_END] = low, high
        plan[f, P_IDS], plan[f, P_IDS_END] = (offsets[low], offsets[high]) if len(offsets) else (low, high)
        plan[f, P_OUT], plan[f, P_MODE] = places[f], modes[f] == 1
        if absent >= 0:
            plan[f, P_ABSENT] = absent


@kernel
def halve(
    plan: NDArray[np.int64],
    offsets: NDArray[np.int64],
    dims: NDArray[np.int64],
    n: int,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
) -> int:
    """Cut a plan's lines where about half of its n ids are behind, between two bags: lines in `first` and `second`.

    first, second: int64[F, PLAN_COLUMNS]. Returns f: the cut is in feature f, so that first[: f + 1] and second[f:]
    are the halves.
    """
    first[:], second[:] = plan, plan
    f = 0
    while f < plan.shape[0] - 1 and plan[f, P_IDS_END] < n // 2:
        f += 1
    bag = plan[f, P_BAGS]
    while bag < plan[f, P_BAGS_END] and (offsets[bag] if len(offsets) else bag) < n // 2:
        bag += 1
    at = offsets[bag] if len(offsets) else bag
    first[f, P_BAGS_END], first[f, P_IDS_END] = bag, at
    second[f, P_BAGS], second[f, P_IDS] = bag, at
    second[f, P_OUT] += (bag - plan[f, P_BAGS]) * dims[f]
    return f


@kernel
def read(
    plan: NDArray[np.int64],
    arena: int,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    weights: NDArray[np.float32],
    where: NDArray[np.int8],
    codes: NDArray[np.int64],
    roles: NDArray[np.uint8],
    directory: NDArray[np.int64],
    nodes: NDArray[np.int64],
    entries: NDArray[np.int64],
    values: NDArray[np.float32],
    sizes: NDArray[np.int64],
    initial: NDArray[np.float64],
    defaults: NDArray[np.float32],
    headers: NDArray[np.int64],
    seen: NDArray[np.int64],
    out: NDArray[np.float32],
) -> int:
    """Pool (or copy: no offsets) the rows of one arena's features, flat at each feature's place in out.

    plan: its lines may be some of the request's; their codes say which features of `codes`, `initial` and `defaults`
    they are. where int8[slots]: the server that is read for each slot, or -1. codes int64[S, F]. roles
    uint8[S * slots], and so on. initial, defaults: a line a feature. seen int64[S]: what `begin` noted.
    Returns how many ids were absent, or -1: nothing that was read counts.
    """
    rows = np.empty(len(ids), np.int64)
    scratch = np.empty((4, BATCH), np.int64)
    used = np.zeros(headers.shape[0], np.uint8)
    for f in range(plan.shape[0]):
        if plan[f, P_ARENA] == arena and not _find(
            plan, f, ids, where, codes, roles, directory, nodes, entries, sizes, used, scratch, rows
        ):
            return -1
    for s in range(headers.shape[0]):
        if used[s] and seen[s] < 0:
            return -1
    if len(offsets):
        absent = pool_bags(plan, arena, offsets, weights, ids, rows, values, initial, defaults, out)
    else:
        absent = gather_rows(plan, arena, ids, rows, values, initial, defaults, out)
    _fenced()
    for s in range(headers.shape[0]):
        if used[s] and headers[s, SEQUENCE] != seen[s]:
            return -1
    return absent


def warmup() -> None:
    """Compile this module's kernels."""
    one, word, bounds = np.zeros(1, np.int64), np.zeros((1, HEADER_FIELDS), np.int64), np.array([0, 1], np.int64)
    tables, plan, values = (
        np.zeros((1, PLAN_COLUMNS), np.int64),
        np.empty((1, PLAN_COLUMNS), np.int64),
        np.zeros((1, 4)),
    )
    floats, sizes, seen = values.astype(np.float32), np.ones(4, np.int64), np.zeros(1, np.int64)
    fence()
    begin(word, one, 0, seen)
    lay_out(tables, bounds, bounds, one, np.zeros(1, np.uint8), -1, plan)
    halve(plan, bounds, one, 1, tables.copy(), tables.copy())
    read(
        plan, 0, one, bounds, np.empty(0, np.float32), np.zeros(1, np.int8), one.reshape(1, 1), np.ones(1, np.uint8),
        one, np.zeros((1, 16), np.int64), np.zeros((8, 2), np.int64), floats, sizes, np.zeros((1, 2)), floats, word,
        seen, np.empty(4, np.float32),
    )  # fmt: skip
