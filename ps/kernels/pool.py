"""Reading rows: gather one by one, or pool bags into sums and maxima, for every feature of an arena in one call.

Loops here index whole arrays: a slice counts its references, two atomic instructions that cost as much as a row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import inline, kernel, prefetch, u64
from ps.kernels.index import (
    P_ABSENT,
    P_ARENA,
    P_BAGS,
    P_BAGS_END,
    P_CODE,
    P_IDS,
    P_IDS_END,
    P_MODE,
    P_OUT,
    P_SEED,
    find,
    token_of,
    warm_index,
    warm_plan,
)
from ps.kernels.vector import LANES, WIDE, sum_16, sum_64, weighted_16, weighted_64

AHEAD = 12
"""Rows whose cache lines are under way while others are added: on random rows 12, 24 and 32 measured alike.

They may be another feature's, even of another arena: to ask for what is not there is no error."""

LINE = 16
"""Floats of a cache line."""

ABSENT_DEFAULT, ABSENT_INITIAL = 1, 2
MODE_MAX = 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@inline
def initial_value(token: Any, j: int, low: float, width: float) -> Any:
    """Value j of the initial row of a token: low + width * (the top 24 bits of a hash) / 2**24.

    The hash is the j-th output of SplitMix64 seeded with the token; integers and one multiplication in float64 (both
    roundings are exact by IEEE 754), so that every CPU gives the same bits.
    """
    top = mix64(token + np.uint64(j + 1) * _GOLDEN) >> np.uint64(40)
    return np.float32(low + width * (np.float64(np.int64(top)) * 5.9604644775390625e-08))


@inline
def _absent_row(
    how: int,
    token: int,
    code: int,
    initial: NDArray[np.float64],
    defaults: NDArray[np.float32],
    out: NDArray[np.float32],
    at: int,
) -> None:
    """What an id without a row answers, from out[at] on."""
    for j in range(defaults.shape[1]):
        if how == ABSENT_INITIAL:
            out[u64(at + j)] = initial_value(token, j, initial[code, 0], initial[code, 1])
        elif how == ABSENT_DEFAULT:
            out[u64(at + j)] = defaults[code, j]
        else:
            out[u64(at + j)] = np.float32(0.0)


@inline
def ask(values: NDArray[np.float32], row: int) -> None:
    """Prefetch a whole row."""
    if row >= 0:
        d = values.shape[1]
        for j in range(0, d, LINE):
            prefetch(values, row * d + j)


@kernel
def gather_rows(
    plan: NDArray[np.int64],
    arena: int,
    ids: NDArray[np.int64],
    rows: NDArray[np.int32],
    values: NDArray[np.float32],
    initial: NDArray[np.float64],
    defaults: NDArray[np.float32],
    out: NDArray[np.float32],
) -> int:
    """Raw rows, one an id, flat at each feature's place in out. Returns how many ids were absent."""
    d = values.shape[1]
    absent = 0
    last = plan[-1, P_IDS_END] if len(plan) else 0
    for f in range(plan.shape[0]):
        if plan[f, P_ARENA] != arena:
            continue
        code, at = plan[f, P_CODE], plan[f, P_OUT]
        for i in range(plan[f, P_IDS], plan[f, P_IDS_END]):
            if i + AHEAD < last:
                ask(values, rows[u64(i + AHEAD)])
            row = np.int64(rows[u64(i)])
            if row >= 0:
                for j in range(d):
                    out[u64(at + j)] = values[u64(row), u64(j)]
            else:
                absent += 1
                _absent_row(plan[f, P_ABSENT], token_of(ids[i], plan[f, P_SEED]), code, initial, defaults, out, at)
            at += d
    return absent


@kernel
def pool_bags(
    plan: NDArray[np.int64],
    arena: int,
    offsets: NDArray[np.int64],
    weights: NDArray[np.float32],
    ids: NDArray[np.int64],
    rows: NDArray[np.int32],
    values: NDArray[np.float32],
    initial: NDArray[np.float64],
    defaults: NDArray[np.float32],
    out: NDArray[np.float32],
) -> int:
    """Sum (weighted, where weights is not empty) or maximum of each bag, flat at each feature's place in out.

    An empty bag is zeros. Returns how many ids were absent.

    Measured against torch.embedding_bag over the same matrix, with what a reply needs besides (a look for absent ids,
    a copy of its output), in M rows/s, best of 15, dim 64, 26 tables of 100,000 rows, bags of 1 to 100, one thread of a
    busy machine. Here / torch, for batches of 32, 256, 2048: Zipf 1.2 ids 120/126, 108/130, 75/105; uniform ids 84/58,
    77/73, 43/45. torch alone reaches 160 to 200 on Zipf ids. It is not used: it has no way to answer an absent id, and
    one call has one mode; a server that pools large batches of cached rows would gain by it.
    """
    d = values.shape[1]
    spare = np.empty(d, np.float32)
    weighted = len(weights) > 0
    absent = 0
    last = plan[-1, P_IDS_END] if len(plan) else 0
    for f in range(plan.shape[0]):
        if plan[f, P_ARENA] != arena:
            continue
        code, at = plan[f, P_CODE], plan[f, P_OUT]
        how, largest = plan[f, P_ABSENT], plan[f, P_MODE] == MODE_MAX
        for b in range(plan[f, P_BAGS], plan[f, P_BAGS_END]):
            low, high = offsets[u64(b)], offsets[u64(b + 1)]
            least = np.int32(0)
            for i in range(low, high):
                least = min(least, rows[u64(i)])
                if i + AHEAD < last:
                    ask(values, rows[u64(i + AHEAD)])
            if least == 0 and not largest:
                _sum(values, rows, weights, low, high, out, at)
            else:
                for j in range(d):
                    out[u64(at + j)] = np.float32(0.0)
                for i in range(low, high):
                    row = np.int64(rows[i])
                    if row >= 0:
                        for j in range(d):
                            spare[j] = values[row, j]
                    else:
                        absent += 1
                        _absent_row(how, token_of(ids[i], plan[f, P_SEED]), code, initial, defaults, spare, 0)
                    if largest:
                        _raise(out, at, spare, i == low)
                    else:
                        _add(out, at, spare, weights[i] if weighted else np.float32(1.0))
            at += d
    return absent


