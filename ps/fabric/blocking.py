"""The client's shell over a plain socket, for threads that wait: training loops, tools, tests.

A connection belongs to one thread at a time. Requests may be pipelined: `send` several, then `receive` each. The
socket never blocks by itself; waiting is done in poll(), so that every call ends at its deadline.
"""

import contextlib
import os
import select
import socket
import ssl
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ps.errors import EmbringError, NotApplied, PerhapsApplied, RequestError
from ps.fabric.address import parse_address, widen
from ps.fabric.protocol import ClientSession, Hello, Traffic, Welcome, result_of
from ps.fabric.tls import refusal, unwelcome
from ps.wire import LIMITS, Buffer, FrameLimits, Message

BUFFERS_MAX = 512
"""Buffers in one sendmsg (Linux allows 1024)."""

IDLE_S = 1.0
"""After this long without a request, a connection is looked at before it is used: servers close silent ones."""

_open: "weakref.WeakSet[BlockingConnection]" = weakref.WeakSet()


class BlockingConnection:
    """One authenticated connection to one server; make it with `connect`."""

    def __init__(self, address: str, connected: socket.socket, session: ClientSession) -> None:
        self.address = address
        self._socket: socket.socket | None = connected
        self._session = session
        self._kept: dict[int, Message] = {}
        self._why = "was closed"
        self._used = time.monotonic()
        # TLS holds decrypted bytes that poll() knows nothing of: ask it before waiting.
        self._tls = isinstance(connected, ssl.SSLSocket)
        connected.setblocking(False)
        self._readable = select.poll()
        self._readable.register(connected, select.POLLIN)
        self._either = select.poll()
        self._either.register(connected, select.POLLIN | select.POLLOUT)
        _open.add(self)

    @classmethod
    def connect(
        cls,
        address: str,
        hello: Hello,
        timeout: float,
        tls: ssl.SSLContext | None = None,
        limits: FrameLimits = LIMITS,
        traffic: Traffic | None = None,
    ) -> "BlockingConnection":
        """Connect and shake hands within `timeout` seconds.

        tls: for TCP; a Unix socket stays plain. traffic: where frames and bytes are counted, beside those of other
        connections. Raises NotApplied where nobody answers in time, AuthError, WrongView or RequestError where the
        server refuses, ConfigError where one of both speaks TLS and the other does not.
        """
        until = time.monotonic() + timeout
        connection = cls(address, _dial(address, timeout, tls), ClientSession(hello, limits, traffic))
        try:
            connection._write(connection._session.hello(), until)
            while connection._session.welcome is None:
                if not connection._read(until):
                    raise NotApplied(f"{address} did not answer the handshake within {timeout:g} s")
        except PerhapsApplied as error:
            if tls is not None:
                raise NotApplied(str(error)) from None
            raise unwelcome(address, parse_address(address), timeout, error) from None
        except EmbringError:
            connection.close()
            raise
        return connection

    @property
    def welcome(self) -> Welcome:
        """What the server said of itself in the handshake."""
        assert self._session.welcome is not None
        return self._session.welcome

    @property
    def closed(self) -> bool:
        """Whether the connection was closed or has broken: make another."""
        return self._socket is None

    def fileno(self) -> int:
        """The socket's descriptor, for waiting on several connections; -1 once closed."""
        return -1 if self._socket is None else self._socket.fileno()

    def send(
        self, op: str, fields: Mapping[str, Any], arrays: dict[str, NDArray[Any]] | None = None, timeout: float = 10.0
    ) -> int:
        """Send a request that is worth an answer for `timeout` seconds; its number.

        The arrays may be changed again when this returns. Raises RequestError where the message breaks a limit, and
        NotApplied where it could not be sent whole: a server never handles a part of a request.
        """
        now = time.monotonic()
        if self._socket is not None and now - self._used > IDLE_S:
            self._look()
        if self._socket is None:
            raise NotApplied(f"the connection to {self.address} {self._why}")
        self._used = now
        number, frame = self._session.request(op, fields, arrays or {}, max(1, int(timeout * 1000)))
        try:
            self._write(frame, now + timeout)
        except PerhapsApplied as error:
            raise NotApplied(str(error)) from None
        return number

    def arrived(self, request: int) -> bool:
        """Whether the reply is here, without waiting: what has come is read. PerhapsApplied where the connection broke.

        `receive` then returns it at once.
        """
        while request not in self._kept:
            if request not in self._session.pending:
                raise RequestError(f"request {request} is not awaited on this connection")
            if self._socket is None:
                self._session.forget(request)
                raise PerhapsApplied(f"the connection to {self.address} {self._why}")
            if not self._take():
                return False
        return True

    def receive(self, request: int, timeout: float) -> Message:
        """The reply to a request, waited for at most `timeout` seconds; replies of others are kept for their own call.

        Raises the error that the reply carries, or PerhapsApplied where none came (it will be dropped) or the
        connection broke.
        """
        if not self.wait(request, timeout):
            raise self.give_up(request, timeout)
        return result_of(self._kept.pop(request))

    def forget(self, request: int) -> None:
        """Drop the reply to a request, which has come or is to come."""
        self._session.forget(request)
        self._kept.pop(request, None)

    def give_up(self, request: int, seconds: float) -> PerhapsApplied:
        """Wait no more for a reply that has been waited for so long; the error that says so."""
        self.forget(request)
        return PerhapsApplied(f"{self.address} did not answer within {seconds:.3g} s")

    def wait(self, request: int, timeout: float) -> bool:
        """Whether the reply has come after at most `timeout` seconds; PerhapsApplied where the connection broke."""
        until = time.monotonic() + timeout
        while not self.arrived(request):
            if not self._readable.poll(_ms_until(until)):
                return False
        return True

    def close(self) -> None:
        """Close the socket; whoever still waits for a reply meets PerhapsApplied."""
        self._end("was closed")

    def _end(self, why: str) -> PerhapsApplied:
        if self._socket is not None:
            self._socket.close()
            self._socket, self._why = None, why
        return PerhapsApplied(f"the connection to {self.address} {self._why}")

    def _forked(self) -> None:
        """In a forked child: give up the descriptor without a word to the server, which talks to the parent."""
        if self._socket is not None:
            fd = self._socket.detach()
            with contextlib.suppress(OSError):
                os.close(fd)
            self._socket, self._why = None, "belongs to the parent process"

    def _look(self) -> None:
        """Read what came while idle, so that a connection closed by the server is known before it is used."""
        with contextlib.suppress(PerhapsApplied):
            while self._read(0.0):
                pass

    def _write(self, buffers: Sequence[Buffer], until: float) -> None:
        """Write all of it, or end the connection and raise PerhapsApplied.

        Replies are read while the socket is full: a server that waits for us to read may have stopped reading itself.
        """
        left = list(buffers)
        while left:
            assert self._socket is not None
            try:
                sent = self._socket.send(left[0]) if self._tls else self._socket.sendmsg(left[:BUFFERS_MAX])
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                sent = 0
            except OSError as error:
                raise self._end(f"broke while sending: {error}") from None
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if not left:
                return
            if sent:
                left[0] = memoryview(left[0])[sent:]
            ready = self._either.poll(_ms_until(until))
            if not ready:
                raise self._end("did not take a request within its deadline")
            if ready[0][1] & ~select.POLLOUT:
                self._take()

    def _read(self, until: float) -> bool:
        """Receive once, waiting until `until`; False at the deadline. The end of the connection is PerhapsApplied."""
        if self._tls and self._take():
            return True
        while self._readable.poll(_ms_until(until)):
            if self._take():
                return True
        return False

    def _take(self) -> bool:
        """Receive what is there; False where there is nothing yet."""
        assert self._socket is not None
        try:
            n = self._socket.recv_into(self._session.buffer())
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            raise self._end(f"broke: {error}") from None
        if n == 0:
            raise self._end("was closed by the server")
        try:
            for reply in self._session.received(n):
                self._kept[reply.request] = reply
        except EmbringError as error:
            self._end(f"was given up: {error}")
            if self._session.welcome is None:
                raise
            raise PerhapsApplied(f"the connection to {self.address} {self._why}") from None
        return True


