"""A range pull: every row of a token interval once, also while slots move between servers.

Each slot remembers up to which token its rows were taken. A call asks one server for a run of slots that it owns, in
the order of the ring; neighbours mostly have other owners. An answer counts only if the server judged by the
view that the call was planned with, or by one in which the owner and the term of those slots are the same: then the
rows are the slots' own, and will not be asked for again.
"""

import time
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ps.client.core import Ask, Command, deadline
from ps.client.request import Call
from ps.client.routing import Routing, TableInfo
from ps.client.verbs import RowRange, Verbs, check_range
from ps.errors import EmbringError, RequestError, SlotsLost, WrongView
from ps.wire import Message

RING_LAST = 2**64 - 1

BLOCK_BYTES = 2**20
"""Less than about this many bytes of rows are gathered, and handed out as one part."""

RUNS = 2
"""Runs that the slots of one server are cut into: calls that are on their way to it at once."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Slots of the table (int64[k], rising, from 0), all owned by one server; at most the first of them was begun."""

    server: int
    slots: NDArray[np.int64]


class PullRange:
    """The rows of [start, stop) of a table; each `next()` gives some. One at a time: they share what is known."""

    def __init__(self, verbs: Verbs, name: str, start: int, stop: int | None, timeout: float | None) -> None:
        self._verbs = verbs
        self._name = name
        self._start, end = check_range(start, stop)
        self._last = RING_LAST if end is None else end - 1
        self._timeout = timeout
        self._number = -1
        self._firsts: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._next: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._lasts: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._open: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._parts: list[RowRange] = []
        self.until()

    def until(self) -> float:
        """The moment (monotonic) at which a `next()` that begins now gives up."""
        return deadline(self._timeout, self._verbs.default_timeout)

    def _begin(self, info: TableInfo) -> None:
        """Of each slot: the first token that is still to be taken, the last one, and whether any is left."""
        shift = np.uint64(64 - info.bits)
        first = np.arange(2**info.bits, dtype=np.uint64) << shift if info.bits else np.zeros(1, np.uint64)
        last = first + np.uint64(2 ** (64 - info.bits) - 1)
        self._firsts = np.maximum(first, np.uint64(self._start))
        self._next = self._firsts.copy()
        self._lasts = np.minimum(last, np.uint64(self._last))
        self._open = self._next <= self._lasts
        self._number = info.number

    def next(self, until: float) -> Generator[Command, dict[int, EmbringError], list[RowRange]]:
        """Some of the rows, in no order; nothing when there are no more.

        What came before an error is kept, and handed out by the `next()` after it: it is not asked for again.
        """
        verbs = self._verbs
        yield from verbs.features((self._name,), until)
        if self._number < 0:
            self._begin(verbs.routing.table(self._name))
        attempt = 0
        while self._open.any() and self._bytes < BLOCK_BYTES:
            routing = verbs.routing
            info = self._same_table(routing)
            try:
                runs = self._runs(routing, info)
            except SlotsLost as error:
                yield from verbs.hopeless(error, routing, until)
                continue
            failed = yield from self._round(runs, routing, info, until)
            if failed:
                if time.monotonic() >= until:
                    raise next(iter(failed.values()))
                yield from verbs.after(failed, routing, attempt, until)
                attempt += 1
        parts = self._parts
        if self._bytes < BLOCK_BYTES and len(parts) > 1:
            parts = [RowRange(np.concatenate([p.ids for p in parts]), np.concatenate([p.rows for p in parts]))]
        self._parts = []
        return parts

    @property
    def _bytes(self) -> int:
        return sum(part.rows.nbytes for part in self._parts)

    def _same_table(self, routing: Routing) -> TableInfo:
        info = routing.table(self._name)
        if info.number != self._number:
            raise RequestError(f"table {self._name!r} was made anew during the range pull")
        return info

    def _runs(self, routing: Routing, info: TableInfo) -> list[_Run]:
        """The next runs, a few of each server; SlotsLost where nobody owns an open slot."""
        owners = np.where(self._open, routing.primaries[info.first : info.first + len(self._open), 0], np.int16(-2))
        if (owners == -1).any():
            slots = (np.flatnonzero(owners == -1) + info.first).tolist()
            raise SlotsLost(f"{len(slots)} slots of table {self._name!r} have no living owner", slots)
        begun = self._next > self._firsts
        runs = []
        for server in np.unique(owners[owners >= 0]).tolist():
            slots_of = np.flatnonzero(owners == server)
            # A slot that was begun must come first in its run, since a run is asked from its first open token on.
            cuts = np.flatnonzero(begun[slots_of])
            if len(cuts) < RUNS:
                cuts = np.union1d(cuts, np.arange(RUNS) * len(slots_of) // RUNS)
            runs += [_Run(server, part) for part in np.split(slots_of, cuts) if len(part)]
        return runs

    def _round(
        self, runs: list[_Run], routing: Routing, info: TableInfo, until: float
    ) -> Generator[Command, dict[int, EmbringError], dict[int, EmbringError]]:
        """Ask for every run at once and keep what counts; errors by server."""
        replies: dict[int, Message] = {}
        calls = [self._call(key, run, routing, info) for key, run in enumerate(runs)]
        ask = Ask(routing.servers, calls, replies.__setitem__, self._verbs.attempt_until(until))
        failed = {runs[key].server: error for key, error in (yield ask).items()}
        for key, reply in replies.items():
            run = runs[key]
            epoch = int(reply.fields.get("epoch", 0))
            if epoch != routing.epoch:
                yield from self._verbs.refresh(epoch - 1, until, {run.server: epoch})
                if epoch < routing.epoch or not self._unmoved(run, routing, self._verbs.routing, info):
                    failed[run.server] = WrongView(f"slots moved between views {routing.epoch} and {epoch}", epoch)
                    continue
            self._take(run, reply)
        return failed

    def _call(self, key: int, run: _Run, routing: Routing, info: TableInfo) -> Call:
        last = int(self._lasts[run.slots[-1]])
        fields = {
            "table": self._number,
            "start": int(self._next[run.slots[0]]),
            "stop": None if last == RING_LAST else last + 1,
            "epoch": routing.epoch,
        }
        return Call(key, run.server, "range", fields, {"slots": run.slots + info.first})

    def _take(self, run: _Run, reply: Message) -> None:
        """Keep the rows of a run, and remember up to where it was answered."""
        if len(reply.arrays["ids"]):
            self._parts.append(RowRange(reply.arrays["ids"], reply.arrays["rows"]))
        span = run.slots
        cursor = reply.fields.get("cursor")
        if cursor is None or int(cursor) > RING_LAST:
            self._open[span] = False
            return
        upto = np.uint64(int(cursor))
        self._open[span] &= self._lasts[span] >= upto
        self._next[span] = np.maximum(self._next[span], upto)

    def _unmoved(self, run: _Run, before: Routing, now: Routing, info: TableInfo) -> bool:
        """Whether the run's owner and terms have been the same in both views."""
        table = now.tables.get(self._name)
        if table is None or table.number != info.number:
            return False
        span = info.first + run.slots
        owner = before.servers[run.server].incarnation
        here = [s for s, server in enumerate(now.servers) if server.incarnation == owner]
        same_owner = bool(here) and bool((now.primaries[span, 0] == here[0]).all())
        return same_owner and bool((before.view.terms()[span] == now.view.terms()[span]).all())
