"""What the figures of several placements say together: do they agree with the arithmetic, who dominates whom. Pure."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

CHECKED = (
    "rows_per_sample",
    "servers_per_request",
    "bytes_per_sample",
    "frames_per_sample",
    "memory_bytes",
    "memory_max_bytes",
    "push_bytes_per_row",
    "join_rows_moved",
)
"""Figures that are counted, and must be what the arithmetic says."""

OFF_MAX = 0.02
"""How far a counted figure may be from the arithmetic."""

OVERRUN_MAX = 0.25
"""How far the last answer of a round may come after its end, as a part of it."""

AXES = {
    "memory": ("measured", "memory_bytes"),
    "bytes of a pull": ("measured", "bytes_per_sample"),
    "servers of a pull": ("measured", "servers_per_request"),
    "bytes of a push": ("measured", "push_bytes_per_row"),
    "load of the busiest server": ("measured", "busiest_share"),
    "bags without a lost server": ("model", "loss_bags_failed"),
}
"""What placements are compared by: figures that are counted, not timed, each better when it is smaller."""

ALIKE = 0.01
"""Figures nearer to each other than this count as equal."""

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""placement -> "measured", "model" or "off" -> figure -> value."""

ORDERS = {
    "rows_per_sample": ("replicated", "whole", "sharded"),
    "bytes_per_sample": ("replicated", "whole", "sharded"),
    "servers_per_request": ("replicated", "whole", "sharded"),
    "memory_bytes": ("sharded", "whole", "replicated"),
    "push_bytes_per_row": ("whole", "sharded", "replicated"),
}
"""From the smallest to the largest, or equal: what must come out wherever the arithmetic says so, as it does where bags
have many ids."""


def summary(figures: Figures) -> dict[str, Any]:
    """Whether every counted figure agrees with the arithmetic, the worst of them, the orders, for which placements the
    rate was too much, and who is dominated."""
    off = [(abs(f["off"][key]), name, key) for name, f in figures.items() for key in CHECKED if key in f["off"]]
    worst = max(off, default=(0.0, "", ""))
    return {
        "agrees": worst[0] <= OFF_MAX,
        "worst_off": {"placement": worst[1], "figure": worst[2], "off": worst[0]},
        "ordered": {
            key: in_order(figures, key, names)
            for key, names in ORDERS.items()
            if in_order(figures, key, names, part="model")
        },
        "late": [name for name, found in figures.items() if late(found["measured"])],
        "dominated_by": dominated(figures),
    }


def late(measured: Mapping[str, Any]) -> bool:
    """Whether the stated rate was too much: a round's answers came long after its end, or most of the slowest latencies
    are the lag of the load's own process."""
    lag, slowest = measured.get("lag_p99_ms", 0.0), measured.get("p99_ms", measured.get("p95_ms", float("inf")))
    return bool(measured.get("overrun", 0.0) > OVERRUN_MAX or lag > slowest / 2)


def in_order(figures: Figures, key: str, names: tuple[str, ...], part: str = "measured") -> bool:
    """Whether these placements' figures rise, or stay alike, in this order; those that are missing are passed over."""
    values = [figures[name][part][key] for name in names if name in figures]
    return all(a <= b * (1 + ALIKE) for a, b in pairwise(values))


def dominated(figures: Figures) -> dict[str, list[str]]:
    """Of each placement, those that are nowhere worse than it in AXES, and somewhere better."""
    points = {name: [found[part][key] for part, key in AXES.values()] for name, found in figures.items()}
    return {
        name: [other for other, theirs in points.items() if other != name and _dominates(theirs, mine)]
        for name, mine in points.items()
    }


def _dominates(a: list[float], b: list[float]) -> bool:
    return all(x <= y * (1 + ALIKE) for x, y in zip(a, b, strict=True)) and any(
        x < y * (1 - ALIKE) for x, y in zip(a, b, strict=True)
    )
