"""Frames against a plain reading of their layout; shares, views and errors there and back."""

import math
import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashring.planner import CreateTable, Join, plan
from hashring.view import Server, View
from ps.errors import ERRORS, EmbringError, RequestError, SlotsLost, WrongView
from ps.share import PullShare, PushShare, features_of
from ps.wire import (
    DTYPES,
    JOIN_MAX,
    FrameError,
    FrameLimits,
    Message,
    decode_header,
    decode_prefix,
    encode,
    error_fields,
    pack_plain,
    pull_message,
    pull_share,
    push_message,
    push_share,
    raise_error,
    unpack_plain,
    view_message,
    view_of,
)


def read_plainly(frame: bytes) -> Message:
    """A frame by the letter of its layout, one field after another."""
    assert frame[:4] == b"EMBR"
    assert int.from_bytes(frame[4:6], "little") == 1
    assert int.from_bytes(frame[6:8], "little") == 0
    header = int.from_bytes(frame[8:12], "little")
    body = int.from_bytes(frame[12:20], "little")
    op, request, fields, described = msgpack.unpackb(frame[20 : 20 + header])
    rest = frame[20 + header :]
    assert len(rest) == body
    arrays, at = {}, 0
    for name, code, shape in described:
        size = int(code[2:]) * math.prod(shape)
        while size and at % 64:
            assert rest[at] == 0
            at += 1
        arrays[name] = np.frombuffer(rest[at : at + size], code).reshape(shape)
        at += size
    assert at == body
    return Message(op, request, fields, arrays)


def frame_of(message: Message) -> bytes:
    return b"".join(bytes(part) for part in encode(message))


arrays_strategy = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.builds(
        lambda code, shape, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(code),
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.integers(0, 1000),
    ),
    max_size=6,
)
numbers = st.integers(-(2**63), 2**64 - 1)
plain = st.one_of(numbers, st.text(max_size=5), st.booleans(), st.none(), st.binary(max_size=5))
messages = st.builds(
    Message,
    st.text(min_size=1, max_size=32),
    st.integers(0, 2**63 - 1),
    st.dictionaries(st.text(max_size=6), plain, max_size=4),
    arrays_strategy,
)


@given(messages)
def test_frames_are_laid_out_as_written(message):
    got = read_plainly(frame_of(message))
    assert (got.op, got.request, got.fields) == (message.op, message.request, message.fields)
    assert list(got.arrays) == list(message.arrays)
    for name, array in message.arrays.items():
        assert got.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(got.arrays[name], array)


def test_a_frame_never_changes_its_bytes():
    message = Message("pull", 7, {"epoch": 3}, {"ids": np.array([1, -1], np.int64), "w": np.array([0.5], np.float32)})
    prefix = "454d425201000000240000004400000000000000"
    header = b"\x94\xa4pull\x07\x81\xa5epoch\x03\x92\x93\xa3ids\xa3<i8\x91\x02\x93\xa1w\xa3<f4\x91\x01"
    body = struct.pack("<qq48xf", 1, -1, 0.5)
    assert frame_of(message) == bytes.fromhex(prefix) + header + body


def test_big_arrays_leave_without_a_copy():
    array = np.zeros(JOIN_MAX, np.uint8)
    parts = encode(Message("push", 1, {}, {"rows": array}))
    assert len(parts) == 2
    assert np.shares_memory(np.frombuffer(parts[1], np.uint8), array)


def test_strided_arrays_are_sent_as_their_values():
    array = np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2].T
    got = read_plainly(frame_of(Message("x", 1, {}, {"a": array})))
    np.testing.assert_array_equal(got.arrays["a"], array)


@pytest.mark.parametrize("dtype", ["bool", "complex64", "object", ">i8", "U3", "datetime64[s]"])
def test_types_that_do_not_travel_are_named(dtype):
    with pytest.raises(FrameError, match="array 'a' has dtype"):
        encode(Message("x", 1, {}, {"a": np.zeros(2, dtype)}))


def test_each_limit_holds_when_sending():
    limits = FrameLimits(header_max=200, body_max=64, arrays_max=2)
    with pytest.raises(FrameError, match=r"header has 31. bytes; the limit is 200"):
        encode(Message("x", 1, {"text": "a" * 300}), limits)
    with pytest.raises(FrameError, match="arrays have 65 bytes; the limit is 64"):
        encode(Message("x", 1, {}, {"a": np.zeros(65, np.uint8)}), limits)
    with pytest.raises(FrameError, match="3 arrays; the limit is 2"):
        encode(Message("x", 1, {}, {n: np.zeros(0, np.uint8) for n in "abc"}), limits)
    encode(Message("x", 1, {}, {"a": np.zeros(64, np.uint8)}), limits)


