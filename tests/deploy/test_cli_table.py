"""`embring table alter`: what is asked for, what is waited for, and what is told."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy import cli_table
from deploy.cli_table import app
from ps.errors import PerhapsApplied

DOUBT = PerhapsApplied("the controller does not answer; alter_table may have been done, or be done later")


def status(**more: Any) -> dict[str, Any]:
    tables = [{"name": "t", "placement": "whole", "replicas": 2}, {"name": "u", "placement": "whole", "replicas": 1}]
    quiet = {"move": None, "starting": [], "servers": [], "unheard": [], "slots_left": 0, "slots_held": 0}
    return {**quiet, "tables": tables, "slots_under_replicated": 0, "epoch": 7, **more}


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Result, list[Any]]]:
    """(outcome, what was asked) of `table alter` where the controller answers so, the change and then each status."""

    def run(*options: str, change: Any = None, statuses: Any = None) -> tuple[Result, list[Any]]:
        asked, told = [], iter(statuses or [status()])

        def ask(verb: str, **fields: Any) -> Any:
            asked.append((verb, fields))
            answer = next(told) if verb == "status" else change or {"epoch": 7, "changed": True}
            if isinstance(answer, BaseException):
                raise answer
            return answer

        @contextmanager
        def controller(runtime: Any) -> Iterator[Callable[..., Any]]:
            yield ask

        monkeypatch.setattr("ps.cluster.controller", controller)
        monkeypatch.setattr("deploy.cli_servers.POLL_S", 0.0)
        monkeypatch.setattr(cli_table, "running", lambda: None)
        return CliRunner().invoke(app, ["alter", *options]), asked

    return run


def test_the_controller_is_asked_and_all_is_waited_for(altered: Callable[..., tuple[Result, list[Any]]]) -> None:
    statuses = [status(slots_left=9), status(unheard=["server-1"]), status(slots_left=1), status(epoch=9)]
    done, asked = altered("t", "--replicas", "2", "--placement", "whole", "--json", statuses=statuses)
    assert done.exit_code == 0, done.exception
    assert asked[0] == ("alter_table", {"names": ["t"], "changes": {"replicas": 2, "placement": "whole"}})
    assert len(asked) == 1 + len(statuses)
    assert json.loads(done.stdout) == {"names": ["t"], "replicas": 2, "placement": "whole", "epoch": 9}


@pytest.mark.parametrize(("name", "made"), [("t", True), ("u", False), ("dropped", False)])
def test_a_controller_that_answers_too_late_may_have_made_the_change(
    altered: Callable[..., tuple[Result, list[Any]]], name: str, made: bool
) -> None:
    done, asked = altered(name, "--replicas", "2", change=DOUBT, statuses=[status(slots_left=3), status()])
    assert len(asked) == 3
    assert done.exception is (None if made else DOUBT)


def test_an_interrupt_says_that_the_change_goes_on(altered: Callable[..., tuple[Result, list[Any]]]) -> None:
    done, _ = altered("t", "--replicas", "2", statuses=[status(slots_left=3), KeyboardInterrupt()])
    assert done.exit_code == 130
    assert "the change goes on: `embring status`" in done.stderr


def test_copies_that_nobody_can_take_are_told(altered: Callable[..., tuple[Result, list[Any]]]) -> None:
    done, _ = altered("t", "--replicas", "2", statuses=[status(slots_under_replicated=16)])
    assert done.exit_code == 0
    assert "16 slots have fewer copies than their tables ask for, and no server to put them on" in done.stderr
