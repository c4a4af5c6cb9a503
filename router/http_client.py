"""A small client of the Open Inference Protocol over HTTP (JSON), and columns as the protocol's tensors.

For embring's own commands; any other client of the protocol serves as well.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from ps.errors import NotApplied, PerhapsApplied, RequestError
from router.columns import INT64, BytesColumn, Column
from router.oip_codec import NUMBERS, OFFSETS, Tensor


def tensors_of(columns: Mapping[str, Column]) -> list[Tensor]:
    """Columns as input tensors; a multi-valued one is followed by its offsets. data: list of bytes, or a flat array."""
    found = []
    for name, column in columns.items():
        values = column.values
        if isinstance(values, BytesColumn):
            found.append(Tensor(name, column.dtype, (len(values),), values.to_list()))
        else:
            found.append(Tensor(name, column.dtype, values.shape, values.reshape(-1)))
        if column.offsets is not None:
            found.append(Tensor(name + OFFSETS, INT64, column.offsets.shape, column.offsets))
    return found


def raw(tensor: Tensor) -> bytes:
    """The protocol's raw bytes of a tensor from `tensors_of`."""
    if isinstance(tensor.data, np.ndarray):
        return np.ascontiguousarray(tensor.data, NUMBERS[tensor.datatype]).tobytes()
    strings: Sequence[Any] = tensor.data
    return b"".join(struct.pack("<I", len(s)) + s for s in strings)


def request_json(columns: Mapping[str, Column]) -> dict[str, Any]:
    """The body of an inference request; RequestError where a string is no UTF-8, which JSON cannot carry."""
    inputs = []
    for tensor in tensors_of(columns):
        try:
            data = [v.decode() if isinstance(v, bytes) else v for v in _plain(tensor)]
        except UnicodeDecodeError as error:
            raise RequestError(f"input {tensor.name!r} holds {error.object!r}, which JSON cannot carry") from None
        inputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": data})
    return {"inputs": inputs}


def _plain(tensor: Tensor) -> list[Any]:
    return tensor.data.tolist() if isinstance(tensor.data, np.ndarray) else list(tensor.data)


class HttpClient:
    """Scores from a router at "HOST:PORT". `async with HttpClient(address) as client: await client.infer(...)`."""

    def __init__(self, address: str) -> None:
        self._url = address if address.startswith(("http://", "https://")) else f"http://{address}"
        self._session = aiohttp.ClientSession()

    async def __aenter__(self) -> "HttpClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def metadata(self, model: str, timeout: float = 30.0) -> dict[str, Any]:
        """What the router says of a model: versions, inputs, outputs."""
        return await self._ask("GET", f"/v2/models/{model}", None, timeout)

    async def infer(self, model: str, columns: Mapping[str, Column], timeout: float = 30.0) -> NDArray[np.float32]:
        """float32[B] scores of B rows. RequestError, NotApplied or PerhapsApplied with the router's own sentence."""
        reply = await self._ask("POST", f"/v2/models/{model}/infer", request_json(columns), timeout)
        return np.array(reply["outputs"][0]["data"], np.float32)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        try:
            limit = aiohttp.ClientTimeout(total=timeout)
            async with self._session.request(method, self._url + path, json=body, timeout=limit) as reply:
                text = await reply.text()
        except TimeoutError:
            raise PerhapsApplied(f"the router at {self._url} did not answer within {timeout:g} s") from None
        except aiohttp.ClientError as error:
            raise NotApplied(f"the router at {self._url} cannot be reached: {error}") from None
        try:
            answer = json.loads(text)
            if reply.status == 200:
                return answer
            said = answer["error"]
        except (ValueError, KeyError, TypeError):
            said = f"HTTP status {reply.status}"
        raise (RequestError if 400 <= reply.status < 500 else NotApplied)(said)
