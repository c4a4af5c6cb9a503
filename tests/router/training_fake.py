"""A cluster in a dictionary, with slots that remember sequences, and a death that can strike between any two slots."""

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np

SLOTS = 7


class Killed(BaseException):
    """The process died here."""


class FakeCluster:
    """Tables under SGD with rate 1; row (table, id) lies in slot id % SLOTS. Rows without a push are zeros."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], np.ndarray] = {}
        self.seen: Counter[tuple[int, int, int]] = Counter()  # (client, sequence, slot): how often it came
        self.applied: Counter[tuple[int, int, int]] = Counter()
        self.dims: dict[str, int] = {}
        self.deaths: list[int] = []  # slots that are still to be reached before each death

    def connect(self, *_: Any, **__: Any) -> "FakeClient":
        return FakeClient(self)

    def reach(self) -> None:
        """A slot is about to be reached."""
        if self.deaths:
            self.deaths[0] -= 1
            if self.deaths[0] < 0:
                self.deaths.pop(0)
                raise Killed


class FakeClient(AbstractContextManager):
    """What training uses of ps.Client."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.last_absent = 0
        self.client, self.last_sequence = 1, 0

    def __exit__(self, *_: object) -> None:
        return None

    def identify(self, client: int, sequence: int) -> None:
        self.client, self.last_sequence = client, sequence

    def pull_bags(self, bags: Mapping[str, Any], mode: Any = "sum", absent: str | None = None) -> dict:
        out, self.last_absent = {}, 0
        for name, (ids, offsets) in bags.items():
            rows = np.zeros((len(offsets) - 1, self.cluster.dims[name]), np.float32)
            for b in range(len(rows)):
                for i in ids[offsets[b] : offsets[b + 1]]:
                    found = self.cluster.rows.get((name, int(i)))
                    self.last_absent += found is None
                    rows[b] += 0 if found is None else found
            out[name] = rows
        return out

    def push_bags_nowait(self, bags: Mapping[str, Any], grads: Mapping[str, Any], mode: Any = "sum") -> Any:
        self.last_sequence += 1
        client, sequence = self.client, self.last_sequence
        parts: dict[int, list] = {}
        for name, (ids, offsets) in bags.items():
            for b in range(len(offsets) - 1):
                for i in ids[offsets[b] : offsets[b + 1]]:
                    parts.setdefault(int(i) % SLOTS, []).append((name, int(i), np.array(grads[name][b])))
        for slot, changes in sorted(parts.items()):
            self.cluster.reach()
            key = (client, sequence, slot)
            self.cluster.seen[key] += 1
            if key in self.cluster.applied:
                continue
            self.cluster.applied[key] += 1
            for name, i, grad in changes:
                old = self.cluster.rows.get((name, i), np.zeros(self.cluster.dims[name], np.float32))
                self.cluster.rows[name, i] = old - grad
        return SimpleNamespace(result=self.cluster.reach)