LIMITS = FrameLimits(header_max=1000, body_max=1000, arrays_max=3)


@pytest.mark.parametrize(
    ("prefix", "match"),
    [
        ((b"EMBS", 1, 0, 10, 0), "carries b'EMBS'"),
        ((b"EMBR", 2, 0, 10, 0), "version 2; this side speaks version 1"),
        ((b"EMBR", 0, 0, 10, 0), "version 0"),
        ((b"EMBR", 1, 1, 10, 0), "flags 0x0001"),
        ((b"EMBR", 1, 0, 0, 0), "0 bytes"),
        ((b"EMBR", 1, 0, 1001, 0), "header has 1001 bytes; the limit is 1000"),
        ((b"EMBR", 1, 0, 2**32 - 1, 0), "header has 4294967295 bytes"),
        ((b"EMBR", 1, 0, 10, 1001), "arrays have 1001 bytes; the limit is 1000"),
        ((b"EMBR", 1, 0, 10, 2**64 - 1), "arrays have 18446744073709551615 bytes"),
    ],
)
def test_wrong_prefixes_are_named(prefix, match):
    with pytest.raises(FrameError, match=match):
        decode_prefix(struct.pack("<4sHHIQ", *prefix), 0, LIMITS)


@pytest.mark.parametrize(
    ("header", "body", "match"),
    [
        ({}, 0, r"must be \[op, request"),
        ([1, 2, 3], 0, r"must be \[op, request"),
        ([5, 1, {}, []], 0, "op must be text"),
        (["", 1, {}, []], 0, "op must be text"),
        (["x" * 33, 1, {}, []], 0, "op must be text"),
        (["x", -1, {}, []], 0, "request is -1"),
        (["x", 2**63, {}, []], 0, "request is"),
        (["x", True, {}, []], 0, "request is True"),
        (["x", 1, [], []], 0, "fields must be a map"),
        (["x", 1, {b"a": 1}, []], 0, "map from text"),
        (["x", 1, {}, {}], 0, "at most 3 arrays"),
        (["x", 1, {}, [["a", "|u1", [1]]] * 4], 1, "at most 3 arrays"),
        (["x", 1, {}, [["a", "|u1"]]], 0, "described as"),
        (["x", 1, {}, [[1, "|u1", [1]]]], 1, "array name '1'"),
        (["x", 1, {}, [["", "|u1", [1]]]], 1, "array name ''"),
        (["x", 1, {}, [["a", "|u1", [0]], ["a", "|u1", [0]]]], 0, "array name 'a'"),
        (["x", 1, {}, [["a", "|O", [1]]]], 8, "dtype '|O'"),
        (["x", 1, {}, [["a", ">i8", [1]]]], 8, "dtype '>i8'"),
        (["x", 1, {}, [["a", 3, [1]]]], 8, "dtype '3'"),
        (["x", 1, {}, [["a", "|u1", 1]]], 1, "shape"),
        (["x", 1, {}, [["a", "|u1", [1, 1, 1, 1]]]], 1, "up to 3"),
        (["x", 1, {}, [["a", "|u1", [-1]]]], 0, "size that is not 0 to"),
        (["x", 1, {}, [["a", "|u1", [1.0]]]], 1, "size that is not 0 to"),
        (["x", 1, {}, [["a", "|u1", [True]]]], 1, "size that is not 0 to"),
        (["x", 1, {}, [["a", "<f8", [2**30, 0]]]], 0, "size that is not 0 to"),
        (["x", 1, {}, [["a", "<f8", [2**29, 2**29, 2**29]]]], 100, "has 100 bytes; its arrays take"),
        (["x", 1, {}, [["a", "<f8", [2]]]], 15, "has 15 bytes; its arrays take 16"),
        (["x", 1, {}, [["a", "<f8", [2]]]], 17, "has 17 bytes; its arrays take 16"),
        (["x", 1, {}, []], 1, "has 1 bytes; its arrays take 0"),
    ],
)
def test_wrong_headers_are_named(header, body, match):
    with pytest.raises(FrameError, match=match):
        decode_header(msgpack.packb(header), body, LIMITS)


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x94", b"\x91" * 900, b"\xa1\xff", msgpack.packb([1]) + b"\x00"])
def test_headers_that_are_not_messagepack(header):
    with pytest.raises(FrameError):
        decode_header(header, 0, LIMITS)


# -- shares


def pull_of(**changed):
    given = {
        "features": features_of([1, 2], [2, 1], [0, 1], [0, 2]),
        "ids": np.array([5, 6, 7, 8], np.int64),
        "offsets": np.array([0, 1, 1, 4], np.int64),
    }
    return {name: array for name, array in {**given, **changed}.items() if array is not None}


