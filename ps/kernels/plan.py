"""Planning: a share's lines checked and laid out for the kernels that find, pool and update, in one call."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.kernels import kernel
from ps.kernels.index import (
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
)
from ps.share import ABSENT, BAGS, MAX, MODE, TABLE
from ps.spec import ABSENT_CODES

# Columns of the registry's array, one line a table, sorted by number.
NUMBER, ARENA, CODE, SEED, BITS, FIRST, DIM = range(7)
TABLE_COLUMNS = 7

GOOD, BAD_BAGS, BAD_TOTAL, BAD_OFFSETS, BAD_TABLE, BAD_MODE, BAD_ABSENT = range(7)
"""What `lay_out` found: the share is good, or which of its rules is broken first."""

ABSENT_MAX = max(ABSENT_CODES.values())


@kernel
def lay_out(
    features: NDArray[np.int32],
    n: int,
    pooled: bool,
    offsets: NDArray[np.int64],
    tables: NDArray[np.int64],
    plan: NDArray[np.int64],
) -> Any:
    """Fill plan int64[F, PLAN_COLUMNS] from features int32[F, 4]: (GOOD, floats of all rows), or (a rule, where).

    n ids; offsets int64[bags + 1] if pooled (else every id is a bag); tables int64[T, 7], sorted by number.
    """
    total = 0
    for f in range(features.shape[0]):
        if features[f, BAGS] < 0:
            return BAD_BAGS, f
        total += features[f, BAGS]
    if total != (len(offsets) - 1 if pooled else n):
        return BAD_TOTAL, total
    if pooled:
        last = np.int64(0)
        for b in range(len(offsets)):
            if offsets[b] < last or (b == 0 and offsets[b] != 0):
                return BAD_OFFSETS, b
            last = offsets[b]
        if last != n:
            return BAD_OFFSETS, total
    bag = np.int64(0)
    floats = np.int64(0)
    for f in range(features.shape[0]):
        low, high = 0, tables.shape[0]
        while low < high:
            middle = (low + high) >> 1
            if tables[middle, NUMBER] < features[f, TABLE]:
                low = middle + 1
            else:
                high = middle
        if low == tables.shape[0] or tables[low, NUMBER] != features[f, TABLE]:
            return BAD_TABLE, f
        if not 0 <= features[f, MODE] <= MAX:
            return BAD_MODE, f
        if not 0 <= features[f, ABSENT] <= ABSENT_MAX:
            return BAD_ABSENT, f
        end = bag + features[f, BAGS]
        line = plan[f]
        line[P_CODE], line[P_SEED], line[P_BITS] = tables[low, CODE], tables[low, SEED], tables[low, BITS]
        line[P_FIRST], line[P_ARENA] = tables[low, FIRST], tables[low, ARENA]
        line[P_BAGS], line[P_BAGS_END] = bag, end
        line[P_IDS], line[P_IDS_END] = (offsets[bag], offsets[end]) if pooled else (bag, end)
        line[P_OUT], line[P_MODE], line[P_ABSENT] = floats, features[f, MODE], features[f, ABSENT]
        floats += features[f, BAGS] * tables[low, DIM]
        bag = end
    return GOOD, floats


@kernel
def codes_of(tables: NDArray[np.int32], arena: int, columns: NDArray[np.int64], codes: NDArray[np.int32]) -> int:
    """The codes of table numbers in an arena, int32[n]; columns as in `lay_out`.

    Returns -1, or the first place whose table is unknown or lives in another arena. Few tables come in long runs.
    """
    at = 0
    for i in range(len(tables)):
        if at == len(columns) or columns[at, NUMBER] != tables[i]:
            at = np.searchsorted(columns[:, NUMBER], tables[i])
        if at == len(columns) or columns[at, NUMBER] != tables[i] or columns[at, ARENA] != arena:
            return i
        codes[i] = np.int32(columns[at, CODE])
    return -1


def warmup() -> None:
    """Compile this module's kernels."""
    features, tables = np.array([[0, 1, 0, 0]], np.int32), np.zeros((1, TABLE_COLUMNS), np.int64)
    lay_out(features, 1, True, np.array([0, 1], np.int64), tables, np.empty((1, PLAN_COLUMNS), np.int64))
    codes_of(np.zeros(1, np.int32), 0, tables, np.zeros(1, np.int32))
