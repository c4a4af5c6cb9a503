"""The sans-IO protocol: cutting, the handshake, and any bytes at all ending in a typed error."""

import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import AuthError, EmbringError, Overloaded, PerhapsApplied, RequestError, WrongView
from ps.fabric.protocol import SCRATCH_AFTER, SCRATCH_BEFORE, ClientSession, Hello, Receiver, ServerSession, Welcome
from ps.wire import HANDSHAKE_LIMITS, LIMITS, PREFIX, FrameError, FrameLimits, Message, encode, error_fields

WELCOME = Welcome(cluster=5, epoch=3, name="a", incarnation=77, fingerprint="fp", slot_bits=14)


def frame_of(message: Message) -> bytes:
    return b"".join(bytes(part) for part in encode(message))


def feed(end, data: bytes, step: int | None = None) -> list[Message]:
    """Give bytes to a receiver or session, at most `step` at a time."""
    got = []
    at = 0
    while at < len(data):
        room = end.buffer()
        assert len(room)
        n = min(len(room), len(data) - at, step or len(data))
        room[:n] = data[at : at + n]
        got += end.received(n)
        at += n
        if getattr(end, "closing", False):
            break
    return got


def receiver(limits: FrameLimits = LIMITS, scratch: int = 256) -> Receiver:
    return Receiver(limits, scratch)


def server() -> ServerSession:
    session = ServerSession("secret", lambda: WELCOME)
    feed(session, frame_of(Message("hello", 0, {"protocol": 1, "token": "secret"})))
    assert session.greeted
    session.said = []
    return session


def said(session: ServerSession) -> Message:
    (message,) = feed(receiver(), b"".join(bytes(part) for part in session.said))
    return message


STREAM = [
    Message("pull", 1, {"epoch": 2}, {"ids": np.arange(3), "w": np.ones((2, 2), np.float32)}),
    Message("ping", 2),
    Message("push", 3, {"text": "x" * 600}, {"rows": np.arange(500, dtype=np.float32), "none": np.empty((0, 3))}),
    Message("empty", 4, {}, {"ids": np.empty(0, np.int64)}),
]
BYTES = b"".join(map(frame_of, STREAM))


def assert_same(got: list[Message], expected: list[Message]) -> None:
    assert [(m.op, m.request, m.fields) for m in got] == [(m.op, m.request, m.fields) for m in expected]
    for a, b in zip(got, expected, strict=True):
        assert list(a.arrays) == list(b.arrays)
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
            assert a.arrays[name].shape == b.arrays[name].shape


@pytest.mark.parametrize("step", [1, 2, 3, 7, 19, 20, 21, 64, 255, 256, 1000, None])
@pytest.mark.parametrize("scratch", [20, 100, 4096])
def test_a_stream_is_cut_alike_however_it_arrives(step, scratch):
    end = receiver(scratch=scratch)
    assert_same(feed(end, BYTES, step), STREAM)
    assert not end.inside


def test_truncated_at_each_byte_nothing_is_handed_out_until_the_rest_comes():
    frame = frame_of(STREAM[0])
    for cut in range(1, len(frame)):
        end = receiver()
        assert feed(end, frame[:cut]) == []
        assert end.inside
        assert_same(feed(end, frame[cut:]), STREAM[:1])


def test_received_arrays_are_their_own_memory():
    end = receiver(scratch=4096)
    (first,) = feed(end, frame_of(STREAM[0]))
    feed(end, frame_of(Message("pull", 9, {}, {"ids": np.full(50, -1)})))
    np.testing.assert_array_equal(first.arrays["ids"], [0, 1, 2])
    first.arrays["ids"][0] = 9


def test_big_bodies_are_received_where_they_stay():
    rows = np.arange(100_000, dtype=np.float32)
    frame = frame_of(Message("push", 1, {}, {"pad": np.ones(3, np.uint8), "rows": rows}))
    end = receiver()
    feed(end, frame[:1000])
    place = np.frombuffer(end.buffer(), np.uint8)
    (message,) = feed(end, frame[1000:])
    assert np.shares_memory(place, message.arrays["rows"])
    assert message.arrays["rows"].flags.aligned
    np.testing.assert_array_equal(message.arrays["rows"], rows)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
        b"\x00",
        bytes(64),
        b"\xff" * 64,
        b"EMBR" + b"\xff" * 16,
        b"*1\r\n$4\r\nPING\r\n",
        BYTES + b"x",
        BYTES + BYTES[1:],
    ],
)
@pytest.mark.parametrize("step", [1, None])
def test_bytes_of_other_protocols_are_refused(data, step):
    with pytest.raises(FrameError):
        feed(receiver(), data, step)
    session = server()
    feed(session, data, step)
    assert session.closing
    assert said(session).fields["error"] == "request"


