"""The client's shell over an asyncio (or uvloop) transport, for the router and for servers calling one another."""

import asyncio
import os
import ssl
import weakref
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, cast

from numpy.typing import NDArray

from ps.errors import EmbringError, NobodyListens, NotApplied, PerhapsApplied
from ps.fabric.address import parse_address, pick, widen
from ps.fabric.protocol import ClientSession, Hello, Traffic, Welcome, result_of
from ps.fabric.tls import refusal, unwelcome
from ps.wire import LIMITS, Buffer, FrameLimits, Message

PING_S = 10.0
"""A connection with nothing to say pings this often: servers close silent ones after 30 s."""

LOOK_S = 0.005
"""Seconds for a loop that was busy to read what has come."""

_open: "weakref.WeakSet[AsyncConnection]" = weakref.WeakSet()


class AsyncConnection(asyncio.BufferedProtocol):
    """One authenticated connection to one server, for tasks of one loop; make it with `connect`."""

    def __init__(self, address: str, session: ClientSession) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._session = session
        self._hello = session.hello()
        self._transport: asyncio.Transport | None = None
        self._welcomed: asyncio.Future[None] = self._loop.create_future()
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._why = "was closed"
        self.on_reply: Callable[[Message], None] | None = None
        self.on_lost: Callable[[], None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._spoke = 0.0
        self._ping: asyncio.TimerHandle | None = None
        _open.add(self)

    @classmethod
    async def connect(
        cls,
        address: str,
        hello: Hello,
        timeout: float,
        tls: ssl.SSLContext | None = None,
        limits: FrameLimits = LIMITS,
        traffic: Traffic | None = None,
    ) -> "AsyncConnection":
        """Connect and shake hands within `timeout` seconds.

        tls: for TCP; a Unix socket stays plain. traffic: where frames and bytes are counted, beside those of other
        connections. Raises NotApplied where nobody answers in time, AuthError, WrongView or RequestError where the
        server refuses, ConfigError where one of both speaks TLS and the other does not.
        """
        where = parse_address(address)
        connection = cls(address, ClientSession(hello, limits, traffic))
        loop = connection._loop
        try:
            async with asyncio.timeout(timeout):
                if where.path:
                    await loop.create_unix_connection(lambda: connection, where.path)
                else:
                    await loop.create_connection(lambda: connection, where.host, where.port, ssl=tls)
                await connection._welcomed
        except TimeoutError:
            connection.close()
            raise NotApplied(f"{address} did not answer the handshake within {timeout:g} s") from None
        except PerhapsApplied as error:
            if tls is not None:
                raise NotApplied(str(error)) from None
            raise await asyncio.to_thread(unwelcome, address, where, timeout, error) from None
        except OSError as error:
            raise refusal(address, error) from None
        return connection

    @property
    def welcome(self) -> Welcome:
        """What the server said of itself in the handshake."""
        assert self._session.welcome is not None
        return self._session.welcome

    @property
    def closed(self) -> bool:
        """Whether the connection was closed or has broken: make another."""
        return self._transport is None or self._transport.is_closing()

    async def request(
        self, op: str, fields: Mapping[str, Any], arrays: dict[str, NDArray[Any]] | None = None, timeout: float = 10.0
    ) -> Message:
        """The reply to a request, within `timeout` seconds.

        The arrays are not copied: leave them alone until this returns or raises. Raises the error that the reply
        carries; NotApplied where the request was not sent; PerhapsApplied where no answer came.
        """
        until = monotonic() + timeout
        if not self._writable.is_set():
            await self._writing(timeout)
        if self.closed:
            raise NotApplied(f"the connection to {self.address} {self._why}")
        number, frame = self._session.request(op, fields, arrays or {}, max(1, int(timeout * 1000)))
        answer = self._waiting[number] = self._loop.create_future()
        self._write(frame)
        timer = self._loop.call_later(timeout, self._expire, number, timeout, until)
        try:
            return result_of(await answer)
        except (asyncio.CancelledError, PerhapsApplied):
            self._session.forget(number)
            self._unsent(frame)
            raise
        finally:
            timer.cancel()
            self._waiting.pop(number, None)

    def post(self, op: str, fields: Mapping[str, Any], arrays: dict[str, NDArray[Any]], deadline_ms: int) -> int:
        """Send a request in the order of these calls, however much waits to be sent; its number.

        Its reply, an error or not, goes to `on_reply`; the end of the connection to `on_lost`. The arrays are not
        copied: leave them alone. Raises NotApplied where the connection is closed, FrameError beyond a limit.
        """
        if self.closed:
            raise NotApplied(f"the connection to {self.address} {self._why}")
        number, frame = self._session.request(op, fields, arrays, deadline_ms)
        self._write(frame)
        return number

    def close(self) -> None:
        """Close the connection; whoever still waits for a reply meets PerhapsApplied."""
        if self._transport is not None:
            self._transport.abort()

    async def _writing(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._writable.wait()
        except TimeoutError:
            raise NotApplied(f"the connection to {self.address} took nothing for {timeout:g} s") from None

    def _write(self, frame: list[Buffer]) -> None:
        assert self._transport is not None
        self._spoke = self._loop.time()
        if len(frame) == 1:
            self._transport.write(frame[0])
        else:
            self._transport.writelines(frame)

    def _unsent(self, frame: list[Buffer]) -> None:
        """The caller may now change arrays that the transport still has to send: rather no frame than a wrong one."""
        if len(frame) > 1 and self._transport is not None and self._transport.get_write_buffer_size():
            self._transport.abort()

    def _expire(self, number: int, timeout: float, until: float | None) -> None:
        """No answer in time; or none that was looked at yet: a loop that was busy runs its timers before it reads what
        has come meanwhile. Such a reply would be called late, and asked for again, by whoever has too much to do
        already. until: None once the loop has had its look.
        """
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return
        if until is not None and monotonic() - until > LOOK_S:
            self._loop.call_later(LOOK_S, self._expire, number, timeout, None)
        else:
            answer.set_exception(PerhapsApplied(f"{self.address} did not answer within {timeout:g} s"))

    def _keep(self) -> None:
        """Ping where nothing was said for a while."""
        if self.closed:
            return
        if self._loop.time() - self._spoke >= PING_S:
            number, frame = self._session.request("ping", {}, {}, 1000)
            self._session.forget(number)
            self._write(frame)
        self._ping = self._loop.call_later(PING_S / 2, self._keep)

    def _fail(self, error: EmbringError) -> None:
        if not self._welcomed.done():
            self._welcomed.set_exception(error)
            # Read at once: where connect() has given up already, nobody else will.
            self._welcomed.exception()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(PerhapsApplied(str(error)))

    # -- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        # uvloop's transports do not derive from asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)
        widen(transport.get_extra_info("socket"))
        self._write(self._hello)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the session wants the next bytes: big bodies are received in place."""
        return self._session.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Hand replies to those who wait for them."""
        try:
            replies = self._session.received(nbytes)
        except EmbringError as error:
            self._why = f"was given up: {error}"
            self._fail(error)
            self.close()
            return
        if not self._welcomed.done() and self._session.welcome is not None:
            self._welcomed.set_result(None)
            self._keep()
        for reply in replies:
            answer = self._waiting.get(reply.request)
            if answer is None:
                if self.on_reply is not None:
                    self.on_reply(reply)
            elif not answer.done():
                answer.set_result(reply)

    def pause_writing(self) -> None:
        """The transport holds enough: later requests wait."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The transport takes more."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits learns that the connection broke."""
        if exc is not None:
            self._why = f"broke: {exc}"
        self._writable.set()
        if self._ping is not None:
            self._ping.cancel()
        self._fail(PerhapsApplied(f"the connection to {self.address} {self._why}"))
        self._transport = None
        if self.on_lost is not None:
            self.on_lost()


async def dial(addresses: Sequence[str], hello: Hello, timeout: float, tls: ssl.SSLContext | None) -> AsyncConnection:
    """A connection to a server by the first of its addresses that answers, each within `timeout` seconds.

    Raises what the last one met; NotApplied where none can be reached from here, NobodyListens only where all refuse.
    """
    met: list[EmbringError] = []
    for address in pick(addresses):
        try:
            return await AsyncConnection.connect(address, hello, timeout, tls)
        except EmbringError as error:
            met.append(error)
    if not met:
        raise NotApplied(f"incarnation {hello.incarnation} has no address that can be reached from here")
    if isinstance(met[-1], NobodyListens) and not all(isinstance(error, NobodyListens) for error in met):
        raise NotApplied(str(met[-1]))
    raise met[-1]


def _after_fork() -> None:
    # The child has no loop that could use or close these; it only must not write into the parent's stream.
    for connection in list(_open):
        connection._why = "belongs to the parent process"
        connection._transport = None


os.register_at_fork(after_in_child=_after_fork)
