"""The client without input or output: verbs as generators that yield what is to be done, and are sent what came of it.

A blocking or asynchronous shell drives a generator: it makes the calls of an `Ask` at once and sends back which of
them failed, sleeps for a `Wait`, and for `Full` waits until a push is decided. All that decides (who is asked, what a
failure means, when to give up) is here, once for both shells.
"""

import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hashring.view import Server, View
from ps.client.request import Call
from ps.client.routing import Features, Routing
from ps.client.shared import SharedReader
from ps.client.window import WINDOW, Window
from ps.errors import (
    EmbringError,
    NotApplied,
    Overloaded,
    PerhapsApplied,
    RequestError,
    SlotsLost,
    WrongView,
)
from ps.fabric.protocol import Traffic
from ps.wire import Message, view_of

TIMEOUT_MAX = 600.0
"""Seconds that a call may last, retries included: servers forget an idle client's sequences after an hour."""

ATTEMPT_MIN = 0.1
"""Seconds that an attempt gets at least. It gets a third of what is left: a silent server leaves time to retry."""

PAUSE_FIRST, PAUSE_MAX = 0.005, 0.25
"""Seconds between attempts, doubling; each is drawn from its upper half, so that clients do not retry in step."""

ATTEMPT_FIRST = 1.0
"""Seconds that the first attempt of a request gets at most, doubling: a server that hangs must not hold a long request
up for longer than others need to take over from it."""

SUSPECT_S = 1.0
"""Seconds for which a server that failed is asked only for what no other owner has."""

CATCH_UP_S = 0.1
"""Seconds between two views that a client fetches because a reply told of a newer one, and that it waits for one: what
was asked is answered already, but by an old view the next failure would find fewer owners to turn to."""

PROBE_S = 0.5
"""Seconds that servers have to say which view they know."""


CLOSED = "this client is closed: ps.connect() makes another"


@dataclass(frozen=True, slots=True)
class Ask:
    """Make these calls at once, hand each reply to `absorb(key, reply)`; send back {key: error} of the rest."""

    servers: Sequence[Server]
    calls: Sequence[Call]
    absorb: Callable[[int, Message], None]
    until: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing for so many seconds. views_until: another request asks for views; a shell that can wait until it has
    (`Core.on_views`) waits for that instead, until then at the longest."""

    seconds: float
    views_until: float | None = None


@dataclass(frozen=True, slots=True)
class Full:
    """Too many pushes are undecided: wait until one is decided, or until the deadline."""

    until: float


Command = Ask | Wait | Full
Outcome = dict[int, EmbringError] | None
Steps = Generator[Command, Any, Any]


class Exchange(Protocol):
    """A request that can be split anew after a failure (ps.client.request)."""

    began: bool
    """Whether a part of it has changed rows."""

    def split(self, routing: Routing, left_out: frozenset[int], load: NDArray[np.float64]) -> list[Call]:
        """Calls for what is not answered yet."""

    def absorb(self, server: int, reply: Message) -> None:
        """Take one reply."""

    def answered(self, failed: Sequence[int]) -> None:
        """An attempt is over."""


@dataclass(slots=True)
class Counters:
    """What a client has done since it began. calls: messages of pulls and pushes; rows: those that servers sent."""

    traffic: Traffic = field(default_factory=Traffic)
    calls: int = 0
    rows: int = 0
    pulls: int = 0
    pushes: int = 0
    ids: int = 0
    absent: int = 0
    in_place: int = 0
    retries: int = 0
    views: int = 0


def _last_word(error: EmbringError, doubtful: PerhapsApplied | None, began: bool) -> EmbringError:
    """What a request that ran out of time ends with: "surely not applied" only where that is so for all of it."""
    if began and not isinstance(error, PerhapsApplied) and doubtful is None:
        return PerhapsApplied(f"a part of the push was applied, and of the rest is known: {error}")
    return doubtful or error


def deadline(timeout: float | None, default: float) -> float:
    """The moment (monotonic) at which a call gives up; RequestError for a time-out that is none."""
    seconds = default if timeout is None else timeout
    if not isinstance(seconds, int | float) or not 0 < seconds <= TIMEOUT_MAX:
        raise RequestError(f"timeout is {seconds!r}; it must be above 0 and at most {TIMEOUT_MAX:g} seconds")
    return time.monotonic() + seconds


def given_up(error: EmbringError, begun: float) -> None:
    """Have an error that ends a call say how long the call took: it came of the last attempt, and names that one's."""
    if isinstance(error, NotApplied | PerhapsApplied | WrongView):
        error.args = (f"given up after {time.monotonic() - begun:.3g} s: {error}",)


