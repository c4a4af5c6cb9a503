"""Merging: from the servers' partial rows to the answer, and from gradients to the rows that each server is sent.

The symbols are those of split.py. Rows lie flat: feature f of the request begins at float `places[f]` and bag g of it
has `dims[f]` floats from `places[f] + (g - starts[f]) * dims[f]`. A share's rows stand feature behind feature too.
One call handles all features of one server's reply, so that early replies are merged while others are under way.
"""

import numpy as np

from ps.kernels import kernel, u64
from ps.kernels.split import F32, I32, I64, U8
from ps.share import BAGS

SUM, MAX, MEAN = 0, 1, 2
"""How a bag is pooled. A server knows the first two (ps/share.py); a mean is a sum that the client divides."""


@kernel
def merge(
    reply: F32, features: I32, edges: I32, edge_bag: I32, edge_row: I32, edge_weight: F32, starts: I64, places: I64,
    dims: I64, modes: U8, touched: U8, out: F32,
) -> bool:  # fmt: skip
    """Pool the rows of one server's reply into `out`, flat float32; False, and nothing done, where it has other rows.

    features int32[F, 4] and edges int32[F] of this server alone, as all edge_*; modes uint8[F].
    touched uint8[G]: whether a bag has been written; its first row is copied, so that `out` need not be cleared.
    """
    e = 0
    base = 0
    for f in range(dims.size):
        base += features[f, BAGS] * dims[f]
    if base != reply.size:
        return False
    base = 0
    weighted = edge_weight.size > 0
    for f in range(dims.size):
        dim = dims[f]
        for _ in range(edges[f]):
            g = edge_bag[e]
            row = base + np.int64(edge_row[e]) * dim
            bag = places[f] + (g - starts[f]) * dim
            weight = edge_weight[e] if weighted else np.float32(1.0)
            if not touched[g]:
                if weighted:
                    for k in range(dim):
                        out[u64(bag + k)] = weight * reply[u64(row + k)]
                else:
                    for k in range(dim):
                        out[u64(bag + k)] = reply[u64(row + k)]
            elif modes[f] == MAX:
                for k in range(dim):
                    out[u64(bag + k)] = max(out[u64(bag + k)], reply[u64(row + k)])
            elif weighted:
                for k in range(dim):
                    out[u64(bag + k)] += weight * reply[u64(row + k)]
            else:
                for k in range(dim):
                    out[u64(bag + k)] += reply[u64(row + k)]
            touched[g] = 1
            e += 1
        base += features[f, BAGS] * dim
    return True


@kernel
def place_bags(starts: I64, dims: I64, places: I64) -> int:
    """Where each feature's bags begin in the flat answer, in floats: places int64[F]. Returns the floats of all."""
    at = 0
    for f in range(dims.size):
        places[f] = at
        at += (starts[f + 1] - starts[f]) * dims[f]
    return at


@kernel
def finish(offsets: I64, starts: I64, places: I64, dims: I64, modes: U8, touched: U8, out: F32) -> None:
    """Zeros for bags without ids, and means divided by the count of the whole bag (offsets empty: one id each)."""
    for f in range(dims.size):
        dim = dims[f]
        for g in range(starts[f], starts[f + 1]):
            at = places[f] + (g - starts[f]) * dim
            if not touched[g]:
                for k in range(dim):
                    out[u64(at + k)] = 0.0
            elif modes[f] == MEAN and offsets.size:
                count = np.float32(offsets[g + 1] - offsets[g])
                if count > 1:
                    for k in range(dim):
                        out[u64(at + k)] /= count


@kernel
def gather(
    grads: F32, features: I32, edges: I32, edge_bag: I32, edge_row: I32, edge_weight: F32, offsets: I64, starts: I64,
    places: I64, dims: I64, modes: U8, overwrite: bool, rows: F32,
) -> None:  # fmt: skip
    """The inverse of `merge`, for one server: each share bag's row is the sum of its bags' gradients.

    The gradient of a mean is divided by the count of its bag. Share bags are numbered in the order of their first
    edge, so that a row is copied once and added to from then on; with `overwrite` (an assignment) it is copied each
    time, and the last one wins. rows: flat float32, written whole.
    """
    e = 0
    base = 0
    weighted = edge_weight.size > 0
    for f in range(dims.size):
        dim = dims[f]
        seen = 0
        for _ in range(edges[f]):
            g = edge_bag[e]
            bag = places[f] + (g - starts[f]) * dim
            row = base + np.int64(edge_row[e]) * dim
            factor = edge_weight[e] if weighted else np.float32(1.0)
            if modes[f] == MEAN and offsets.size:
                factor /= np.float32(offsets[g + 1] - offsets[g])
            fresh = edge_row[e] == seen
            seen += fresh
            if fresh or overwrite:
                for k in range(dim):
                    rows[u64(row + k)] = factor * grads[u64(bag + k)]
            else:
                for k in range(dim):
                    rows[u64(row + k)] += factor * grads[u64(bag + k)]
            e += 1
        base += features[f, BAGS] * dim


_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
"""The bits of a float32 but its sign. As whole numbers they stand in the order of the magnitudes, and those of a NaN
beyond those of infinity (IEEE 754)."""


@kernel
def first_not_finite(values: F32) -> int:
    """Index of the first NaN or infinity of a flat float32 array, or -1. Of a block the largest is found first."""
    block = 4096
    bits = values.view(np.int32)
    for start in range(0, values.size, block):
        stop = min(start + block, values.size)
        largest = np.int32(0)
        for i in range(start, stop):
            largest = max(largest, bits[u64(i)] & _MAGNITUDE)
        if largest >= _INFINITY:
            for i in range(start, stop):
                if not np.isfinite(values[i]):
                    return i
    return -1


def warmup() -> None:
    """Compile this module's kernels, for arguments of the types that a client passes."""
    lines, ones, zeros = np.ones((1, 4), np.int32), np.ones(1, np.int32), np.zeros(1, np.int32)
    bounds, places, dims = np.array([0, 1], np.int64), np.array([0, 1], np.int64), np.ones(1, np.int64)
    modes, touched = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    row, out, none = np.zeros(1, np.float32), np.zeros(1, np.float32), np.empty(0, np.float32)
    merge(row, lines, ones, zeros, zeros, none, bounds, places, dims, modes, touched, out)
    place_bags(bounds, dims, places)
    finish(bounds, bounds, places, dims, modes, touched, out)
    gather(row, lines, ones, zeros, zeros, none, bounds, bounds, places, dims, modes, False, out)
    first_not_finite(out)
