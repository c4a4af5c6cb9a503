"""The fabric's protocol without any input or output: bytes in, messages out, and back.

A shell (a socket, a transport, a test) asks `buffer()` where the next bytes belong, says with `received(n)` how many
came, and writes what it is handed. Nothing here knows a clock or a socket.

The first message of a connection is the client's "hello" and the server's answer "welcome" (or an error, and the
end). Until then both sides hold the other to HANDSHAKE_LIMITS. After it, requests and replies come in any order.
"""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from numpy.typing import NDArray

from ps.errors import AuthError, EmbringError, PerhapsApplied, RequestError, WrongView
from ps.wire import (
    HANDSHAKE_LIMITS,
    LIMITS,
    PREFIX,
    VERSION,
    Buffer,
    FrameError,
    FrameLimits,
    Message,
    Places,
    assemble,
    body_buffer,
    check_magic,
    decode_header,
    decode_prefix,
    encode,
    error_fields,
    raise_error,
    text,
    whole,
)

SCRATCH_BEFORE = 8 * 1024
"""Bytes received at once before the handshake: all the memory that a stranger can claim."""

SCRATCH_AFTER = 64 * 1024
"""Bytes received at once after it."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client says of itself.

    token: the cluster's secret, "" where the cluster has none. incarnation: the one it means to reach, 0 for any.
    fingerprint: of the cluster's configuration, "" to adopt the server's. client: its random uint64.
    """

    token: str = ""
    incarnation: int = 0
    fingerprint: str = ""
    client: int = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a server says of itself: the cluster's number, its view's epoch, its name, incarnation and fingerprint."""

    cluster: int = 0
    epoch: int = 0
    name: str = ""
    incarnation: int = 0
    fingerprint: str = ""
    slot_bits: int = 14


@dataclass(slots=True)
class Traffic:
    """Frames and bytes of any number of connections, counted where a session makes and takes them.

    Bytes are those of the frames, handshakes among them; what TLS and TCP add is not in them.
    """

    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0

    def sent(self, frame: list[Buffer]) -> list[Buffer]:
        """Count a frame that is about to be written; returns it."""
        self.frames_sent += 1
        self.bytes_sent += sum(map(len, frame))
        return frame

    def received(self, size: int, frames: int) -> None:
        """Count bytes that came, and the frames that they completed."""
        self.bytes_received += size
        self.frames_received += frames


class Receiver:
    """Cuts a stream of bytes into messages.

    Small frames are received into one scratch buffer and copied out of it; the body of a bigger one is received
    where it will stay. A FrameError ends the stream: there is no way to find the next frame.
    """

    def __init__(self, limits: FrameLimits, scratch: int) -> None:
        self.limits = limits
        self._scratch = memoryview(bytearray(scratch))
        self._start = 0
        self._end = 0
        self._partial: tuple[Message, Places, Buffer] | None = None
        self._rest = memoryview(b"")

    @property
    def inside(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._partial is not None or self._end > self._start

    def widen(self, limits: FrameLimits, scratch: int) -> None:
        """Take other limits and another scratch buffer from the next frame on."""
        self.limits = limits
        self._move(scratch)

    def _move(self, size: int) -> None:
        """Bring what the scratch buffer holds to its beginning, in one of at least `size` bytes."""
        kept = self._end - self._start
        target = self._scratch if size <= len(self._scratch) else memoryview(bytearray(size))
        target[:kept] = bytes(self._scratch[self._start : self._end])
        self._scratch, self._start, self._end = target, 0, kept

    def buffer(self) -> memoryview:
        """Where the next bytes are to be received; never empty."""
        if self._partial is not None:
            return self._rest
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._scratch):
            self._move(len(self._scratch))
        return self._scratch[self._end :]

    def received(self, n: int) -> list[Message]:
        """`n` bytes came into `buffer()`: the messages that they complete."""
        messages: list[Message] = []
        if self._partial is not None:
            self._rest = self._rest[n:]
            if not len(self._rest):
                messages.append(assemble(*self._partial))
                self._partial = None
            return messages
        self._end += n
        while self._start < self._end and self._partial is None and self._next(messages):
            pass
        return messages

    def _next(self, messages: list[Message]) -> bool:
        """Take one frame out of the scratch buffer; False where it holds no further header."""
        start = self._start
        have = self._end - start
        if have < PREFIX.size:
            check_magic(bytes(self._scratch[start : min(self._end, start + 4)]))
            return False
        header, size = decode_prefix(self._scratch, start, self.limits)
        begin = start + PREFIX.size + header
        here = self._end - begin
        if here < 0:
            if begin > len(self._scratch):
                self._move(PREFIX.size + header)
            return False
        message, places = decode_header(self._scratch[begin - header : begin], size, self.limits)
        if here >= size:
            self._start = begin + size
            messages.append(assemble(message, places, bytearray(self._scratch[begin : self._start])))
        else:
            body = body_buffer(size)
            self._start = self._end
            body[:here] = self._scratch[begin : self._end]
            self._partial, self._rest = (message, places, body), body[here:]
        return True


class ServerSession:
    """The server's end of one connection.

    token: what a client must show. welcome: gives what the server says of itself, asked at each handshake.
    greeted: whether the handshake is done. said: what the session itself has to say; the shell sends it and clears it.
    closing: whether the connection is to be closed after that.
    """

    def __init__(
        self,
        token: str,
        welcome: Callable[[], Welcome],
        limits: FrameLimits = LIMITS,
        traffic: Traffic | None = None,
    ) -> None:
        self.greeted = False
        self._traffic = Traffic() if traffic is None else traffic
        self.closing = False
        self._token = token
        self._welcome = welcome
        self._limits = limits
        self._receiver = Receiver(HANDSHAKE_LIMITS, SCRATCH_BEFORE)
        self.said: list[Buffer] = []

    @property
    def inside(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._receiver.inside

    def buffer(self) -> memoryview:
        """Where the next bytes are to be received."""
        return self._receiver.buffer()

    def received(self, n: int) -> list[Message]:
        """The requests that `n` further bytes complete. Never raises: what must be said about them is in `said`."""
        try:
            messages = self._receiver.received(n)
            self._traffic.received(n, len(messages))
            if self.greeted or not messages:
                return messages
            self._greet(messages[0])
            if len(messages) > 1 or self._receiver.inside:
                raise FrameError("nothing may follow a hello before its welcome")
        except EmbringError as error:
            self.closing = True
            number = messages[0].request if not isinstance(error, FrameError) else 0
            self.said += self.reply(Message("error", number, error_fields(error)))
        return []

    def _greet(self, hello: Message) -> None:
        welcome = self._welcome()
        check_hello(hello, self._token, welcome)
        self.said += self.reply(Message("welcome", hello.request, asdict(welcome)))
        self._receiver.widen(self._limits, SCRATCH_AFTER)
        self.greeted = True

    def reply(self, message: Message) -> list[Buffer]:
        """The frame of a reply."""
        return self._traffic.sent(encode(message, self._limits))


def check_hello(hello: Message, token: str, welcome: Welcome) -> None:
    """Raise AuthError, WrongView or RequestError unless the hello is for this server."""
    if hello.op != "hello":
        raise AuthError(f'the first message is {hello.op!r}; it must be "hello"')
    said = hello.fields
    if not hmac.compare_digest(text(said, "token", default="").encode(), token.encode()):
        raise AuthError("the token is not this cluster's")
    version = whole(said, "protocol")
    if version != VERSION:
        raise RequestError(f"the client speaks protocol version {version}; this server speaks version {VERSION}")
    fingerprint = text(said, "fingerprint", default="")
    if fingerprint and fingerprint != welcome.fingerprint:
        raise AuthError(
            f"the client's configuration has fingerprint {fingerprint!r}; this cluster's has {welcome.fingerprint!r}"
        )
    meant = whole(said, "incarnation", 0, 2**64 - 1, default=0)
    if meant and meant != welcome.incarnation:
        raise WrongView(
            f"incarnation {meant} was meant; here answers {welcome.name!r}, incarnation {welcome.incarnation}",
            welcome.epoch,
        )


class ClientSession:
    """The client's end of one connection: numbers requests, and hands out their replies by number."""

    def __init__(self, hello: Hello, limits: FrameLimits = LIMITS, traffic: Traffic | None = None) -> None:
        self.welcome: Welcome | None = None
        self._traffic = Traffic() if traffic is None else traffic
        self.pending: set[int] = set()
        self._hello = hello
        self._limits = limits
        self._receiver = Receiver(HANDSHAKE_LIMITS, SCRATCH_BEFORE)
        self._number = 0

    def hello(self) -> list[Buffer]:
        """The first thing to send."""
        hello = Message("hello", 0, {"protocol": VERSION, **asdict(self._hello)})
        return self._traffic.sent(encode(hello, HANDSHAKE_LIMITS))

    def request(
        self, op: str, given: Mapping[str, Any], arrays: dict[str, NDArray[Any]], deadline_ms: int
    ) -> tuple[int, list[Buffer]]:
        """(number, frame) of a request to be answered within `deadline_ms`; FrameError where it breaks a limit."""
        number = self._number + 1
        message = Message(op, number, {**given, "deadline_ms": deadline_ms}, arrays)
        frame = self._traffic.sent(encode(message, self._limits))
        self._number = number
        self.pending.add(number)
        return number, frame

    def forget(self, number: int) -> None:
        """Nobody waits for this reply any more; it will be dropped when it comes."""
        self.pending.discard(number)

    def buffer(self) -> memoryview:
        """Where the next bytes are to be received."""
        return self._receiver.buffer()

    def received(self, n: int) -> list[Message]:
        """The replies that `n` further bytes complete, errors among them; FrameError ends the connection.

        Before the welcome there are none; a refusal is raised in its own class.
        """
        messages = self._receiver.received(n)
        self._traffic.received(n, len(messages))
        if self.welcome is None and messages:
            self._welcomed(messages.pop(0))
        replies = []
        for message in messages:
            if message.op == "error" and message.request == 0:
                # The server could not read what was sent, and closes: which requests it had seen is unknown.
                raise PerhapsApplied(f"the server ended the connection: {str(message.fields.get('message'))[:200]}")
            if message.op not in ("ok", "error") or message.request > self._number:
                raise FrameError(f"the server sent {message.op!r} for request {message.request}, which nobody asked")
            if message.request in self.pending:
                self.pending.remove(message.request)
                replies.append(message)
        return replies

    def _welcomed(self, message: Message) -> None:
        if message.op == "error":
            raise_error(message.fields)
        if message.op != "welcome":
            raise FrameError(f'the server answered {message.op!r} to a hello; it must be "welcome"')
        known = {f.name for f in fields(Welcome)}
        said = {name: value for name, value in message.fields.items() if name in known}
        welcome = Welcome(**said)
        if not all(type(getattr(welcome, f.name)) is type(f.default) for f in fields(Welcome)):
            raise FrameError("the server's welcome has a field of the wrong type")
        self.welcome = welcome
        self._receiver.widen(self._limits, SCRATCH_AFTER)


def result_of(reply: Message) -> Message:
    """The reply itself, or the error that it carries, raised."""
    if reply.op == "error":
        raise_error(reply.fields)
    return reply
