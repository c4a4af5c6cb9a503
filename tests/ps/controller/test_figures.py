"""Rates and percentiles from two of a server's statistics."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ps.controller.figures import figures, percentile
from ps.meter import BUCKETS_S


def statistics(requests: int, buckets: list[int]) -> dict:
    quiet = {"requests": 100, "errors": 1, "seconds": 0.0, "buckets": [0] * (len(BUCKETS_S) + 1)}
    return {
        "absent_ids": 3, "copied_rows": 0, "copied_bytes": 0, "lag_changes": 4, "lag_s": 0.25,
        "operations": {
            "ping": quiet, "push": quiet, "range": quiet, "pull": {**quiet, "requests": requests, "buckets": buckets},
        },
        "listener": {"connections": 2, "overloaded": 0},
        "store": {"rows": 5, "bytes_used": 100, "memory_max": 1000, "rows_by_table": {"item": 5}},
    }  # fmt: skip


def test_rates_are_of_the_time_between():
    empty = [0] * (len(BUCKETS_S) + 1)
    spent = empty.copy()
    spent[3] = 50
    out = figures(statistics(150, spent), statistics(100, empty), seconds=2.0)
    assert out["requests_per_s"] == 25.0
    assert out["requests"] == 350  # pings are not counted
    assert out["errors"] == 4
    assert (out["lag_changes"], out["lag_s"]) == (4, 0.25)
    assert BUCKETS_S[2] * 1000 < out["p50_ms"] < out["p99_ms"] <= BUCKETS_S[3] * 1000
    first = figures(statistics(150, spent), None, seconds=2.0)
    assert first["requests_per_s"] == 0.0
    assert "p50_ms" not in first
    assert "p50_ms" not in figures(statistics(150, spent), statistics(150, spent), seconds=2.0)


@given(st.lists(st.floats(1e-6, 20.0), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(times, share):
    counts = np.bincount(np.searchsorted(BUCKETS_S, times), minlength=len(BUCKETS_S) + 1).tolist()
    true = np.sort(times)[max(0, int(np.ceil(share * len(times) - 1e-9)) - 1)]
    bucket = int(np.searchsorted(BUCKETS_S, true))
    low = BUCKETS_S[bucket - 1] if bucket else 0.0
    high = BUCKETS_S[min(bucket, len(BUCKETS_S) - 1)]
    assert low <= percentile(counts, share) <= high + 1e-12
