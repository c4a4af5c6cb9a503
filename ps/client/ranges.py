"""A range pull: every row of a token interval once, also while slots move between servers.

Each slot remembers up to which token its rows were taken. A server is asked from the lowest such token of the slots
that it owns; of its answer only the rows of those slots from their own token on are kept. An answer counts only if
the server judged by the view that the slots were planned with, or by one in which their owner and term are the same.
"""

import time
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import tokens
from ps.client.core import Ask, Command, deadline
from ps.client.request import Call
from ps.client.routing import Routing, TableInfo
from ps.client.verbs import RowRange, Verbs, check_range
from ps.errors import EmbringError, RequestError, SlotsLost, WrongView
from ps.wire import Message

RING_LAST = 2**64 - 1


class PullRange:
    """The rows of [start, stop) of a table; `next()` asks every owner for its next part at once."""

    def __init__(self, verbs: Verbs, name: str, start: int, stop: int | None, timeout: float | None) -> None:
        self._verbs = verbs
        self._name = name
        self._start, end = check_range(start, stop)
        self._last = RING_LAST if end is None else end - 1
        self._timeout = timeout
        self._number = -1
        self._next: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._ends: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._open: NDArray[np.bool_] = np.empty(0, np.bool_)
        deadline(timeout, verbs.default_timeout)

    def _begin(self, info: TableInfo) -> None:
        """Per slot of the table: the first token still to be taken, and the last one; open while any is left."""
        width = 2 ** (64 - info.bits)
        first = [s * width for s in range(2**info.bits)]
        self._next = np.array([max(f, self._start) for f in first], np.uint64)
        self._ends = np.array([min(f + width - 1, self._last) for f in first], np.uint64)
        self._open = self._next <= self._ends
        self._number = info.number

    def next(self) -> Generator[Command, object, list[RowRange] | None]:
        """The next parts, at most one from each server; None at the end."""
        verbs = self._verbs
        until = deadline(self._timeout, verbs.default_timeout)
        yield from verbs.features((self._name,), until)
        info = verbs.routing.table(self._name)
        if self._number < 0:
            self._begin(info)
        if info.number != self._number:
            raise RequestError(f"table {self._name!r} was made anew during the range pull")
        attempt = 0
        while self._open.any():
            routing = verbs.routing
            try:
                owners = self._owners(routing, info)
            except SlotsLost as error:
                yield from verbs.hopeless(error, routing, until)
                continue
            replies: dict[int, Message] = {}
            calls = [self._call(s, owners, routing) for s in np.unique(owners[self._open]).tolist()]
            failures = yield Ask(routing.servers, calls, replies.__setitem__, verbs.attempt_until(until))
            parts: list[RowRange] = []
            failed: dict[int, EmbringError] = dict(failures)  # type: ignore[call-overload]
            for s, reply in replies.items():
                error_of = yield from self._take(s, reply, owners, routing, info, parts, until)
                if error_of is not None:
                    failed[s] = error_of
            if parts:
                return parts
            if failed:
                if time.monotonic() >= until:
                    raise next(iter(failed.values()))
                yield from verbs.after(failed, routing, attempt, until)
                attempt += 1
        return None

    def _owners(self, routing: Routing, info: TableInfo) -> NDArray[np.int16]:
        """The primary of each slot of the table."""
        owners = routing.primaries[info.first : info.first + len(self._next), 0]
        lost = self._open & (owners < 0)
        if lost.any():
            slots = (np.flatnonzero(lost) + info.first).tolist()
            raise SlotsLost(f"{len(slots)} slots of table {self._name!r} have no living owner", slots)
        return owners

    def _call(self, s: int, owners: NDArray[np.int16], routing: Routing) -> Call:
        mine = self._open & (owners == s)
        start, last = int(self._next[mine].min()), int(self._ends[mine].max())
        stop = None if last == RING_LAST else last + 1
        return Call(s, "range", {"table": self._number, "start": start, "stop": stop, "epoch": routing.epoch}, {})

    def _take(
        self,
        s: int,
        reply: Message,
        owners: NDArray[np.int16],
        routing: Routing,
        info: TableInfo,
        parts: list[RowRange],
        until: float,
    ) -> Generator[Command, object, EmbringError | None]:
        """Keep what server s answered for its slots, or say why it does not count."""
        mine = self._open & (owners == s)
        epoch = int(reply.fields.get("epoch", 0))
        if epoch != routing.epoch:
            yield from self._verbs.refresh(epoch - 1, until, {s: epoch})
            now = self._verbs.routing
            if epoch < routing.epoch or now.epoch < epoch:
                return WrongView(f"a server answered by view {epoch}; this client has {now.epoch}", epoch)
            mine &= self._unmoved(routing, now, info)
        ids, rows = reply.arrays["ids"], reply.arrays["rows"]
        cursor = reply.fields.get("cursor")
        upto = RING_LAST if cursor is None else int(cursor) - 1
        if len(ids):
            places = tokens(ids, info.spec.seed)
            slots = (places >> np.uint64(32)) >> np.uint64(32 - info.bits)
            kept = mine[slots] & (places >= self._next[slots]) & (places <= self._ends[slots])
            if kept.any():
                parts.append(RowRange(ids, rows) if kept.all() else RowRange(ids[kept], rows[kept]))
        taken = mine & (self._ends <= np.uint64(upto))
        self._open &= ~taken
        begun = mine & ~taken & (self._next <= np.uint64(upto))
        self._next[begun] = np.uint64(min(upto, RING_LAST - 1) + 1)
        return None

    def _unmoved(self, before: Routing, now: Routing, info: TableInfo) -> NDArray[np.bool_]:
        """Slots whose owner and term have been the same in both views."""
        table = now.tables.get(self._name)
        if table is None or table.number != info.number:
            raise RequestError(f"table {self._name!r} was dropped or made anew during the range pull")
        span = slice(info.first, info.first + len(self._next))
        names_before = np.array([x.incarnation for x in before.servers] + [0], np.uint64)
        names_now = np.array([x.incarnation for x in now.servers] + [0], np.uint64)
        same_owner = names_before[before.primaries[span, 0]] == names_now[now.primaries[span, 0]]
        return same_owner & (before.view.terms()[span] == now.view.terms()[span])
