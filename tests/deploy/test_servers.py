"""What `add-server` and `remove-server` print, and how they follow a change."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from deploy.cli import app
from deploy.cli_servers import Copied, _change, follow, line_of, stage, table_of
from ps.errors import NotApplied, RequestError
from ps.runtime import Runtime, runtime_path, write_runtime

PLAN = {
    "kind": "join",
    "names": ["server-3"],
    "slots": 8192,
    "turns": 4164,
    "lost": 0,
    "rows": 100_000,
    "bytes": 9_200_000,
    "seconds": 3.2,
    "bytes_per_s": 0,
    "servers": [
        {"name": "server-0", "host": "h", "slots": [16384, 8192], "primaries": [5, 4], "bytes": [2048, 1024]},
        {"name": "server-3", "host": "h", "slots": [0, 8192], "primaries": [0, 4], "bytes": [0, 1024]},
    ],
    "hosts": [{"host": "h", "slots": [16384, 16384], "primaries": [5, 8], "bytes": [2048, 2048]}],
}


def record(move: dict | None = None, left: int = 0, **more: object) -> dict:
    servers = [{"name": "server-3", "incarnation": 3, "state": "alive", "addresses": []}]
    slots = {"slots_left": left, "slots_held": 0}
    told = {"move": move, **slots, "unheard": [], "starting": [], "servers": servers, "epoch": 7, "move_failed": ""}
    return {**told, "slots_under_replicated": 0, "tables": [], **more}


JOIN = {"kind": "join", "names": ["server-3"], "undoes": False}


def test_a_plan_is_told_in_a_line_and_in_a_table() -> None:
    line = line_of(PLAN)
    assert line.startswith(
        "server-3 joins: 8,192 copies of slots with about 100,000 rows (8.8 MiB) are copied, some 3.2 s"
    )
    table = table_of(PLAN)
    assert line in table
    assert "16,384 -> 8,192" in table
    assert "2.0 KiB -> 1.0 KiB" in table
    assert "no limit" in table
    assert "50 MiB/s a server" in table_of({**PLAN, "bytes_per_s": 50 * 2**20})
    assert "1,048,576 MiB/s a server" in table_of({**PLAN, "bytes_per_s": 2**40})
    assert "lost" not in table
    later = "; 9 slots are lost: loads are evened out once they are back"
    assert line_of({**PLAN, "lost": 9}).endswith(later)
    assert later not in line_of({**PLAN, "lost": 9, "kind": "leave"})
    assert "some 12,345,678 s" in line_of({**PLAN, "seconds": 12345678.0})


def test_the_stage_names_who_is_not_well() -> None:
    assert stage(record(JOIN)) == "server-3 joining"
    assert stage(record(starting=["server-4"])) == "starting server-4"
    assert stage(record(JOIN | {"kind": "leave", "undoes": True})) == "server-3 going back"
    sick = record(JOIN | {"kind": "leave"})
    sick["servers"][0]["state"] = "silent"
    assert stage(sick) == "server-3 leaving (server-3 is silent)"
    assert stage(record(JOIN | {"names": ["x"]})) == "x joining (x is gone)"
    assert stage(record(left=3)) == "copying slots"
    assert stage(record(unheard=["server-3"])) == "waiting for server-3"


def test_a_change_is_followed_until_its_processes_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.cli_servers.POLL_S", 0.0)
    ending = record()
    ending["servers"][0]["state"] = "ending"
    answers: list = [
        record(starting=["server-3"]),
        record(JOIN, 9),
        NotApplied("away"),
        record(JOIN, 2),
        ending,
        record(),
    ]

    def ask(verb: str) -> dict:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert follow(ask)["epoch"] == 7
    assert not answers
    dead = [{"name": "server-3", "incarnation": 3, "state": "dead", "addresses": []}]
    answers = [record(left=4), record(left=1), record(unheard=["server-3"]), record(servers=dead), record(left=1)]
    answers.append(record())
    follow(ask, to_the_end=True)
    assert not answers


def test_a_server_that_does_not_answer_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it does not, nobody can tell what is left."""
    monkeypatch.setattr("deploy.cli_servers.POLL_S", 0.0)
    monkeypatch.setattr("deploy.cli_servers.SILENT_S", 0.0)
    with pytest.raises(NotApplied, match="server-3: no answer; the change goes on after it"):
        follow(lambda verb: record(unheard=["server-3"]), to_the_end=True)
    follow(lambda verb: record(unheard=["server-3"]))