@settings(max_examples=400)
@given(st.data())
def test_mutated_frames_end_in_a_message_or_a_frame_error(data):
    frame = bytearray(frame_of(data.draw(st.sampled_from(STREAM))))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "double"]))
        at = data.draw(st.integers(0, max(0, min(len(frame) - 1, 120))))
        if kind == "flip" and frame:
            frame[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del frame[at : at + data.draw(st.integers(1, 30))]
        elif kind == "insert":
            frame[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            frame += frame[at:]
    end = receiver(FrameLimits(header_max=2000, body_max=4000, arrays_max=4))
    told = None
    try:
        for message in feed(end, bytes(frame), data.draw(st.sampled_from([None, 1, 17]))):
            assert sum(array.nbytes for array in message.arrays.values()) <= 4000
    except FrameError as error:
        told = error
    assert told is None or len(str(told)) < 400


numbers = st.one_of(st.integers(-5, 2**64 - 1), st.floats(), st.booleans())
leaf = st.one_of(numbers, st.text(max_size=4), st.none(), st.binary(max_size=4))
tree = st.recursive(leaf, lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=3), c, max_size=3))
described = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(["a", "b"]), leaf),
        st.one_of(st.sampled_from(["<i8", "|u1", "<f4", "|O", "|b1", ">i4"]), leaf),
        st.one_of(st.lists(st.one_of(st.integers(-1, 5), st.integers(0, 2**63)), max_size=4), leaf),
    ),
    max_size=3,
)


@settings(max_examples=400)
@given(st.one_of(tree, st.tuples(tree, tree, tree, st.one_of(tree, described)).map(list)), st.integers(0, 80))
def test_any_header_ends_in_a_message_or_a_frame_error(plain, body):
    header = msgpack.packb(plain)
    data = PREFIX.pack(b"EMBR", 1, 0, len(header), body) + header + bytes(body)
    told = None
    try:
        messages = feed(receiver(FrameLimits(header_max=10_000, body_max=4000, arrays_max=4)), data)
        assert len(messages) == 1
    except FrameError as error:
        told = error
    assert told is None or len(str(told)) < 400


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_leave_a_session_usable_or_closing(chunks):
    for session in (ServerSession("secret", lambda: WELCOME), server()):
        for chunk in chunks:
            feed(session, chunk)
            if session.closing:
                assert said(session).op == "error"
                break
        assert not session.greeted or not session.said or session.closing


def test_huge_lengths_are_refused_before_anything_is_allocated():
    header = msgpack.packb(["push", 1, {}, [["rows", "|u1", [2**28]]]])
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            feed(receiver(FrameLimits(body_max=2**20)), PREFIX.pack(b"EMBR", 1, 0, len(header), 2**28) + header)
        with pytest.raises(FrameError):
            feed(receiver(), PREFIX.pack(b"EMBR", 1, 0, len(header), 2**27) + header)
        with pytest.raises(FrameError):
            feed(receiver(), PREFIX.pack(b"EMBR", 1, 0, 2**31, 0))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# -- the handshake


def refused(fields: dict, op: str = "hello", token: str = "secret") -> Message:
    session = ServerSession(token, lambda: WELCOME)
    assert feed(session, frame_of(Message(op, 8, fields))) == []
    assert session.closing
    assert not session.greeted
    return said(session)


@pytest.mark.parametrize(
    ("fields", "op", "code", "match"),
    [
        ({"protocol": 1, "token": "wrong"}, "hello", "auth", "token"),
        ({"protocol": 1, "token": ""}, "hello", "auth", "token"),
        ({"protocol": 1}, "hello", "auth", "token"),
        ({"protocol": 1, "token": "secret" + "x" * 2000}, "hello", "request", "at most 1024"),
        ({"protocol": 1, "token": 5}, "hello", "request", "text"),
        ({"protocol": 2, "token": "secret"}, "hello", "request", "protocol version 2"),
        ({"token": "secret"}, "hello", "request", "protocol"),
        ({"protocol": 1, "token": "secret", "fingerprint": "other"}, "hello", "auth", "fingerprint 'other'"),
        ({"protocol": 1, "token": "secret", "incarnation": 78}, "hello", "wrong_view", "incarnation 78"),
        ({"protocol": 1, "token": "secret", "incarnation": "x"}, "hello", "request", "incarnation"),
        ({"protocol": 1, "token": "secret"}, "pull", "auth", "must be"),
    ],
)
def test_hellos_that_are_refused(fields, op, code, match):
    answer = refused(fields, op)
    assert (answer.op, answer.request) == ("error", 8)
    assert answer.fields["error"] == code
    assert match in answer.fields["message"]
    assert "secret" not in answer.fields["message"]