class Core:
    """What a client knows: the view, its window of sequences, which servers failed lately."""

    def __init__(self, addresses: Sequence[str] | Callable[[], Sequence[str]]) -> None:
        self._addresses = addresses if callable(addresses) else lambda: addresses
        self.window = Window()
        self.reader = SharedReader()
        self.counters = Counters()
        self.absent = 0
        self._routing: Routing | None = None
        self._load = np.zeros(0)
        self._suspects: dict[int, float] = {}
        self._refreshing = False
        self.on_views: Callable[[], None] = lambda: None
        self.on_adopt: Callable[[Sequence[Server]], None] = lambda servers: None
        self._caught_up = 0.0
        self._random = random.Random()

    @property
    def routing(self) -> Routing:
        """What is derived from the newest view that this client has seen."""
        assert self._routing is not None
        return self._routing

    def adopt(self, view: View) -> None:
        """Take a view if it is newer; RequestError if it is another cluster's."""
        known = self._routing
        if known is not None and view.cluster != known.view.cluster:
            raise RequestError(f"a server belongs to cluster {view.cluster}; this client's is {known.view.cluster}")
        if known is None or view.epoch > known.epoch:
            self._routing = Routing(view)
            self._load = np.zeros(len(view.servers))
            self._suspects = {}
            self.counters.views += 1
            self.on_adopt(view.servers)

    # -- asking, and what a failure means

    def exchange(self, request: Exchange, until: float) -> Steps:
        """Drive a request until every id is answered; raises what its caller is to know."""
        attempt = 0
        doubtful: PerhapsApplied | None = None
        newest = teller = -1

        def absorb(key: int, reply: Message) -> None:
            nonlocal newest, teller
            epoch = reply.fields.get("epoch", 0)
            if epoch > newest:
                newest, teller = epoch, key
            request.absorb(key, reply)

        while True:
            newest = teller = -1
            routing = self.routing
            failures: dict[int, EmbringError] = {}
            try:
                calls = request.split(routing, self._left_out(), self._load)
            except (SlotsLost, RequestError) as error:
                yield from self.hopeless(error, routing, until)
                continue
            if calls:
                self.counters.calls += len(calls)
                failures = yield Ask(routing.servers, calls, absorb, self.attempt_until(until, attempt))
            if not failures:
                if newest > self.routing.epoch:
                    yield from self._catch_up(routing, next(c.server for c in calls if c.key == teller))
                return
            request.answered(list(failures))
            doubtful = doubtful or next((e for e in failures.values() if isinstance(e, PerhapsApplied)), None)
            if time.monotonic() >= until:
                raise _last_word(next(iter(failures.values())), doubtful, request.began)
            yield from self.after(failures, routing, attempt, until)
            attempt += 1
            self.counters.retries += 1

    def _left_out(self) -> frozenset[int]:
        if not self._suspects:
            return frozenset()
        now = time.monotonic()
        self._suspects = {s: t for s, t in self._suspects.items() if t > now}
        return frozenset(self._suspects)

    def attempt_until(self, until: float, attempt: int | None = None) -> float:
        """When the attempt that begins now ends. attempt: of a request, 0 for its first."""
        now = time.monotonic()
        left = until - now
        share = left / 3 if attempt is None else min(left / 3, ATTEMPT_FIRST * 2 ** min(attempt, 10))
        return now + max(share, min(left, ATTEMPT_MIN))

    def after(self, failures: dict[int, EmbringError], routing: Routing, attempt: int, until: float) -> Steps:
        """Return where a retry may help, after waiting or learning a newer view; else raise."""
        for error in failures.values():
            if not isinstance(error, WrongView | NotApplied | PerhapsApplied):
                yield from self.hopeless(error, routing, until)
                return
        now = time.monotonic()
        # Whoever answers that a push is undecided, since a slot got another primary or that one broke, lives, and
        # knows of a change.
        moved = {
            s for s, e in failures.items() if isinstance(e, WrongView) or (e.answered and type(e) is PerhapsApplied)
        }
        if self.routing.epoch == routing.epoch:
            self._suspects |= dict.fromkeys(failures.keys() - moved, now + SUSPECT_S)
        told = {s: e.epoch for s, e in failures.items() if isinstance(e, WrongView) and e.epoch > routing.epoch}
        if attempt == 0 and not moved and not any(isinstance(e, Overloaded) for e in failures.values()):
            return  # another owner first: to ask around for a newer view could take all the time that is left
        if not all(isinstance(e, Overloaded) for e in failures.values()):
            yield from self.refresh(routing.epoch, until, told, shared=not told)
        if self.routing.epoch == routing.epoch:
            pause = min(PAUSE_MAX, PAUSE_FIRST * 2 ** min(attempt, 10)) * self._random.uniform(0.5, 1.0)
            yield Wait(max(0.0, min(pause, until - time.monotonic())))

    def hopeless(self, error: EmbringError, routing: Routing, until: float) -> Steps:
        """Raise the error, unless it was judged by an old view: a table was made anew since, or slots restored."""
        if isinstance(error, SlotsLost) or type(error) is RequestError:
            yield from self.refresh(routing.epoch, until, {})
            now = self.routing
            before, after = ({name: t.number for name, t in r.tables.items()} for r in (routing, now))
            moved = before != after
            if now.epoch > routing.epoch and (moved or isinstance(error, SlotsLost)) and time.monotonic() < until:
                return
        raise error

    def room(self, began: bool, until: float) -> Steps:
        """Wait until the window has room for a push. began: whether a part of it was sent before."""
        while self.window.full:
            if time.monotonic() >= until:
                error = NotApplied(f"{WINDOW} pushes are undecided, and none was decided in time")
                raise _last_word(error, None, began)
            yield Full(until)

    # -- views

    def _catch_up(self, routing: Routing, server: int) -> Steps:
        """Fetch the newer view that a reply told of, from whoever told, unless one was fetched just now."""
        now = time.monotonic()
        if now >= self._caught_up + CATCH_UP_S and not self._refreshing:
            self._caught_up = now
            yield from self.fetch_view(routing.servers, server, now + CATCH_UP_S)

    def refresh(self, epoch: int, until: float, told: dict[int, int], shared: bool = False) -> Steps:
        """Try to learn a view newer than `epoch`. told: servers that are known to have one. shared: where another
        request tries already, what comes of that will do; many that fail together would else ask one after another.
        It is not waited for for long: the blocking client goes on with a request only when its caller waits for it."""
        waited, patience = self._refreshing, min(until, time.monotonic() + PROBE_S)
        while self._refreshing and self.routing.epoch <= epoch and time.monotonic() < patience:
            yield Wait(PAUSE_FIRST, until)
        if self.routing.epoch > epoch or (waited and shared):
            return
        self._refreshing = True
        servers = self.routing.servers  # those that all numbers here mean: another request may learn a view meanwhile
        try:
            for s in sorted(told, key=lambda s: -told[s]):  # a process that died since tells of views, and gives none
                if (yield from self._fetched(servers, s, epoch, until)):
                    return
            newer, answered = yield from self._newer(servers, epoch, until)
            for s in newer:
                if self.routing.epoch > epoch or (yield from self._fetched(servers, s, epoch, until)):
                    return
            if not answered:  # every process of this view may be gone: who listens at their addresses now?
                seeds = self._seeds()
                for s in range(len(seeds)):
                    if (yield from self._fetched(seeds, s, epoch, until)):
                        return
        finally:
            self._refreshing = False
            self.on_views()

    def _fetched(self, servers: Sequence[Server], s: int, epoch: int, until: float) -> Generator[Command, Any, bool]:
        """Ask one server for its view: whether a view newer than `epoch` is known now."""
        yield from self.fetch_view(servers, s, until)
        return self.routing.epoch > epoch

    def _newer(
        self, servers: Sequence[Server], epoch: int, until: float
    ) -> Generator[Command, Any, tuple[list[int], bool]]:
        """Servers that know a view newer than `epoch`, the newest first; whether any server answered."""
        epochs: dict[int, int] = {}
        suspects = self._left_out()

        def absorb(s: int, reply: Message) -> None:
            epochs[s] = int(reply.fields.get("epoch", 0))

        alive = [s for s, server in enumerate(servers) if server.alive]
        for some in ([s for s in alive if s not in suspects], [s for s in alive if s in suspects]):
            calls = [Call(s, s, "ping", {}, {}) for s in some]
            if calls and not epochs:  # whoever hangs is not waited for while others answer
                yield Ask(servers, calls, absorb, min(self.attempt_until(until), time.monotonic() + PROBE_S))
        return sorted((s for s in epochs if epochs[s] > epoch), key=lambda s: -epochs[s]), bool(epochs)

    def fetch_view(
        self, servers: Sequence[Server], s: int, until: float
    ) -> Generator[Command, Any, EmbringError | None]:
        """Adopt the view of one server; its error where it gave none."""

        def absorb(_: int, reply: Message) -> None:
            view = view_of(reply.fields, reply.arrays)
            if view.epoch == 0:
                raise NotApplied("the server has no view yet: it has just started")
            self.adopt(view)

        failures = yield Ask(servers, [Call(s, s, "view", {}, {})], absorb, self.attempt_until(until))
        return failures.get(s)

    def begin(self, until: float) -> Steps:
        """Learn the view from the first of the given addresses that answers."""
        seeds = self._seeds()
        attempt = 0
        while True:
            error: EmbringError | None = None
            for s in range(len(seeds)):
                error = yield from self.fetch_view(seeds, s, until)
                if error is None:
                    return
                if isinstance(error, RequestError):
                    raise error
            pause = min(PAUSE_MAX, PAUSE_FIRST * 2 ** min(attempt, 10))
            attempt += 1
            if time.monotonic() + pause >= until:
                raise error or NotApplied("no address of a server was given")
            yield Wait(pause)

    def _seeds(self) -> list[Server]:
        """Whoever listens where the cluster was told to be, or at the addresses of the view."""
        known = () if self._routing is None else (a for s in self.routing.servers for a in s.addresses)
        return [Server(address, 0, "", addresses=(address,)) for address in dict.fromkeys((*self._addresses(), *known))]

    def features(self, names: tuple[str, ...], until: float) -> Generator[Command, Any, Features]:
        """The tables of a request; a name that is not known yet may stand in a newer view."""
        try:
            return self.routing.features(names)
        except RequestError:
            yield from self.refresh(self.routing.epoch, until, {})
            return self.routing.features(names)

    # -- administration

    def admin(self, verb: str, fields: dict[str, Any], until: float, done: Callable[[Routing], bool]) -> Steps:
        """Ask the controller through any server, then wait until this client's view shows that it is done."""
        attempt = 0
        while isinstance(error := (yield from self._through_any(verb, fields, attempt, until)), NotApplied):
            yield from self._pause(attempt, until, error)
            attempt += 1
        if error is not None and not isinstance(error, PerhapsApplied):
            raise error
        # Not asked again where no answer came: a table would be emptied twice, or be unknown since it is gone.
        unseen = error or PerhapsApplied(f"{verb} was asked for, and no view shows it yet")
        while not done(self.routing):
            yield from self.refresh(self.routing.epoch, until, {})
            if not done(self.routing):
                yield from self._pause(attempt, until, unseen)
                attempt += 1

    def _through_any(
        self, verb: str, fields: dict[str, Any], attempt: int, until: float
    ) -> Generator[Command, Any, EmbringError | None]:
        """Ask the controller through the first server that answers; what came of it, NotApplied where none does.

        Each must answer a ping first: one that hangs takes a request as any other, and would have all the time.
        """
        servers, suspects = self.routing.servers, self._left_out()
        failed = NotApplied("no server of the view is alive")
        for s in sorted((s for s, server in enumerate(servers) if server.alive), key=suspects.__contains__):
            error = yield from self._call(servers, Call(s, s, "ping", {}, {}), self.attempt_until(until, attempt))
            if error is None:
                error = yield from self._call(servers, Call(s, s, "admin", {"verb": verb, **fields}, {}), until)
                if not isinstance(error, NotApplied):
                    return error
                failed = error
            elif isinstance(error, RequestError):
                return error
            else:
                if self.routing.servers is servers:
                    self._suspects[s] = time.monotonic() + SUSPECT_S
                if not failed.answered:
                    failed = NotApplied(str(error))
        return failed

    def _call(
        self, servers: Sequence[Server], call: Call, until: float
    ) -> Generator[Command, Any, EmbringError | None]:
        """Make one call whose answer says no more than that it succeeded; its error where it did not."""
        failures: dict[int, EmbringError] = yield Ask(servers, [call], lambda key, reply: None, until)
        return failures.get(call.key)

    def _pause(self, attempt: int, until: float, error: EmbringError) -> Steps:
        """Wait before the next attempt, or raise the error where there is no time for one."""
        pause = min(PAUSE_MAX, PAUSE_FIRST * 2 ** min(attempt, 10))
        if time.monotonic() + pause >= until:
            raise error
        yield Wait(pause)
