"""The HTTP door, seen through unmodified tritonclient, requests, curl and a raw socket."""

import gzip
import json
import logging
import shutil
import socket
import subprocess
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from ps import NotApplied, Overloaded, PerhapsApplied, RequestError
from router import http_door
from router.errors import NonFiniteScore
from router.http_door import serve_http
from router.oip_codec import Limits
from tests.router.doors_fake import Beside, FakeRouter

requests = pytest.importorskip("requests")
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def fake() -> FakeRouter:
    return FakeRouter()


@pytest.fixture(scope="module")
def served(fake: FakeRouter) -> Iterator[str]:
    beside = Beside()
    door = beside.run(serve_http(fake, "127.0.0.1", 0, Limits(bytes_max=1 << 20)))
    yield f"127.0.0.1:{door.port}"
    beside.close(door.stop)


@pytest.fixture
def address(served: str, fake: FakeRouter) -> str:
    fake.error, fake.hold, fake.is_ready = None, False, True
    return served


def body() -> dict[str, object]:
    return {
        "id": "r1",
        "inputs": [
            {"name": "user", "datatype": "BYTES", "shape": [3, 1], "data": [["ann"], ["bé"], [""]]},
            {"name": "item", "datatype": "INT64", "shape": [4], "data": [7, 8, 9, 10]},
            {"name": "item.offsets", "datatype": "INT64", "shape": [4], "data": [0, 1, 1, 4]},
            {"name": "dense", "datatype": "FP32", "shape": [3, 2], "data": [[0.5, 1], [0, 0], [1, 1]]},
        ],
    }


EXPECTED = [3 + 7 + 1.5, 3, 0 + 27 + 2]


def post(address: str, content: object, path: str = "ctr/infer", **headers: str) -> object:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return requests.post(f"http://{address}/v2/models/{path}", data=data, headers=headers, timeout=TIMEOUT)


def test_plain_json(address: str) -> None:
    reply = post(address, body())
    assert reply.status_code == 200
    assert reply.json() == {
        "model_name": "ctr",
        "model_version": "2",
        "id": "r1",
        "parameters": {"absent": 3},
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [3], "data": EXPECTED}],
    }
    assert post(address, body(), "ctr/versions/1/infer").json()["model_version"] == "1"


def test_curl(address: str) -> None:
    curl = shutil.which("curl")
    if not curl:
        pytest.skip("curl is not installed")
    command = [curl, "-sS", "--max-time", "30", "-d", json.dumps(body()), f"http://{address}/v2/models/ctr/infer"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["outputs"][0]["data"] == EXPECTED


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient(address: str, binary: bool, compression: str | None) -> None:
    triton = pytest.importorskip("tritonclient.http")
    utils = pytest.importorskip("tritonclient.utils")
    arrays = {
        "user": np.array([b"ann", "bé".encode(), b""], object),
        "item": np.array([7, 8, 9, 10], np.int64),
        "item.offsets": np.array([0, 1, 1, 4], np.int64),
        "dense": np.array([[0.5, 1], [0, 0], [1, 1]], np.float32),
    }
    inputs = []
    for name, array in arrays.items():
        kind = {"O": "BYTES", "i": "INT64", "f": "FP32"}[array.dtype.kind]
        inputs.append(triton.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    with triton.InferenceServerClient(address) as client:
        for outputs in (None, [triton.InferRequestedOutput("scores", binary_data=binary)]):
            reply = client.infer(
                "ctr", inputs, outputs=outputs, request_id="r2", request_compression_algorithm=compression
            )
            assert reply.as_numpy("scores").tolist() == EXPECTED
            assert reply.get_response()["id"] == "r2"
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("ctr", "2")
        assert not client.is_model_ready("nope")
        assert client.get_model_metadata("ctr", "1")["versions"] == ["1", "2"]
        with pytest.raises(utils.InferenceServerException, match="'nope'"):
            client.infer("nope", inputs)


def test_health_and_metadata(address: str, fake: FakeRouter) -> None:
    def get(path: str) -> object:
        return requests.get(f"http://{address}{path}", timeout=TIMEOUT)

    assert get("/v2").json()["name"] == "embring"
    assert get("/v2/models/ctr").json()["inputs"][0] == {"name": "user", "datatype": "BYTES", "shape": [-1]}
    assert get("/v2/models/ctr/versions/1").json()["platform"] == "embring"
    for path in ("/v2/health/ready", "/v2/models/ctr/ready", "/v2/models/ctr/versions/1/ready"):
        for ready, status in ((True, 200), (False, 503)):
            fake.is_ready = ready
            assert get(path).status_code == status
    assert get("/v2/health/live").json() == {"live": True}
    for path, says in (
        ("nope", "there is no model 'nope'; there are: ctr"),
        ("nope/ready", "there is no model 'nope'; there are: ctr"),
        ("ctr/versions/9", "model 'ctr' has no version '9'; it has 1, 2"),
    ):
        reply = get(f"/v2/models/{path}")
        assert (reply.status_code, reply.json()["error"]) == (404, says)
    for path in ("/", "/v2/nothing"):
        assert get(path).status_code == 404
        assert path in get(path).json()["error"]
    assert get("/v2/models/ctr/infer").status_code == 405


def test_metrics(address: str) -> None:
    def count() -> float:
        text = requests.get(f"http://{address}/metrics", timeout=TIMEOUT).text
        wanted = 'embring_door_requests_total{door="http",method="ModelInfer",status="404"} '
        return sum(float(line.removeprefix(wanted)) for line in text.splitlines() if line.startswith(wanted))

    before = count()
    for _ in range(3):
        post(address, body(), "nope/infer")
    assert count() == before + 3
    assert "fake_router_requests_total 7.0" in requests.get(f"http://{address}/metrics", timeout=TIMEOUT).text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("input 'x' is odd"), 400),
        (Overloaded("the queue holds 9 requests; 9 are the most"), 503),
        (NonFiniteScore("model 'ctr' version 2 gave row 0 the score nan"), 500),
        (NotApplied("no server answers"), 503),
        (PerhapsApplied("no answer in 1 s"), 504),
        (TimeoutError("too late"), 504),
    ],
)
def test_errors_have_their_status(address: str, fake: FakeRouter, error: Exception, status: int) -> None:
    fake.error = error
    reply = post(address, body())
    assert (reply.status_code, reply.json()) == (status, {"error": str(error)})


