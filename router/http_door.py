"""The Open Inference Protocol v2 over HTTP: JSON, the binary tensor extension, and /metrics for Prometheus.

    door = await serve_http(router, "127.0.0.1", 8000)
    ...                                         # door.port
    await door.stop()

With the binary extension the body is JSON followed by raw tensors: the header Inference-Header-Content-Length gives the
JSON's length, and an input's parameter `binary_data_size` the length of its part.
"""

import asyncio
import json
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from ps import RequestError
from router.columns import FP32
from router.doors import EXTENSIONS, REQUESTS, SECONDS, SERVER_NAME, answer, seconds_of, server_version, whole
from router.oip_codec import NUMBERS, OUTPUT, Limits, Tensor, check_outputs, columns, shown, warmup
from router.pipeline import Router

HEADER_LENGTH = "Inference-Header-Content-Length"

BODY_S = 60.0
"""How long a body may take to come, at any size."""

WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""Content-Encodings that a body may come in, with what zlib calls them."""


class HttpDoor:
    """A listening server: `port` (chosen by the system where 0 was asked for) and `stop()`."""

    def __init__(self, runner: web.AppRunner, listening: asyncio.Server) -> None:
        self.port: int = listening.sockets[0].getsockname()[1]
        self._runner = runner
        self._listening = listening

    async def stop(self) -> None:
        """Refuse new requests, let those under way end, close."""
        self._listening.close()
        await self._runner.cleanup()


async def serve_http(router: Router, host: str, port: int, limits: Limits | None = None) -> HttpDoor:
    """Listen for inference requests at host:port (0: any free port); OSError where the address cannot be had."""
    limits = limits or Limits()
    warmup()
    runner = web.AppRunner(application(router, limits), shutdown_timeout=5.0)
    await runner.setup()
    loop = asyncio.get_running_loop()
    try:
        listening = await loop.create_server(lambda: _Connection(runner.server, loop), host, port)
    except OSError:
        await runner.cleanup()
        raise
    return HttpDoor(runner, listening)


def application(router: Router, limits: Limits) -> web.Application:
    """The routes of the protocol over a router."""
    door = _Door(router, limits)
    app = web.Application(middlewares=[_answered], client_max_size=limits.bytes_max)
    app.router.add_get("/metrics", door.metrics, name="Metrics")
    app.router.add_get("/v2", door.server, name="ServerMetadata")
    app.router.add_get("/v2/health/live", door.live, name="ServerLive")
    app.router.add_get("/v2/health/ready", door.ready, name="ServerReady")
    for model, suffix in (("/v2/models/{model}", ""), ("/v2/models/{model}/versions/{version}", "Version")):
        app.router.add_get(model, door.model, name=f"ModelMetadata{suffix}")
        app.router.add_get(f"{model}/ready", door.model_ready, name=f"ModelReady{suffix}")
        app.router.add_post(f"{model}/infer", door.infer, name=f"ModelInfer{suffix}")
    return app


class _Door:
    def __init__(self, router: Router, limits: Limits) -> None:
        self.router = router
        self.limits = limits

    async def metrics(self, request: web.Request) -> web.Response:
        """Everything of this process and its front doors, then of this router."""
        body = generate_latest(REGISTRY) + generate_latest(self.router.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def server(self, request: web.Request) -> web.Response:
        return web.json_response({"name": SERVER_NAME, "version": server_version(), "extensions": EXTENSIONS})

    async def live(self, request: web.Request) -> web.Response:
        return _yes("live", self.router.live())

    async def ready(self, request: web.Request) -> web.Response:
        return _yes("ready", self.router.ready())

    async def model_ready(self, request: web.Request) -> web.Response:
        model, version = _model(request)
        return _yes("ready", self.router.model_ready(model, version), name=model)

    async def model(self, request: web.Request) -> web.Response:
        found = self.router.metadata(*_model(request))
        inputs, outputs = (
            [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in described]
            for described in (found.inputs, found.outputs)
        )
        plain = {"name": found.name, "versions": list(found.versions), "platform": found.platform}
        return web.json_response({**plain, "inputs": inputs, "outputs": outputs})

    async def infer(self, request: web.Request) -> web.Response:
        model, version = _model(request)
        body = decoded(await _read(request), request.headers.getall("Content-Encoding", []), self.limits.bytes_max)
        header, binary = split_body(body, request.headers.get(HEADER_LENGTH))
        parameters = _field(header, "parameters", dict, "the request")
        outputs = _field(header, "outputs", list, "the request")
        check_outputs(_field(output, "name", str, "an output") for output in outputs)
        binary_output = _field(parameters, "binary_data_output", bool, "the request's parameters")
        for wanted in (_field(output, "parameters", dict, "an output") for output in outputs):
            binary_output = _field(
                {"binary_data": binary_output, **wanted}, "binary_data", bool, "an output's parameters"
            )
        timeout, request_id = seconds_of(parameters.get("timeout")), _field(header, "id", str, "the request")
        given = columns(tensors(header, binary), self.limits)
        found = await self.router.predict(model, version, given, timeout)
        output: dict[str, Any] = {"name": OUTPUT, "datatype": FP32, "shape": [len(found.scores)]}
        reply: dict[str, Any] = {"model_name": found.model, "model_version": found.version}
        if "id" in header:
            reply["id"] = request_id
        reply.update(parameters={"absent": found.absent}, outputs=[output])
        if not binary_output:
            output["data"] = found.scores.tolist()
            return web.json_response(reply)
        raw = np.ascontiguousarray(found.scores, NUMBERS[FP32]).tobytes()
        output["parameters"] = {"binary_data_size": len(raw)}
        head = json.dumps(reply).encode()
        length = {HEADER_LENGTH: str(len(head))}
        return web.Response(body=head + raw, headers=length, content_type="application/octet-stream")


async def _read(request: web.Request) -> bytes:
    """The body as it came; RequestError where the client breaks it off, or off its chunks; 408 where it stays away."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the request's body did not come within {BODY_S:g} s") from None
    except (web.RequestPayloadError, ConnectionError) as error:
        raise RequestError(f"the request's body cannot be read: {_line(str(error))}") from None


