"""What the gRPC and the HTTP front door share: the router as they see it, answers to errors, deadlines, counters."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Histogram

from ps import EmbringError, Overloaded, PerhapsApplied, RequestError
from router.columns import Column
from router.errors import DeadlineExceeded, UnknownModel
from router.oip_codec import Limits

SERVER_NAME = "embring"
EXTENSIONS = ("binary_tensor_data",)

_log = logging.getLogger("embring.router")

REQUESTS = Counter("embring_door_requests", "Requests answered at a front door", ("door", "method", "status"))
SECONDS = Histogram(
    "embring_door_seconds",
    "Seconds from a request's arrival at a front door to its answer",
    ("door", "method"),
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)


class Tensors(Protocol):
    """Description of one input or output; a size of -1 is each request's own."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Metadata(Protocol):
    """Description of one model."""

    name: str
    versions: Sequence[str]
    inputs: Sequence[Tensors]
    outputs: Sequence[Tensors]


class Prediction(Protocol):
    """Scores of one batch, and the version of the model that gave them."""

    scores: NDArray[np.float32]
    model: str
    version: str
    absent: int


class Scorer(Protocol):
    """The router as a front door sees it. A version of None is the one that the model's policy serves."""

    async def predict(
        self, model: str, version: str | None, columns: Mapping[str, Column], timeout: float
    ) -> Prediction:
        """float32[B] scores, within `timeout` seconds."""

    def metadata(self, model: str, version: str | None) -> Metadata:
        """Inputs and outputs; UnknownModel where there is no such model or version."""

    def live(self) -> bool:
        """The router runs."""

    def ready(self) -> bool:
        """At least one model can be scored with."""

    def model_ready(self, model: str, version: str | None) -> bool:
        """This one can be scored with; UnknownModel where there is none."""


def server_version() -> str:
    """Version of the installed distribution; "0" where the code runs without being installed."""
    try:
        return version("embring")
    except PackageNotFoundError:
        return "0"


def answer(error: BaseException) -> tuple[int, str, str]:
    """(HTTP status, name of the gRPC status, one sentence) for an error; its trace goes to the log, never to users."""
    message = str(error)
    match error:
        case UnknownModel():
            return 404, "NOT_FOUND", message
        case RequestError():
            return 400, "INVALID_ARGUMENT", message
        case DeadlineExceeded():
            return 504, "DEADLINE_EXCEEDED", message
        case TimeoutError() | asyncio.TimeoutError():
            return 504, "DEADLINE_EXCEEDED", message or "the request's deadline passed before its scores were there"
        case Overloaded():
            return 503, "RESOURCE_EXHAUSTED", message
        case PerhapsApplied():
            return 504, "DEADLINE_EXCEEDED", message
        case EmbringError():
            return 503, "UNAVAILABLE", message
    _log.error("a request failed unexpectedly", exc_info=error)
    return 500, "INTERNAL", f"the router failed with {type(error).__name__}; its log has the details"


def seconds_of(parameter: object, limits: Limits, remaining: float | None = None) -> float:
    """Seconds that a request may take: the least of the limit, the transport's deadline and `timeout` in microseconds.

    `parameter` is the protocol's request parameter of that name; None or 0 says nothing.
    """
    seconds = limits.timeout if remaining is None else min(limits.timeout, remaining)
    if parameter is None or parameter == 0:
        return seconds
    if isinstance(parameter, str) and parameter.isdecimal():
        parameter = int(parameter)
    if isinstance(parameter, bool) or not isinstance(parameter, int) or parameter < 0:
        raise RequestError(f"parameter 'timeout' is {parameter!r}; it must be microseconds, 0 or more")
    return min(seconds, parameter / 1e6)