def test_what_is_not_foreseen_shows_no_trace(address: str, fake: FakeRouter) -> None:
    fake.error = ZeroDivisionError("secret detail")
    reply = post(address, body())
    assert reply.status_code == 500
    assert "ZeroDivisionError" in reply.json()["error"]
    assert "secret" not in reply.text


def test_deadline_parameter(address: str, fake: FakeRouter) -> None:
    fake.hold = True
    reply = post(address, {**body(), "parameters": {"timeout": 20_000}})
    assert reply.status_code == 504
    assert "0.02 s" in reply.json()["error"]


def item(**changes: object) -> dict[str, object]:
    one = {"name": "item", "datatype": "INT64", "shape": [1], "data": [1]}
    one.update(changes)
    return {"inputs": [{key: value for key, value in one.items() if value is not None}]}


@pytest.mark.parametrize(
    ("content", "headers", "says"),
    [
        (b"", {}, "JSON"),
        (b"{", {}, "JSON"),
        (b"[" * 100_000, {}, "JSON"),
        (b"\xff\xfe{", {}, "JSON"),
        (b"[]", {}, "object"),
        ({}, {}, "no inputs"),
        ({"inputs": {}}, {}, "'inputs'"),
        ({"inputs": [1]}, {}, "an input"),
        (item(name=5), {}, "'name'"),
        (item(shape="1"), {}, "'shape'"),
        (item(shape=[1.5]), {}, "whole numbers"),
        (item(shape=[True]), {}, "whole numbers"),
        (item(datatype=None), {}, "datatype none"),
        (item(data="1"), {}, "'data'"),
        (item(data=[[[1]]]), {}, "[1]"),
        (item(data=[1, 2]), {}, "2 values"),
        (item(data=None, parameters={"binary_data_size": 8}), {}, "0 bytes are left"),
        (item(data=None, parameters={"binary_data_size": -1}), {}, "-1"),
        (item(data=None, parameters={"binary_data_size": "8"}), {}, "'8'"),
        (item(parameters=[]), {}, "'parameters'"),
        ({**item(), "outputs": [{"name": "other"}]}, {}, "'other'"),
        ({**item(), "parameters": {"timeout": "soon"}}, {}, "'soon'"),
        (item(), {"Inference-Header-Content-Length": "999999"}, "'999999'"),
        ({**item(), "parameters": {"timeout": 10**400}}, {}, "'timeout' is 1000"),
        ({**item(), "parameters": {"timeout": "9" * 5000}}, {}, "'timeout' is '9999"),
        (item(), {"Inference-Header-Content-Length": "-1"}, "'-1'"),
        (item(), {"Inference-Header-Content-Length": "9" * 5000}, "Inference-Header-Content-Length is '9999"),
        (item(), {"Content-Encoding": "gzip"}, "cannot be read as gzip"),
        (b"", {"Content-Encoding": "gzip"}, "as gzip: it must be one whole stream"),
        (gzip.compress(b"{}", mtime=0)[:-1], {"Content-Encoding": "gzip"}, "as gzip: it must be one whole stream"),
        (gzip.compress(b"{}", mtime=0) * 2, {"Content-Encoding": "gzip"}, "as gzip: it must be one whole stream"),
        (b"x" * 40, {"Content-Encoding": "deflate"}, "cannot be read as deflate"),
        (item(), {"Content-Encoding": "zstd"}, "Content-Encoding is 'zstd'; it must be gzip, deflate or identity"),
        (item(), {"Content-Encoding": "br"}, "Content-Encoding is 'br'; it must be gzip, deflate or identity"),
        (item(), {"Content-Encoding": "gzip, gzip"}, "'gzip, gzip'; it must be"),
        (item(), {"Content-Encoding": "snappy"}, "'snappy'; it must be"),
        (
            json.dumps(item()).encode() + b"xy",
            {"Inference-Header-Content-Length": str(len(json.dumps(item())))},
            "2 bytes",
        ),
    ],
)
def test_bad_requests_meet_one_sentence(address: str, content: object, headers: dict[str, str], says: str) -> None:
    reply = post(address, content, **headers)
    assert reply.status_code == 400, reply.text
    assert says in reply.json()["error"]
    assert "Traceback" not in reply.text


