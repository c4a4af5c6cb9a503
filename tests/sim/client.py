"""A client of the simulation: the real verbs, whose calls travel as frames through the simulated network."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hashring.view import Server as ServerEntry
from ps.client.core import Ask, Full, Steps, Wait
from ps.client.verbs import Verbs
from ps.errors import EmbringError, NotApplied, PerhapsApplied, WrongView
from ps.wire import Message, raise_error
from tests.sim.network import Connection
from tests.sim.process import Process, frame, unframe

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

PUSH_S = 60.0
"""Virtual seconds that a push is tried for."""


class Attempt:
    """The calls of one Ask."""

    def __init__(self, flight: "Flight", ask: Ask) -> None:
        self.flight, self.ask = flight, ask
        self.failures: dict[int, EmbringError] = {}
        self.left = {call.key for call in ask.calls}
        self.over = False

    def reply(self, key: int, message: Message | EmbringError) -> None:
        if self.over or key not in self.left:
            return
        self.left.discard(key)
        try:
            if isinstance(message, EmbringError):
                raise message
            if message.op == "error":
                raise_error(message.fields)
            self.ask.absorb(key, message)
        except EmbringError as error:
            self.failures[key] = error
        if not self.left:
            self.end()

    def end(self) -> None:
        if self.over:
            return
        self.over = True
        for key in sorted(self.left):
            self.failures[key] = PerhapsApplied("no answer came in time")
        self.flight.resume(self.failures)


class Flight:
    """A verb on its way."""

    def __init__(self, client: "Client", steps: Steps, done: Callable[[Any, EmbringError | None], None]) -> None:
        self.client, self.steps, self.done = client, steps, done
        self.resume(None)

    def resume(self, outcome: Any) -> None:
        if not self.client.alive:
            return
        try:
            command = self.steps.send(outcome)
        except StopIteration as stop:
            self.done(stop.value, None)
            return
        except EmbringError as error:
            self.done(None, error)
            return
        world = self.client.world
        if isinstance(command, Ask):
            attempt = Attempt(self, command)
            for call in command.calls:
                self.client.call(command.servers[call.server], call, attempt)
            world.at(command.until - world.now, attempt.end)
        elif isinstance(command, Wait):
            world.at(command.seconds, self.resume, None)
        elif isinstance(command, Full):
            self.client.waiting.append(self)


class ImpatientVerbs(Verbs):
    """Verbs whose attempts are short now and then: retries overtake what they repeat."""

    world: Any = None
    attempt_s = 30.0

    def attempt_until(self, until: float, attempt: int | None = None) -> float:
        """When the attempt that begins now ends."""
        longest = super().attempt_until(until, attempt)
        if self.world.chance(0.7):
            return longest
        return float(min(longest, self.world.now + self.world.between(0.1, 1.0) * self.attempt_s))


class Client(Process):
    """One client process."""

    def __init__(self, cluster: "Cluster", name: str) -> None:
        super().__init__(cluster, name)
        self.verbs = ImpatientVerbs([s.name for s in cluster.log.newest.servers])
        self.verbs.world, self.verbs.attempt_s = self.world, cluster.world.rng.choice((0.05, 0.3, 3.0))
        self.verbs.window.client = cluster.world.rng.getrandbits(63) | 1
        self.verbs.window.on_close = self._room
        self.verbs._random = random.Random(cluster.world.rng.getrandbits(32))
        self.verbs.adopt(cluster.log.newest)
        self.waiting: list[Flight] = []
        self.undecided = 0
        self._connections: dict[tuple[str, int], Connection] = {}
        self._numbers = 0
        self._calls: dict[tuple[Connection, int], tuple[Attempt, int]] = {}

    def knows(self, table: int) -> bool:
        """Whether this client's view has a table."""
        return any(t.number == table for t in self.verbs.routing.tables.values())

    def _room(self) -> None:
        if self.waiting:
            flight = self.waiting.pop(0)
            self.world.at(0.0, flight.resume, None)

    def push(self, table: str, ids: np.ndarray, rows: np.ndarray | None, kind: str, done: Any) -> None:
        """Begin a push; done(error) is called at its end."""
        self.undecided += 1

        def ended(_: Any, error: EmbringError | None) -> None:
            self.undecided -= 1
            done(error)

        seconds = 8.0 if self.cluster.forgetful else PUSH_S
        Flight(self, self.verbs.push(table, ids, rows, kind, 1.0, seconds), ended)  # type: ignore[arg-type]

    def pull(self, table: str, ids: np.ndarray, done: Any) -> None:
        Flight(self, self.verbs.pull(table, ids, None, 5.0), done)

    def call(self, server: ServerEntry, call: Any, attempt: Attempt) -> None:
        """Send one call; who cannot be reached says so a little later."""
        world = self.world
        key = (server.name, server.incarnation)
        connection = self._connections.get(key)
        if connection is None or not connection.open:
            try:
                target = self.cluster.reach(server.name, server.incarnation)
            except (WrongView, NotApplied) as error:
                world.at(world.between(0.0, 0.002), attempt.reply, call.key, error)
                return
            connection = self._connections[key] = self.cluster.network.connect(self, target)
        self._numbers += 1
        self._calls[(connection, self._numbers)] = (attempt, call.key)
        data = frame(Message(call.op, self._numbers, {**call.fields, "deadline_ms": 1000}, call.arrays))
        connection.send(self, data)
        if call.op == "push" and self.cluster.faults.duplicates and world.chance(self.cluster.faults.duplicates):
            world.counts["duplicate"] += 1
            again = self.cluster.network.connect(self, connection.called)
            world.at(world.between(0.0, 2.0), again.send, self, data)

    def message(self, connection: Connection, data: bytes) -> None:
        reply = unframe(data)
        found = self._calls.pop((connection, reply.request), None)
        if found is not None:
            found[0].reply(found[1], reply)

    def disconnected(self, connection: Connection) -> None:
        for key in [key for key in self._calls if key[0] is connection]:
            attempt, call = self._calls.pop(key)
            attempt.reply(call, PerhapsApplied("the connection broke"))
