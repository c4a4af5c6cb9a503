"""The gRPC door, seen through unmodified tritonclient, our own stub, gRPC's health client and reflection."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from ps import NotApplied, Overloaded, PerhapsApplied, RequestError
from router import oip
from router.doors import SERVER_NAME
from router.errors import NonFiniteScore
from router.grpc_door import serve_grpc
from router.oip_codec import Limits
from tests.router.doors_fake import Beside, FakeRouter

triton = pytest.importorskip("tritonclient.grpc")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def fake() -> FakeRouter:
    return FakeRouter()


@pytest.fixture(scope="module")
def address(fake: FakeRouter) -> Iterator[str]:
    beside = Beside()
    door = beside.run(serve_grpc(fake, "127.0.0.1", 0, Limits(bytes_max=1 << 20)))
    yield f"127.0.0.1:{door.port}"
    beside.close(lambda: door.stop(0.1))


@pytest.fixture
def client(address: str, fake: FakeRouter) -> Iterator[object]:
    fake.error, fake.hold, fake.is_ready = None, False, True
    with triton.InferenceServerClient(address) as found:
        yield found


def inputs(**arrays: np.ndarray) -> list[object]:
    kinds = {"O": "BYTES", "i": "INT64", "f": "FP32"}
    made = []
    for name, array in arrays.items():
        one = triton.InferInput(name.replace("_", "."), array.shape, kinds[array.dtype.kind])
        one.set_data_from_numpy(array)
        made.append(one)
    return made


def batch() -> list[object]:
    return inputs(
        user=np.array([b"ann", "bé".encode(), b""], object),
        item=np.array([7, 8, 9, 10], np.int64),
        item_offsets=np.array([0, 1, 1, 4], np.int64),
        dense=np.array([[0.5, 1], [0, 0], [1, 1]], np.float32),
    )


EXPECTED = [3 + 7 + 1.5, 3, 0 + 27 + 2]


def test_tritonclient_scores_a_batch(client: object) -> None:
    reply = client.infer("ctr", batch(), request_id="r1", outputs=[triton.InferRequestedOutput("scores")])
    assert reply.as_numpy("scores").tolist() == EXPECTED
    assert reply.as_numpy("scores").dtype == np.float32
    response = reply.get_response()
    assert (response.id, response.model_name, response.model_version) == ("r1", "ctr", "2")
    assert response.parameters["absent"].int64_param == 3
    assert client.infer("ctr", batch(), model_version="1").get_response().model_version == "1"


def test_typed_contents_are_answered_by_type(address: str) -> None:
    request = oip.messages.ModelInferRequest(model_name="ctr")
    request.inputs.add(name="user", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", b"bcd"])
    request.inputs.add(name="item", datatype="INT64", shape=[2, 1]).contents.int64_contents.extend([-5, 2**40])
    request.inputs.add(name="age", datatype="FP32", shape=[2]).contents.fp32_contents.extend([0.25, 0])
    with grpc.insecure_channel(address) as channel:
        reply = oip.Stub(channel).ModelInfer(request, timeout=TIMEOUT)
    assert list(reply.outputs[0].contents.fp32_contents) == [-3.75, np.float32(2**40 + 3)]
    assert not reply.raw_output_contents


def test_health_and_metadata(client: object, address: str, fake: FakeRouter) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ctr", "1")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata().name == SERVER_NAME
    found = client.get_model_metadata("ctr")
    assert list(found.versions) == ["1", "2"]
    assert next((i.name, i.datatype, list(i.shape)) for i in found.inputs) == ("user", "BYTES", [-1])
    assert [o.name for o in found.outputs] == ["scores"]
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", oip.SERVICE):
            for ready in (True, False):
                fake.is_ready = ready
                status = check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT).status
                assert (status == health_pb2.HealthCheckResponse.SERVING) is ready


def test_reflection_describes_every_service(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = list(database.get_services())
        assert set(services) == {oip.SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        for service in services:
            assert database.FindFileContainingSymbol(service).service


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("input 'x' is odd"), "INVALID_ARGUMENT"),
        (Overloaded("the queue holds 9 requests; 9 are the most"), "RESOURCE_EXHAUSTED"),
        (NonFiniteScore("model 'ctr' version 2 gave row 0 the score nan"), "INTERNAL"),
        (NotApplied("no server answers"), "UNAVAILABLE"),
        (PerhapsApplied("no answer in 1 s"), "DEADLINE_EXCEEDED"),
        (TimeoutError(), "DEADLINE_EXCEEDED"),
    ],
)
def test_errors_have_their_status(client: object, fake: FakeRouter, error: Exception, code: str) -> None:
    fake.error = error
    with pytest.raises(InferenceServerException) as caught:
        client.infer("ctr", batch())
    assert caught.value.status() == f"StatusCode.{code}"
    assert str(error) in caught.value.message()


def test_what_is_not_foreseen_shows_no_trace(client: object, fake: FakeRouter) -> None:
    fake.error = ZeroDivisionError("secret detail")
    with pytest.raises(InferenceServerException, match="ZeroDivisionError") as caught:
        client.infer("ctr", batch())
    assert caught.value.status() == "StatusCode.INTERNAL"
    assert "secret" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_unknown_models_are_named(client: object) -> None:
    for call in (lambda: client.infer("nope", batch()), lambda: client.get_model_metadata("nope")):
        with pytest.raises(InferenceServerException, match="'nope'") as caught:
            call()
        assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_deadlines(client: object, fake: FakeRouter) -> None:
    client.infer("ctr", batch())
    assert fake.timeouts[-1] is None
    client.infer("ctr", batch(), timeout=250_000)
    assert fake.timeouts[-1] == pytest.approx(0.25)
    client.infer("ctr", batch(), client_timeout=5)
    assert 4 < fake.timeouts[-1] < 6
    fake.hold = True
    with pytest.raises(InferenceServerException, match=r"deadline of 0\.02 s") as caught:
        client.infer("ctr", batch(), timeout=20_000)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def bad() -> object:
    request = oip.messages.ModelInferRequest(model_name="ctr")
    request.inputs.add(name="item", datatype="INT64", shape=[1])
    request.raw_input_contents.append(bytes(8))
    return request


def test_bad_requests_meet_one_sentence(address: str) -> None:
    two_raw, both, wrong, output = bad(), bad(), bad(), bad()
    two_raw.raw_input_contents.append(b"")
    both.inputs[0].contents.int64_contents.append(1)
    del wrong.raw_input_contents[:]
    wrong.inputs[0].contents.fp32_contents.append(1)
    output.outputs.add(name="other")
    negative = bad()
    negative.parameters["timeout"].int64_param = -1
    large = bad()
    large.raw_input_contents[0] = bytes(2 << 20)
    cases = [
        (two_raw, "2 entries for 1 inputs"),
        (both, "beside raw_input_contents"),
        (wrong, "fp32_contents"),
        (output, "'other'"),
        (negative, "timeout"),
        (oip.messages.ModelInferRequest(model_name="ctr"), "no inputs"),
    ]
    with grpc.insecure_channel(address) as channel:
        stub = oip.Stub(channel)
        for request, says in cases:
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(request, timeout=TIMEOUT)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert says in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(large, timeout=TIMEOUT)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.ServerLive(oip.messages.ServerLiveRequest(), timeout=TIMEOUT).live


def test_a_taken_port_is_an_os_error(address: str, fake: FakeRouter) -> None:
    beside = Beside()

    async def taken() -> None:
        with pytest.raises(OSError, match="cannot listen"):
            await serve_grpc(fake, "127.0.0.1", int(address.rsplit(":", 1)[1]))

    beside.close(taken)
