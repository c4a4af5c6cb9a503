"""What a server answers: one handler for each operation, over a Store. No socket, no Ray, no clock but for measuring.

Handlers run on the data thread, each request from its beginning to its end, so that each is atomic on its server.
What could take long (exports, ranges) is cut into parts of bounded size, one request each.

    ping, view, pull, push, shared, range, export, absorb, drop, digest, verify, watermark, statistics, install, drain,
    admin

Every reply carries `epoch`, the epoch of the server's view.
"""

import asyncio
import contextlib
import gc
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import tokens
from hashring.view import View
from ps.config import Config
from ps.errors import EmbringError, NotApplied, RequestError, judged_by
from ps.exports import Exports
from ps.fabric.listen import Listener, ListenLimits, Result
from ps.fabric.protocol import Welcome
from ps.meter import Meter, ServiceStatistics
from ps.peers import Peers
from ps.replication import Answer, Refuse, Replication, ReplicationLimits
from ps.shared import lease
from ps.spec import TableSpec
from ps.store import Store
from ps.store.sharing import described
from ps.wire import (
    FrameLimits,
    Message,
    pull_share,
    push_share,
    unpack_plain,
    vector,
    view_message,
    view_of,
    whole,
)

Control = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""(verb, fields) -> answer: how administration reaches the controller."""

PART_BYTES = 2 * 1024 * 1024
"""Rows in one part of a range or an export, in bytes, before the part is closed: a few milliseconds of work. Less where
frames carry less."""

NEWER_S = 1.0
"""How long a request that knows a newer view waits for that view to arrive here; then the present one judges."""

TICK_S, COPYING_S = 0.05, 0.01
"""Seconds between two ticks of the machine of replication, and while copies are made: a tick sends what falls to it at
once, and requests wait for that."""

FIRST = frozenset(("ping", "view", "install", "learn", "replicate", "repair", "fork", "digest", "drain", "statistics"))
"""What servers and the controller say to each other: heard also where the queue is full. Pushes in it may wait for an
owner that is dead, until a view says so."""

TIDY_S, TIDY_REST, TIDY_REST_MAX_S = 0.01, 19, 1.0
"""Seconds between two steps of giving freed memory back, or so many times what the step before took (at most the third:
a process may be stopped in one), a millisecond or two but for the first and the last, which look at all that is free:
requests come first, and rows that move in memory at one core's speed slow down whoever shares the caches."""

REUSE_S = 0.5
"""Seconds for which memory that a view freed is kept for rows to come, counted from the last block of a restore: one
that replaces a table would else have the system hand out anew, page by page, what it was given back just before."""


