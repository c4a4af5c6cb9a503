"""Load that names what it lost: each pusher adds 1 to its own column, so rows say how often each was applied.

Rows begin at zero and the optimizer is SGD with learning rate 1, so float32 is exact up to 2**24 pushes.
"""

import bisect
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

import ps
from ps.errors import EmbringError

TABLE = "chaos"
PUSH_S = 120.0
"""Seconds that a push may take, with its retries: longer than any fault here lasts."""

SLOW_S = 1.5
"""Seconds after which a push is worth its story."""

WATCH_S = 0.01

PULL_S = 0.25
"""Seconds that a pull may take, with its retries."""

Rows = NDArray[np.int64]


@dataclass
class Findings:
    """What went wrong, and what was measured.

    acks: when acknowledged pushes began and ended. failed_reads, slow_pushes: what was tried in each, and when.
    """

    lost: int = 0
    doubled: int = 0
    unseen: int = 0
    failed_pulls: int = 0
    failed_pushes: int = 0
    pulls: int = 0
    pull_max_s: float = 0.0
    late_max_s: float = 0.0
    acks: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed_reads: list[str] = field(default_factory=list)
    slow_pushes: list[str] = field(default_factory=list)


class Load:
    """Pushers and a puller over one table, until `stop`.

    chosen: the ids that pushes begun from now on touch, as numbers of `ids`. pause: seconds between two pushes, and
    between two pulls, of one thread.
    """

    def __init__(self, connect: Callable[[], ps.Client], ids: int, pushers: int, pause: float = 0.002) -> None:
        self.found = Findings()
        self.ids = np.arange(ids, dtype=np.int64)
        self.chosen: Rows = self.ids
        self.acked = np.zeros((ids, pushers), np.int64)
        self.sent = np.zeros((ids, pushers), np.int64)
        self.flying: list[Rows | None] = [None] * pushers
        self._pushers, self._pause = pushers, pause
        self._connect = connect
        self._stop = threading.Event()
        works = [lambda k=k: self._push(k) for k in range(pushers)] + [self._pull, self._watch]
        self._threads = [threading.Thread(target=self._guard, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()

    def in_flight(self, some: Rows) -> bool:
        """Whether a push of any of these ids is not acknowledged now."""
        return any(rows is not None and np.isin(rows, some).any() for rows in list(self.flying))

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.found.errors.append(f"{type(error).__name__}: {error}"[:300])

    def _push(self, k: int) -> None:
        with self._connect() as client:
            trace = _traced(client)
            while not self._stop.is_set():
                trace.clear()
                rows = self.chosen
                grads = np.zeros((len(rows), self._pushers), np.float32)
                grads[:, k] = -1.0
                self.sent[rows, k] += 1
                self.flying[k] = rows
                begun = time.monotonic()
                try:
                    client.push(TABLE, self.ids[rows], grads, timeout=PUSH_S)
                    self.acked[rows, k] += 1
                    self.found.acks.append((begun, time.monotonic()))
                    if time.monotonic() - begun > SLOW_S:
                        self.found.slow_pushes.append(_told(trace, begun))
                except EmbringError as error:
                    self.found.failed_pushes += 1
                    self.found.errors.append(f"push: {type(error).__name__}: {error}"[:300])
                self.flying[k] = None
                if self._pause > 0.01:
                    self._stop.wait(self._pause)

    def _pull(self) -> None:
        chance = np.random.default_rng(0)
        with self._connect() as client:
            trace = _traced(client)
            while not self._stop.is_set():
                some = chance.choice(self.ids, min(64, len(self.ids)), replace=False)
                before = self.acked[some]
                trace.clear()
                begun = time.monotonic()
                try:
                    rows = client.pull(TABLE, some, timeout=PULL_S)
                    self.found.pulls += 1
                    self.found.unseen += int((rows < before - 0.5).any())
                except EmbringError as error:
                    self.found.failed_pulls += 1
                    self.found.errors.append(f"pull: {type(error).__name__}: {error}"[:300])
                    self.found.failed_reads.append(_told(trace, begun))
                self.found.pull_max_s = max(self.found.pull_max_s, time.monotonic() - begun)
                self._stop.wait(self._pause)

    def _watch(self) -> None:
        """How late this process itself is: of a pull that failed while it did not run, the servers are not guilty."""
        while not self._stop.is_set():
            begun = time.monotonic()
            time.sleep(WATCH_S)
            self.found.late_max_s = max(self.found.late_max_s, time.monotonic() - begun - WATCH_S)

    def stop(self) -> None:
        """End the load; what was pushed is decided then."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PUSH_S + 30)

    def check(self, rows: NDArray[np.float32]) -> None:
        """Compare the rows that are there with what was acknowledged."""
        self.found.lost += int((rows < self.acked - 0.5).sum())
        self.found.doubled += int((rows > self.sent + 0.5).sum())

    def acked_since(self, moment: float) -> float | None:
        """Seconds from a moment until the first push that began after it was acknowledged; None if none was yet."""
        acks = self.found.acks  # in the order of their ends, but for what threads overtake
        first = bisect.bisect_left(acks, moment, key=lambda ack: ack[1])
        return next((end - moment for begun, end in itertools.islice(acks, first, None) if begun > moment), None)


def _told(trace: list[tuple[float, str]], begun: float) -> str:
    steps = "; ".join(f"{at - begun:.3f} s: {what}" for at, what in trace)
    return f"{time.monotonic() - begun:.3f} s in all: {steps}"[:1000]


def _traced(client: ps.Client) -> list[tuple[float, str]]:
    """What each attempt of the client's requests failed with, and when: kept up while it is used."""
    trace: list[tuple[float, str]] = []
    verbs = client._verbs
    after, refresh = verbs.after, verbs.refresh

    def told(failures, routing, attempt, until):  # type: ignore[no-untyped-def]
        names = [s.name for s in routing.servers]
        for server, error in failures.items():
            line = f"{names[server]}: {type(error).__name__} {error} (epoch {routing.epoch})"
            trace.append((time.monotonic(), line))
        yield from after(failures, routing, attempt, until)

    def refreshed(*arguments, **options):  # type: ignore[no-untyped-def]
        yield from refresh(*arguments, **options)
        trace.append((time.monotonic(), f"looked for a view, has epoch {verbs.routing.epoch}"))

    verbs.after, verbs.refresh = told, refreshed  # type: ignore[method-assign]
    return trace


def make_table(client: ps.Client, replicas: int, columns: int) -> None:
    """The table of a load."""
    client.create_table(
        TABLE, columns, optimizer=ps.SGD(lr=1.0), initializer=ps.Initializer(0.0, 0.0), replicas=replicas
    )
