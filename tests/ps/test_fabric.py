"""The shells over real sockets: blocking and asyncio clients against a listener."""

import asyncio
import os
import select
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import uvloop

from ps.config import SEND_BUFFER
from ps.errors import (
    ERRORS,
    AuthError,
    ConfigError,
    EmbringError,
    NobodyListens,
    NotApplied,
    Overloaded,
    PerhapsApplied,
    RequestError,
    WrongView,
)
from ps.fabric import AsyncConnection, BlockingConnection, Hello, aio, blocking
from ps.fabric.address import parse_address, widen
from ps.fabric.listen import Listener, ListenLimits
from ps.fabric.protocol import Traffic
from ps.loop import LoopThread
from ps.wire import FrameError, FrameLimits, Message, encode
from tests.ps.fabric_server import HELLO, WAIT_S, WELCOME, echo_server


@pytest.fixture(scope="module")
def server():
    with echo_server() as running:
        yield running


class Awaited:
    """An AsyncConnection on a loop of its own, with the calls of the blocking one."""

    def __init__(self, address, hello=HELLO, timeout=WAIT_S, **kwargs):
        self.loop = LoopThread("test client")
        try:
            self.connection = self.loop.call(AsyncConnection.connect(address, hello, timeout, **kwargs), 2 * WAIT_S)
        except BaseException:
            self.loop.close()
            raise
        self.welcome = self.connection.welcome
        self._futures = {}

    def send(self, op, fields, arrays=None, timeout=WAIT_S):
        number = len(self._futures)
        self._futures[number] = self.loop.submit(self.connection.request(op, fields, arrays, timeout))
        return number

    def receive(self, number, timeout):
        return self._futures[number].result(timeout + WAIT_S)

    def close(self):
        async def end():
            self.connection.close()

        self.loop.call(end(), WAIT_S)
        self.loop.close()


def blocking_shell(address, hello=HELLO, timeout=WAIT_S, **kwargs):
    return BlockingConnection.connect(address, hello, timeout, **kwargs)


shells = pytest.mark.parametrize("shell", [blocking_shell, Awaited])


def ask(connection, op, fields=None, arrays=None, timeout=WAIT_S):
    return connection.receive(connection.send(op, fields or {}, arrays, timeout), timeout)


@shells
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_requests_of_every_size_come_back_alike(server, shell, kind):
    connection = shell(getattr(server, kind))
    assert connection.welcome == WELCOME
    for n in (0, 1, 1000, 9_000, 100_000, 3_000_000):
        ids = np.arange(n, dtype=np.int64)
        reply = ask(connection, "echo", {"n": n}, {"ids": ids, "w": np.ones((n % 7, 2), np.float32)})
        assert reply.fields["n"] == n
        np.testing.assert_array_equal(reply.arrays["ids"], ids)
        assert reply.arrays["w"].shape == (n % 7, 2)
    connection.close()


@shells
def test_replies_come_in_any_order(shell):
    with echo_server() as server:
        connection = shell(server.unix)
        slow = connection.send("hold", {})
        for i in range(3):
            assert ask(connection, "echo", {"i": i}).fields["i"] == i
        server.release()
        assert connection.receive(slow, WAIT_S).fields["held"]
        connection.close()


@shells
def test_many_big_requests_in_flight_do_not_block_one_another(server, shell):
    connection = shell(server.tcp)
    ids = np.arange(500_000, dtype=np.int64)
    numbers = [connection.send("echo", {"i": i}, {"ids": ids + i}, WAIT_S) for i in range(12)]
    for i, number in enumerate(numbers):
        reply = connection.receive(number, WAIT_S)
        assert reply.fields["i"] == i
        assert reply.arrays["ids"][-1] == 499_999 + i
    connection.close()


@shells
@pytest.mark.parametrize("cls", ERRORS.values())
def test_errors_are_raised_in_their_class(server, shell, cls):
    connection = shell(server.unix)
    with pytest.raises(EmbringError, match="as you wish") as caught:
        ask(connection, "fail", {"error": cls.code})
    assert type(caught.value) is cls
    assert ask(connection, "echo", {"after": 1}).fields["after"] == 1
    connection.close()


