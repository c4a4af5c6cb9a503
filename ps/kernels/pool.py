"""Reading rows: gather one by one, or pool bags into sums and maxima, for every feature of an arena in one call."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import inline, kernel, prefetch
from ps.kernels.index import (
    P_ABSENT,
    P_BAGS,
    P_BAGS_END,
    P_CODE,
    P_IDS,
    P_IDS_END,
    P_MODE,
    P_OUT,
    P_SEED,
    token_of,
    warm_plan,
)

AHEAD = 12
"""Rows whose cache lines are under way while one is added. 8 to 16 measured alike; without, half the speed."""

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
    row: NDArray[np.float32],
) -> None:
    """What an id without a row answers: row float32[d]."""
    if how == ABSENT_INITIAL:
        for j in range(len(row)):
            row[j] = initial_value(token, j, initial[code, 0], initial[code, 1])
    elif how == ABSENT_DEFAULT:
        row[:] = defaults[code]
    else:
        row[:] = np.float32(0.0)


@inline
def _ask(values: NDArray[np.float32], row: int) -> None:
    """Prefetch a whole row."""
    if row >= 0:
        d = values.shape[1]
        for j in range(0, d, LINE):
            prefetch(values, row * d + j)


@kernel
def gather_rows(
    plan: NDArray[np.int64],
    ids: NDArray[np.int64],
    rows: NDArray[np.int32],
    values: NDArray[np.float32],
    initial: NDArray[np.float64],
    defaults: NDArray[np.float32],
    out: NDArray[np.float32],
) -> int:
    """Raw rows, one an id, flat at each feature's place in out. Returns how many ids were absent."""
    d = values.shape[1]
    spare = np.empty(d, np.float32)
    absent = 0
    for f in range(plan.shape[0]):
        code, end, at = plan[f, P_CODE], plan[f, P_IDS_END], plan[f, P_OUT]
        for i in range(plan[f, P_IDS], end):
            if i + AHEAD < end:
                _ask(values, rows[i + AHEAD])
            row = rows[i]
            if row >= 0:
                for j in range(d):
                    out[at + j] = values[row, j]
            else:
                absent += 1
                _absent_row(plan[f, P_ABSENT], token_of(ids[i], plan[f, P_SEED]), code, initial, defaults, spare)
                for j in range(d):
                    out[at + j] = spare[j]
            at += d
    return absent


@kernel
def pool_bags(
    plan: NDArray[np.int64],
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

    Measured (dim 64, 2 million rows, huge pages, bags of 8 Zipf ids, one thread): see `embring bench kernels`, which
    compares it with torch.embedding_bag over the same matrix; this loop needs no second array of row numbers for the
    absent, and one call serves every feature.
    """
    d = values.shape[1]
    spare = np.empty(d, np.float32)
    weighted = len(weights) > 0
    absent = 0
    for f in range(plan.shape[0]):
        code, at, end = plan[f, P_CODE], plan[f, P_OUT], plan[f, P_IDS_END]
        how, largest = plan[f, P_ABSENT], plan[f, P_MODE] == MODE_MAX
        for b in range(plan[f, P_BAGS], plan[f, P_BAGS_END]):
            for j in range(d):
                out[at + j] = np.float32(0.0)
            for i in range(offsets[b], offsets[b + 1]):
                if i + AHEAD < end:
                    _ask(values, rows[i + AHEAD])
                row = rows[i]
                if row < 0:
                    absent += 1
                    _absent_row(how, token_of(ids[i], plan[f, P_SEED]), code, initial, defaults, spare)
                    _add(out, at, spare, weights[i] if weighted else np.float32(1.0), largest, i == offsets[b])
                else:
                    weight = weights[i] if weighted else np.float32(1.0)
                    _add(out, at, values[row], weight, largest, i == offsets[b])
            at += d
    return absent


@inline
def _add(
    out: NDArray[np.float32], at: int, row: NDArray[np.float32], weight: float, largest: bool, first: bool
) -> None:
    d = len(row)
    if not largest:
        for j in range(d):
            out[at + j] += weight * row[j]
    elif first:
        for j in range(d):
            out[at + j] = row[j]
    else:
        for j in range(d):
            out[at + j] = max(out[at + j], row[j])


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
        code = codes[i]
        token = token_of(ids[i], seeds[code])
        for j in range(values.shape[1]):
            values[rows[i], j] = initial_value(token, j, initial[code, 0], initial[code, 1])


def warmup() -> None:
    """Compile this module's kernels."""
    ids, rows, values = np.zeros(1, np.int64), np.full(1, -1, np.int32), np.zeros((1, 4), np.float32)
    initial, out, offsets = np.zeros((1, 2)), np.zeros(4, np.float32), np.array([0, 1], np.int64)
    gather_rows(warm_plan(1), ids, rows, values, initial, values, out)
    pool_bags(warm_plan(1), offsets, out, ids, rows, values, initial, values, out)
    initial_rows(ids, ids, rows * 0, rows * 0, initial, values)