@kernel
def pull(
    plan: NDArray[np.int64],
    arena: int,
    pooled: bool,
    offsets: NDArray[np.int64],
    weights: NDArray[np.float32],
    ids: NDArray[np.int64],
    roles: NDArray[np.uint8],
    role_min: int,
    directory: NDArray[np.int64],
    nodes: NDArray[np.int64],
    entries: NDArray[np.int64],
    values: NDArray[np.float32],
    initial: NDArray[np.float64],
    defaults: NDArray[np.float32],
    out: NDArray[np.float32],
) -> Any:
    """Find the rows of one arena's features and pool them (or copy, unless `pooled`): one call, for small pulls' sake.

    Returns (-1, how many ids were absent), or (slot, 0) for a slot whose role here is below `role_min`.
    """
    slots, rows = np.empty(len(ids), np.int32), np.empty(len(ids), np.int32)
    bad = find(plan, arena, ids, roles, role_min, directory, nodes, entries, slots, rows)
    if bad >= 0:
        return np.int64(slots[bad]), 0
    if pooled:
        return -1, pool_bags(plan, arena, offsets, weights, ids, rows, values, initial, defaults, out)
    return -1, gather_rows(plan, arena, ids, rows, values, initial, defaults, out)


@inline
def _sum(
    values: NDArray[np.float32],
    rows: NDArray[np.int32],
    weights: NDArray[np.float32],
    low: int,
    high: int,
    out: NDArray[np.float32],
    at: int,
) -> None:
    """The sum of rows that are all there (each times its weight): 64 columns at a time, then 16, then the rest."""
    d = values.shape[1]
    weighted = len(weights) > 0
    column = 0
    while column + WIDE <= d:
        if weighted:
            weighted_64(values, rows, weights, low, high, column, out, at + column)
        else:
            sum_64(values, rows, weights, low, high, column, out, at + column)
        column += WIDE
    while column + LANES <= d:
        if weighted:
            weighted_16(values, rows, weights, low, high, column, out, at + column)
        else:
            sum_16(values, rows, weights, low, high, column, out, at + column)
        column += LANES
    for j in range(column, d):
        total = np.float32(0.0)
        for i in range(low, high):
            total += (weights[i] if weighted else np.float32(1.0)) * values[rows[i], j]
        out[u64(at + j)] = total


@inline
def _add(out: NDArray[np.float32], at: int, row: NDArray[np.float32], weight: float) -> None:
    for j in range(len(row)):
        out[u64(at + j)] += weight * row[j]


@inline
def _raise(out: NDArray[np.float32], at: int, row: NDArray[np.float32], first: bool) -> None:
    for j in range(len(row)):
        out[u64(at + j)] = row[j] if first or row[j] > out[u64(at + j)] else out[u64(at + j)]


@kernel
def initial_rows(
    ids: NDArray[np.int64],
    seeds: NDArray[np.int64],
    codes: NDArray[np.int32],
    rows: NDArray[np.int32],
    initial: NDArray[np.float64],
    values: NDArray[np.float32],
) -> None:
    """Write the initial row of each id into values[rows[i]]; seeds int64[codes] are token seeds."""
    for i in range(len(ids)):
        code, row = codes[i], values[rows[i]]
        token = token_of(ids[i], seeds[code])
        for j in range(len(row)):
            row[j] = initial_value(token, j, initial[code, 0], initial[code, 1])


def warmup() -> None:
    """Compile this module's kernels."""
    ids, rows, values = np.zeros(1, np.int64), np.full(1, -1, np.int32), np.zeros((1, 4), np.float32)
    initial, out, offsets = np.zeros((1, 2)), np.zeros(4, np.float32), np.array([0, 1], np.int64)
    gather_rows(warm_plan(1), 0, ids, rows, values, initial, values, out)
    pool_bags(warm_plan(1), 0, offsets, out, ids, rows, values, initial, values, out)
    index, roles = warm_index(), np.ones(1, np.uint8)
    found = (index.directory, index.nodes, index.entries)
    pull(warm_plan(1), 0, True, offsets, out, ids, roles, 1, *found, values, initial, values, out)
    initial_rows(ids, ids, rows * 0, rows * 0, initial, values)
