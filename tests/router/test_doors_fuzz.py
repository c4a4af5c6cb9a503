"""Valid requests, mutated: both doors answer each with scores or with whose fault it is, in time, and log nothing."""

import copy
import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("requests")

from router import oip
from router.http_door import HEADER_LENGTH
from tests.router.doors_real import GOOD, Doors, grpc_message, http_body, opened, raw

EXAMPLES = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
ANSWERS = (200, 400, 413, 504, "OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED")
"""A mutated request may name another model or a time that passes at once; 500 and INTERNAL are never its fault."""


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    with opened(tmp_path_factory.mktemp("models")) as found:
        yield found


def answered(doors: Doors, answer: tuple[int | str, str]) -> None:
    status, message = answer
    assert status in ANSWERS, answer
    assert "\n" not in message
    assert bool(message) is (status not in (200, "OK"))
    assert not doors.logged.take()


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 10**4000])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["INT64", "FP32", "BYTES", "user", "words", "price", "user.offsets", "scores", ".offsets"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def plain_request() -> dict[str, Any]:
    request = json.loads(http_body(GOOD, outputs=1)[0])
    request.update(id="r", parameters={"timeout": 10_000_000, "binary_data_output": False})
    request["outputs"][0]["parameters"] = {"binary_data": True}
    request["inputs"][0]["parameters"] = {}
    return request


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@st.composite
def json_requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request with one to three places replaced, taken away or doubled."""
    request = copy.deepcopy(plain_request())
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(request))
        if not found:
            break
        holder, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "remove", "double"])):
            case "replace":
                holder[key] = draw(anything)
            case "remove":
                del holder[key]
            case _ if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
    return request


@st.composite
def torn(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with one to three pieces replaced, cut out or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(whole)))
        whole = whole[:at] + draw(st.binary(max_size=6)) + whole[at + draw(st.integers(0, 6)) :]
    return whole


@EXAMPLES
@given(json_requests())
def test_json_with_other_values(doors: Doors, request_: dict[str, Any]) -> None:
    answered(doors, doors.http(json.dumps(request_).encode()))


@EXAMPLES
@given(st.data(), st.sampled_from(["", "", "gzip", "gzip", "deflate", "br", "zstd", "identity"]))
def test_bodies_with_other_bytes(doors: Doors, data: st.DataObject, encoding: str) -> None:
    head = plain_request()
    for one, (_, kind, _, values) in zip(head["inputs"], GOOD, strict=True):
        del one["data"]
        one["parameters"] = {"binary_data_size": len(raw(kind, values))}
    begin, end = json.dumps(head).encode(), b"".join(raw(kind, values) for _, kind, _, values in GOOD)
    where = data.draw(st.sampled_from(["numbers", "numbers", "JSON", "anywhere"]))
    if where == "numbers":
        end = data.draw(torn(end))
    elif where == "JSON":
        begin = data.draw(torn(begin))
    sent = gzip.compress(begin + end, mtime=0) if encoding == "gzip" else begin + end
    if where == "anywhere":
        sent = data.draw(torn(sent))
    length = data.draw(st.sampled_from([str(len(begin))] * 6 + ["0", "-1", "1e3", str(len(begin + end) + 1)]))
    headers = {"Content-Encoding": encoding} if encoding else {}
    answered(doors, doors.http(sent, **headers, **{HEADER_LENGTH: length}))


int64s = st.integers(-(2**63), 2**63 - 1)


@st.composite
def grpc_requests(draw: st.DrawFn) -> bytes:
    """A message with a field of one input, or of the request, replaced; raw or by type."""
    message = grpc_message(GOOD, outputs=draw(st.sampled_from([0, 0, 1, 2])))
    one = message.inputs[draw(st.integers(0, 2))]
    if draw(st.booleans()):
        del message.raw_input_contents[:]
        message.inputs[0].contents.int64_contents[:] = [1, 2]
        message.inputs[1].contents.bytes_contents[:] = [b"a", b"b c"]
        message.inputs[2].contents.fp32_contents[:] = [1.5, 2]
    for change in draw(st.lists(st.integers(0, 8), min_size=1, max_size=3)):
        match change:
            case 0:
                one.name = draw(st.text(max_size=8) | st.sampled_from(["user", "price", "user.offsets"]))
            case 1:
                one.datatype = draw(st.sampled_from(["INT64", "FP32", "BYTES", "BOOL", "UINT8", "", "?"]))
            case 2:
                one.shape[:] = draw(st.lists(int64s | st.integers(-2, 4), max_size=3))
            case 3:
                one.contents.int64_contents[:] = draw(st.lists(int64s, min_size=1, max_size=3))
            case 4:
                one.contents.bytes_contents[:] = draw(st.lists(st.binary(max_size=5), max_size=3))
            case 5:
                one.contents.fp32_contents[:] = draw(st.lists(st.floats(width=32), max_size=3))
            case 6 if message.raw_input_contents:
                message.raw_input_contents[draw(st.integers(0, 2))] = draw(st.binary(max_size=24))
            case 7:
                message.parameters["timeout"].CopyFrom(draw(parameters))
            case _:
                message.inputs.add().CopyFrom(one)
    return message.SerializeToString()


parameters = st.one_of(
    st.builds(lambda v: oip.messages.InferParameter(int64_param=v), int64s),
    st.builds(lambda v: oip.messages.InferParameter(string_param=v), st.text(max_size=9)),
    st.builds(lambda v: oip.messages.InferParameter(bool_param=v), st.booleans()),
    st.just(oip.messages.InferParameter()),
)


@EXAMPLES
@given(grpc_requests())
def test_messages_with_other_fields(doors: Doors, sent: bytes) -> None:
    answered(doors, doors.grpc(sent))


@EXAMPLES
@given(torn(grpc_message(GOOD, outputs=1).SerializeToString()))
def test_messages_with_other_bytes(doors: Doors, sent: bytes) -> None:
    answered(doors, doors.grpc(sent))
