"""The Open Inference Protocol v2 over gRPC: its messages, in a descriptor pool of their own, and a client stub.

`messages` holds the message classes (`messages.ModelInferRequest`, ...). They live beside tritonclient's classes of the
same names in one process, because their pool is private; generate.py says how they were made.

    async with grpc.aio.insecure_channel("127.0.0.1:8001") as channel:
        reply = await oip.Stub(channel).ModelInfer(oip.messages.ModelInferRequest(model_name="ctr", ...))
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from router.oip import open_inference_grpc_pb2

messages: Any = open_inference_grpc_pb2
"""The message classes; they are built at import time, where no type checker sees them."""

_SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]

SERVICE: str = _SERVICE.full_name
"""Full name of the service, as clients and reflection know it."""

POOL = messages.DESCRIPTOR.pool
"""The private pool."""


def methods() -> Iterator[tuple[str, Any, Any]]:
    """(name, request class, reply class) of every method of the service."""
    for method in _SERVICE.methods:
        yield method.name, GetMessageClass(method.input_type), GetMessageClass(method.output_type)


class Stub:
    """The service's methods as callables over a channel of grpc or grpc.aio: one attribute for each method."""

    def __init__(self, channel: Any) -> None:
        for name, request, reply in methods():
            call = channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=reply.FromString,
            )
            setattr(self, name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{SERVICE} has no method {name}")
