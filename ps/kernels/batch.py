"""Batches: the offsets of several features joined and checked, and a batch that is too big for one request cut."""

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import kernel

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


@kernel
def first_bad_offset(counts: I64, offsets: I64, rebased: I64) -> tuple[int, int]:
    """Join the offsets of F features, which lie one behind another, into `rebased` int64[G+1].

    counts int64[F, 2]: bags and ids of each feature. Returns (-1, 0), or (feature, index) of the first offset that
    breaks the invariants of RaggedIds.
    """
    at = 0
    base = 0
    g = 0
    rebased[0] = 0
    for f in range(counts.shape[0]):
        bags = counts[f, 0]
        n = counts[f, 1]
        if offsets[at] != 0:
            return f, 0
        last = 0
        for b in range(1, bags + 1):
            offset = offsets[at + b]
            if offset < last or offset > n:
                return f, b
            last = offset
            g += 1
            rebased[g] = base + offset
        if last != n:
            return f, bags
        at += bags + 1
        base += n
    return -1, 0


@kernel
def cut(ids: I64, starts: I64, offsets: I64, seeds: U64, parts: int) -> U8:
    """Part of each id, uint8[n], of up to 256 about equal ones. All occurrences of an id in a table are in one part."""
    part = np.empty(ids.size, np.uint8)
    for f in range(starts.size - 1):
        low, high = starts[f], starts[f + 1]
        if offsets.size:
            low, high = offsets[low], offsets[high]
        for i in range(low, high):
            # The token's low half: the high one already decides the slot.
            half = mix64(np.uint64(ids[i]) ^ seeds[f]) & np.uint64(0xFFFFFFFF)
            part[i] = (half * np.uint64(parts)) >> np.uint64(32)
    return part


def warmup() -> None:
    """Compile this module's kernels."""
    bounds = np.array([0, 1], np.int64)
    cut(np.zeros(1, np.int64), bounds, bounds, np.zeros(1, np.uint64), 1)
    first_bad_offset(np.ones((1, 2), np.int64), bounds, np.empty(2, np.int64))
