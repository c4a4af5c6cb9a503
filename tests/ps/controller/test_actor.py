"""The controller's work without its actor: what it does about servers that Ray does not give it at once."""

import asyncio
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from hashring.planner import Begin, CreateTable, Enlist, Fail, plan
from hashring.view import Move, Server, View
from ps.config import Config
from ps.controller import actor
from ps.controller.actor import Control
from ps.controller.members import Member
from ps.errors import RequestError
from ps.failover import Wish
from ps.server import Setup
from ps.viewlog import ViewLog


@pytest.mark.parametrize("met", [ActorDiedError(), ActorUnavailableError("busy", None), TimeoutError()])
def test_a_controller_that_was_started_again_goes_on_looking_for_its_servers(
    met: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its servers may be dying, or too busy to answer, at that very moment."""
    monkeypatch.setattr(actor, "AGAIN_S", 0.0)
    servers = tuple(Server(f"server-{i}", 10 + i, "h") for i in range(3))
    ViewLog(tmp_path / "views").append(plan(View.empty(1, 3), Enlist(servers)))
    setup = Setup({}, str(tmp_path), str(tmp_path), "", "embring", "", {})
    asked: list[str] = []

    async def test() -> None:
        control = Control(setup, Config())

        async def launch(name: str) -> Member:
            asked.append(name)
            if asked.count(name) < (3 if name == "server-1" else 1):
                raise met
            member = control.members.by_name[name]
            member.state, member.incarnation = "alive", 10 + int(name[-1])
            return member

        monkeypatch.setattr(control.members, "launch", launch)
        async with asyncio.timeout(60):
            await control.begin()
        assert [s["state"] for s in control.status()["servers"]] == ["alive"] * 3
        for task in control._tasks:
            task.cancel()
        control.shell.close()

    asyncio.run(test())
    assert sorted(asked) == ["server-0", "server-1", "server-1", "server-1", "server-2"]


def test_an_abort_while_a_join_is_logged_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes: list[str] = []

    async def test() -> None:
        control = control_of(tmp_path)

        async def change(wish: object) -> int:
            wishes.append(type(wish).__name__)
            if isinstance(wish, Begin):  # no view has it yet
                assert (await control.admin("abort", {}))["names"] == ["s-c"]
            return 7

        async def launch(name: str) -> Member:
            member = control.members.by_name[name] = Member(name, incarnation=20, state="alive")
            return member

        monkeypatch.setattr(control, "_change", change)
        monkeypatch.setattr(control.members, "launch", launch)
        await control.admin("move", {"kind": "join", "names": ["s-c"]})
        async with asyncio.timeout(60):
            await asyncio.gather(*control._tasks)
        control.shell.close()

    asyncio.run(test())
    assert wishes == ["Begin", "Abort"]


def test_the_name_of_a_process_that_is_still_ending_is_not_given_to_another(tmp_path: Path) -> None:
    """The one that joined would be ended in its place, with the slots that it was given."""

    async def test() -> None:
        control = control_of(tmp_path)
        control.members.by_name["server-3"] = Member("server-3", incarnation=20, state="alive")
        with pytest.raises(RequestError, match="'server-3' has left and its process is still ending"):
            await control.admin("move", {"kind": "join", "names": ["server-3"]})
        assert (await control.admin("outlook", {"kind": "join", "names": []}))["names"] == ["server-4"]
        control.shell.close()

    asyncio.run(test())


def test_a_server_that_rows_of_a_restore_are_on_their_way_to_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        control = control_of(tmp_path)
        mind = control.shell.mind
        mind.view = plan(plan(mind.view, CreateTable("t", {}, replicas=1)), Fail("server-1"))
        manifest = {
            "cluster": mind.view.cluster,
            "term_max": 1,
            "tables": [[t.number, t.name, t.group, dict(t.spec)] for t in mind.view.tables],
            "groups": [[g.number, g.placement, g.replicas, g.first, g.slots] for g in mind.view.groups],
        }

        async def change(wish: Wish) -> int:
            change = wish(mind.view) if callable(wish) else wish
            assert change is not None
            mind.view = change if isinstance(change, View) else plan(mind.view, change)
            return mind.view.epoch

        monkeypatch.setattr(control, "_change", change)
        begun = await control.admin("restore", {"manifest": manifest})
        for verb in ("move", "outlook"):
            with pytest.raises(RequestError, match="rows of a restore are on their way to server-0"):
                await control.admin(verb, {"kind": "leave", "names": ["server-0"]})
        assert control.shell.view.move is None
        await control.admin("restored", {"restore": begun["restore"]})
        await control.admin("move", {"kind": "leave", "names": ["server-0"]})
        assert control.shell.view.move == Move("leave", ("server-0",))
        control.shell.close()

    asyncio.run(test())


def control_of(folder: Path) -> Control:
    """A controller of three servers that has begun."""
    servers = tuple(Server(f"server-{i}", 10 + i, "h") for i in range(3))
    ViewLog(folder / "views").append(plan(View.empty(1, 3), Enlist(servers)))
    control = Control(Setup({}, str(folder), str(folder), "", "embring", "", {}), Config())
    control._begun.set()
    return control
