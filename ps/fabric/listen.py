"""The server's shell: connections of a loop in, requests to a handler, replies out.

Requests wait in one bounded queue, first come first served, and are handled on the loop's own thread in short turns,
so that reading goes on meanwhile: only then is it known what waits, what has expired and when to say Overloaded.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import socket
import ssl
import stat
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any, cast

from numpy.typing import NDArray

from ps.errors import ConfigError, EmbringError, NotApplied, Overloaded, PerhapsApplied, RequestError
from ps.fabric.address import Address, parse_address, widen
from ps.fabric.protocol import ServerSession, Traffic, Welcome
from ps.wire import LIMITS, Buffer, FrameLimits, Message, error_fields

log = logging.getLogger(__name__)

Result = tuple[dict[str, Any], dict[str, NDArray[Any]]]
"""Fields and arrays of a reply. The arrays are not copied: the handler must not touch them again."""

Handler = Callable[[Message, float], Result | Coroutine[Any, Any, Result]]
"""(request, seconds that it waited in the queue) -> result, at once or later; errors of ps.errors become replies."""

DEADLINE_MS = 60_000
"""Deadline of a request that names none, and the longest that one may name is a thousand times this."""

GIVE_UP_S = 0.25
"""Seconds between two looks for requests that are still being handled at their deadline."""


@dataclass(frozen=True, slots=True)
class ListenLimits:
    """What one server takes on.

    connections_max: open at once; further ones are closed at once.
    requests_max, bytes_max: requests in the queue or being handled, and bytes of their arrays. More lets a burst wait
        instead of meeting Overloaded; less answers sooner and holds less memory.
    unread_max: bytes of replies that one client may leave unread before it is cut off.
    handshake_s, silent_s: seconds for the handshake; seconds without a byte, or inside one frame, before a connection
        is closed.
    turn_s: seconds of handling before the loop looks at its sockets again.
    """

    connections_max: int = 4096
    requests_max: int = 1024
    bytes_max: int = 512 * 1024 * 1024
    unread_max: int = 512 * 1024 * 1024
    handshake_s: float = 5.0
    silent_s: float = 30.0
    turn_s: float = 0.002


@dataclass(frozen=True, slots=True)
class ListenStatistics:
    """Counts since the start, but for `connections` and `waiting`, which are of now.

    frames_ and bytes_: of all connections, see `Traffic`.
    """

    connections: int = 0
    waiting: int = 0
    accepted: int = 0
    closed_silent: int = 0
    requests: int = 0
    expired: int = 0
    overloaded: int = 0
    malformed: int = 0
    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0


class Listener:
    """Serves one handler on any number of addresses; all of it runs on the loop that calls `start`."""

    def __init__(
        self,
        handler: Handler,
        token: str,
        welcome: Callable[[], Welcome],
        frame_limits: FrameLimits = LIMITS,
        limits: ListenLimits | None = None,
        first: Collection[str] = (),
    ) -> None:
        """first: operations by which the cluster itself goes on. They have as much room again where the queue is full,
        for it may be full of requests that wait for just what these bring."""
        self.limits = limits or ListenLimits()
        self.frame_limits = frame_limits
        self.token = token
        self.welcome = welcome
        self.connections: set[_Connection] = set()
        self.counts = dict.fromkeys(ListenStatistics.__dataclass_fields__, 0)
        self.traffic = Traffic()
        self._handler = handler
        self._first = first
        self._queue: deque[tuple[_Connection, Message, float, float]] = deque()
        self._turning = False
        self._held = 0
        self._held_bytes = 0
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._tasks: dict[asyncio.Task[None], tuple[_Connection, float]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._giver: asyncio.TimerHandle | None = None

    # -- begin and end

    async def start(self, addresses: Sequence[str], tls: ssl.SSLContext | None = None) -> tuple[str, ...]:
        """Listen, on TCP with TLS where it is given; the addresses with the ports that were taken.

        Raises ConfigError for an address that is none, is taken, or can be reached from other machines while there
        is no token.
        """
        self._loop = asyncio.get_running_loop()
        wanted = [parse_address(given) for given in addresses]
        for where in wanted:
            if not where.local and not self.token:
                raise ConfigError(f"{where} can be reached from other machines; listening there needs a token")
        try:
            taken = [await self._listen(where, tls) for where in wanted]
        except OSError as error:
            await self.close()
            raise ConfigError(f"cannot listen on {', '.join(map(str, wanted))}: {error}") from None
        self._sweep()
        self._give_up()
        return tuple(taken)

    async def _listen(self, where: Address, tls: ssl.SSLContext | None) -> str:
        make = lambda: _Connection(self)  # noqa: E731 - a factory of one expression
        if where.path:
            self._servers.append(await self._loop.create_unix_server(make, sock=_unix_socket(where.path)))
            self._paths.append(where.path)
            return str(where)
        server = await self._loop.create_server(make, where.host, where.port, ssl=tls, backlog=1024)
        self._servers.append(server)
        return str(replace(where, port=server.sockets[0].getsockname()[1]))

    async def close(self) -> None:
        """Stop listening, let what is being handled end (nothing new begins), and close every connection."""
        for server in self._servers:
            server.close()
        for timer in (self._sweeper, self._giver):
            if timer is not None:
                timer.cancel()
        while self._queue:
            connection, request, _, _ = self._queue.popleft()
            self._release(request)
            connection.reply(request, NotApplied("the server is closing"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self.connections):
            connection.close()
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def statistics(self) -> ListenStatistics:
        """What happened so far."""
        now = {"connections": len(self.connections), "waiting": self._held, **asdict(self.traffic)}
        return ListenStatistics(**{**self.counts, **now})

    # -- requests

    def take(self, connection: "_Connection", request: Message, now: float) -> None:
        """Queue a request, or refuse it because too much waits already."""
        given = request.fields.get("deadline_ms", DEADLINE_MS)
        if type(given) is not int or given < 0:
            wrong = RequestError(f"deadline_ms is {str(given)[:40]}; it must be a whole number from 0 on")
            connection.reply(request, wrong)
            return
        size = request.size
        full = self._held >= self.limits.requests_max or self._held_bytes + size > self.limits.bytes_max
        if full and not self._goes_first(request.op, size):
            self.counts["overloaded"] += 1
            refusal = f"{self._held} requests of {self._held_bytes} bytes wait here already; nothing was applied"
            connection.reply(request, Overloaded(refusal))
            return
        self.counts["requests"] += 1
        self._held += 1
        self._held_bytes += size
        self._queue.append((connection, request, now, now + min(given, DEADLINE_MS * 1000) / 1000))
        if not self._turning:
            # The first one that comes is handled at once; what other connections brought meanwhile waits for a turn.
            self._turning = True
            self._loop.call_soon(self._turn)
            self._handle_next(now)

    def _goes_first(self, op: str, size: int) -> bool:
        """Whether a request has a place though the queue is full."""
        here = self._held < 2 * self.limits.requests_max and self._held_bytes + size <= 2 * self.limits.bytes_max
        return here and op in self._first

    def _turn(self) -> None:
        """Handle requests until the queue is empty or the turn is over."""
        # Not the loop's clock: uvloop's stands still while a callback runs.
        begin = now = monotonic()
        while self._queue and now - begin < self.limits.turn_s:
            self._handle_next(now)
            now = monotonic()
        self._turning = bool(self._queue)
        if self._turning:
            self._loop.call_soon(self._turn)

    def _handle_next(self, now: float) -> None:
        connection, request, came, until = self._queue.popleft()
        self._handle(connection, request, now - came, until, until <= now)

    def _handle(self, connection: "_Connection", request: Message, waited: float, until: float, expired: bool) -> None:
        if expired or connection.gone:
            self.counts["expired"] += 1
            self._release(request)
            connection.reply(request, NotApplied("the request expired before it was looked at"))
            return
        result: Result | Coroutine[Any, Any, Result] | Exception
        try:
            result = self._handler(request, waited)
        except Exception as error:
            result = error
        if isinstance(result, tuple | Exception):
            self._release(request)
            connection.reply(request, result)
            return
        task = self._loop.create_task(self._finish(connection, request, result))
        self._tasks[task] = connection, until
        task.add_done_callback(self._tasks.pop)

    async def _finish(self, connection: "_Connection", request: Message, result: Coroutine[Any, Any, Result]) -> None:
        """Await a handler that takes longer, and reply. What was given up may have been applied all the same."""
        answer: Result | Exception
        try:
            answer = await result
        except asyncio.CancelledError:
            answer = PerhapsApplied(f"{request.op} was not decided within its deadline, or while the server ran")
        except Exception as error:
            answer = error
        finally:
            self._release(request)
        connection.reply(request, answer)

    def _release(self, request: Message) -> None:
        self._held -= 1
        self._held_bytes -= request.size

    # -- time

    def _give_up(self) -> None:
        """End requests whose deadline is over, or whose connection is gone: nobody waits for what they would bring,
        and they would keep their places until then, however often they are sent again."""
        now = monotonic()
        for task, (connection, until) in self._tasks.items():
            if (until <= now or connection.gone) and _begun(task):
                task.cancel()
        self._giver = self._loop.call_later(GIVE_UP_S, self._give_up)

    def _sweep(self) -> None:
        """Close the connections that are silent, stuck in a frame or in the handshake, or not reading."""
        now = monotonic()
        for connection in list(self.connections):
            if connection.overdue(now):
                self.counts["closed_silent"] += 1
                connection.close()
        every = min(self.limits.handshake_s, self.limits.silent_s) / 4
        self._sweeper = self._loop.call_later(every, self._sweep)


class _Connection(asyncio.BufferedProtocol):
    """One client of a listener."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._session = ServerSession(listener.token, listener.welcome, listener.frame_limits, listener.traffic)
        self._transport: asyncio.Transport | None = None
        self.gone = True
        self._heard = self._opened = monotonic()
        self._unread_since: float | None = None
        self._seen = 0
        self._stuck = (-1, 0.0)
        self._busy = 0

    def overdue(self, now: float) -> bool:
        """Whether one of the connection's times is over."""
        limits = self._listener.limits
        if not self._session.greeted:
            return now - self._opened > limits.handshake_s
        if self._unread_since is not None:
            return now - self._unread_since > limits.silent_s
        if self._session.inside:
            if self._stuck[0] != self._seen:
                self._stuck = (self._seen, now)
            return now - self._stuck[1] > limits.silent_s
        return not self._busy and now - self._heard > limits.silent_s

    def reply(self, request: Message, result: Result | Exception) -> None:
        """Send what came of a request: a result, or the error that it met."""
        self._busy -= 1
        if self.gone:
            return
        if not isinstance(result, Exception):
            answer = Message("ok", request.request, *result)
        else:
            answer = _refusal(request, result)
        try:
            frame = self._session.reply(answer)
        except EmbringError as error:
            frame = self._session.reply(_refusal(request, error))
        self._write(frame)

    def close(self) -> None:
        """Drop the connection at once."""
        self.gone = True
        if self._transport is not None:
            self._transport.abort()

    def _write(self, frame: list[Buffer]) -> None:
        assert self._transport is not None
        if len(frame) == 1:
            self._transport.write(frame[0])
        else:
            self._transport.writelines(frame)
        slow = self._unread_since is not None
        if slow and self._transport.get_write_buffer_size() > self._listener.limits.unread_max:
            self.close()

    # -- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, or turn it away."""
        # uvloop's transports do not derive from asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)
        widen(transport.get_extra_info("socket"))
        listener = self._listener
        if len(listener.connections) >= listener.limits.connections_max:
            full = Overloaded("too many connections are open here")
            self._write(self._session.reply(Message("error", 0, error_fields(full))))
            self._transport.close()
            return
        self.gone = False
        listener.connections.add(self)
        listener.counts["accepted"] += 1

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the session wants the next bytes: big bodies are received in place."""
        return self._session.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Queue the requests that have come whole."""
        session = self._session
        requests = session.received(nbytes)
        listener = self._listener
        self._heard = now = monotonic()
        self._seen += len(requests)
        self._busy += len(requests)
        for request in requests:
            listener.take(self, request, now)
        if session.said and not self.gone:
            self._write(session.said)
            session.said = []
        if session.closing and self._transport is not None:
            listener.counts["malformed"] += 1
            self.gone = True
            self._transport.close()

    def pause_writing(self) -> None:
        """The client does not read fast enough: take no further requests of it."""
        self._unread_since = monotonic()
        if self._transport is not None and not self.gone:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client has read its replies."""
        self._unread_since = None
        if self._transport is not None and not self.gone:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; what it asked for and is still queued is dropped."""
        self._listener.connections.discard(self)
        self.gone = True
        self._transport = None


def _begun(task: asyncio.Task[None]) -> bool:
    """Whether a task has taken its first step: one that is cancelled before it would not let go of its place."""
    running = task.get_coro()
    return inspect.iscoroutine(running) and inspect.getcoroutinestate(running) != inspect.CORO_CREATED


def _refusal(request: Message, error: Exception) -> Message:
    """The reply that carries an error. One that we did not foresee is logged, and told without its details."""
    if not isinstance(error, EmbringError):
        log.error("request %s failed", request.op, exc_info=error)
        error = EmbringError(f"{request.op} failed inside the server: {type(error).__name__}")
    return Message("error", request.request, error_fields(error))


def _unix_socket(path: str) -> socket.socket:
    """A bound Unix socket that only its owner may open, in place of one that a dead process left behind."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        # On Linux the mode of the descriptor is that of the file which bind() makes.
        os.fchmod(made.fileno(), 0o600)
        made.bind(path)
    except OSError:
        made.close()
        raise
    return made
