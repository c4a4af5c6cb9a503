"""What the gRPC and the HTTP front door share: answers to errors, deadlines, counters."""

import asyncio
import logging
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import Counter, Histogram

from ps import EmbringError, Overloaded, PerhapsApplied, RequestError
from router.errors import DeadlineExceeded, NonFiniteScore, UnknownModel

SERVER_NAME = "embring"
EXTENSIONS = ("binary_tensor_data",)

DIGITS_MAX = 19
"""Of a number in text: those of the largest int64. Python refuses to read numbers of thousands of digits."""
MICROSECONDS_MAX = 10**15

MESSAGE_MAX = 500
"""Characters of an error. gRPC sends it in a trailer, of which clients take 8 KB, and up to 12 bytes a character."""

_log = logging.getLogger("embring.router")

REQUESTS = Counter("embring_door_requests", "Requests answered at a front door", ("door", "method", "status"))
SECONDS = Histogram(
    "embring_door_seconds",
    "Seconds from a request's arrival at a front door to its answer",
    ("door", "method"),
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)


def server_version() -> str:
    """Version of the installed distribution; "0" where the code runs without being installed."""
    try:
        return version("embring")
    except PackageNotFoundError:
        return "0"


def answer(error: BaseException) -> tuple[int, str, str]:
    """(HTTP status, name of the gRPC status, one sentence) for an error; its trace goes to the log, never to users."""
    message = str(error)[:MESSAGE_MAX]
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
        case NonFiniteScore():
            return 500, "INTERNAL", message
        case EmbringError():
            return 503, "UNAVAILABLE", message
    _log.error("a request failed unexpectedly", exc_info=error)
    return 500, "INTERNAL", f"the router failed with {type(error).__name__}; its log has the details"


def seconds_of(parameter: object, remaining: float | None = None) -> float | None:
    """Seconds that a request may take, or None where it does not say: the lesser of two deadlines.

    parameter: the protocol's `timeout`, in microseconds; None or 0 says nothing. remaining: the transport's own.
    """
    if parameter is None or parameter == 0:
        return remaining
    number = whole(parameter) if isinstance(parameter, str) else parameter
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MICROSECONDS_MAX:
        raise RequestError(
            f"parameter 'timeout' is {repr(parameter)[:40]}; it must be microseconds, 0 to {MICROSECONDS_MAX}"
        )
    return number / 1e6 if remaining is None else min(remaining, number / 1e6)


def whole(text: str) -> int | None:
    """The number that decimal digits name; None where they name none, or are too many to read."""
    return int(text) if text.isdecimal() and len(text) <= DIGITS_MAX else None
