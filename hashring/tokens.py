"""Where an id stands on the ring: 64-bit hashes, the same in every process and every language.

    token = mix64(id ^ token_seed(seed of the table))        slot = token >> (64 - slot_bits)

`HASH_VERSION` is part of a cluster's fingerprint: change a function here and it must change too. Golden values stand
in tests/hashring/test_tokens.py and ARCHITECTURE.md, for clients in other languages.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

HASH_VERSION = 1

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_PRIME_1 = np.uint64(0x9E3779B185EBCA87)
_PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME_3 = np.uint64(0x165667B19E3779F9)
_PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
_PRIME_5 = np.uint64(0x27D4EB2F165667C5)
_INIT_1 = np.uint64((int(_PRIME_1) + int(_PRIME_2)) % 2**64)
_INIT_4 = np.uint64(2**64 - int(_PRIME_1))
_ZERO = np.uint64(0)


@njit(inline="always", cache=True, nogil=True)
def mix64(x):  # type: ignore[no-untyped-def]  # compiled: uint64 -> uint64
    """splitmix64's finaliser on uint64 (Steele, Lea, Flood 2014; Vigna's constants): a bijection, mixing every bit."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def token_seed(seed: int) -> int:
    """The uint64 that is xored with the ids of a table with this seed: splitmix64's first output from it."""
    return int(mix64(np.uint64((seed + int(_GAMMA)) % 2**64)))


@njit(cache=True, nogil=True)
def _tokens(ids, seed, out):  # type: ignore[no-untyped-def]  # int64[n], uint64, uint64[n]
    for i in range(len(ids)):
        out[i] = mix64(np.uint64(ids[i]) ^ seed)


def tokens(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """uint64[n]: the tokens of int64[n] ids of a table with this seed."""
    out = np.empty(len(ids), np.uint64)
    _tokens(np.ascontiguousarray(ids, np.int64), np.uint64(token_seed(seed)), out)
    return out


@njit(inline="always", cache=True, nogil=True)
def _rotate(x, bits):  # type: ignore[no-untyped-def]
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@njit(inline="always", cache=True, nogil=True)
def _read(buffer, at, width):  # type: ignore[no-untyped-def]  # little-endian
    value = _ZERO
    for i in range(width):
        value |= np.uint64(buffer[at + i]) << np.uint64(8 * i)
    return value


@njit(inline="always", cache=True, nogil=True)
def _round(lane, word):  # type: ignore[no-untyped-def]
    return _rotate(lane + word * _PRIME_2, 31) * _PRIME_1


@njit(inline="always", cache=True, nogil=True)
def _merge(h, lane):  # type: ignore[no-untyped-def]
    return (h ^ _round(_ZERO, lane)) * _PRIME_1 + _PRIME_4


@njit(cache=True, nogil=True)
def xxh64(buffer, start, stop):  # type: ignore[no-untyped-def]  # uint8[m], int, int -> uint64
    """XXH64 (Collet's specification, seed 0) of buffer[start:stop]."""
    at = start
    if stop - start >= 32:
        a, b, c, d = _INIT_1, _PRIME_2, _ZERO, _INIT_4
        while at + 32 <= stop:
            a = _round(a, _read(buffer, at, 8))
            b = _round(b, _read(buffer, at + 8, 8))
            c = _round(c, _read(buffer, at + 16, 8))
            d = _round(d, _read(buffer, at + 24, 8))
            at += 32
        h = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        h = _merge(_merge(_merge(_merge(h, a), b), c), d)
    else:
        h = _PRIME_5
    h += np.uint64(stop - start)
    while at + 8 <= stop:
        h = _rotate(h ^ _round(_ZERO, _read(buffer, at, 8)), 27) * _PRIME_1 + _PRIME_4
        at += 8
    if at + 4 <= stop:
        h = _rotate(h ^ (_read(buffer, at, 4) * _PRIME_1), 23) * _PRIME_2 + _PRIME_3
        at += 4
    while at < stop:
        h = _rotate(h ^ (np.uint64(buffer[at]) * _PRIME_5), 11) * _PRIME_1
        at += 1
    h = (h ^ (h >> np.uint64(33))) * _PRIME_2
    h = (h ^ (h >> np.uint64(29))) * _PRIME_3
    return h ^ (h >> np.uint64(32))


@njit(cache=True, nogil=True)
def _hash_strings(buffer, offsets, out):  # type: ignore[no-untyped-def]  # uint8[m], int64[n + 1], int64[n]
    for i in range(len(out)):
        out[i] = np.int64(xxh64(buffer, offsets[i], offsets[i + 1]))


def hash_strings(buffer: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[n]: XXH64 of each of the n strings buffer[offsets[i] : offsets[i + 1]]."""
    out = np.empty(len(offsets) - 1, np.int64)
    _hash_strings(buffer, offsets, out)
    return out
