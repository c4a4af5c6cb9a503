"""Load that names what it lost: each pusher adds 1 to its own column, so rows say how often each was applied.

Rows begin at zero and the optimizer is SGD with learning rate 1, so float32 is exact up to 2**24 pushes.
"""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

import ps
from ps.errors import EmbringError

TABLE = "chaos"
PUSH_S = 120.0
"""Seconds that a push may take, with its retries: longer than any fault here lasts."""


@dataclass
class Findings:
    """What went wrong, and what was measured. acks: when acknowledged pushes began and ended."""

    lost: int = 0
    doubled: int = 0
    unseen: int = 0
    failed_pulls: int = 0
    failed_pushes: int = 0
    pulls: int = 0
    acks: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Load:
    """Pushers and pullers over one table, until `stop`."""

    def __init__(self, connect, ids: int, pushers: int, pull_deadline_s: float) -> None:  # type: ignore[no-untyped-def]
        self.found = Findings()
        self.ids = np.arange(ids, dtype=np.int64)
        self.acked = np.zeros(pushers, np.int64)
        self.sent = np.zeros(pushers, np.int64)
        self.in_flight = [False] * pushers
        self._pushers, self._deadline = pushers, pull_deadline_s
        self._connect = connect
        self._stop = threading.Event()
        works = [lambda k=k: self._push(k) for k in range(pushers)] + [self._pull]
        self._threads = [threading.Thread(target=self._guard, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()

    def _guard(self, work) -> None:  # type: ignore[no-untyped-def]
        try:
            work()
        except BaseException as error:
            self.found.errors.append(f"{type(error).__name__}: {error}"[:300])

    def _push(self, k: int) -> None:
        grads = np.zeros((len(self.ids), self._pushers), np.float32)
        grads[:, k] = -1.0
        with self._connect() as client:
            while not self._stop.is_set():
                self.sent[k] += 1
                self.in_flight[k] = True
                begun = time.monotonic()
                try:
                    client.push(TABLE, self.ids, grads, timeout=PUSH_S)
                    self.acked[k] += 1
                    self.found.acks.append((begun, time.monotonic()))
                except EmbringError as error:
                    self.found.failed_pushes += 1
                    self.found.errors.append(f"push: {type(error).__name__}: {error}"[:300])
                self.in_flight[k] = False

    def _pull(self) -> None:
        with self._connect() as client:
            while not self._stop.is_set():
                before = self.acked.copy()
                some = np.random.default_rng().choice(self.ids, 64, replace=False)
                try:
                    rows = client.pull(TABLE, some, timeout=self._deadline)
                    self.found.pulls += 1
                    if (rows < before - 0.5).any():
                        self.found.unseen += 1
                except EmbringError as error:
                    self.found.failed_pulls += 1
                    self.found.errors.append(f"pull: {type(error).__name__}: {error}"[:300])
                time.sleep(0.002)

    def stop(self) -> None:
        """End the load; what was pushed is decided then."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PUSH_S + 30)

    def check(self, rows: NDArray[np.float32]) -> None:
        """Compare the rows that are there with what was acknowledged."""
        self.found.lost += int((rows < self.acked - 0.5).sum())
        self.found.doubled += int((rows > self.sent + 0.5).sum())

    def first_ack_after(self, moment: float) -> float | None:
        """Seconds from a moment until the first push that began after it was acknowledged; None if none was yet."""
        later = [end for begun, end in self.found.acks if begun > moment]
        return min(later) - moment if later else None


def make_table(client: "ps.Client", replicas: int, columns: int) -> None:
    """The table of a load."""
    client.create_table(
        TABLE, columns, optimizer=ps.SGD(lr=1.0), initializer=ps.Initializer(0.0, 0.0), replicas=replicas
    )
