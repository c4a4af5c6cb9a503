"""Decorating conventions: inputs, prefetch, and a cache that follows every kernel's source."""

from pathlib import Path

import numpy as np
import pytest

from ps import kernels
from ps.kernels import as_input, kernel, prefetch


def test_inputs_share_memory_where_they_can_and_are_always_of_one_type() -> None:
    frozen = np.arange(6)
    frozen.flags.writeable = False
    given = as_input(frozen, np.int64)
    assert given.flags.writeable
    assert np.shares_memory(given, frozen)
    assert as_input(np.frombuffer(bytes(8), np.int64), np.int64).tolist() == [0]
    unaligned = np.frombuffer(b"x" + np.arange(3).tobytes(), np.uint8)[1:].view(np.int64)
    assert as_input(unaligned, np.int64).flags.aligned
    assert as_input(np.arange(6)[::2], np.int64).flags.c_contiguous
    assert as_input(np.arange(3, dtype=np.int32), np.int64).dtype == np.int64


@kernel
def _sum_ahead(values: np.ndarray) -> float:
    total = 0.0
    for i in range(len(values)):
        prefetch(values, i + 1000)  # beyond the end: a prefetch never faults
        total += values[i]
    return total


def test_prefetch_changes_nothing() -> None:
    assert _sum_ahead(np.arange(10.0)) == 45.0


def test_the_cache_has_a_folder_for_each_state_of_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    first = kernels._cache_folder()
    assert Path(first).parent == tmp_path
    assert first == kernels._cache_folder()
    source = Path(kernels.tokens.__file__)
    changed = tmp_path / "tokens.py"
    changed.write_bytes(source.read_bytes() + b"# changed\n")
    monkeypatch.setattr(kernels.tokens, "__file__", str(changed))
    assert kernels._cache_folder() != first
