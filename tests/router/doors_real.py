"""Both doors before a real pipeline (its client answers from arrays), and what they answer to any request."""

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc
import requests

from router import oip
from router.grpc_door import serve_grpc
from router.http_door import HEADER_LENGTH, serve_http
from router.oip_codec import Limits
from router.pipeline import Router
from tests.router.doors_fake import Beside
from tests.router.test_pipeline import FakeClient, publish

TIMEOUT_S = 30.0
LIMITS = Limits(rows_max=1_000, values_max=4_000, inputs_max=16, bytes_max=1 << 20)

Input = tuple[str, str, list[int], Any]
"""name, datatype, shape, and data: a flat list."""

GOOD: list[Input] = [
    ("user", "INT64", [2], [1, 2]),
    ("words", "BYTES", [2], ["a b", "c"]),
    ("price", "FP32", [2], [1.5, 2.0]),
]


class Logged(logging.Handler):
    """Keeps every record: a bad request is no line in the log, least of all a trace."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[str] = []

    def take(self) -> list[str]:
        """What came since the last time."""
        taken, self.records = self.records, []
        return taken

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


class Doors:
    """Model "ctr" over HTTP and gRPC, as (status, error or "")."""

    def __init__(self, http_port: int, grpc_port: int, logged: Logged) -> None:
        self.url = f"http://127.0.0.1:{http_port}/v2/models/ctr/infer"
        self.session = requests.Session()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        self.bytes_call = self.channel.unary_unary(f"/{oip.SERVICE}/ModelInfer")
        self.logged = logged

    def http(self, body: bytes, **headers: str) -> tuple[int, str]:
        reply = self.session.post(self.url, data=body, headers=headers, timeout=TIMEOUT_S)
        length = int(reply.headers.get(HEADER_LENGTH, len(reply.content)))
        answered = json.loads(reply.content[:length], parse_constant=_no_json)
        return reply.status_code, answered.get("error", "")

    def grpc(self, message: bytes) -> tuple[str, str]:
        try:
            oip.messages.ModelInferResponse.FromString(self.bytes_call(message, timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""

    def ask(self, way: str, inputs: list[Input], outputs: int = 0) -> tuple[int | str, str]:
        """One of three ways: "json", "binary" (the extension of HTTP) or "grpc"."""
        if way == "grpc":
            return self.grpc(grpc_message(inputs, outputs).SerializeToString())
        return self.http(*http_body(inputs, outputs)) if way == "json" else self.binary(inputs, outputs)

    def binary(self, inputs: list[Input], outputs: int) -> tuple[int, str]:
        described = [
            {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(raw(kind, data))}}
            for name, kind, shape, data in inputs
        ]
        head = json.dumps({"inputs": described, "outputs": [{"name": "scores"}] * outputs}).encode()
        body = head + b"".join(raw(kind, data) for _, kind, _, data in inputs)
        return self.http(body, **{HEADER_LENGTH: str(len(head))})


def _no_json(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def http_body(inputs: list[Input], outputs: int = 0) -> tuple[bytes]:
    described = [dict(zip(("name", "datatype", "shape", "data"), one, strict=True)) for one in inputs]
    return (json.dumps({"inputs": described, "outputs": [{"name": "scores"}] * outputs}).encode(),)


def grpc_message(inputs: list[Input], outputs: int = 0) -> Any:
    message = oip.messages.ModelInferRequest(model_name="ctr")
    for name, kind, shape, data in inputs:
        message.inputs.add(name=name, datatype=kind, shape=shape)
        message.raw_input_contents.append(raw(kind, data))
    for _ in range(outputs):
        message.outputs.add(name="scores")
    return message


def raw(kind: str, data: list[Any]) -> bytes:
    if kind == "BYTES":
        return b"".join(struct.pack("<I", len(s)) + s.encode() for s in data)
    return struct.pack(f"<{len(data)}{'f' if kind == 'FP32' else 'q'}", *data)


@contextmanager
def opened(folder: Path) -> Iterator[Doors]:
    publish(folder)
    beside, logged = Beside(), Logged()

    async def start() -> tuple[Router, Any, Any]:
        router = await Router(folder, FakeClient()).start()  # type: ignore[arg-type]
        return (
            router,
            await serve_http(router, "127.0.0.1", 0, LIMITS),
            await serve_grpc(router, "127.0.0.1", 0, LIMITS),
        )

    router, http_door, grpc_door = beside.run(start())

    async def stop() -> None:
        await http_door.stop()
        await grpc_door.stop(0.1)
        await router.close()

    doors = Doors(http_door.port, grpc_door.port, logged)
    logging.getLogger().addHandler(logged)
    try:
        yield doors
    finally:
        logging.getLogger().removeHandler(logged)
        doors.session.close()
        doors.channel.close()
        beside.close(stop)
