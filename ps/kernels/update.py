"""Writing rows: check, sum duplicates, copy, stamp."""

import numpy as np
from numpy.typing import NDArray

from ps.kernels import kernel, prefetch
from ps.kernels.index import P_BAGS, P_BAGS_END, P_CODE, P_IDS, P_IDS_END, P_OUT, P_SEED, token_of, warm_plan
from ps.kernels.pool import ask
from ps.kernels.window import NEW

_AHEAD = 8
"""Rows whose memory is asked for before they are written."""


@kernel
def dedupe(
    plan: NDArray[np.int64],
    ids: NDArray[np.int64],
    slots: NDArray[np.int32],
    verdicts: NDArray[np.uint8],
    scratch: NDArray[np.int32],
    inverse: NDArray[np.int32],
    first: NDArray[np.int32],
    codes: NDArray[np.int32],
) -> int:
    """Number the distinct (code, id) of an arena's features, leaving out slots whose verdict is not NEW.

    scratch int32[2**k >= 2 n], zero: a hash table. inverse int32[n]: the number of each id, -1 where left out.
    first int32[u], codes int32[u]: where each was met first, and its code. Returns u.
    """
    mask = np.int64(len(scratch) - 1)
    u = 0
    for f in range(plan.shape[0]):
        code, seed = plan[f, P_CODE], plan[f, P_SEED]
        for i in range(plan[f, P_IDS], plan[f, P_IDS_END]):
            if verdicts[slots[i]] != NEW:
                inverse[i] = np.int32(-1)
                continue
            place = np.int64(token_of(ids[i], seed) >> np.uint64(20)) & mask
            while True:
                known = scratch[place] - 1
                if known < 0:
                    scratch[place] = np.int32(u + 1)
                    first[u], codes[u] = np.int32(i), np.int32(code)
                    inverse[i] = np.int32(u)
                    u += 1
                    break
                if codes[known] == code and ids[first[known]] == ids[i]:
                    inverse[i] = np.int32(known)
                    break
                place = (place + 1) & mask
    return u


@kernel
def sum_gradients(
    plan: NDArray[np.int64],
    offsets: NDArray[np.int64],
    weights: NDArray[np.float32],
    inverse: NDArray[np.int32],
    rows: NDArray[np.float32],
    sums: NDArray[np.float32],
) -> None:
    """sums float32[u, d] += the gradient of each id (of its bag, times its weight); sums begins as zeros.

    offsets is empty where every id is a bag; weights is empty where each is 1.
    """
    d = sums.shape[1]
    bagged, weighted = len(offsets) > 0, len(weights) > 0
    for f in range(plan.shape[0]):
        at = plan[f, P_OUT]
        for b in range(plan[f, P_BAGS], plan[f, P_BAGS_END]):
            low = offsets[b] if bagged else plan[f, P_IDS] + b - plan[f, P_BAGS]
            high = offsets[b + 1] if bagged else low + 1
            gradient = rows[at : at + d]
            for i in range(low, high):
                u = inverse[i]
                if u < 0:
                    continue
                total = sums[u]
                if weighted:
                    for j in range(d):
                        total[j] += weights[i] * gradient[j]
                else:
                    for j in range(d):
                        total[j] += gradient[j]
            at += d


@kernel
def overwrite(
    plan: NDArray[np.int64],
    inverse: NDArray[np.int32],
    targets: NDArray[np.int32],
    rows: NDArray[np.float32],
    values: NDArray[np.float32],
) -> None:
    """values[targets[inverse[i]]] = row i, in order: of duplicates the last wins."""
    d = values.shape[1]
    for f in range(plan.shape[0]):
        at = plan[f, P_OUT]
        end = plan[f, P_IDS_END]
        for i in range(plan[f, P_IDS], end):
            if i + _AHEAD < end and inverse[i + _AHEAD] >= 0:  # beyond it may stand anything
                ask(values, np.int64(targets[inverse[i + _AHEAD]]))
            if inverse[i] >= 0:
                target, source = values[targets[inverse[i]]], rows[at : at + d]
                for j in range(d):
                    target[j] = source[j]
            at += d


@kernel
def stamp(
    rows: NDArray[np.int32],
    slots: NDArray[np.int32],
    positions: NDArray[np.int64],
    now: int,
    pushes: int,
    meta: NDArray[np.int64],
) -> None:
    """Metadata of changed rows: version = the slot's position, time = now (seconds), push count += pushes."""
    for i in range(len(rows)):
        if i + 16 < len(rows):
            prefetch(meta, 2 * np.int64(rows[i + 16]))
        row = rows[i]
        count = min((meta[row, 1] & 0xFFFFFFFF) + pushes, 0xFFFFFFFF)
        meta[row, 0] = positions[slots[i]]
        meta[row, 1] = now << 32 | count


def warmup() -> None:
    """Compile this module's kernels."""
    ids, one32 = np.zeros(1, np.int64), np.zeros(1, np.int32)
    rows, values = np.zeros(4, np.float32), np.zeros((1, 4), np.float32)
    inverse = one32.copy()
    dedupe(warm_plan(1), ids, one32, np.ones(1, np.uint8), np.zeros(2, np.int32), inverse, one32.copy(), one32.copy())
    sum_gradients(warm_plan(1), np.zeros(0, np.int64), rows[:0], inverse, rows, values)
    overwrite(warm_plan(1), inverse, one32, rows, values)
    stamp(one32, one32, ids, 0, 1, np.zeros((1, 2), np.int64))