def test_both_sides_agree_and_talk():
    session = ServerSession("secret", lambda: WELCOME)
    client = ClientSession(Hello("secret", incarnation=77, fingerprint="fp", client=2**64 - 1))
    assert feed(session, b"".join(map(bytes, client.hello())), 5) == []
    assert feed(client, b"".join(map(bytes, session.said)), 5) == []
    assert client.welcome == WELCOME
    numbers = []
    for op in ("pull", "push"):
        number, frame = client.request(op, {"epoch": 3}, {"ids": np.arange(2)}, 50)
        numbers.append(number)
        (request,) = feed(session, b"".join(map(bytes, frame)))
        assert (request.op, request.request) == (op, number)
        assert request.fields == {"epoch": 3, "deadline_ms": 50}
    for number in reversed(numbers):
        (reply,) = feed(client, frame_of(Message("ok", number, {"n": number})))
        assert (reply.request, reply.fields["n"]) == (number, number)
    assert not client.pending


def test_nothing_may_follow_a_hello_before_its_welcome():
    hello = frame_of(Message("hello", 0, {"protocol": 1, "token": "secret"}))
    for rest in (frame_of(Message("ping", 1)), b"EMBR"):
        session = ServerSession("secret", lambda: WELCOME)
        assert feed(session, hello + rest) == []
        assert session.closing


def test_before_the_handshake_neither_side_takes_more_than_a_tiny_frame():
    big = Message("hello", 0, {"protocol": 1, "token": "x" * HANDSHAKE_LIMITS.header_max})
    arrays = Message("hello", 0, {"protocol": 1, "token": "secret"}, {"a": np.zeros(1, np.uint8)})
    for message in (big, arrays):
        session = ServerSession("secret", lambda: WELCOME)
        feed(session, frame_of(message))
        assert session.closing
        with pytest.raises(FrameError):
            feed(ClientSession(Hello()), frame_of(message))


def test_a_stranger_claims_no_more_than_64_kib():
    sessions = []
    garbage = PREFIX.pack(b"EMBR", 1, 0, HANDSHAKE_LIMITS.header_max, 0) + bytes(HANDSHAKE_LIMITS.header_max - 1)
    tracemalloc.start()
    try:
        for _ in range(50):
            sessions.append(ServerSession("secret", lambda: WELCOME))
            feed(sessions[-1], garbage)
            assert len(sessions[-1].buffer()) <= SCRATCH_BEFORE
        assert tracemalloc.get_traced_memory()[1] / len(sessions) <= 64 * 1024
    finally:
        tracemalloc.stop()


def test_after_the_handshake_the_buffer_grows_only_to_the_header_limit():
    session = ServerSession("", lambda: WELCOME, FrameLimits(header_max=100_000))
    feed(session, frame_of(Message("hello", 0, {"protocol": 1})))
    assert len(session.buffer()) == SCRATCH_AFTER
    (message,) = feed(session, frame_of(Message("x", 1, {"text": "y" * 99_000})))
    assert len(message.fields["text"]) == 99_000
    feed(session, frame_of(Message("x", 1, {"text": "y" * 100_000})))
    assert session.closing


@pytest.mark.parametrize("error", [AuthError("no"), WrongView("no", 4), RequestError("no"), Overloaded("no")])
def test_a_refusal_is_raised_in_its_own_class(error):
    with pytest.raises(type(error), match="no"):
        feed(ClientSession(Hello()), frame_of(Message("error", 0, error_fields(error))))


@pytest.mark.parametrize("fields", [{"epoch": "x"}, {"cluster": 1.5}, {"name": None}])
def test_a_malformed_welcome_is_refused(fields):
    with pytest.raises(FrameError, match="wrong type"):
        feed(ClientSession(Hello()), frame_of(Message("welcome", 0, fields)))
    with pytest.raises(FrameError, match="must be"):
        feed(ClientSession(Hello()), frame_of(Message("ok", 0, fields)))


def test_replies_that_nobody_asked_for():
    client = ClientSession(Hello())
    feed(client, frame_of(Message("welcome", 0)))
    number, _ = client.request("pull", {}, {}, 10)
    client.forget(number)
    assert feed(client, frame_of(Message("ok", number))) == []
    for stray in (Message("ok", number + 1), Message("pull", number)):
        with pytest.raises(FrameError, match="nobody asked"):
            feed(client, frame_of(stray))


def test_a_server_that_gives_up_the_stream_leaves_requests_undecided():
    client = ClientSession(Hello())
    feed(client, frame_of(Message("welcome", 0)))
    client.request("push", {}, {}, 10)
    with pytest.raises(PerhapsApplied, match="flags"):
        feed(client, frame_of(Message("error", 0, error_fields(EmbringError("flags are wrong")))))


def test_a_request_beyond_the_limits_is_not_numbered():
    client = ClientSession(Hello(), FrameLimits(body_max=10))
    with pytest.raises(FrameError):
        client.request("pull", {}, {"ids": np.arange(2)}, 10)
    assert client.request("pull", {}, {}, 10)[0] == 1
