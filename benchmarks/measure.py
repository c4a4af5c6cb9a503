"""Interleaved rounds: A, B, A, B, ...; medians and spreads of their ratio; the machine and versions they hold for."""

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

Side = Callable[[int], list[float]]
"""Does so many calls, one after another, and returns the seconds that each took."""

PACKAGES = ("embring", "grpcio", "hiredis", "llvmlite", "numba", "numpy", "ray", "redis", "torch", "uvloop")


@dataclass(frozen=True)
class Rounds:
    """Seconds of every call: samples[side][round] is a list."""

    samples: Mapping[str, list[list[float]]]

    def median(self, side: str) -> float:
        """Median seconds of one call, all rounds together."""
        return float(np.median(np.concatenate(self.samples[side])))

    def percentile(self, side: str, q: float) -> float:
        """Percentile q (0 to 100) of the seconds of one call, all rounds together."""
        return float(np.percentile(np.concatenate(self.samples[side]), q))

    def ratios(self, above: str, below: str) -> list[float]:
        """Of each round: median seconds of `above` by those of `below`."""
        pairs = zip(self.samples[above], self.samples[below], strict=True)
        return [float(np.median(a) / np.median(b)) for a, b in pairs]

    def ratio(self, above: str, below: str) -> tuple[float, float, float]:
        """(median, lowest, highest) of `ratios`."""
        found = self.ratios(above, below)
        return float(np.median(found)), min(found), max(found)

    def to_plain(self) -> dict[str, list[list[float]]]:
        """The samples in microseconds, for JSON."""
        return {side: [[round(s * 1e6, 2) for s in one] for one in rounds] for side, rounds in self.samples.items()}


def timed(call: Callable[[Any], object], arguments: Sequence[Any]) -> Side:
    """A side of this process: `call` with the arguments in turn, going on where the last round ended."""
    turn: Iterator[Any] = cycle(arguments)

    def side(calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            argument = next(turn)
            begun = time.perf_counter()
            call(argument)
            seconds.append(time.perf_counter() - begun)
        return seconds

    return side


def interleave(
    sides: Mapping[str, Side], rounds: int = 5, seconds: float = 0.4, calls_min: int = 3, calls_max: int = 2000
) -> Rounds:
    """Run every side in every round, in turn, each for about `seconds`; one call before each is not counted.

    What changes on the machine during a run then meets all sides alike, and a ratio is taken within each round.
    """
    calls = {}
    for name, side in sides.items():
        side(1)
        calls[name] = int(np.clip(seconds / max(side(3)), calls_min, calls_max))
    samples: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            gc.collect()
            side(1)
            samples[name].append(side(calls[name]))
    return Rounds(samples)


def machine() -> dict[str, object]:
    """The machine a figure holds for."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "huge_pages": _huge_pages(),
    }


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text() if path.exists() else ""
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of every package that takes part; a missing one is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
