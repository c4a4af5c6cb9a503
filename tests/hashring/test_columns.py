"""Reductions by columns against numpy's own, line by line."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hashring.columns import any_of, count_of, differ, first_of

tables = st.tuples(st.integers(0, 20), st.integers(0, 5)).flatmap(lambda shape: arrays(np.bool_, shape))


@given(tables)
def test_lines_are_reduced_as_numpy_does(table: np.ndarray) -> None:
    any_ = table.any(axis=1)
    assert (any_of(table) == any_).all()
    assert (count_of(table) == table.sum(axis=1)).all()
    first = table.argmax(axis=1) if table.shape[1] else np.zeros(len(table), int)
    assert (first_of(table) == np.where(any_, first, -1)).all()


@given(tables, st.randoms())
def test_lines_that_differ(table: np.ndarray, random: object) -> None:
    other = np.array([[bit ^ (random.random() < 0.2) for bit in line] for line in table], bool).reshape(table.shape)  # type: ignore[attr-defined]
    assert (differ(table, other) == (table != other).any(axis=1)).all()
