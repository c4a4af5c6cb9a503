"""A load whose pushes name themselves: each adds one to its rows, which say in the end whether one was lost or doubled.

Rows begin at zero and the optimizer is SGD with learning rate 1, so float32 is exact up to 2**24 pushes. Pulls of 64
rows, pushes of 64 rows, and probes, pushes of a single row each of one of some slots in turn, fall due by a Poisson
law, whether earlier ones were answered or not. A request fails where it met an error, or where its answer came later
than 250 ms after it was due: also where the load's own process was late to begin it, which is told beside it (lag).
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ps
from benchmarks.load import percentiles_ms, steady
from benchmarks.model import slots_of
from hashring.view import View
from ps.errors import EmbringError

TABLE = "rows"
LOAD_ROWS = 25_000
IDS = 64
"""Rows of one pull, and of one push; a few less where ids are drawn twice."""

DEADLINE_S = 0.25
PUSH_S = 60.0
"""How long a push is retried; one that took longer than DEADLINE_S has failed all the same."""

PROBED = 64
"""Slots that are probed in turn, by one of their rows each."""

MIX = ("pull", "pull", "pull", "push", "probe")
"""Requests, drawn evenly."""


@dataclass
class Trace:
    """Every request of a load: its kind, when it was due, how many seconds after that it was begun (lag) and answered
    (took), whether it met an error (wrong). Only one that has ended stands here."""

    kinds: list[str] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    wrong: list[bool] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def failed(self) -> NDArray[np.bool_]:
        """Which requests met an error, or were answered later than DEADLINE_S after they were due."""
        return np.array(self.wrong, np.bool_) | (np.array(self.took) > DEADLINE_S)

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """Figures of the requests that were due between two moments; all of them must have ended.

        failed_once_begun: as failed, but each has DEADLINE_S from when it was begun, as a client's own deadline has.
        """
        due, lag, took, wrong = (np.array(x) for x in (self.due, self.lag, self.took, self.wrong))
        within = (due >= begin) & (due < end)
        failed, begun = self.failed()[within], (wrong.astype(bool) | (took - lag > DEADLINE_S))[within]
        kinds, lag, took = np.array(self.kinds)[within], lag[within], took[within]
        pulls, pushes = took[kinds == "pull"], took[kinds != "pull"]
        return {
            "seconds": round(end - begin, 2),
            "requests": len(took),
            "failed": int(failed.sum()),
            "failed_once_begun": int(begun.sum()),
            "lag": percentiles_ms(lag.tolist(), (50, 99)),
            "pull": percentiles_ms(pulls, (50, 99)),
            "push": percentiles_ms(pushes, (50, 99)),
            "pushes_per_s": round(float((~failed & (kinds != "pull")).sum()) / (end - begin), 1),
        }

    def longest(self, begin: float, end: float) -> dict[int, float]:
        """Of each slot that was probed: the longest seconds that a probe took which was under way between two
        moments."""
        out: dict[int, float] = {}
        for kind, due, took, slot in zip(self.kinds, self.due, self.took, self.probed, strict=True):
            if kind == "probe" and due < end and due + took >= begin:
                out[slot] = max(out.get(slot, 0.0), took)
        return out


def make_table(client: "ps.Client", rows: int, dim: int, replicas: int) -> None:
    """The table of a load, all rows zero."""
    client.create_table(TABLE, dim, ps.SGD(lr=1.0), ps.Initializer(0.0, 0.0), replicas=replicas)
    zeros = np.zeros((LOAD_ROWS, dim), np.float32)
    for at in range(0, rows, LOAD_ROWS):
        ids = np.arange(at, min(at + LOAD_ROWS, rows))
        client.assign(TABLE, ids, zeros[: len(ids)], timeout=60.0)


class Counted:
    """The load over a table of `make_table`, and what became of it. unseen: pulls that missed an acknowledged push."""

    def __init__(self, view: View, rows: int, dim: int) -> None:
        self.trace = Trace()
        self.unseen = 0
        self.sent = np.zeros(rows, np.int64)
        self.acknowledged = np.zeros(rows, np.int64)
        self._rows = rows
        self._rng = np.random.default_rng(11)
        self._grads = np.full((IDS, dim), -1.0, np.float32)
        slots = slots_of(view, TABLE, rows)
        self._probes = np.sort(self._rng.choice(np.unique(slots, return_index=True)[1], PROBED, replace=False))
        self._slots_of_probes = slots[self._probes]

    async def run(self, clients: Sequence["ps.AsyncClient"], rate: float, stop: asyncio.Event) -> None:
        """Requests of clients in turn, that fall due by a Poisson law, until `stop`."""
        steady()
        due, number = time.perf_counter(), 0
        pending: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            due += self._rng.exponential(1 / rate)
            number += 1
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self.request(clients[number % len(clients)], number, due, self.trace))
            pending.add(task)
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)

    async def request(self, client: "ps.AsyncClient", number: int, due: float, trace: Trace) -> None:
        """Make one request, and note it."""
        kind = MIX[int(self._rng.integers(len(MIX)))]
        probe = number % PROBED
        ids = (
            self._probes[probe : probe + 1] if kind == "probe" else np.unique(self._rng.integers(self._rows, size=IDS))
        )
        lag = time.perf_counter() - due
        wrong = False
        try:
            if kind == "pull":
                before = self.acknowledged[ids]
                rows = await client.pull(TABLE, ids, timeout=DEADLINE_S)
                self.unseen += bool((rows[:, 0] < before - 0.5).any())
            else:
                self.sent[ids] += 1
                await client.push(TABLE, ids, self._grads[: len(ids)])
                self.acknowledged[ids] += 1
        except EmbringError as error:
            wrong = True
            trace.errors.append(f"{kind}: {type(error).__name__}: {error}"[:200])
        trace.kinds.append(kind)
        trace.due.append(due)
        trace.lag.append(lag)
        trace.took.append(time.perf_counter() - due)
        trace.wrong.append(wrong)
        trace.probed.append(int(self._slots_of_probes[probe]))

    def check(self, client: "ps.Client") -> dict[str, int]:
        """Compare every row that was pushed to with what was acknowledged; nothing may be under way."""
        touched = np.flatnonzero(self.sent)
        lost = doubled = 0
        for at in range(0, len(touched), LOAD_ROWS):
            ids = touched[at : at + LOAD_ROWS]
            rows = client.pull(TABLE, ids, timeout=60.0)
            lost += int((rows.min(axis=1) < self.acknowledged[ids] - 0.5).sum())
            doubled += int((rows.max(axis=1) > self.sent[ids] + 0.5).sum())
        pushes = int(self.acknowledged.sum())
        return {"pushed_to": len(touched), "pushes": pushes, "lost": lost, "doubled": doubled, "unseen": self.unseen}
