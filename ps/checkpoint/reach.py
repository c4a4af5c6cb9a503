"""Servers as a save or a restore reaches them: blocking connections with several parts on their way."""

import contextlib
import os
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.view import Server, View
from ps.checkpoint.storage import CheckpointError
from ps.errors import EmbringError, NotApplied, PerhapsApplied, WrongView
from ps.fabric.blocking import BlockingConnection
from ps.fabric.protocol import Hello
from ps.rowblock import RowBlock
from ps.wire import Message, pack_plain, view_of

TIMEOUT_S = 60.0
"""For one part of an export, or one block to be absorbed."""

CONNECT_S = 5.0
"""For one server to answer a handshake, where another one may be asked."""

AHEAD = 4
"""Parts asked for, or blocks sent, before the first of them is answered."""

_PASSED_OVER = (NotApplied, PerhapsApplied, WrongView)
"""Of a server in whose place another one is asked for its view. WrongView: a new process has its old port."""

Ask = Callable[..., Mapping[str, Any]]
"""ask(verb, **fields) of the controller (ps.cluster.controller)."""


@dataclass(frozen=True)
class Access:
    """How to reach the servers: the cluster's token, and what to trust over TCP where they speak TLS."""

    token: str = field(repr=False)
    tls: ssl.SSLContext | None = None


@contextmanager
def connected(server: Server, access: Access, timeout: float = TIMEOUT_S) -> Iterator[BlockingConnection]:
    """A connection to one server, by its Unix socket where that is on this host."""
    local = [a for a in server.addresses if a.startswith("unix:") and os.path.exists(a.removeprefix("unix:"))]
    hello = Hello(access.token, server.incarnation)
    connection = BlockingConnection.connect((local or server.addresses)[0], hello, timeout, access.tls)
    try:
        yield connection
    finally:
        connection.close()


def call(connection: BlockingConnection, op: str, fields: dict[str, Any], arrays: dict[str, Any]) -> Message:
    """One request and its reply."""
    return connection.receive(connection.send(op, fields, arrays, TIMEOUT_S), TIMEOUT_S)


def newest_view(servers: Sequence[Server], access: Access) -> View:
    """The newest view that any of these servers has. Raises NotApplied where none answers."""
    newest: View | None = None
    for server in servers:
        if not server.alive or not server.addresses:
            continue
        with contextlib.suppress(*_PASSED_OVER), connected(server, access, CONNECT_S) as connection:
            reply = call(connection, "view", {}, {})
            if newest is None or int(reply.fields["view_epoch"]) > newest.epoch:
                newest = view_of(reply.fields, reply.arrays)
    if newest is None:
        raise NotApplied("no server of the cluster answers")
    return newest


@contextmanager
def controller_through(servers: Sequence[Server], access: Access) -> Iterator[Ask]:
    """`ask(verb, **fields)` of the controller, through the first of these servers that answers."""

    def ask(verb: str, **fields: Any) -> Mapping[str, Any]:
        failed: EmbringError = NotApplied("no server of the cluster is known")
        for server in servers:
            try:
                with connected(server, access, CONNECT_S) as connection:
                    return call(connection, "admin", {"verb": verb}, {"fields": pack_plain(fields)}).fields
            except (NotApplied, WrongView) as error:
                failed = error
        raise failed

    yield ask


def exported(
    connection: BlockingConnection, slots: NDArray[np.int64], view: View, since: NDArray[np.int64] | None
) -> Iterator[RowBlock]:
    """The blocks of an export, in order, some parts asked for ahead. since int64[k]: a position of each slot."""
    fields, arrays = {"epoch": view.epoch}, {"slots": slots}
    if since is not None:
        fields, arrays = {**fields, "cluster": view.cluster}, {**arrays, "positions": since}
    reply = call(connection, "export", fields, arrays)
    part, asked = 1, deque[int]()
    while reply.fields["more"]:
        while len(asked) < AHEAD:
            following = {"cursor": reply.fields["cursor"], "part": part}
            asked.append(connection.send("export", following, {}, TIMEOUT_S))
            part += 1
        yield RowBlock.from_arrays(reply.fields["block"], reply.arrays)
        reply = connection.receive(asked.popleft(), TIMEOUT_S)
    for number in asked:  # asked for beyond the end
        with contextlib.suppress(NotApplied):
            connection.receive(number, TIMEOUT_S)


class Absorber:
    """Sends blocks to one server, some before the first was answered. term: of the slots while they are restored.
    foreign: whether positions are of another cluster, or of other slots."""

    def __init__(self, connection: BlockingConnection, name: str, term: int, foreign: bool) -> None:
        self._connection, self._name, self._term, self._foreign = connection, name, term, foreign
        self._sent: deque[tuple[int, RowBlock]] = deque()

    def send(self, block: RowBlock) -> None:
        """Send a block, behind those before it. Raises CheckpointError where an earlier one was not taken."""
        while len(self._sent) >= AHEAD:
            self._settle()
        fields, arrays = block.to_arrays()
        fields = {"block": fields, "term": self._term, "epoch": self._term, "foreign": self._foreign}
        self._sent.append((self._connection.send("absorb", fields, arrays, TIMEOUT_S), block))

    def finish(self) -> None:
        """Wait until all are taken."""
        while self._sent:
            self._settle()

    def _settle(self) -> None:
        number, block = self._sent.popleft()
        reply = self._connection.receive(number, TIMEOUT_S)
        taken, epoch = reply.arrays["taken"].astype(bool), int(reply.fields["epoch"])
        if not taken.all():
            why = f"its view of epoch {epoch} has it in another term than the restore, {self._term}: restore again"
            if epoch < self._term:
                why = (
                    f"its view is of epoch {epoch}, and it has not taken that of the restore, {self._term}: see its log"
                )
            raise CheckpointError(f"server {self._name} did not take slot {int(block.slots[~taken][0])}: {why}")


class Counter:
    """What the threads of long work add up, and whoever shows it reads; thread-safe.

    rows, bytes: moved. done of total: how far the work is, in a unit of its own (total 0: not known yet).
    """

    def __init__(self, show: Callable[["Counter"], None] = lambda counter: None) -> None:
        self.rows = self.bytes = self.done = self.total = 0
        self._show = show
        self._lock = threading.Lock()

    def expect(self, total: int) -> None:
        """Say how much there is to do."""
        self.total = total
        self._show(self)

    def add(self, rows: int, size: int, done: int) -> None:
        """Say what was done since the last call."""
        with self._lock:
            self.rows += rows
            self.bytes += size
            self.done += done
            self._show(self)