@shells
def test_a_fault_inside_the_server_is_told_and_survived(server, shell, caplog):
    connection = shell(server.unix)
    with pytest.raises(EmbringError, match="crash failed inside the server: KeyError"):
        ask(connection, "crash")
    assert "a fault of ours" in caplog.text
    with pytest.raises(FrameError.__mro__[1], match="dtype bool"):
        ask(connection, "unsendable")
    ask(connection, "echo")
    connection.close()


@shells
def test_no_answer_in_time(shell):
    with echo_server() as server:
        connection = shell(server.unix)
        with pytest.raises(PerhapsApplied, match=r"did not answer within 0.05 s"):
            ask(connection, "hold", timeout=0.05)
        server.release()
        assert ask(connection, "echo", {"still": "here"}).fields["still"] == "here"
        connection.close()


def spin(seconds: float) -> None:
    """Keep this thread busy."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_a_reply_that_came_while_the_caller_was_busy_is_not_late():
    """uvloop runs the timers that fell due before it reads what came while it handled another event."""

    async def ask():
        connection = await AsyncConnection.connect(server.unix, HELLO, WAIT_S)
        there = connection._transport.get_extra_info("socket").fileno()
        event, trigger = os.pipe()

        def busy():
            asyncio.get_running_loop().remove_reader(event)
            server.release()
            assert select.select([there], [], [], WAIT_S)[0]
            spin(0.2)

        asyncio.get_running_loop().add_reader(event, busy)
        request = asyncio.ensure_future(connection.request("hold", {}, timeout=0.15))
        await asyncio.sleep(0)
        os.write(trigger, b"x")
        await request
        connection.close()
        os.close(event), os.close(trigger)

    with echo_server() as server:
        uvloop.run(ask())


@shells
def test_a_server_that_goes_leaves_requests_undecided_and_refuses_later_ones(shell):
    with echo_server() as server:
        connection = shell(server.unix)
        number = connection.send("hold", {})
        server.until(lambda s: s.waiting == 1)
        server.stop_listening()
        with pytest.raises((PerhapsApplied, NotApplied)):
            connection.receive(number, WAIT_S)
        with pytest.raises(NotApplied):
            ask(connection, "echo")
        with pytest.raises(NobodyListens, match="cannot connect"):
            shell(server.unix)
        connection.close()


def test_nobody_listens_only_where_every_address_refuses():
    with echo_server() as server, socket.socket() as full:
        gone = (server.unix, server.tcp)
        server.stop_listening()
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # takes connections, and never a word
        deaf = f"tcp:127.0.0.1:{full.getsockname()[1]}"

        def meets(*addresses: str) -> type[BaseException]:
            with pytest.raises(EmbringError) as caught:
                asyncio.run(aio.dial(addresses, HELLO, 0.2, None))
            return caught.type

        assert meets(*gone) is NobodyListens
        assert meets(deaf, server.tcp) is NotApplied
        assert meets(server.tcp, deaf) is not NobodyListens


@shells
@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (Hello("wrong"), AuthError),
        (Hello(""), AuthError),
        (Hello("secret", fingerprint="other"), AuthError),
        (Hello("secret", incarnation=78), WrongView),
        (Hello("x" * 5000), FrameError),
    ],
)
def test_a_server_that_refuses(server, shell, hello, error):
    with pytest.raises(error):
        shell(server.unix, hello)


@shells
def test_a_server_that_is_something_else(shell):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(NotApplied, match="did not answer the handshake"):
            shell(address, timeout=0.1)


@shells
def test_a_server_that_answers_http(shell):
    loop = LoopThread("http")

    async def http():
        async def serve(reader, writer):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        return await asyncio.start_server(serve, "127.0.0.1", 0)

    running = loop.call(http(), WAIT_S)
    with pytest.raises(FrameError, match="carries b'HTTP'"):
        shell(f"127.0.0.1:{running.sockets[0].getsockname()[1]}")

    async def end():
        running.close()

    loop.call(end(), WAIT_S)
    loop.close()


@shells
def test_a_request_beyond_the_limits_is_refused_before_it_is_sent(server, shell):
    connection = shell(server.unix, limits=FrameLimits(body_max=100))
    with pytest.raises(FrameError, match="limit is 100"):
        ask(connection, "echo", {}, {"ids": np.arange(20)})
    assert ask(connection, "echo", {"a": 1}).fields["a"] == 1
    connection.close()


@shells
def test_a_reply_beyond_the_servers_limits_is_an_error(shell):
    with echo_server(frames=FrameLimits(body_max=1000)) as server:
        connection = shell(server.unix)
        with pytest.raises(RequestError, match="limit is 1000"):
            ask(connection, "big", {"size": 1000})
        assert len(ask(connection, "big", {"size": 250}).arrays["rows"]) == 250
        connection.close()


# -- the blocking shell alone


def test_unknown_requests_are_named(server):
    connection = server.connect()
    with pytest.raises(RequestError, match="request 5 is not awaited"):
        connection.receive(5, 1.0)
    connection.close()


def test_waiting_on_several_connections(server):
    connections = [server.connect() for _ in range(3)]
    numbers = {c.fileno(): (c, c.send("echo", {"i": i})) for i, c in enumerate(connections)}
    poll = select.poll()
    for fd in numbers:
        poll.register(fd, select.POLLIN)
    got = set()
    while numbers:
        ready = poll.poll(WAIT_S * 1000)
        assert ready
        for fd, _ in ready:
            connection, number = numbers[fd]
            if connection.wait(number, 0.0):
                got.add(connection.receive(number, 0.0).fields["i"])
                poll.unregister(fd)
                del numbers[fd]
    assert got == {0, 1, 2}
    for connection in connections:
        connection.close()
        assert connection.fileno() == -1


def test_a_connection_closed_while_idle_is_noticed_before_it_is_used(monkeypatch):
    monkeypatch.setattr(blocking, "IDLE_S", 0.0)
    with echo_server() as server:
        connection = server.connect()
        ask(connection, "echo")
        server.stop_listening()
        with pytest.raises(NotApplied, match="was closed by the server"):
            connection.send("echo", {})
        assert connection.closed


def test_a_server_that_does_not_read_ends_the_request_at_its_deadline():
    with echo_server(limits=ListenLimits(requests_max=2)) as server:
        connection = server.connect(server.tcp)
        connection.send("nap", {"ms": 600})
        with pytest.raises(NotApplied, match="did not take a request within its deadline"):
            connection.send("echo", {}, {"rows": np.zeros(8_000_000, np.float64)}, timeout=0.05)
        assert connection.closed


def test_a_forked_child_has_no_connections_and_the_parent_keeps_them(server):
    connection = server.connect()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            connection.send("echo", {})
        except NotApplied as error:
            code = 0 if "parent process" in str(error) and connection.fileno() == -1 else 2
        finally:
            os._exit(code)
    end = time.monotonic() + WAIT_S
    done = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        select.select([], [], [], 0.005)
    if not done:
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(status) == 0
    assert ask(connection, "echo", {"a": 2}).fields["a"] == 2
    connection.close()


# -- the asyncio shell alone


def test_a_cancelled_request_that_was_not_sent_ends_the_connection():
    async def main(address):
        connection = await AsyncConnection.connect(address, HELLO, WAIT_S)
        rows = np.zeros(20_000_000, np.uint8)
        with pytest.raises(PerhapsApplied):
            await connection.request("echo", {}, {"rows": rows}, 0.05)
        assert connection.closed
        with pytest.raises(NotApplied):
            await connection.request("echo", {})

    with socket.socket() as silent:
        # It welcomes, and never reads again.
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        loop = LoopThread("silent")

        async def welcome():
            peer, _ = await loop.loop.sock_accept(silent)
            await loop.loop.sock_sendall(peer, b"".join(map(bytes, encode(Message("welcome", 0)))))
            return peer

        silent.setblocking(False)
        accepted = loop.submit(welcome())
        uvloop.run(main(f"127.0.0.1:{silent.getsockname()[1]}"))
        accepted.result(WAIT_S).close()
        loop.close()


def test_a_quiet_connection_pings(monkeypatch, server):
    monkeypatch.setattr(aio, "PING_S", 0.02)
    connection = Awaited(server.unix)
    server.handled.clear()
    server.until(lambda s: server.handled.count("ping") >= 3)
    connection.close()


def test_both_loops_serve():
    async def main():
        listener = Listener(lambda request, waited: ({}, request.arrays), "", lambda: WELCOME)
        (address,) = await listener.start(["127.0.0.1:0"])
        connection = await AsyncConnection.connect(address, Hello(), WAIT_S)
        rows = np.arange(1_000_000)
        reply = await connection.request("echo", {}, {"rows": rows})
        np.testing.assert_array_equal(reply.arrays["rows"], rows)
        connection.close()
        await listener.close()

    asyncio.run(main())
    uvloop.run(main())


# -- addresses


@pytest.mark.parametrize(
    ("given", "written", "local"),
    [
        ("tcp:127.0.0.1:80", "tcp:127.0.0.1:80", True),
        ("localhost:0", "tcp:localhost:0", True),
        ("tcp:[::1]:7000", "tcp:[::1]:7000", True),
        ("10.1.2.3:7000", "tcp:10.1.2.3:7000", False),
        ("0.0.0.0:7000", "tcp:0.0.0.0:7000", False),
        ("host.example:7000", "tcp:host.example:7000", False),
        ("unix:/a b", "unix:/a b", True),
    ],
)
def test_addresses(given, written, local):
    address = parse_address(given)
    assert str(address) == written
    assert parse_address(str(address)) == address
    assert address.local is local


@pytest.mark.parametrize(
    "given", ["", "host", "host:", ":80", "host:x", "http://host:80", "host:65536", "unix:", "tcp:80", "host:-1"]
)
def test_addresses_that_are_none(given):
    with pytest.raises(ConfigError, match="address"):
        parse_address(given)


def test_unix_sockets_hold_large_messages_and_tcp_is_left_to_the_kernel():
    """As much as the kernel allows (it doubles what is asked for, for its own records)."""
    allowed = min(SEND_BUFFER, int(Path("/proc/sys/net/core/wmem_max").read_text()))
    one, other = socket.socketpair(socket.AF_UNIX)
    tcp = socket.socket(socket.AF_INET)
    with one, other, tcp:
        before = tcp.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        for wide in (one, tcp):
            widen(wide)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * allowed
        assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == before


def test_listening_elsewhere_needs_a_token():
    async def main(token):
        listener = Listener(lambda request, waited: ({}, {}), token, lambda: WELCOME)
        try:
            await listener.start(["127.0.0.1:0", "0.0.0.0:0"])
        finally:
            await listener.close()

    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:0 can be reached from other machines"):
        uvloop.run(main(""))
    uvloop.run(main("secret"))


def test_an_address_that_is_taken(server):
    async def main(address):
        await Listener(lambda request, waited: ({}, {}), "", lambda: WELCOME).start([address])

    with pytest.raises(ConfigError, match="cannot listen on"):
        uvloop.run(main(server.tcp))
    with pytest.raises(ConfigError, match="cannot listen on"):
        uvloop.run(main("unix:/" + "x" * 200))


def test_a_unix_socket_is_its_owners_and_replaces_a_dead_one(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def main():
        listener = Listener(lambda request, waited: ({}, {}), "", lambda: WELCOME)
        await listener.start([f"unix:{path}"])
        assert path.stat().st_mode & 0o777 == 0o600
        (await AsyncConnection.connect(f"unix:{path}", Hello(), WAIT_S)).close()
        await listener.close()

    uvloop.run(main())
    assert not path.exists()


# -- limits of the listener


def raw(server) -> socket.socket:
    """A socket that has shaken hands and speaks bytes."""
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(WAIT_S)
    plain.connect(str(server.path))
    plain.sendall(b"".join(map(bytes, encode(Message("hello", 0, {"protocol": 1, "token": "secret"})))))
    assert b"welcome" in plain.recv(4096)
    return plain


def read_to_end(plain: socket.socket) -> bytes:
    got = b""
    try:
        while data := plain.recv(65536):
            got += data
    except ConnectionError:
        pass
    return got


def test_a_full_queue_answers_at_once():
    with echo_server(limits=ListenLimits(requests_max=2)) as server:
        connection = server.connect()
        held = [connection.send("hold", {}) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 requests"):
            ask(connection, "echo")
        server.release()
        for number in held:
            connection.receive(number, WAIT_S)
        ask(connection, "echo")
        assert server.statistics().overloaded == 1
        connection.close()


def test_a_queue_full_of_bytes_answers_at_once():
    with echo_server(limits=ListenLimits(bytes_max=1000)) as server:
        connection = server.connect()
        held = connection.send("hold", {}, {"a": np.zeros(900, np.uint8)})
        with pytest.raises(Overloaded, match="900 bytes"):
            ask(connection, "echo", {}, {"a": np.zeros(101, np.uint8)})
        ask(connection, "echo", {}, {"a": np.zeros(100, np.uint8)})
        server.release()
        connection.receive(held, WAIT_S)
        connection.close()


def test_a_full_queue_has_room_for_what_the_cluster_goes_on_by_and_no_end_of_it():
    with echo_server(limits=ListenLimits(requests_max=1), first=("ping", "hold")) as server:
        connection = server.connect()
        held = connection.send("hold", {})
        with pytest.raises(Overloaded):
            ask(connection, "echo")
        ask(connection, "ping")
        held = [held, connection.send("hold", {})]
        with pytest.raises(Overloaded, match="2 requests"):
            ask(connection, "ping")
        server.release()
        for number in held:
            connection.receive(number, WAIT_S)
        connection.close()


def test_a_request_that_is_not_decided_by_its_deadline_lets_go_of_its_place():
    with echo_server(limits=ListenLimits(requests_max=1)) as server:
        plain = raw(server)
        plain.sendall(bytes(encode(Message("hold", 2, {"deadline_ms": 20}))[0]))
        got = b""
        while b"deadline" not in got:
            got += plain.recv(65536)
        assert b"perhaps_applied" in got
        assert b"not_applied" not in got
        server.until(lambda s: s.waiting == 0)
        plain.close()
        connection = server.connect()
        ask(connection, "echo")
        connection.close()


def test_a_request_whose_connection_is_gone_lets_go_of_its_place():
    with echo_server(limits=ListenLimits(requests_max=1)) as server:
        connection = server.connect()
        connection.send("hold", {})
        server.until(lambda s: s.waiting == 1)
        connection.close()
        server.until(lambda s: s.waiting == 0)
        other = server.connect()
        ask(other, "echo")
        other.close()


def test_too_many_connections_are_turned_away():
    with echo_server(limits=ListenLimits(connections_max=2)) as server:
        two = [server.connect() for _ in range(2)]
        with pytest.raises((Overloaded, NotApplied)):
            server.connect()
        two.pop().close()
        server.until(lambda s: s.connections == 1)
        server.connect().close()
        two.pop().close()


def test_expired_requests_are_dropped_unseen():
    with echo_server() as server:
        plain = raw(server)
        server.handled.clear()
        nap = encode(Message("nap", 1, {"ms": 30}))
        late = encode(Message("echo", 2, {"deadline_ms": 5}))
        good = encode(Message("echo", 3, {"deadline_ms": 20_000}))
        plain.sendall(b"".join(map(bytes, nap + late + good)))
        got = b""
        while b"expired" not in got or got.count(b"EMBR") < 3:
            got += plain.recv(65536)
        assert server.handled == ["nap", "echo"]
        assert server.statistics().expired == 1
        plain.close()


@pytest.mark.parametrize("deadline", [-1, "x", None, 1.5, True])
def test_a_deadline_that_is_none(server, deadline):
    plain = raw(server)
    plain.sendall(bytes(encode(Message("echo", 2, {"deadline_ms": deadline}))[0]))
    assert b"deadline_ms is" in plain.recv(65536)
    plain.close()


def test_silence_closes_a_connection_but_not_one_that_awaits_a_reply():
    with echo_server(limits=ListenLimits(silent_s=0.1, handshake_s=0.1)) as server:
        waiting = server.connect()
        held = waiting.send("hold", {})
        silent = raw(server)
        stranger = socket.socket(socket.AF_UNIX)
        stranger.settimeout(WAIT_S)
        stranger.connect(str(server.path))
        assert read_to_end(silent) == b""
        assert read_to_end(stranger) == b""
        server.until(lambda s: s.closed_silent == 2)
        server.release()
        assert waiting.receive(held, WAIT_S).fields["held"]
        for plain in (silent, stranger):
            plain.close()
        waiting.close()


def test_one_byte_at_a_time_is_cut_off():
    with echo_server(limits=ListenLimits(silent_s=0.2, handshake_s=0.2)) as server:
        plain = raw(server)
        end = time.monotonic() + WAIT_S
        frame = bytes(encode(Message("echo", 1, {"text": "x" * 100_000}))[0])
        with pytest.raises(ConnectionError):  # noqa: PT012 - which byte meets the end is not known
            for byte in frame:
                plain.sendall(bytes([byte]))
                assert time.monotonic() < end
                select.select([], [], [], 0.01)
        assert server.statistics().closed_silent == 1
        plain.close()


def test_a_client_that_never_reads_is_cut_off():
    with echo_server(limits=ListenLimits(unread_max=1_000_000, silent_s=0.3)) as server:
        plain = raw(server)
        with pytest.raises((ConnectionError, AssertionError)):  # noqa: PT012
            for i in range(1000):
                plain.sendall(bytes(encode(Message("big", i, {"size": 500_000}))[0]))
                if server.statistics().connections == 0:
                    raise ConnectionResetError
            pytest.fail("the server kept the connection")
        server.until(lambda s: s.connections == 0)
        plain.close()


# -- any bytes at all


def test_raw_bytes_end_in_an_error_or_a_closed_connection():
    rng = np.random.default_rng(5)
    good = bytes(encode(Message("echo", 1, {}, {"ids": np.arange(10)}))[0])
    starts = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", bytes(30), b"\xff" * 30, good, good + good[:50]]
    with echo_server(limits=ListenLimits(silent_s=0.2, handshake_s=0.2)) as server:
        for turn in range(120):
            data = bytearray(starts[turn % len(starts)])
            for at in rng.integers(0, len(data), 3):
                data[at] = rng.integers(0, 256)
            if turn % 2:
                plain = raw(server)
            else:
                plain = socket.socket(socket.AF_UNIX)
                plain.settimeout(WAIT_S)
                plain.connect(str(server.path))
            plain.sendall(bytes(data))
            plain.shutdown(socket.SHUT_WR)
            answer = read_to_end(plain)
            assert answer == b"" or answer.startswith(b"EMBR")
            plain.close()
        connection = server.connect()
        assert ask(connection, "echo", {"alive": 1}).fields["alive"] == 1
        connection.close()
        server.until(lambda s: s.connections == 0 and s.waiting == 0)


@shells
def test_both_ends_count_the_same_frames_and_bytes(shell):
    traffic = Traffic()
    with echo_server() as server:
        connection = shell(server.tcp, traffic=traffic)
        for n in (0, 10, 200_000):
            ask(connection, "echo", {"n": n}, {"ids": np.arange(n)})
        there = server.statistics()
        connection.close()
    assert (traffic.frames_sent, traffic.bytes_sent) == (there.frames_received, there.bytes_received)
    assert (traffic.frames_received, traffic.bytes_received) == (there.frames_sent, there.bytes_sent)
    assert traffic.frames_sent == 4  # a hello and three requests
    assert traffic.bytes_sent > 200_010 * 8
