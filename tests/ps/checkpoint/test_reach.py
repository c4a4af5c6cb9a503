"""Which servers are asked, and what of them is passed over."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hashring.planner import Join, plan
from hashring.view import Server, View
from ps.checkpoint.reach import Absorber, Access, controller_through, newest_view
from ps.checkpoint.storage import CheckpointError
from ps.errors import AuthError, EmbringError, NotApplied, PerhapsApplied, WrongView
from ps.spec import TableSpec
from ps.wire import LIMITS, Message, encode, view_message

ACCESS = Access("")
SERVERS = tuple(Server(f"s{i}", 10 + i, f"h{i}", addresses=(f"unix:{i}",)) for i in range(2))
VIEW = plan(View.empty(1, slot_bits=4), Join(SERVERS))


@pytest.fixture
def first_fails(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that says what connecting to the first server ends with."""

    def fails(error: EmbringError) -> None:
        @contextmanager
        def connected(server: Server, *_: object) -> Iterator[Server]:
            if server.name == "s0":
                raise error
            yield server

        monkeypatch.setattr("ps.checkpoint.reach.connected", connected)

    def call(server: Server, op: str, fields: dict[str, Any], arrays: dict[str, Any]) -> Any:
        encode(Message(op, 1, fields, arrays), LIMITS)
        told, packed = view_message(VIEW) if op == "view" else ({"by": server.name, **fields}, {})
        return SimpleNamespace(fields=told, arrays=packed)

    monkeypatch.setattr("ps.checkpoint.reach.call", call)
    return fails


@pytest.mark.parametrize(
    "error",
    [NotApplied("nobody"), WrongView("incarnation 10 was meant; here answers another"), PerhapsApplied("it broke")],
)
def test_a_server_that_was_started_again_at_its_port_ends_no_save(first_fails: Any, error: EmbringError) -> None:
    first_fails(error)
    assert newest_view(SERVERS, ACCESS).epoch == VIEW.epoch
    with pytest.raises(NotApplied, match="no server of the cluster answers"):
        newest_view(SERVERS[:1], ACCESS)


def test_a_token_that_is_refused_is_told(first_fails: Any) -> None:
    first_fails(AuthError("the token is another"))
    with pytest.raises(AuthError):
        newest_view(SERVERS, ACCESS)


def test_the_controller_is_asked_through_the_next_server_where_the_first_is_another_process(first_fails: Any) -> None:
    error = WrongView("incarnation 10 was meant; here answers another")
    first_fails(error)
    with controller_through(SERVERS, ACCESS) as ask:
        assert ask("status") == {"by": "s1", "verb": "status"}
        big = [TableSpec(f"t{n}", 4096, default=(0.1,) * 4096).to_plain() for n in range(30)]
        assert ask("restore", manifest={"tables": big})["verb"] == "restore"
    with controller_through(SERVERS[:1], ACCESS) as ask, pytest.raises(WrongView):
        ask("status")


@pytest.mark.parametrize(
    ("epoch", "sentence"),
    [
        (6, r"^server s0 did not take slot 3: its view is of epoch 6, and it has not taken that of the restore, 7"),
        (8, r"^server s0 did not take slot 3: its view of epoch 8 has it in another term than the restore, 7"),
    ],
)
def test_why_a_server_takes_no_rows_is_told(epoch: int, sentence: str) -> None:
    taken = {"taken": np.array([1, 0], np.uint8)}
    connection = SimpleNamespace(
        send=lambda *_: 1, receive=lambda *_: SimpleNamespace(fields={"epoch": epoch}, arrays=taken)
    )
    absorber = Absorber(connection, "s0", 7, False)  # type: ignore[arg-type]
    absorber.send(SimpleNamespace(slots=np.array([2, 3]), to_arrays=lambda: ({}, {})))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=sentence):
        absorber.finish()