def push_of(**changed):
    given = {
        "features": features_of([1], [2]),
        "ids": np.array([5, 6], np.int64),
        "rows": np.zeros(6, np.float32),
    }
    return {name: array for name, array in {**given, **changed}.items() if array is not None}


PUSH_FIELDS = {"client": 2**64 - 1, "sequence": 1, "kind": "push", "lr_scale": 0.5}


def same(a, b):
    assert type(a) is type(b)
    for name in a.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_shares_there_and_back():
    share = PullShare(**pull_of())
    same(pull_share(*pull_message(share)), share)
    weighted = PullShare(**pull_of(features=features_of([1, 2], [2, 1]), weights=np.ones(4, np.float32)))
    same(pull_share(*pull_message(weighted)), weighted)
    push = PushShare(**PUSH_FIELDS, **push_of(offsets=np.array([0, 0, 2]), weights=np.ones(2, np.float32)))
    same(push_share(*push_message(push)), push)
    delete = PushShare(client=0, sequence=9, kind="delete", **push_of(rows=np.empty(0, np.float32)))
    same(push_share(*push_message(delete)), delete)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"ids": None}, "array 'ids' is missing"),
        ({"features": None}, "array 'features' is missing"),
        ({"features": np.zeros((2, 4), np.int64)}, "'features' is <i8"),
        ({"features": np.zeros((2, 3), np.int32)}, "4 columns wide"),
        ({"features": np.zeros(8, np.int32)}, "4 columns wide"),
        ({"ids": np.zeros((4, 1), np.int64)}, "must be <i8, one-dimensional"),
        ({"offsets": np.zeros((2, 2), np.int64)}, "must be <i8, one-dimensional"),
        ({"weights": np.ones(4, np.float64)}, "must be <f4, one-dimensional"),
    ],
)
def test_wrong_pulls_are_named(changed, match):
    with pytest.raises(RequestError, match=match):
        pull_share({}, pull_of(**changed))


@pytest.mark.parametrize(
    ("fields", "changed", "match"),
    [
        ({"kind": "add"}, {}, "kind is 'add'"),
        ({"kind": None}, {}, "kind is 'None'"),
        ({"sequence": 0}, {}, "sequence is 0"),
        ({"sequence": "1"}, {}, "sequence is 1; it must be a whole number"),
        ({"client": -1}, {}, "client is -1"),
        ({"lr_scale": -1.0}, {}, "lr_scale is -1"),
        ({"lr_scale": math.nan}, {}, "lr_scale is nan"),
        ({"lr_scale": math.inf}, {}, "lr_scale is inf"),
        ({"kind": "assign"}, {"offsets": np.array([0, 1, 2])}, "assign takes single ids"),
        ({"kind": "delete"}, {"weights": np.ones(2, np.float32)}, "delete takes single ids"),
        ({}, {"rows": np.zeros(6, np.float64)}, "'rows' is <f8"),
    ],
)
def test_wrong_pushes_are_named(fields, changed, match):
    with pytest.raises(RequestError, match=match):
        push_share({**PUSH_FIELDS, **fields}, push_of(**changed))


# -- views and errors


def test_views_there_and_back():
    view = plan(View.empty(7, 4), Join((Server("a", 1, "h", addresses=("unix:/a",)), Server("b", 2, "h"))))
    view = plan(view, CreateTable("t", {"dim": 8}, "sharded", 1))
    fields, arrays = view_message(view)
    got = view_of(fields, arrays)
    assert got.to_plain() == view.to_plain()
    assert fields["view_epoch"] == view.epoch


@given(st.binary(max_size=60))
def test_no_bytes_crash_the_view(data):
    array = np.frombuffer(data, np.uint8)
    with pytest.raises(RequestError):
        view_of({}, {"view": array})


def test_plain_data_there_and_back():
    assert unpack_plain(pack_plain({"a": [1, {"b": None}]})) == {"a": [1, {"b": None}]}
    with pytest.raises(RequestError):
        unpack_plain(np.empty(0, np.uint8))


@pytest.mark.parametrize("cls", ERRORS.values())
def test_errors_there_and_back(cls):
    error = cls("no such thing")
    with pytest.raises(EmbringError, match="no such thing") as caught:
        raise_error(error_fields(error))
    assert type(caught.value) is cls


def test_errors_bring_their_details():
    with pytest.raises(WrongView) as wrong:
        raise_error(error_fields(WrongView("x", 12)))
    assert wrong.value.epoch == 12
    with pytest.raises(SlotsLost) as lost:
        raise_error(error_fields(SlotsLost("x", range(1000))))
    assert lost.value.slots == tuple(range(64))
    with pytest.raises(EmbringError):
        raise_error({"error": 5, "slots": "no"})
    assert len(error_fields(RequestError("x" * 10_000))["message"]) == 2000
