"""Hashes against their references, and golden values for clients in other languages."""

import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hashring.tokens import hash_strings, mix64, token_seed, tokens

MASK = 2**64 - 1


def slow_mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50), st.integers(0, 2**63 - 1))
def test_tokens_are_the_mixed_ids(ids: list[int], seed: int) -> None:
    salt = slow_mix64((seed + 0x9E3779B97F4A7C15) & MASK)
    expected = [slow_mix64((i & MASK) ^ salt) for i in ids]
    assert tokens(np.array(ids, np.int64), seed).tolist() == expected
    assert token_seed(seed) == salt


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_strings_hash_as_xxh64(strings: list[bytes]) -> None:
    buffer = np.frombuffer(b"".join(strings) + b"\0", np.uint8)
    offsets = np.cumsum([0] + [len(s) for s in strings]).astype(np.int64)
    expected = [xxhash.xxh64_intdigest(s) for s in strings]
    assert hash_strings(buffer, offsets).view(np.uint64).tolist() == expected


def test_golden_values() -> None:
    """These stand in ARCHITECTURE.md: a change here is a new HASH_VERSION, and another cluster."""
    assert int(mix64(np.uint64(1))) == 0x5692161D100B05E5
    assert token_seed(0) == 0xE220A8397B1DCDAF
    ids = np.array([0, 1, -1, 2**63 - 1], np.int64)
    assert [f"{t:016x}" for t in tokens(ids, 0)] == [
        "48218226ff3cd4bf",
        "9e0160293a33aaf7",
        "f2c27ef86a95b080",
        "396887b99134c140",
    ]
    word = np.frombuffer(b"embring", np.uint8)
    assert f"{int(hash_strings(word, np.array([0, 7])).view(np.uint64)[0]):016x}" == xxhash.xxh64_hexdigest(b"embring")
