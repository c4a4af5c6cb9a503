"""Every way to pool that `bench kernels` measures gives what plain loops give."""

import numpy as np
import pytest

from benchmarks.kernel_sides import POOLING, KernelBench
from benchmarks.suites import kernels


@pytest.fixture(scope="module")
def bench() -> KernelBench:
    return KernelBench(5000, 16)


@pytest.mark.parametrize("name", POOLING)
def test_ways_to_pool_agree_with_plain_loops(bench: KernelBench, name: str) -> None:
    for number, (bags, size) in enumerate([(1, 1), (40, 7), (300, 3)]):
        asked = bench.question(bags, size, number)
        expected = np.zeros((bags, 16), np.float32)
        for i, id_ in enumerate(asked.share.ids):
            expected[i // size] += bench.values[id_]
        assert np.array_equal(POOLING[name](bench, asked), expected)


def test_the_gather_copies_the_rows_that_are_asked_for(bench: KernelBench) -> None:
    asked = bench.question(40, 7)
    assert np.array_equal(bench.by_gather(asked), bench.values[asked.share.ids])


def test_the_suite_gives_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "warmup", lambda: None)
    monkeypatch.setattr(kernels, "BAGS", 64)
    said: list[str] = []
    result = kernels.run(kernels.Settings(rows=20_000, large=20_000, rounds=2, seconds=0.01), said.append)
    assert result["equal"] is True
    assert result["S14"] > 0
    assert set(result["raw_us"]["S14"]) == {*POOLING, "find", "gather"}
    for placement in ("sharded", "whole"):
        found = result["S16"][placement]
        assert found["rows"] == 20_000
        assert found["bytes_of_rows"] == 20_000 * 64 * 2 * 4
        assert found["push_ms_max"] >= found["push_ms_median"] > 0
        assert found["export_part_ms_max"] > 0
    assert any("S14" in line for line in said)
