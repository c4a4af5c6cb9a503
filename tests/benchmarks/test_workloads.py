"""What is asked: shapes, Zipf's law, and sums that are exact in any order."""

import numpy as np
import pytest

from benchmarks.workloads import SHAPES, Shape, Workload, distinct_zipf_ids, zipf_ids


def test_the_shapes_are_those_of_the_goals() -> None:
    assert len(SHAPES["M"].ids_per_sample) == len(SHAPES["O"].ids_per_sample) == 26
    assert sum(SHAPES["M"].ids_per_sample) == 214
    assert sum(SHAPES["O"].ids_per_sample) == 26
    assert {shape.dim for shape in SHAPES.values()} == {64}


def test_a_batch_is_its_number_and_nothing_else() -> None:
    one, other = (Workload(SHAPES["M"], rows=1000) for _ in range(2))
    for (name, (ids, offsets)), k in zip(one.batch(5, 3).items(), SHAPES["M"].ids_per_sample, strict=True):
        again, _ = other.batch(5, 3)[name]
        assert np.array_equal(ids, again)
        assert offsets.tolist() == [0, k, 2 * k, 3 * k, 4 * k, 5 * k]
        assert ids.dtype == offsets.dtype == np.int64
        assert 0 <= ids.min() <= ids.max() < 1000
    different = other.batch(5, 4)
    assert any(not np.array_equal(ids, different[name][0]) for name, (ids, _) in one.batch(5, 3).items())


@pytest.mark.parametrize("exponent", [1.05, 1.2])
def test_ids_follow_zipf(exponent: float) -> None:
    n, rows = 200_000, 500
    ids = zipf_ids(np.random.default_rng(1), n, rows, exponent, (1,))
    counts = np.sort(np.bincount(ids, minlength=rows))[::-1]
    weights = np.arange(1, rows + 1) ** -exponent
    expected = n * weights / weights.sum()
    assert np.all(np.abs(counts[:20] - expected[:20]) < 6 * np.sqrt(expected[:20]))
    other = zipf_ids(np.random.default_rng(1), n, rows, exponent, (2,))
    assert np.bincount(other).argmax() != np.bincount(ids).argmax()


@pytest.mark.parametrize("exponent", [0.0, 1.05, 3.0, 10.0])
def test_distinct_ids_are_as_many_as_asked_for_however_steep_the_law(exponent: float) -> None:
    rng = np.random.default_rng(2)
    for n, rows in ((50, 1000), (1000, 1000), (5, 3)):
        ids = distinct_zipf_ids(rng, n, rows, exponent, (1,))
        assert len(np.unique(ids)) == len(ids) == min(n, rows)
        assert 0 <= ids.min() <= ids.max() < rows


def test_distinct_ids_are_those_of_draws_without_replacement() -> None:
    """The first is drawn by the law itself, the second by the law without the first."""
    rng, rows = np.random.default_rng(3), 4
    law = np.arange(1, rows + 1) ** -1.2
    law /= law.sum()
    drawn = np.array([distinct_zipf_ids(rng, 2, rows, 1.2, (1,)) for _ in range(20_000)])
    of_rank = np.argsort(-np.bincount(drawn[:, 0]))  # the id of each rank
    first = np.bincount(drawn[:, 0], minlength=rows)[of_rank] / len(drawn)
    assert np.abs(first - law).max() < 0.015
    second = drawn[drawn[:, 0] == of_rank[0], 1]
    share = np.bincount(second, minlength=rows)[of_rank[1:]] / len(second)
    assert np.abs(share - law[1:] / law[1:].sum()).max() < 0.02


def test_sums_are_exact_in_any_order() -> None:
    values = Workload(Shape("x", (1,), 8), rows=3000).values(0)
    assert values.dtype == np.float32
    assert np.array_equal(values * 64, np.round(values * 64))
    forward, backward = np.float32(0), np.float32(0)
    for row in values:
        forward = forward + row
    for row in values[::-1]:
        backward = backward + row
    assert np.array_equal(forward, backward)
    assert np.array_equal(forward, values.astype(np.float64).sum(axis=0))
    assert len(np.unique(values)) > 200