def decoded(body: bytes, encodings: list[str], bytes_max: int) -> bytes:
    """The body without its Content-Encoding; RequestError where that is unknown, or the body is not in it.

    Ours rather than aiohttp's, which takes other encodings on each machine, passes over those it does not know, and
    logs a trace for each body that it cannot decode.
    """
    encoding = ", ".join(encodings).strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOW_BITS:
        raise RequestError(f"Content-Encoding is {encoding[:40]!r}; it must be {', '.join(WINDOW_BITS)} or identity")
    bare = encoding == "deflate" and body[:1] and body[0] & 15 != 8  # some clients send deflate without zlib's header
    inflate = zlib.decompressobj(-WINDOW_BITS[encoding] if bare else WINDOW_BITS[encoding])
    try:
        plain = inflate.decompress(body, bytes_max + 1)
    except zlib.error as error:
        raise RequestError(f"the request's body cannot be read as {encoding}: {error}") from None
    if len(plain) > bytes_max:
        raise web.HTTPRequestEntityTooLarge(bytes_max, len(plain))
    # One stream only: each further one would cost a copy of all that follows it.
    if not inflate.eof or inflate.unused_data:
        raise RequestError(f"the request's body cannot be read as {encoding}: it must be one whole stream")
    return plain


def split_body(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """(JSON part, binary part) of a request; RequestError where the length or the JSON is wrong."""
    length = len(body)
    if header_length is not None:
        said = whole(header_length)
        if said is None or said > len(body):
            raise RequestError(
                f"{HEADER_LENGTH} is {header_length[:40]!r}; it must be a number of bytes within the body's {len(body)}"
            )
        length = said
    try:
        header = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request's JSON cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise RequestError("the request's JSON must be an object with 'inputs'")
    return header, memoryview(body)[length:]


def tensors(header: dict[str, Any], binary: memoryview) -> list[Tensor]:
    """Input tensors of a request; RequestError where a field is missing or the binary parts do not fill the rest."""
    found, at = [], 0
    for tensor in _field(header, "inputs", list, "the request"):
        name = _field(tensor, "name", str, "an input")
        where = f"input {name!r}"
        shape = tuple(_field(tensor, "shape", list, where))
        if not all(isinstance(size, int) and not isinstance(size, bool) for size in shape):
            raise RequestError(f"{where} has shape {shown(list(shape))}; it must be a list of whole numbers")
        size = _field(tensor, "parameters", dict, where).get("binary_data_size")
        data: Any
        if size is None:
            data = _flat(_field(tensor, "data", list, where), shape, where)
        elif isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - at:
            raise RequestError(
                f"{where} has binary_data_size {shown(size)}; {len(binary) - at} bytes are left in the body"
            )
        elif "data" in tensor:
            raise RequestError(f"{where} has data beside binary_data_size; it may have one of them")
        else:
            data, at = binary[at : at + size], at + size
        found.append(Tensor(name, _field(tensor, "datatype", str, where), shape, data))
    if at != len(binary):
        raise RequestError(f"{len(binary) - at} bytes follow the last input; the body must end with it")
    return found


def _flat(values: list[Any], shape: tuple[int, ...], where: str) -> list[Any]:
    """Values end to end, which come so or, in two dimensions, as a list for each row."""
    if not any(isinstance(value, list) for value in values):
        return values
    if len(shape) != 2 or not all(isinstance(row, list) and len(row) == shape[1] for row in values):
        raise RequestError(f"{where} has nested data that its shape {shown(list(shape))} does not have")
    return [value for row in values for value in row]


_KINDS: dict[type, tuple[Any, str]] = {
    dict: ({}, "an object"),
    list: ([], "a list"),
    str: ("", "a string"),
    bool: (False, "true or false"),
}


def _field(holder: Any, key: str, kind: type, where: str) -> Any:
    """holder[key], empty where it is missing; RequestError where it, or its holder, is of another kind."""
    if not isinstance(holder, dict):
        raise RequestError(f"{where} is {shown(holder)}; it must be an object")
    empty, described = _KINDS[kind]
    value = holder.get(key, empty)
    if not isinstance(value, kind):
        raise RequestError(f"{key!r} of {where} is {shown(value)}; it must be {described}")
    return value


def _model(request: web.Request) -> tuple[str, str | None]:
    return request.match_info["model"], request.match_info.get("version")


def _yes(what: str, value: bool, **more: str) -> web.Response:
    return web.json_response({**more, what: value}, status=200 if value else 503)


def _line(text: str) -> str:
    """The text on one line, as short as an error should be."""
    return " ".join(text.split())[:200]


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": message}, status=status, headers=headers)


def _refusal(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    """One of aiohttp's own answers, in the protocol's form and our words."""
    path = _line(repr(request.path))
    match error:
        case web.HTTPNotFound():
            return _error(404, f"there is nothing at {path}; the protocol's paths begin with /v2")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not allowed at {path}; it takes {allowed}"
            return _error(405, message, {"Allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            return _error(413, f"the request's body is too large: {request.client_max_size} bytes are the most allowed")
    return _error(error.status, f"{request.method} {path}: {_line(error.text or error.reason)}")


@web.middleware
async def _answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error as JSON {"error": ...} with its status; requests counted and timed."""
    begun, status = time.perf_counter(), 500
    method = (request.match_info.route.resource and request.match_info.route.resource.name) or "other"
    try:
        response = await handler(request)
        status = response.status
    except web.HTTPException as error:
        response, status = _refusal(request, error), error.status
    except Exception as error:
        status, _, message = answer(error)
        response = _error(status, message)
    finally:
        method = method.removesuffix("Version")
        REQUESTS.labels("http", method, str(status)).inc()
        SECONDS.labels("http", method).observe(time.perf_counter() - begun)
    return response


class _Connection(web.RequestHandler):
    """aiohttp's connection; what it refuses outside the application (no HTTP, odd expectations) is JSON too."""

    def __init__(self, server: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop=loop, access_log=None, auto_decompress=False)  # type: ignore[arg-type]

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A failure of ours is logged and told as any; what is no HTTP is the client's, and no line in the log."""
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        REQUESTS.labels("http", "other", str(status)).inc()
        reason = (message or str(exc)).rstrip(" ^")  # which points at a place in the line above
        response = _error(status, f"the request is no HTTP that can be read: {_line(reason)}")
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """The last room before the wire: refusals that no middleware has seen."""
        if isinstance(resp, web.HTTPException):
            resp = _refusal(request, resp)
        return await super().finish_response(request, resp, start_time)
