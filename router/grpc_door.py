"""The Open Inference Protocol v2 over gRPC, with gRPC's own health service and reflection.

    door = await serve_grpc(router, "127.0.0.1", 8001)
    ...                                         # door.port
    await door.stop()

A request's deadline is the client's own, or the parameter `timeout` (microseconds), whichever is shorter.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from ps import RequestError
from router import oip
from router.columns import BYTES, FP32, INT64
from router.doors import EXTENSIONS, REQUESTS, SECONDS, SERVER_NAME, answer, seconds_of, server_version
from router.errors import UnknownModel
from router.oip import messages
from router.oip_codec import NUMBERS, OUTPUT, Limits, Tensor, check_outputs, columns, warmup
from router.pipeline import Router

CONTENTS = {BYTES: "bytes_contents", INT64: "int64_contents", FP32: "fp32_contents"}
"""Field of InferTensorContents that carries a datatype's values."""


class GrpcDoor:
    """A listening server: `port` (chosen by the system where 0 was asked for) and `stop()`."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self.port = port
        self._server = server

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new requests, give those under way `grace` seconds, close."""
        await self._server.stop(grace)


async def serve_grpc(router: Router, host: str, port: int, limits: Limits | None = None) -> GrpcDoor:
    """Listen for inference requests at host:port (0: any free port); OSError where the address cannot be had."""
    limits = limits or Limits()
    warmup()
    options = [
        ("grpc.max_receive_message_length", limits.bytes_max),
        ("grpc.max_send_message_length", limits.bytes_max),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(options=options)
    service = InferenceService(router, limits)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _answered(name, request, getattr(service, name)),
            response_serializer=reply.SerializeToString,
        )
        for name, request, reply in oip.methods()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip.SERVICE, handlers),))
    health_pb2_grpc.add_HealthServicer_to_server(_Health(router), server)
    for known in (health_pb2, reflection_pb2):
        oip.POOL.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    names = (oip.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=oip.POOL)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen at {address}: {error}") from None
    await server.start()
    return GrpcDoor(server, bound)


class InferenceService:
    """The methods of the protocol; each raises the errors of ps and router, which `_answered` turns into a status."""

    def __init__(self, router: Router, limits: Limits) -> None:
        self.router = router
        self.limits = limits

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802 - names of the protocol
        """Whether the router runs."""
        return messages.ServerLiveResponse(live=self.router.live())

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether some model can be scored with."""
        return messages.ServerReadyResponse(ready=self.router.ready())

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether this model can be scored with; an unknown one is not ready (and not an error: clients poll this)."""
        try:
            ready = self.router.model_ready(request.name, request.version or None)
        except UnknownModel:
            ready = False
        return messages.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Name, version, extensions."""
        return messages.ServerMetadataResponse(name=SERVER_NAME, version=server_version(), extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Versions, inputs and outputs of a model."""
        found = self.router.metadata(request.name, request.version or None)
        tensor = messages.ModelMetadataResponse.TensorMetadata
        return messages.ModelMetadataResponse(
            name=found.name,
            versions=found.versions,
            platform=found.platform,
            inputs=[tensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in found.inputs],
            outputs=[tensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in found.outputs],
        )

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Scores; raw where the inputs came raw, else by type."""
        timeout = seconds_of(_parameter(request.parameters, "timeout"), context.time_remaining())
        check_outputs(output.name for output in request.outputs)
        given = columns(tensors(request), self.limits)
        found = await self.router.predict(request.model_name, request.model_version or None, given, timeout)
        reply = messages.ModelInferResponse(model_name=found.model, model_version=found.version, id=request.id)
        reply.parameters["absent"].int64_param = found.absent
        output = reply.outputs.add(name=OUTPUT, datatype=FP32, shape=[len(found.scores)])
        if request.raw_input_contents:
            reply.raw_output_contents.append(np.ascontiguousarray(found.scores, NUMBERS[FP32]).tobytes())
        else:
            output.contents.fp32_contents.extend(found.scores.tolist())
        return reply


def tensors(request: Any) -> list[Tensor]:
    """Input tensors of a ModelInferRequest."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; it holds one for each"
        )
    found = []
    for i, tensor in enumerate(request.inputs):
        if raw and tensor.HasField("contents"):
            raise RequestError(f"input {tensor.name!r} has contents beside raw_input_contents; it may have one of them")
        data: Any = raw[i] if raw else _typed(tensor)
        found.append(Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    return found


def _typed(tensor: Any) -> Any:
    """Values of the contents field of the tensor's datatype; a filled field of another type is refused."""
    wanted = CONTENTS.get(tensor.datatype, "")
    for field, _ in tensor.contents.ListFields():
        if wanted and field.name != wanted:
            raise RequestError(f"input {tensor.name!r} has {field.name}; its datatype {tensor.datatype} takes {wanted}")
    if not wanted:
        return ()
    values = getattr(tensor.contents, wanted)
    return values if tensor.datatype == BYTES else np.array(values, NUMBERS[tensor.datatype])


def _parameter(parameters: Any, name: str) -> Any:
    if name not in parameters:
        return None
    kind = parameters[name].WhichOneof("parameter_choice")
    return getattr(parameters[name], kind) if kind else None


def _message(kind: Any, sent: bytes) -> Any:
    try:
        return kind.FromString(sent)
    except DecodeError:
        raise RequestError(f"the request is no {kind.DESCRIPTOR.name}: its {len(sent)} bytes cannot be read") from None


def _answered(name: str, kind: Any, method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[bytes, Any], Any]:
    """The method with errors turned into a gRPC status, counted and timed.

    It reads the message itself, for grpc would answer UNKNOWN, and log a trace, to bytes that are none.
    """

    async def call(sent: bytes, context: Any) -> Any:
        begun, status = time.perf_counter(), "OK"
        try:
            return await method(_message(kind, sent), context)
        except Exception as error:
            _, status, message = answer(error)
        finally:
            REQUESTS.labels("grpc", name, status).inc()
            SECONDS.labels("grpc", name).observe(time.perf_counter() - begun)
        await context.abort(grpc.StatusCode[status], message)

    return call


class _Health(health.aio.HealthServicer):
    """gRPC's health service, asked of the router at each check."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self._router = router

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """SERVING while some model can be scored with."""
        status = health_pb2.HealthCheckResponse
        now = status.SERVING if self._router.ready() else status.NOT_SERVING
        for service in (health.OVERALL_HEALTH, oip.SERVICE):
            await self.set(service, now)
        return await super().Check(request, context)