class Service:
    """Answers the fabric's requests from one store; everything but the constructor runs on the data thread."""

    def __init__(self, store: Store, config: Config, token: str, control: Control, name: str = "") -> None:
        self.store = store
        self.view = View.empty(0, config.cluster.slot_bits)
        self.draining = False
        self.listener = Listener(self.handle, token, self.welcome, *_limits(config), FIRST)
        self._config = config
        self._lease = lease(config.control.ping_interval_ms * config.control.pings_max)
        self._control = control
        self._name = name
        self._absent_ids = 0
        frame = config.server.frame_max_mib << 20
        store.held.block_max = frame - frame // 16  # the rest is for what aligns the arrays
        self._part_max = frame // 4
        self._exports = Exports(store, min(PART_BYTES, self._part_max))
        self._newer = asyncio.Event()
        server = config.server
        limits = ReplicationLimits(
            block_bytes_max=min(ReplicationLimits().block_bytes_max, self._part_max),
            owners_min=server.owners_min,
            verify_slots_per_s=server.verify_slots_per_s,
            copy_bytes_per_s=server.copy_max_mib_per_s << 20,
        )
        self.replication = Replication(store, limits)
        self._peers = Peers(self.replication, config, token, self._perform)
        self._tokens = 0
        self._decided: dict[int, Result | EmbringError] = {}
        self._undecided: dict[int, asyncio.Future[Result]] = {}
        self._held: dict[Any, Result] = {}
        self._given_up = False
        self._deleted = 0
        self._ticking: asyncio.TimerHandle | None = None
        self._due = perf_counter()
        self._asked, self._waited = 0, 0.0
        self._tidying: asyncio.TimerHandle | None = None
        self._handlers: dict[str, Callable[[Message], Result | Awaitable[Result]]] = {
            "ping": lambda request: ({}, dict(self.replication.pinged(request.fields).to_arrays())),
            "view": lambda request: view_message(self.view),
            "pull": self._pull,
            "push": self._push,
            "shared": lambda request: (described(self.store.held), {}),
            "range": self._range,
            "export": self._export,
            "absorb": self._absorb,
            "drop": self._drop,
            "learn": self._learn,
            "replicate": self._of_peer,
            "repair": self._of_peer,
            "fork": self._of_peer,
            "digest": self._digest,
            "verify": self._verify,
            "watermark": self._watermark,
            "statistics": self._statistics,
            "install": self._install,
            "drain": self._drain,
            "admin": self._admin,
        }
        self._meters = {op: Meter() for op in self._handlers}

    def welcome(self) -> Welcome:
        """What the handshake says of this server."""
        view = self.view
        return Welcome(
            cluster=view.cluster,
            epoch=view.epoch,
            name=self._name,
            incarnation=self.store.incarnation,
            fingerprint=self._config.fingerprint,
            slot_bits=self._config.cluster.slot_bits,
        )

    def install(self, view: View) -> int:
        """Judge by this view from now on if it is newer; the epoch that stands afterwards."""
        self.replication.install(view)
        self._perform()
        return self.view.epoch

    def _adopt(self) -> None:
        """Judge by the store's view from now on: the machine may have had a newer one of a peer."""
        view = self.store.view
        if view is not None and view.epoch > self.view.epoch:
            self.view = view
            self._newer.set()
            self._newer = asyncio.Event()
            self._tidy_soon(REUSE_S)
            self._peers.keep_soon(lambda: self.view)

    # -- replication

    def begin(self) -> None:
        """Let time go by for the machine of replication, until `end`."""
        loop = asyncio.get_running_loop()
        until_next = COPYING_S if self.replication.copying else TICK_S
        late, self._due = max(0.0, perf_counter() - self._due), perf_counter() + until_next
        # Ticks come before requests that are here already; and where nobody asks, only copies make them late.
        late = max(late, self._waited / self._asked) if self._asked else 0.0
        self._asked, self._waited = 0, 0.0
        self._ticking = loop.call_later(until_next, self.begin)
        self.store.held.latch.beat(0 if self.draining else self._lease)
        self._drop_given_up()
        self.replication.tick(loop.time(), late)
        self._perform()
        if self._deleted != self.store.held.deleted:  # by a push, or by a block of another server
            self._deleted = self.store.held.deleted
            self._tidy_soon()

    async def end(self) -> None:
        """Stop: close the listener, the connections to other servers, and answer nobody any more."""
        if self._ticking is not None:
            self._ticking.cancel()
        await self.listener.close()
        self._peers.close()

    def _perform(self) -> None:
        """Carry out what the machine of replication asks for."""
        self._adopt()
        while actions := self.replication.actions():
            for action in actions:
                if isinstance(action, Answer):
                    self._decide(action.token, self._held.pop(action.token, (action.fields, {})))
                elif isinstance(action, Refuse):
                    self._held.pop(action.token, None)
                    self._decide(action.token, action.error)
                else:
                    self._peers.send(action, self.view)

    def _decide(self, token: Any, result: Result | EmbringError) -> None:
        future = self._undecided.pop(token, None)
        if future is None:
            self._decided[token] = result
        elif not future.done():
            if isinstance(result, EmbringError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _outcome(self, token: int) -> Result | Awaitable[Result]:
        """What became of a request that the machine was handed: at once where it is decided already."""
        self._perform()
        result = self._decided.pop(token, None)
        if isinstance(result, EmbringError):
            raise result
        if result is not None:
            return result
        future = self._undecided[token] = asyncio.get_running_loop().create_future()
        return future

    def _drop_given_up(self) -> None:
        """Have the machine forget answers for which nobody waits any more."""
        self._decided.clear()  # what is here now was decided after it had been given up
        if self._given_up:
            self._given_up = False
            tokens = {token for token, future in self._undecided.items() if future.cancelled()}
            for token in tokens:
                del self._undecided[token]
                self._held.pop(token, None)
            self.replication.give_up(tokens)

    def _token(self) -> int:
        self._tokens += 1
        return self._tokens

    def _of_peer(self, request: Message) -> Result:
        reply = self.replication.request(request.op, request.fields, request.arrays)
        self._perform()
        return reply

    def _learn(self, request: Message) -> Result:
        """The controller has this server copy slots to another one."""
        fields = request.fields
        slots = self._slots(request)
        self.replication.learn(slots, whole(fields, "learner", 1, 2**64 - 1), whole(fields, "term_epoch"))
        self._perform()
        return {}, {}

    def _tidy_soon(self, seconds: float = TIDY_S) -> None:
        """Give freed memory back, in bounded steps between requests: called where rows may have been freed."""
        if self._tidying is None:
            self._tidying = asyncio.get_running_loop().call_later(seconds, self._tidy)

    def _tidy(self) -> None:
        self._tidying = None
        self.replication.flush()
        self._perform()
        begin = perf_counter()
        if self.store.compact():
            self._tidy_soon(min(max(TIDY_S, TIDY_REST * (perf_counter() - begin)), TIDY_REST_MAX_S))

    def statistics(self) -> ServiceStatistics:
        """What happened so far."""
        operations = {op: meter.statistics() for op, meter in self._meters.items()}
        return ServiceStatistics(
            self.view.epoch, self.draining, self._absent_ids, *self.replication.verified, *self.replication.copied,
            *self.replication.lag, operations, self.listener.statistics(), self.store.statistics(),
        )  # fmt: skip

    # -- dispatch

    def handle(self, request: Message, waited: float) -> Result | Coroutine[Any, Any, Result]:
        """Answer one request that waited so many seconds; what takes longer is answered by the coroutine.

        Raises the error to be sent.
        """
        handler = self._handlers.get(request.op)
        if handler is None:
            raise RequestError(f"operation {request.op!r} is unknown; there are {', '.join(sorted(self._handlers))}")
        begin = perf_counter() - waited
        if request.op not in FIRST:
            self._asked += 1
            self._waited += waited
        meter = self._meters[request.op]
        failed = True
        result = None
        try:
            epoch = request.fields.get("epoch", 0)
            if type(epoch) is not int or epoch < 0:
                raise RequestError(f"epoch is {str(epoch)[:40]}; it must be a whole number from 0 on")
            result = self._later(request, epoch) if epoch > self.view.epoch else handler(request)
            if not isinstance(result, tuple):
                return self._finish(meter, begin, result)
            result[0]["epoch"] = self.view.epoch
            failed = False
            return result
        finally:
            if result is None or isinstance(result, tuple):
                meter.add(perf_counter() - begin, failed)

    async def _finish(self, meter: Meter, begin: float, result: Awaitable[Result]) -> Result:
        failed = True
        try:
            fields, arrays = await result
            failed = False
        except asyncio.CancelledError:
            self._given_up = True
            raise
        finally:
            meter.add(perf_counter() - begin, failed)
        return {**fields, "epoch": self.view.epoch}, arrays

    async def _later(self, request: Message, epoch: int) -> Result:
        """Handle a request once the view that it knows is here, or could not be had."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NEWER_S):
                while epoch > self.view.epoch:
                    await self._newer.wait()
        try:
            result = self._handlers[request.op](request)
            return result if isinstance(result, tuple) else await result
        except RequestError as error:
            raise judged_by(self.view.epoch, epoch, error) from None

    # -- rows

    def _serving(self) -> None:
        if self.draining:
            raise NotApplied("the server is draining; another owner answers")

    def _pull(self, request: Message) -> Result:
        self._serving()
        share = pull_share(request.fields, request.arrays)
        reply = self.store.pull(share, self.listener.frame_limits.body_max // 4)
        self._absent_ids += reply.absent
        return {"absent": reply.absent}, {"rows": reply.rows}

    def _push(self, request: Message) -> Result | Awaitable[Result]:
        self._serving()
        share = push_share(request.fields, request.arrays)
        acks = request.fields.get("acks", "all")
        if acks not in ("all", "primary"):
            raise RequestError(f'acks is {str(acks)[:40]!r}; it must be "all" or "primary"')
        only = vector(request.arrays, "only", "<i8") if "only" in request.arrays else None
        at = whole(request.fields, "at") if only is not None else None
        token = self._token()
        self.replication.push(token, share, acks, only, at)
        return self._outcome(token)

    def _range(self, request: Message) -> Result:
        """One part of the rows whose tokens lie in [start, stop); the next begins at `cursor` (None: there is none).

        slots: rows of these slots alone.
        """
        self._serving()
        fields = request.fields
        number = whole(fields, "table", 0, 2**31 - 1)
        start = whole(fields, "start", 0, 2**64 - 1)
        stop = whole(fields, "stop", start, 2**64 - 1) if fields.get("stop") is not None else None
        table = next((t for t in self.view.tables if t.number == number), None)
        if table is None:
            raise RequestError(f"table {number} is unknown in epoch {self.view.epoch}")
        spec = TableSpec.from_plain(table.spec)
        rows_max = max(1, min(PART_BYTES, self._part_max) // (4 * spec.dim + 8))
        slots = self._slots(request) if "slots" in request.arrays else None
        for ids, rows in self.store.range(number, start, stop, rows_max, slots):
            if len(ids):
                # Tokens are a bijection of ids: no other row of the table stands where this part ends.
                cursor = int(tokens(ids, spec.seed).max()) + 1
                more = cursor < (2**64 if stop is None else stop)
                part: dict[str, NDArray[Any]] = {"ids": ids, "rows": rows}
                return {"more": more, "cursor": cursor if more else None}, part
        part = {"ids": np.empty(0, np.int64), "rows": np.empty((0, spec.dim), np.float32)}
        return {"more": False, "cursor": None}, part

    # -- blocks

    def _slots(self, request: Message) -> NDArray[np.int64]:
        """The slots that a request names, each of them in the view, once."""
        slots = vector(request.arrays, "slots", "<i8")
        if len(slots) and not 0 <= slots.min() <= slots.max() < self.view.slots_total:
            last = self.view.slots_total - 1
            raise RequestError(f"slots are {slots.min()} to {slots.max()}; epoch {self.view.epoch} has 0 to {last}")
        if len(np.unique(slots)) != len(slots):
            raise RequestError("a slot is named twice")
        return slots

    def _export(self, request: Message) -> Result | Awaitable[Result]:
        """One part of an export: begun by `slots`, continued by the `cursor` and `part` of the answer before."""
        begins = "cursor" not in request.fields
        told = self._exports.part(request, self._slots(request) if begins else None)
        if told is None:
            return {"more": False}, {}
        fields, block = told
        plain, arrays = block.to_arrays()
        token = self._token()
        self._held[token] = {"more": True, "block": plain, **fields}, arrays
        self.replication.hold(token, block.slots, block.last)  # it leaves once every owner holds what is in it
        return self._outcome(token)

    def _absorb(self, request: Message) -> Result:
        if self._tidying is not None:
            self._tidying.cancel()
            self._tidying = None
            self._tidy_soon(REUSE_S)
        return self.replication.restore(request.fields, request.arrays)

    def _drop(self, request: Message) -> Result:
        self.store.drop(self._slots(request))
        self._tidy_soon()
        return {}, {}

    def _digest(self, request: Message) -> Result:
        if "from" in request.fields:
            return self._of_peer(request)
        return {}, {"digests": self.store.digest(self._slots(request))}

    def _verify(self, request: Message) -> Result | Awaitable[Result]:
        """Compare the slots, as many as one request may; answered when their other owners have answered."""
        repair = request.fields.get("repair", False)
        if not isinstance(repair, bool):
            raise RequestError(f"repair is {str(repair)[:40]}; it must be true or false")
        start = whole(request.fields, "start", 0, 2**64 - 1) if "start" in request.fields else 0
        token = self._token()
        self.replication.verify(token, self._slots(request), start, repair)
        return self._outcome(token)

    def _watermark(self, request: Message) -> Result:
        return {}, {"positions": self.store.watermark(self._slots(request))}

    # -- the server itself

    def _statistics(self, request: Message) -> Result:
        statistics = self.statistics()
        plain = {**asdict(statistics), "requests": statistics.requests, "errors": statistics.errors}
        return plain, {}

    def _install(self, request: Message) -> Result:
        if whole(request.fields, "view_epoch", default=2**62) > self.store.epoch:  # most have it when it is handed on
            self.install(view_of(request.fields, request.arrays))
        return {}, {}

    def _drain(self, request: Message) -> Result:
        """Refuse pulls and pushes from now on (`on`, the default), or take them again."""
        on = request.fields.get("on", True)
        if not isinstance(on, bool):
            raise RequestError(f"on is {str(on)[:40]}; it must be true or false")
        self.draining = on
        return {}, {}

    async def _admin(self, request: Message) -> Result:
        fields = {k: v for k, v in request.fields.items() if k not in ("verb", "deadline_ms", "epoch")}
        if "fields" in request.arrays:  # more than a header may hold, as of a restore
            more = unpack_plain(vector(request.arrays, "fields", "|u1"))
            if not isinstance(more, dict):
                raise RequestError(f"fields are {str(more)[:40]}; they must be a map")
            fields |= more
        verb = request.fields.get("verb")
        if not isinstance(verb, str):
            raise RequestError("verb must be text")
        # What was begun is carried out, though nobody may wait for the answer any more.
        return {**await asyncio.shield(asyncio.ensure_future(self._control(verb, fields)))}, {}


def _limits(config: Config) -> tuple[FrameLimits, ListenLimits]:
    server = config.server
    return FrameLimits(body_max=server.frame_max_mib << 20), ListenLimits(
        connections_max=server.connections_max,
        requests_max=server.queue_max,
        bytes_max=server.queue_max_mib << 20,
        unread_max=server.unread_max_mib << 20,
        handshake_s=server.handshake_s,
        silent_s=server.silent_s,
    )


async def serve(service: Service, addresses: Sequence[str], tls: ssl.SSLContext | None = None) -> list[str]:
    """Listen for a service on the running loop, which becomes its data thread; the addresses with their ports.

    Raises ConfigError for an address that is none, is taken, or can be reached from elsewhere while there is no token.
    """
    gc.freeze()  # the modules loaded so far stay: no collection walks through them in the middle of a request
    taken = await service.listener.start(addresses, tls)
    service.begin()
    return list(taken)
