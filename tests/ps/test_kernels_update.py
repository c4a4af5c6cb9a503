"""Rows that are written by an assignment, against a loop."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ps.kernels.index import P_BAGS_END, P_IDS, P_IDS_END, P_OUT, warm_plan
from ps.kernels.update import overwrite

DIM = 3


@given(st.data())
def test_rows_are_overwritten_in_order_whatever_stands_in_the_places_of_other_arenas(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    n = sum(counts)
    targets = data.draw(st.permutations(range(30)))[:12]
    # Of features of other arenas nobody has filled in anything: what memory held before.
    inverse = np.full(n, 2**31 - 1, np.int32)
    rows = np.arange(n * DIM, dtype=np.float32)
    expected = np.zeros((30, DIM), np.float32)
    plan = []
    at = 0
    for count in counts:
        if data.draw(st.booleans()):
            line = warm_plan(count)[0]
            line[[P_IDS, P_IDS_END, P_OUT]] = at, at + count, at * DIM
            line[P_BAGS_END] = count
            plan.append(line)
            for i in range(at, at + count):
                inverse[i] = data.draw(st.integers(-1, len(targets) - 1))
                if inverse[i] >= 0:
                    expected[targets[inverse[i]]] = rows[i * DIM : (i + 1) * DIM]
        at += count
    values = np.zeros((30, DIM), np.float32)
    lines = np.array(plan, np.int64).reshape(len(plan), warm_plan(1).shape[1])
    overwrite(lines, inverse, np.array(targets, np.int32), rows, values)
    np.testing.assert_array_equal(values, expected)