def wait_for_any(connections: Sequence[BlockingConnection], until: float) -> bool:
    """Wait for bytes on any of these connections; False at the deadline. A closed one counts as ready."""
    readable = select.poll()
    for connection in connections:
        fd = connection.fileno()
        if fd < 0:
            return True
        readable.register(fd, select.POLLIN)
    return bool(readable.poll(_ms_until(until)))


def _ms_until(moment: float) -> float:
    """Milliseconds from now, for poll(): at least 0, at most a day."""
    return min(max(0.0, (moment - time.monotonic()) * 1000), 86_400_000.0)


def _dial(address: str, timeout: float, tls: ssl.SSLContext | None) -> socket.socket:
    """A connected socket, its TLS handshake done; raises what `refusal` says where that fails."""
    where = parse_address(address)
    connected: socket.socket | None = None
    try:
        if where.path:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            widen(connected)
            connected.settimeout(timeout)
            connected.connect(where.path)
        else:
            connected = socket.create_connection((where.host, where.port), timeout)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None and not where.path:
            connected = tls.wrap_socket(connected, server_hostname=where.host)
        return connected
    except (OSError, ValueError) as error:
        if connected is not None:
            connected.close()
        raise refusal(address, error) from None


def _after_fork() -> None:
    for connection in list(_open):
        connection._forked()


os.register_at_fork(after_in_child=_after_fork)
