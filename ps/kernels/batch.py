"""Batches: the offsets of several features joined and checked, and a batch that is too big for one request cut."""

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import kernel

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


@kernel
def join_offsets(counts: I64, offsets: I64, starts: I64, joined: I64) -> tuple[int, int]:
    """Join the offsets of F features, which lie one behind another, into `joined` int64[G+1]; fills starts int64[F+1].

    counts int64[2, F]: offsets and ids of each feature; G, all bags, is the former less one each. Returns (-1, 0), or
    (feature, index) of the first offset that breaks the invariants of RaggedIds.
    """
    for f in range(counts.shape[1]):
        if counts[0, f] < 1:
            return f, 0
    at = 0
    base = 0
    g = 0
    joined[0] = 0
    starts[0] = 0
    for f in range(counts.shape[1]):
        bags = counts[0, f] - 1
        n = counts[1, f]
        if offsets[at] != 0:
            return f, 0
        last = 0
        for b in range(1, bags + 1):
            offset = offsets[at + b]
            if offset < last or offset > n:
                return f, b
            last = offset
            g += 1
            joined[g] = base + offset
        if last != n:
            return f, bags
        at += bags + 1
        base += n
        starts[f + 1] = g
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
    join_offsets(np.array([[2], [1]]), bounds, np.empty(2, np.int64), np.empty(2, np.int64))