def test_bodies_in_every_encoding_that_is_accepted(address: str) -> None:
    plain = json.dumps(body()).encode()
    bare = zlib.compressobj(wbits=-15)
    for encoding, data in (
        ("identity", plain),
        ("GZIP", gzip.compress(plain)),
        ("deflate", zlib.compress(plain)),
        ("deflate", bare.compress(plain) + bare.flush()),
    ):
        assert post(address, data, **{"Content-Encoding": encoding}).json()["outputs"][0]["data"] == EXPECTED


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_body_beyond_the_limit_is_refused(address: str, encoding: str) -> None:
    data = bytes(2 << 20) if encoding == "identity" else gzip.compress(bytes(2 << 20))
    reply = post(address, data, **{"Content-Encoding": encoding})
    assert reply.status_code == 413
    assert "1048576 bytes are the most allowed" in reply.json()["error"]


def raw(address: str, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what the door answers to these bytes, until it closes."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as wire:
        wire.sendall(sent)
        answered = b"".join(iter(lambda: wire.recv(1 << 16), b""))
    head, _, body = answered.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


INFER = "POST /v2/models/ctr/infer"


@pytest.mark.parametrize(
    ("first", "rest", "status", "says"),
    [
        (INFER, "Content-Length: 0\r\nContent-Encoding: zstd\r\n\r\n", 400, "'zstd'; it must be gzip"),
        (INFER, "Content-Length: 0\r\nExpect: a miracle\r\n\r\n", 417, "a miracle"),
        ("GET /v3", "Expect: a miracle\r\n\r\n", 417, "a miracle"),
        ("GET /v3", "\r\n", 404, "there is nothing at '/v3'"),
        ("GET /v2/a%0Ab", "\r\n", 404, "there is nothing at '/v2/a\\nb'"),
        ("GET /v2/models/ctr/infer", "\r\n", 405, "GET is not allowed at '/v2/models/ctr/infer'; it takes POST"),
        ("DELETE /v2", "\r\n", 405, "it takes GET, HEAD"),
        ("OPTIONS *", "\r\n", 404, "'*'"),
        ("GET /v2/" + "a" * 9000, "\r\n", 400, "8190 bytes"),
        ("GET http://[::1/v2", "\r\n", 400, "http://[::1/v2"),
        ("F(OO /v2", "\r\n", 400, "F(OO"),
        (INFER, "X-A: " + "a" * 9000 + "\r\n\r\n", 400, "8190 bytes"),
        (INFER, "X Y: 1\r\n\r\n", 400, "X Y: 1"),
        (INFER, "Content-Length: x\r\n\r\n", 400, "Content-Length: x"),
        (INFER, "Content-Length: 1\r\nContent-Length: 1\r\n\r\n1", 400, "Content-Length: 1"),
        (INFER, "Transfer-Encoding: gzip\r\n\r\nx", 400, "Transfer-Encoding"),
        (INFER, "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "zz"),
        (INFER, "Transfer-Encoding: chunked\r\n\r\n200000\r\n" + "x" * 0x200000 + "\r\n0\r\n\r\n", 413, "1048576"),
    ],
)
def test_what_the_http_library_refuses_is_json_too(
    address: str, caplog: pytest.LogCaptureFixture, first: str, rest: str, status: int, says: str
) -> None:
    sent = f"{first} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{rest}".encode()
    found, headers, answered = raw(address, sent)
    assert (found, headers["Content-Type"]) == (status, "application/json; charset=utf-8"), answered
    assert set(json.loads(answered)) == {"error"}
    message = json.loads(answered)["error"]
    assert says in message
    assert "\n" not in message
    assert len(message) < 400
    assert status != 405 or headers["Allow"] in message
    assert not caplog.records


def test_a_client_that_leaves_in_mid_body_is_no_failure_of_ours(address: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for rest in (b"Content-Length: 500\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as wire:
            wire.sendall(f"{INFER} HTTP/1.1\r\nHost: x\r\n".encode() + rest)
    assert post(address, body()).status_code == 200
    assert not caplog.records


def test_a_body_that_does_not_come_is_not_waited_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_door, "BODY_S", 0.05)
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as wire:
        wire.sendall(f"{INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf".encode())
        answered = b""
        while not answered.endswith(b"}"):
            answered += wire.recv(1 << 16)
        wire.sendall(b"a half")  # the rest is read, so that a client which sends it sees the answer
    assert answered.startswith(b"HTTP/1.1 408 ")
    assert b"the request's body did not come within 0.05 s" in answered
    assert post(address, body()).status_code == 200


def test_other_protocols_do_not_stop_it(address: str) -> None:
    host, port = address.split(":")
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 64, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as raw:
            raw.sendall(noise)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    assert post(address, body()).status_code == 200
