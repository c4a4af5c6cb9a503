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

from ps.kernels import BATCH, inline, kernel, prefetch, u64
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

TAKEN, DONE, ABSENT, SPOILT = range(4)
"""Of a read in parts: how many parts were begun, and ended; ids without a row; parts that do not count."""
WORK_FIELDS = 4

OWNER = 1
_UNUSABLE = -1


def _fence(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


_fenced: Any = intrinsic(_fence)


def _atomic_add(typingctx: Any, array: Any, position: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


atomic_add: Any = intrinsic(_atomic_add)
"""atomic_add(array, position, value): what int64 array[position] was before `value` was added."""


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
    word = directory[u64(at)]
    used = bits
    while word < 0:
        number = -(word + 1)  # not -word - 1, which overflows for the least of all words
        if number >= nodes_n or used > 64 - FANOUT_BITS:
            return 0
        word = nodes[u64(node + number), u64(child_of(token, used))]
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
        lost = np.int64(0)
        for k in range(high - low):
            token = token_of(ids[u64(low + k)], seed)
            slot = slot_of(token, bits, first)
            server = np.int64(where[u64(slot)])
            lost |= server
            at = server * sizes[SLOTS] + slot
            scratch[0, u64(k)], scratch[1, u64(k)], scratch[2, u64(k)] = np.int64(token), at, server
            prefetch(directory, at)
        if lost < 0:
            return False
        for k in range(high - low):
            token, at, server = np.uint64(scratch[0, u64(k)]), scratch[1, u64(k)], scratch[2, u64(k)]
            used[u64(server)] = 1
            if roles[u64(at)] < OWNER:
                return False
            word = _leaf(directory, nodes, at, server * sizes[NODES], sizes[NODES], token, bits)
            class_, base = word & 63, (word >> 22) * GRANULE
            size = CAPACITY[u64(class_)] if class_ < CLASSES else np.int64(0)
            if base + size > sizes[ENTRIES]:
                size, base = np.int64(0), np.int64(0)
            place = place_of(token, codes[u64(server), u64(code)], size)
            base += server * sizes[ENTRIES]
            scratch[0, u64(k)], scratch[1, u64(k)], scratch[3, u64(k)] = place, base, size
            prefetch(entries, 2 * (base + place))
        for k in range(high - low):
            place, base, server, size = (
                scratch[0, u64(k)], scratch[1, u64(k)], scratch[2, u64(k)], scratch[3, u64(k)]
            )  # fmt: skip
            at = probe(entries, base, size, place, ids[u64(low + k)], codes[u64(server), u64(code)])
            row = np.int64(-1)
            if at >= 0:
                row = entries[u64(at), 1] & 0x7FFFFFFF
                row = row + server * sizes[ROWS] if row < sizes[ROWS] else np.int64(-1)
            rows[u64(low + k)] = row
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
def cut_parts(offsets: NDArray[np.int64], bags: int, size: int, cuts: NDArray[np.int64]) -> int:
    """Cut a request's bags into parts of at least `size` ids (but the last), for `read_parts`; returns how many.

    offsets may be empty: every bag is one id. cuts int64[ids // size + 2]: part p has the bags cuts[p]..cuts[p + 1]-1.
    """
    parts = 0
    cuts[0] = begun = 0
    ragged = len(offsets) > 0
    for bag in range(1, bags + 1):
        ids = offsets[bag] - offsets[begun] if ragged else bag - begun
        if ids >= size or bag == bags:
            parts += 1
            cuts[parts] = begun = bag
    return parts


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
    rows: NDArray[np.int64],
    out: NDArray[np.float32],
) -> int:
    """Pool (or copy: no offsets) the rows of one arena's features, flat at each feature's place in out.

    plan: its lines may be some of the request's; their codes say which features of `codes`, `initial` and `defaults`
    they are. where int8[slots]: the server that is read for each slot, or -1. codes int64[S, F]. roles
    uint8[S * slots], and so on. initial, defaults: a line a feature. seen int64[S]: what `begin` noted.
    rows int64[n]: room; nothing is touched but the places of the ids of these lines.
    Returns how many ids were absent, or -1: nothing that was read counts.
    """
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


@kernel
def read_parts(
    work: NDArray[np.int64],
    cuts: NDArray[np.int64],
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
    rows: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """`read` by several threads, which call this with the same arguments: each takes the next part until none is left.

    work int64[WORK_FIELDS], zeros at first; all is read once work[DONE] is the number of parts. cuts: of `cut_parts`.
    """
    lines = np.empty_like(plan)
    while True:
        part = atomic_add(work, TAKEN, 1)
        if part >= len(cuts) - 1:
            return
        n = 0
        for f in range(plan.shape[0]):
            low, high = max(plan[f, P_BAGS], cuts[part]), min(plan[f, P_BAGS_END], cuts[part + 1])
            if low < high and plan[f, P_ARENA] == arena:
                lines[n] = plan[f]
                lines[n, P_BAGS], lines[n, P_BAGS_END] = low, high
                lines[n, P_IDS], lines[n, P_IDS_END] = (offsets[low], offsets[high]) if len(offsets) else (low, high)
                lines[n, P_OUT] += (low - plan[f, P_BAGS]) * values.shape[1]
                n += 1
        without = read(
            lines[:n], arena, ids, offsets, weights, where, codes, roles, directory, nodes, entries, values, sizes,
            initial, defaults, headers, seen, rows, out,
        )  # fmt: skip
        atomic_add(work, ABSENT if without >= 0 else SPOILT, abs(without))
        atomic_add(work, DONE, 1)


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
    cut_parts(bounds, 1, 1, np.empty(3, np.int64))
    arguments = (
        plan, 0, one, bounds, np.empty(0, np.float32), np.zeros(1, np.int8), one.reshape(1, 1), np.ones(1, np.uint8),
        one, np.zeros((1, 16), np.int64), np.zeros((8, 2), np.int64), floats, sizes, np.zeros((1, 2)), floats, word,
        seen, one, np.empty(4, np.float32),
    )  # fmt: skip
    read(*arguments)
    read_parts(np.zeros(WORK_FIELDS, np.int64), bounds, *arguments)