@pytest.mark.parametrize("to_the_end", [False, True])
@pytest.mark.parametrize(
    "others",
    [
        record({"kind": "leave", "names": ["server-1"], "undoes": False}, 9),
        record(left=9, starting=["server-4"]),
        record(left=0, servers=[{"name": "server-1", "incarnation": 1, "state": "ending", "addresses": []}]),
    ],
    ids=["joins or leaves", "starts", "ends"],
)
def test_nobody_waits_for_a_change_of_others(to_the_end: bool, others: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.cli_servers.POLL_S", 0.0)
    answers = [record(starting=["server-3"]), record(JOIN, 9), others]
    assert follow(lambda verb: answers.pop(0), ["server-3"], to_the_end) == others
    assert not answers


def test_what_is_left_to_copy_is_waited_for_though_a_process_of_others_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.cli_servers.POLL_S", 0.0)
    ending = [{"name": "server-1", "incarnation": 1, "state": "ending", "addresses": []}]
    answers = [record(left=9, servers=ending), record(left=9), record()]
    assert follow(lambda verb: answers.pop(0), ["server-3"], to_the_end=True) == record()
    assert not answers


def test_a_controller_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.cli_servers.POLL_S", 0.0)
    monkeypatch.setattr("deploy.cli_servers.SILENT_S", 0.0)

    def ask(verb: str) -> dict:
        raise NotApplied("the controller does not answer")

    with pytest.raises(NotApplied, match="does not answer; the change goes on once it is back"):
        follow(ask)


def test_what_was_copied_counts_servers_that_left_and_that_joined() -> None:
    def status(**rows: int) -> dict[str, Any]:
        return {"servers": [{"incarnation": ord(n), "copied_rows": r, "copied_bytes": 10 * r} for n, r in rows.items()]}

    copied = Copied(status(a=100, b=5000))
    copied.see(status(a=150, b=5300, c=7))
    copied.see({"servers": [{"incarnation": ord("a"), "name": "a"}]})  # has not been asked for its figures yet
    copied.see(status(a=160, c=9))  # b is gone with its figures
    assert copied.total() == (60 + 300 + 9, 3690)
    assert Copied(status(a=1)).total() == (0, 0)


class Asked:
    """A controller that answers by a dictionary; one answer may be an error. verbs: what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"outlook": {**PLAN, "kind": "leave"}, "status": record(), **answers}
        self.verbs: list[str] = []
        self.fields: dict[str, dict[str, Any]] = {}

    def __call__(self, verb: str, **fields: Any) -> Any:
        self.verbs.append(verb)
        self.fields[verb] = fields
        answer = self.answers[verb]
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def of_controller(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    def make(**answers: Any) -> Asked:
        ask = Asked(**answers)

        @contextmanager
        def controller(runtime: Any) -> Iterator[Asked]:
            yield ask

        monkeypatch.setattr("ps.cluster.controller", controller)
        monkeypatch.setattr("deploy.cli_servers.running", lambda: Runtime(("tcp:h:1",), ""))
        return ask

    return make


def test_an_interrupt_while_a_move_is_asked_for_that_was_refused(of_controller: Callable[..., Asked]) -> None:
    """There is nothing to undo: what there is now is told."""
    refused = RequestError("no server is joining or leaving")
    ask = of_controller(move=KeyboardInterrupt(), abort=refused)
    with pytest.raises(NotApplied, match="server-3 did not leave: it was aborted, or had not begun"):
        _change("leave", ["server-3"], False, None, False, False)
    assert ask.verbs == ["outlook", "status", "move", "abort", "status", "status"]


def test_an_interrupt_while_a_move_is_asked_for_that_was_taken(
    of_controller: Callable[..., Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    ask = of_controller(move=KeyboardInterrupt(), abort={"names": ["server-3"], "epoch": 8})
    with pytest.raises(typer.Exit) as ended:
        _change("leave", ["server-3"], False, None, False, False)
    assert ended.value.exit_code == 130
    assert "server-3: gone back; the servers are server-" in capsys.readouterr().err
    assert ask.fields["abort"] == {"kind": "leave", "names": ["server-3"]}
    gone = {"status": {**record(), "servers": []}}
    of_controller(move=KeyboardInterrupt(), abort=RequestError("no server is joining or leaving"), **gone)
    _change("leave", ["server-3"], False, None, False, True)
    assert json.loads(capsys.readouterr().out)["names"] == ["server-3"]


def test_the_servers_of_the_plan_are_those_that_are_asked_for(of_controller: Callable[..., Asked]) -> None:
    """Else, where another was faster, they would not be those that the line before named."""
    ask = of_controller(outlook=PLAN, move={"names": ["server-3"], "epoch": 8})
    _change("join", [], False, None, False, True)
    assert ask.fields["move"]["names"] == ["server-3"]


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(("kind", "there"), [("join", True), ("leave", False)])
def test_gone_back_is_said_where_they_have(
    of_controller: Callable[..., Asked], capsys: pytest.CaptureFixture[str], kind: str, there: bool, interrupted: bool
) -> None:
    servers = {} if there else {"servers": []}
    answers = {"abort": {"names": ["server-3"], "epoch": 8}, "outlook": {**PLAN, "kind": kind}}
    of_controller(status=record(**servers), move=KeyboardInterrupt(), **answers)
    with pytest.raises(NotApplied, match="server-3 did not go back: another change was made meanwhile"):
        _change(kind, ["server-3"], False, None, not interrupted, False)
    assert "gone back" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("failed", "says"),
    [("", "it was aborted, or the controller was started again before it had joined"), ("it: why", "it: why")],
)
def test_a_join_that_came_to_nothing_says_why(of_controller: Callable[..., Asked], failed: str, says: str) -> None:
    of_controller(outlook=PLAN, move={"names": ["server-3"]}, status=record(servers=[], move_failed=failed))
    with pytest.raises(NotApplied, match=f"{says}$"):
        _change("join", [], False, None, False, False)


def test_the_runtime_file_is_the_controllers_to_write(
    of_controller: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that was removed with its cluster meanwhile would be brought back by who knows of it from before."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    servers = [{"name": "server-4", "state": "alive", "incarnation": 4, "addresses": ["tcp:h:4"]}]
    of_controller(move={"names": ["server-3"]}, status=record() | {"servers": servers})
    write_runtime(Runtime(("tcp:h:1",), ""))
    runtime_path().unlink()
    done = CliRunner().invoke(app, ["remove-server", "server-3", "--yes"])
    assert done.exit_code == 0, done.exception
    assert not runtime_path().exists()
