"""The actor around a server: what needs neither Ray nor a data thread."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from ps.errors import EmbringError, NotApplied, PerhapsApplied, RequestError
from ps.server import Server
from ps.wire import error_fields

AWAY = ActorUnavailableError("it is being started again", b"0" * 16)


class Controller:
    """Answers `status` and `admin` with what it is given; None is no answer at all."""

    def __init__(self, status: Any, admin: Any) -> None:
        self.asked: list[str] = []
        self.status = SimpleNamespace(remote=lambda: self._answer("status", status))
        self.admin = SimpleNamespace(remote=lambda verb, fields: self._answer(verb, admin))

    def _answer(self, what: str, outcome: Any) -> Any:
        self.asked.append(what)
        future: Future[Any] = Future()
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        elif outcome is not None:
            future.set_result(outcome)
        return SimpleNamespace(future=lambda: future)


def control(controller: Controller, verb: str) -> dict[str, Any]:
    server = object.__new__(Server)
    server._controller = controller
    return asyncio.run(server._control(verb, {"name": "a"}))


@pytest.mark.parametrize(
    ("verb", "status", "admin", "raised"),
    [
        ("truncate", {}, AWAY, PerhapsApplied),
        ("truncate", {}, None, PerhapsApplied),
        ("truncate", AWAY, {"ok": {}}, NotApplied),
        ("truncate", None, {"ok": {}}, NotApplied),
        ("status", {}, AWAY, NotApplied),
        ("outlook", {}, None, NotApplied),
        ("truncate", {}, {"error": error_fields(RequestError("unknown table"))}, RequestError),
    ],
)
def test_not_done_is_said_only_where_the_controller_did_not_hear_of_it(
    monkeypatch: pytest.MonkeyPatch, verb: str, status: Any, admin: Any, raised: type[EmbringError]
) -> None:
    """It may die, or be late, when it has logged what was asked for."""
    if status is None or admin is None:
        monkeypatch.setattr("ps.server.ADMIN_TIMEOUT_S", 0.05)
    controller = Controller(status, admin)
    with pytest.raises(EmbringError) as error:
        control(controller, verb)
    assert type(error.value) is raised
    if verb == "truncate":
        assert ("truncate" in controller.asked) == (raised is not NotApplied)


def test_what_the_controller_answers_is_handed_on() -> None:
    controller = Controller({}, {"ok": {"epoch": 3}})
    assert control(controller, "drop_table") == {"epoch": 3}
    assert controller.asked == ["status", "drop_table"]


def test_only_one_waits_for_a_servers_end() -> None:
    """Watchers that nobody hears any more leave room for other calls: the one before ends when the next comes."""

    async def watch() -> list[bool]:
        server = object.__new__(Server)
        server._watched = asyncio.Event()
        calls = [asyncio.ensure_future(server.forever()) for _ in range(3)]
        done, _ = await asyncio.wait(calls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 2:
            more, _ = await asyncio.wait(set(calls) - done, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            assert more
            done |= more
        ended = [call.done() for call in calls]
        calls[2].cancel()
        return ended

    assert asyncio.run(watch()) == [True, True, False]
