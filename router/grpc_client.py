"""A small client of the Open Inference Protocol over gRPC, for embring's own commands; any other serves as well."""

from collections.abc import Mapping
from types import TracebackType

import grpc
import numpy as np
from numpy.typing import NDArray

from ps.errors import NotApplied, PerhapsApplied, RequestError
from router import oip
from router.columns import Column
from router.http_client import raw, tensors_of
from router.oip import messages

BYTES_MAX = 64 << 20


class GrpcClient:
    """Scores from a router at "HOST:PORT". `async with GrpcClient(address) as client: await client.infer(...)`."""

    def __init__(self, address: str) -> None:
        sizes = [("grpc.max_receive_message_length", BYTES_MAX), ("grpc.max_send_message_length", BYTES_MAX)]
        self._channel = grpc.aio.insecure_channel(address, options=sizes)
        self._stub = oip.Stub(self._channel)
        self._address = address

    async def __aenter__(self) -> "GrpcClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def infer(self, model: str, columns: Mapping[str, Column], timeout: float = 30.0) -> NDArray[np.float32]:
        """float32[B] scores of B rows. RequestError, NotApplied or PerhapsApplied with the router's own sentence."""
        request = messages.ModelInferRequest(model_name=model)
        for tensor in tensors_of(columns):
            request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            request.raw_input_contents.append(raw(tensor))
        try:
            reply = await self._stub.ModelInfer(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise _error(error, self._address) from None
        return np.frombuffer(reply.raw_output_contents[0], "<f4")


def _error(error: "grpc.aio.AioRpcError", address: str) -> Exception:
    said = error.details() or error.code().name
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.NOT_FOUND:
            return RequestError(said)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return PerhapsApplied(said)
    return NotApplied(f"the router at {address} answers {error.code().name}: {said}")
