"""Kernels of feature preparation, over flat arrays.

    B rows   n values of a column   m bytes of its strings   k columns of a cross   offsets int64[B + 1]

Every kernel is serial and releases the GIL. Outputs come last and are written in place; a caller that cannot know
their length counts first. `warmup` compiles all of them into numba's cache: call it before several processes start.
"""

import numpy as np
from numba import njit

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@njit(inline="always", cache=True, nogil=True)
def fold(h, value):  # type: ignore[no-untyped-def]  # compiled: uint64, int64 -> uint64
    """One step of a cross's hash: splitmix64 (Steele, Lea, Flood 2014) with `value` mixed into its state."""
    x = (h + _GAMMA) ^ np.uint64(value)
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def split_count(buffer, strings, separator, counts):  # type: ignore[no-untyped-def]
    """counts int64[B]: non-empty pieces of each string between separators (a byte)."""
    for b in range(len(counts)):
        pieces, inside = 0, False
        for i in range(strings[b], strings[b + 1]):
            if buffer[i] == separator:
                inside = False
            elif not inside:
                inside = True
                pieces += 1
        counts[b] = pieces


@njit(cache=True, nogil=True)
def split_fill(buffer, strings, separator, out_buffer, out_strings):  # type: ignore[no-untyped-def]
    """The pieces end to end: out_buffer uint8[<= m], out_strings int64[pieces + 1]."""
    written, piece = 0, 0
    out_strings[0] = 0
    for b in range(len(strings) - 1):
        inside = False
        for i in range(strings[b], strings[b + 1] + 1):
            if i < strings[b + 1] and buffer[i] != separator:
                inside = True
                out_buffer[written] = buffer[i]
                written += 1
            elif inside:
                inside = False
                piece += 1
                out_strings[piece] = written


@njit(cache=True, nogil=True)
def prefix_fill(buffer, strings, length, out_buffer, out_strings):  # type: ignore[no-untyped-def]
    """The first `length` bytes of each string: out_buffer uint8[<= m], out_strings int64[n + 1]."""
    written = 0
    out_strings[0] = 0
    for i in range(len(strings) - 1):
        for at in range(strings[i], min(strings[i + 1], strings[i] + length)):
            out_buffer[written] = buffer[at]
            written += 1
        out_strings[i + 1] = written


@njit(cache=True, nogil=True)
def cross_count(offsets, limit, counts):  # type: ignore[no-untyped-def]
    """counts int64[B]: combinations of each row, at most `limit`; offsets int64[k, B + 1]."""
    for b in range(len(counts)):
        combinations = 1
        for c in range(offsets.shape[0]):
            # Stops growing at the limit, so that it cannot overflow, but an empty column still makes it 0.
            combinations = min(combinations * (offsets[c, b + 1] - offsets[c, b]), limit)
        counts[b] = combinations


@njit(cache=True, nogil=True)
def cross_fill(values, first, offsets, out_offsets, out):  # type: ignore[no-untyped-def]
    """Ids of the combinations of each row, the last column's values varying fastest.

    values int64[sum n]: the columns end to end; first int64[k]: where each begins; offsets int64[k, B + 1].
    out int64[out_offsets[B]].
    """
    k = offsets.shape[0]
    for b in range(len(out_offsets) - 1):
        for j in range(out_offsets[b + 1] - out_offsets[b]):
            # j in mixed radix, the lengths of the columns as its bases; the first column is the leading digit.
            scale = np.int64(1)
            for c in range(1, k):
                scale *= offsets[c, b + 1] - offsets[c, b]
            h, rest = np.uint64(0), np.int64(j)
            for c in range(k):
                digit = rest // scale
                rest -= digit * scale
                h = fold(h, values[first[c] + offsets[c, b] + digit])
                if c + 1 < k:
                    scale //= offsets[c + 1, b + 1] - offsets[c + 1, b]
            out[out_offsets[b] + j] = np.int64(h)


def warmup() -> None:
    """Compile every kernel for the types it is called with."""
    from ps import hash_strings

    buffer, strings = np.zeros(3, np.uint8), np.array([0, 3], np.int64)
    counts, spare = np.zeros(1, np.int64), np.zeros(3, np.uint8)
    split_count(buffer, strings, np.uint8(1), counts)
    split_fill(buffer, strings, np.uint8(1), spare, np.zeros(2, np.int64))
    prefix_fill(buffer, strings, 2, spare, np.zeros(2, np.int64))
    offsets = np.array([[0, 1], [0, 1]], np.int64)
    cross_count(offsets, 4, counts)
    cross_fill(np.zeros(2, np.int64), np.array([0, 1], np.int64), offsets, np.array([0, 1], np.int64), counts)
    hash_strings(buffer, strings)
