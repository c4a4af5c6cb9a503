"""A server's raw statistics (ps.meter.ServiceStatistics, as plain data) as the figures that people ask for. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from ps.meter import BUCKETS_S

OWN = frozenset({"ping", "statistics", "install"})
"""Operations of the controller itself, not counted as requests."""

TIMED = ("pull", "push", "range")
"""Operations whose latency is reported."""


def figures(now: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    """Figures of one server from two of its statistics, `seconds` apart (None: rates are of the whole time as 0).

    rows, bytes, rows_by_table, requests, errors, absent_ids, copied_rows, copied_bytes: totals since its start.
    lag_changes, lag_s: how far other owners are behind it. requests_per_s, p50_ms, p99_ms: of the time between the two;
    the percentiles are missing where nothing was asked.
    """
    store = now["store"]
    out = {
        "rows": store["rows"],
        "bytes": store["bytes_used"],
        "memory_max": store["memory_max"],
        "rows_by_table": store["rows_by_table"],
        "connections": now["listener"]["connections"],
        "overloaded": now["listener"]["overloaded"],
        "absent_ids": now["absent_ids"],
        "lag_changes": now["lag_changes"],
        "lag_s": now["lag_s"],
        "copied_rows": now["copied_rows"],
        "copied_bytes": now["copied_bytes"],
        "requests": _requests(now),
        "errors": sum(m["errors"] for m in now["operations"].values()),
        "requests_per_s": 0.0,
    }
    if before is not None and seconds > 0:
        out["requests_per_s"] = max(0, _requests(now) - _requests(before)) / seconds
        spent = [a - b for a, b in zip(_buckets(now), _buckets(before), strict=True)]
        for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99)):
            if sum(spent) > 0:
                out[name] = percentile(spent, share) * 1000
    return out


def _requests(statistics: Mapping[str, Any]) -> int:
    return sum(m["requests"] for op, m in statistics["operations"].items() if op not in OWN)


def _buckets(statistics: Mapping[str, Any]) -> list[int]:
    """Counts of TIMED, bucket by bucket."""
    return [sum(counts) for counts in zip(*(statistics["operations"][op]["buckets"] for op in TIMED), strict=True)]


def percentile(counts: Sequence[int], share: float) -> float:
    """Seconds below which `share` of the counted requests stayed, linear inside a bucket of BUCKETS_S."""
    rank = share * sum(counts)
    low = 0.0
    passed = 0
    for count, high in zip(counts, (*BUCKETS_S, BUCKETS_S[-1]), strict=True):
        if count and passed + count >= rank:
            return low + (high - low) * (rank - passed) / count
        passed += count
        low = high
    return low
