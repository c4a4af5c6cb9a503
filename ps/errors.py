"""What went wrong, told by what the caller should do next.

The class of an error is its retry policy; no call site guesses again:

    RequestError     never retry: the request itself is wrong (bad batch, unknown table, a limit)
    WrongView        refresh the view, then retry
    NotApplied       surely not applied (unreachable, overloaded, draining): try the next owner
    PerhapsApplied   a time-out or a broken connection: retry; a push keeps its sequence
    SlotsLost        rows are gone until a restore, or until their loss is accepted

Every message is one sentence that names the offending value and what is allowed.
"""

from collections.abc import Sequence


class EmbringError(Exception):
    """Base of every error that embring raises on purpose. answered: whether a server said so, which then lives."""

    code = "error"
    answered = False


class RequestError(EmbringError):
    """The request is wrong and will stay wrong: never retry it."""

    code = "request"


class MemoryFull(RequestError):
    """New rows were refused because a server stands at its `memory_max`; updates and pulls go on."""

    code = "memory_full"


class ConfigError(RequestError):
    """A setting or a file of settings is wrong: names the key, the value and what is allowed."""

    code = "config"


class AuthError(RequestError):
    """The token or the cluster's fingerprint did not match."""

    code = "auth"


class WrongView(EmbringError):
    """The server judges by another view: it does not own (or is not primary of) a slot that was asked for.

    `epoch` is the epoch of the server's view, 0 where it has none.
    """

    code = "wrong_view"

    def __init__(self, message: str, epoch: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch


class NotApplied(EmbringError):
    """Surely not applied: unreachable, draining or expired before it was looked at. Another owner may answer."""

    code = "not_applied"


class NobodyListens(NotApplied):
    """Connections are refused at every address of the server: its process is gone."""


class Overloaded(NotApplied):
    """A bounded queue is full; nothing was applied."""

    code = "overloaded"


class PerhapsApplied(EmbringError):
    """No answer came in time, or the connection broke after the request left. A retry keeps its sequence."""

    code = "perhaps_applied"


class SlotsLost(EmbringError):
    """Slots whose every owner has died: their rows are gone until a restore or an explicit acceptance.

    `slots` holds the (global) numbers of some of them.
    """

    code = "slots_lost"

    def __init__(self, message: str, slots: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.slots = tuple(int(s) for s in slots)


def judged_by(mine: int, asked: int, error: EmbringError) -> EmbringError:
    """The error of a request that knows epoch `asked`, at a server of epoch `mine`.

    By an older view nobody can say that a request is wrong for good: its table may be new.
    """
    if type(error) is RequestError and asked > mine:
        return NotApplied(f"judged by epoch {mine}, where the request knows epoch {asked}: {error}")
    return error


ERRORS: dict[str, type[EmbringError]] = {
    cls.code: cls
    for cls in (
        EmbringError,
        RequestError,
        MemoryFull,
        ConfigError,
        AuthError,
        WrongView,
        NotApplied,
        Overloaded,
        PerhapsApplied,
        SlotsLost,
    )
}
"""Error classes by the code that travels in a reply."""


def cause(error: BaseException) -> str:
    """The last line of an error, or its class: of one that came through Ray the lines before are a trace-back."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
