"""The connections on which a server speaks to other servers: what `Replication` asks for, carried out on the loop.

One connection for each peer and direction, which keeps the order of what is sent on it. A connection that broke is
never mended: the machine is told, and asks for the next one by a higher number.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from hashring.view import View
from ps.config import Config
from ps.errors import EmbringError
from ps.fabric.aio import AsyncConnection, dial
from ps.fabric.protocol import Hello
from ps.fabric.tls import trusting
from ps.replication import Forward, Replication, Send, SendView
from ps.wire import Message, push_message, raise_error, view_message, view_of

CONNECT_S = 2.0
"""Seconds in which another server must answer the handshake."""

DEADLINE_MS = 600_000
"""Deadline of a request to another server: none that matters, since silence is judged by the machine."""

FORWARD_MS = 5_000
"""Of a push that is handed on, whose client asks again about as soon: it keeps a place in the other server's queue."""

GONE_S = 1.0
"""Seconds for which a connection outlives the view that names its server no more: that view is on its way there."""

ToPeer = Send | SendView | Forward


@dataclass(slots=True)
class _Wire:
    """One connection to a peer, by its number; what is to be sent while it is being made."""

    number: int
    connection: AsyncConnection | None = None
    waiting: list[ToPeer] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    lost: bool = False


class Peers:
    """Carries out `Send`, `SendView` and `Forward`; everything runs on the data thread.

    acted: called after the machine was told of something, to carry out what it asks for then.
    """

    def __init__(self, machine: Replication, config: Config, token: str, acted: Callable[[], None]) -> None:
        self._machine = machine
        self._config = config
        self._token = token
        self._tls = trusting(config.tls.trusted)
        self._acted = acted
        self._wires: dict[int, _Wire] = {}
        self._keeper: asyncio.TimerHandle | None = None

    def send(self, action: ToPeer, view: View) -> None:
        """Send an action on its connection, which is made where its number is new."""
        wire = self._wires.get(action.peer)
        if wire is None or wire.number < action.link:
            if wire is not None:
                self._close(wire)
            wire = self._wires[action.peer] = _Wire(action.link)
            loop = asyncio.get_running_loop()
            wire.task = loop.create_task(self._connect(action.peer, wire, view))
        if wire.number > action.link or wire.lost:
            return  # of a connection that is gone already: the machine knows, or is about to be told
        if wire.connection is None:
            wire.waiting.append(action)
        else:
            self._write(action.peer, wire, action)

    def keep_soon(self, view: Callable[[], View]) -> None:
        """Close the connections to servers that the view does not name, a moment from now."""
        if self._keeper is None and self._wires:
            self._keeper = asyncio.get_running_loop().call_later(GONE_S, lambda: self._keep(view()))

    def _keep(self, view: View) -> None:
        self._keeper = None
        for peer in self._wires.keys() - {server.incarnation for server in view.servers}:
            self._close(self._wires.pop(peer))

    def close(self) -> None:
        """Close every connection."""
        if self._keeper is not None:
            self._keeper.cancel()
        for wire in self._wires.values():
            self._close(wire)
        self._wires.clear()

    def _close(self, wire: _Wire) -> None:
        if wire.task is not None:
            wire.task.cancel()
        if wire.connection is not None:
            wire.connection.close()

    async def _connect(self, peer: int, wire: _Wire, view: View) -> None:
        try:
            wire.connection = await self._dial(peer, view)
        except EmbringError:
            self._broken(peer, wire)
            return
        wire.connection.on_reply = lambda reply: self._replied(peer, wire, reply)
        wire.connection.on_lost = lambda: self._broken(peer, wire)
        waiting, wire.waiting = wire.waiting, []
        for action in waiting:
            self._write(peer, wire, action)

    async def _dial(self, peer: int, view: View) -> AsyncConnection:
        server = next((s for s in view.servers if s.incarnation == peer), None)
        hello = Hello(self._token, peer, self._config.fingerprint)
        return await dial(server.addresses if server else (), hello, CONNECT_S, self._tls)

    def _write(self, peer: int, wire: _Wire, action: ToPeer) -> None:
        assert wire.connection is not None
        deadline_ms = DEADLINE_MS
        if isinstance(action, Send):
            op, fields, arrays = action.op, action.fields, action.arrays
        elif isinstance(action, SendView):
            op, (fields, arrays) = "install", view_message(action.view)
        else:
            op, (fields, arrays) = "push", push_message(action.share)
            fields |= {"acks": action.acks, "at": action.at}
            arrays |= {"only": action.only}
            deadline_ms = FORWARD_MS
        try:
            wire.asked[wire.connection.post(op, fields, arrays, deadline_ms)] = action.number
        except EmbringError:
            self._broken(peer, wire)

    def _replied(self, peer: int, wire: _Wire, reply: Message) -> None:
        number = wire.asked.pop(reply.request, None)
        if number is None:
            return
        error: EmbringError | None = None
        view: View | None = None
        try:
            if reply.op == "error":
                raise_error(reply.fields)
            if "view" in reply.arrays:
                view = view_of(reply.fields, reply.arrays)
        except EmbringError as caught:
            error = caught
        self._machine.replied(peer, wire.number, number, reply.fields, reply.arrays, error, view)
        self._acted()

    def _broken(self, peer: int, wire: _Wire) -> None:
        """Tell the machine, once; not from inside of what it asked for."""
        if self._wires.get(peer) is wire and not wire.lost:
            wire.lost = True
            wire.waiting = []
            if wire.connection is not None:
                wire.connection.close()
            asyncio.get_running_loop().call_soon(self._tell_broken, peer, wire.number)

    def _tell_broken(self, peer: int, number: int) -> None:
        self._machine.broken(peer, number)
        self._acted()
