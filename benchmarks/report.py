"""What a suite found: figures by goal, shape and batch; spreads and raw samples of both sides; what it holds for."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import Rounds, machine, versions


@dataclass
class Findings:
    """Grows while a suite runs. `equal` turns false for good once two results differed."""

    figures: dict[str, Any] = field(default_factory=dict)
    spreads: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    equal: bool = True

    def ratio(self, rounds: Rounds, above: str, below: str, *place: str) -> float:
        """Note the ratio of two sides at a place (goal, shape, batch), its spread and their samples; returns it."""
        middle, low, high = rounds.ratio(above, below)
        put(self.figures, place, round(middle, 4))
        put(self.spreads, place, [round(low, 4), round(high, 4)])
        self.samples(rounds, (above, below), *place)
        return middle

    def samples(self, rounds: Rounds, sides: tuple[str, ...], *place: str) -> None:
        """Note raw samples at a place: side -> rounds -> microseconds."""
        put(self.raw, place, {side: rounds.to_plain()[side] for side in sides})

    def to_plain(self, settings: dict[str, Any]) -> dict[str, Any]:
        """One JSON-able object; figures stand at its top, by goal."""
        return {
            **self.figures,
            "equal": self.equal,
            "missing": self.missing,
            "spread": self.spreads,
            "raw_us": self.raw,
            "settings": settings,
            "machine": machine(),
            "versions": versions(),
        }


def put(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set tree[place[0]][place[1]]... = value."""
    for key in place[:-1]:
        tree = tree.setdefault(key, {})
    tree[place[-1]] = value
