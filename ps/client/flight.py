"""The blocking shell: connections, and a verb that is driven over them."""

import os
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

from hashring.view import Server
from ps.client.core import Ask, Command, Core, Full, Steps, Wait, given_up
from ps.client.request import Call
from ps.errors import EmbringError, NotApplied, PerhapsApplied
from ps.fabric.address import pick
from ps.fabric.blocking import BlockingConnection, wait_for_any
from ps.fabric.protocol import Hello

GRACE_S = 0.05
"""A reply that is already here is read even where its deadline passed while nobody asked for it."""


SPIN_S = 0.0002
"""How long a single server is waited for awake. To be woken takes some 40 us on a virtual machine, as much as a small
pull; whoever else wants this core gets it at once (sched_yield). With more servers than one the core is theirs."""

Sent = tuple[int, BlockingConnection, int]
"""Key of a call, its connection, the number of its request there."""


class Connections:
    """One connection for each server, made when it is first needed."""

    def __init__(self, token: str, tls: ssl.SSLContext | None, core: Core) -> None:
        self._token = token
        self._tls = tls
        self._client = core.window.client
        self._traffic = core.counters.traffic
        core.on_adopt = self._keep
        self._open: dict[tuple[str, int], BlockingConnection] = {}

    def known(self, server: Server) -> bool:
        """Whether there is a connection to a server already."""
        found = self._open.get((server.name, server.incarnation))
        return found is not None and not found.closed

    def of(self, server: Server, until: float) -> BlockingConnection:
        """The connection to a server; NotApplied where none of its addresses answers."""
        key = (server.name, server.incarnation)
        found = self._open.get(key)
        if found is None or found.closed:
            found = self._open[key] = self._connect(server, until)
        return found

    def _connect(self, server: Server, until: float) -> BlockingConnection:
        hello = Hello(self._token, server.incarnation, client=self._client)
        failed: EmbringError = NotApplied(f"server {server.name!r} could not be reached in time")
        for address in pick(server.addresses):
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                return BlockingConnection.connect(address, hello, left, self._tls, traffic=self._traffic)
            except NotApplied as error:
                failed = error
        raise failed

    def send(self, server: Server, call: Call, until: float) -> tuple[BlockingConnection, int]:
        """Send, over a new connection if the old one turns out to be closed: (connection, number of the request)."""
        connection = self.of(server, until)
        try:
            return self._send(connection, call, until)
        except NotApplied:
            if not connection.closed or time.monotonic() >= until:
                raise
        return self._send(self.of(server, until), call, until)

    def _send(self, connection: BlockingConnection, call: Call, until: float) -> tuple[BlockingConnection, int]:
        try:
            left = max(0.001, until - time.monotonic())
            return connection, connection.send(call.op, call.fields, call.arrays, left)
        except EmbringError:
            raise
        except BaseException:  # an interrupt: half a frame may have left, which the next one must not complete
            connection.close()
            raise

    def _keep(self, servers: Sequence[Server]) -> None:
        """Close what leads to incarnations that the newest view does not name: those own nothing."""
        for key in self._open.keys() - {(server.name, server.incarnation) for server in servers}:
            self._open.pop(key).close()

    def close(self) -> None:
        """Close all."""
        for connection in self._open.values():
            connection.close()
        self._open.clear()


class Flight:
    """A verb on its way: its generator, and the calls whose replies are awaited."""

    def __init__(self, connections: Connections, wait_for_room: Callable[[], None], steps: Steps) -> None:
        self._connections = connections
        self._wait_for_room = wait_for_room
        self._steps = steps
        self._ask: Ask | None = None
        self._sent: list[Sent] = []
        self._failures: dict[int, EmbringError] = {}
        self._begun = time.monotonic()
        self.done = False
        self.waits = False  # for room in the window, where it has no place itself: nobody waits for it meanwhile
        self.value: Any = None
        self.error: EmbringError | None = None

    def start(self) -> None:
        """Go as far as the first calls, and send them."""
        try:
            self._resume(None)
        except BaseException as error:
            self._broken_off(error)
            raise

    def finish(self) -> None:
        """Receive, and go on until the verb is done."""
        try:
            while not self.done:
                self._resume(self._receive())
        except BaseException as error:
            self._broken_off(error)
            raise

    def abandon(self) -> None:
        """Nobody will finish this: replies are dropped when they come."""
        for _, connection, number in self._sent:
            connection.forget(number)
        self.done = True

    def _broken_off(self, error: BaseException) -> None:
        """An interrupt (Control-C) ends the verb here and now: interpreters keep the traceback, and with it the
        generator, whose sequence would stay undecided for ever."""
        self.done, self.error = True, PerhapsApplied(f"this was broken off by {type(error).__name__}")
        for _, connection, _ in self._sent:  # the beginning of a reply may be lost: what follows could not be read
            connection.close()
        self._steps.close()

    def goes_by(self, connections: Connections) -> bool:
        """Whether these are its connections: after a fork the child has others."""
        return self._connections is connections

    def _resume(self, outcome: Any) -> None:
        while not self.done:
            try:
                command: Command = self._steps.send(outcome)
            except StopIteration as stop:
                self.done, self.value = True, stop.value
                return
            except EmbringError as error:
                self.done, self.error = True, error
                given_up(error, self._begun)
                return
            if isinstance(command, Ask):
                self._send(command)
                return
            outcome = None
            if isinstance(command, Wait):
                time.sleep(command.seconds)
            elif isinstance(command, Full):
                self.waits = True
                self._wait_for_room()
                self.waits = False

    def _send(self, ask: Ask) -> None:
        self._ask, self._sent, self._failures = ask, [], {}
        strangers = []
        for call in ask.calls:
            if self._connections.known(ask.servers[call.server]):
                self._send_one(ask, call)
            else:
                strangers.append(call)
        for k, call in enumerate(strangers):  # of whom one that hangs leaves time for the others
            now = time.monotonic()
            self._send_one(ask, call, now + (ask.until - now) / (len(strangers) - k))

    def _send_one(self, ask: Ask, call: Call, connect_until: float = 0.0) -> None:
        """Send a call. connect_until: how long a connection may take, where there is none."""
        server = ask.servers[call.server]
        try:
            if connect_until:
                self._connections.of(server, connect_until)
            self._sent.append((call.key, *self._connections.send(server, call, ask.until)))
        except EmbringError as error:
            self._failures[call.key] = error

    def _receive(self) -> dict[int, EmbringError]:
        """Take the replies as they come, the first first: merging goes on while other servers still work."""
        ask, failures = self._ask, self._failures
        assert ask is not None
        waiting = self._sent
        begun = time.monotonic()
        until = max(ask.until, begun + GRACE_S)
        while waiting:
            still = []
            for sent in waiting:
                key, connection, number = sent
                try:
                    if connection.arrived(number):
                        ask.absorb(key, connection.receive(number, 0.0))
                    else:
                        still.append(sent)
                except EmbringError as error:
                    failures[key] = error
            if len(still) == len(waiting) and not _wait(still, begun, until):
                for key, connection, number in still:
                    failures[key] = connection.give_up(number, time.monotonic() - begun)
                break
            waiting = still
        return failures


def _wait(waiting: Sequence[Sent], begun: float, until: float) -> bool:
    """Wait until something may have come; False at the deadline."""
    if len(waiting) == 1 and time.monotonic() - begun < SPIN_S:
        os.sched_yield()
        return True
    return wait_for_any([connection for _, connection, _ in waiting], until)
