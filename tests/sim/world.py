"""Virtual time: one heap of events, one source of chance. Nothing in a run looks at a real clock."""

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any


class Violation(Exception):
    """An invariant does not hold; the message names it."""


class World:
    """Events in the order of their time; equal times in the order in which they were planned."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.counts: Counter[str] = Counter()
        self.trace: list[str] | None = None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, delay: float, what: Callable[..., None], *args: Any) -> None:
        """Call `what(*args)` after so many virtual seconds."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + max(0.0, delay), self._number, what, args))

    def step(self) -> None:
        """The next event."""
        self.now, _, what, args = heapq.heappop(self._heap)
        self.events += 1
        what(*args)

    def until(self, moment: float, done: Callable[[], bool] = lambda: False) -> None:
        """Run events up to a moment, or until something is done."""
        while self._heap and self._heap[0][0] <= moment and not done():
            self.step()
        if not done():
            self.now = max(self.now, moment)

    def say(self, line: str) -> None:
        """Note what happens, where a trace is wanted."""
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f} {line}")

    def fingerprint(self) -> str:
        """A hash of the run so far: every delay, fault and choice has moved the source of chance."""
        state = (self.seed, self.now, self.events, self.rng.getstate())
        return hashlib.sha256(repr(state).encode()).hexdigest()[:16]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def between(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)
