"""The controller's work without its actor: what it does about servers that Ray does not give it at once."""

import asyncio
import queue
import socket
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from hashring.planner import Begin, CreateTable, Enlist, Fail, PlanError, plan
from hashring.view import Move, Server, View
from ps.config import Config
from ps.controller import actor
from ps.controller.actor import Control, Controller
from ps.controller.members import Member
from ps.errors import NotApplied, RequestError
from ps.failover import Wish
from ps.runtime import Runtime, read_runtime, write_runtime
from ps.server import Setup
from ps.spec import SGD, TableSpec
from ps.viewlog import ViewLog


@pytest.mark.parametrize("met", [ActorDiedError(), ActorUnavailableError("busy", None), TimeoutError()])
def test_a_controller_that_was_started_again_goes_on_looking_for_its_servers(
    met: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its servers may be dying, or too busy to answer, at that very moment; its port for metrics may be taken."""

    def taken(*_: object) -> None:
        raise OSError("Address already in use")

    monkeypatch.setattr(actor, "serve_metrics", taken)
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

        async def change(wish: Wish) -> int:
            made = wish(control.shell.view) if callable(wish) else wish
            wishes.append(type(made).__name__)
            if isinstance(made, Begin):  # no view has it yet
                for names in ([], ["s-c"]):
                    assert (await control.admin("abort", {"kind": "join", "names": names}))["names"] == ["s-c"]
                for others in (["s-c", "s-d"], ["s-d"]):
                    with pytest.raises(
                        RequestError, match=f"under way is s-c joining, not {', '.join(others)} joining"
                    ):
                        await control.admin("abort", {"kind": "join", "names": others})
                control.shell.mind.view = plan(control.shell.view, made)
            return 7

        async def launch(name: str) -> Member:
            member = control.members.by_name[name] = Member(name, incarnation=20, state="alive")
            return member

        monkeypatch.setattr(control, "_change", change)
        monkeypatch.setattr(control.members, "launch", launch)
        await control.admin("move", {"kind": "join", "names": ["s-c"]})
        async with asyncio.timeout(60):
            await asyncio.gather(*control.moves.joins)
        control.shell.close()

    asyncio.run(test())
    assert wishes == ["Begin", "Abort"]


def test_what_would_be_done_is_refused_while_servers_start(tmp_path: Path) -> None:
    async def test() -> None:
        control = control_of(tmp_path)
        control.moves.starting = ("server-3",)
        for verb in ("move", "outlook"):
            with pytest.raises(
                RequestError, match=r"a change is under way \(server-3 starting\): wait until it is done"
            ):
                await control.admin(verb, {"kind": "join", "names": []})
        control.shell.close()

    asyncio.run(test())


def test_what_would_be_done_counts_rows_as_they_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that was just started again has not heard of any yet."""

    async def test() -> None:
        control = control_of(tmp_path)
        spec = TableSpec("t", 4, SGD(lr=1.0)).to_plain()
        control.shell.mind.view = plan(control.shell.view, CreateTable("t", spec, replicas=1))
        for server in control.shell.view.servers:
            control.members.by_name[server.name] = Member(server.name, None, server.incarnation, state="alive")

        async def ask_one(member: Member, timeout: float) -> None:
            member.figures = {"rows_by_table": {"t": 800}}

        monkeypatch.setattr(control, "_ask_one", ask_one)
        told = await control.admin("outlook", {"kind": "leave", "names": ["server-2"]})
        assert told["rows"] == pytest.approx(2400 * told["slots"] / 8, abs=1)
        assert told["seconds"] >= 0
        control.shell.close()

    asyncio.run(test())


def test_a_server_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = 'ray::Server.ready() (pid=7)\n  File "x.py", line 1, in f\nOSError: [Errno 98] Address already in use\n'

    async def test() -> None:
        control = control_of(tmp_path)

        async def launch(name: str) -> Member:
            raise RayError(trace)

        async def remove(name: str) -> None:
            pass

        monkeypatch.setattr(control.members, "launch", launch)
        monkeypatch.setattr(control.members, "remove", remove)
        await control.admin("move", {"kind": "join", "names": ["server-3"]})
        async with asyncio.timeout(60):
            await asyncio.gather(*control.moves.joins)
        told = control.status()["move_failed"]
        assert told == "server-3 did not join: OSError: [Errno 98] Address already in use"
        control.shell.close()

    asyncio.run(test())


@pytest.mark.parametrize(("kind", "name"), [("join", "server-3"), ("leave", "server-2")])
@pytest.mark.parametrize("named", [False, True])
def test_an_abort_that_is_asked_for_again_answers_the_same(
    kind: str, name: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two presses of Ctrl-C, or two people: an undone join is a leave, which a second abort would undo."""

    async def test() -> None:
        control = control_of(tmp_path)
        mind = control.shell.mind
        servers = (Server("server-3", 13, "h"),) if kind == "join" else ()
        mind.view = plan(mind.view, Begin(Move(kind, (name,), 5), servers))  # type: ignore[arg-type]

        async def change(wish: Wish) -> int:
            if (change := wish(mind.view) if callable(wish) else wish) is not None:
                mind.view = granted(mind.view, change)
            return mind.view.epoch

        monkeypatch.setattr(control, "_change", change)
        fields = {"kind": kind, "names": [name] if named else []}
        first = await control.admin("abort", fields)
        assert first["names"] == [name]
        undone = control.shell.view.move
        assert undone == (Move("leave", (name,), 5, undoes=True) if kind == "join" else None)
        if named or kind == "join":
            assert await control.admin("abort", fields) == first
        assert control.shell.view.move == undone
        says = "is server-3 going back, not server-3 leaving" if kind == "join" else "no server is joining or leaving"
        other = {"kind": "join" if kind == "leave" else "leave", "names": []}
        with pytest.raises((RequestError, PlanError), match=says):
            await control.admin("abort", other)
        control.shell.close()

    asyncio.run(test())


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
        manifest = manifest_of(mind.view)

        async def change(wish: Wish) -> int:
            mind.view = granted(mind.view, wish)
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


def test_who_is_to_take_rows_of_a_restore_does_not_leave_while_its_first_view_spreads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        control = control_of(tmp_path)
        mind, leave = control.shell.mind, {"kind": "leave", "names": ["server-0"]}
        spec = TableSpec("t", 4).to_plain()
        mind.view = plan(plan(mind.view, CreateTable("t", spec, replicas=1)), Fail("server-1"))
        before, manifest = mind.view, manifest_of(mind.view)
        spreading, go_on = asyncio.Event(), asyncio.Event()

        async def change(wish: Wish) -> int:
            after = granted(mind.view, wish)
            control._refuse(mind.view, Move("leave", ("server-0",)))  # asked for while the new view is being logged
            mind.view = after
            spreading.set()
            await go_on.wait()
            return mind.view.epoch

        monkeypatch.setattr(control, "_change", change)
        fields = {"manifest": manifest, "replace_tables": True}  # into slots that the view of before does not have
        restore = asyncio.create_task(control.admin("restore", fields))
        async with asyncio.timeout(60):
            await spreading.wait()
            for verb in ("move", "outlook"):
                with pytest.raises(RequestError, match="rows of a restore are on their way to server-0"):
                    await control.admin(verb, leave)
        go_on.set()
        assert control._restoring is not None
        assert (await restore)["restore"] == control._restoring[0]
        assert before.epoch < mind.view.epoch
        control.shell.close()

    asyncio.run(test())


@pytest.mark.parametrize("others", [False, True])
def test_a_restore_whose_first_view_came_to_nothing_holds_nobody_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    """others: an earlier restore is under way, and stays so."""

    async def test() -> None:
        control = control_of(tmp_path)
        mind = control.shell.mind
        mind.view = plan(plan(mind.view, CreateTable("t", {}, replicas=1)), Fail("server-1"))
        manifest = manifest_of(mind.view)
        failing = False

        async def change(wish: Wish) -> int:
            change = wish(mind.view) if callable(wish) else wish
            if failing:
                raise NotApplied("it could not be logged")
            assert isinstance(change, View)
            mind.view = change
            return change.epoch

        monkeypatch.setattr(control, "_change", change)
        if others:
            await control.admin("restore", {"manifest": manifest})
        before, failing = control._restoring, True
        assert (before is not None) == others
        with pytest.raises(NotApplied):
            await control.admin("restore", {"manifest": manifest})
        assert control._restoring is before
        control.shell.close()

    asyncio.run(test())


def test_figures_are_scraped_and_the_runtime_file_kept_up_from_the_loops_own_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides is not to be looked at while it changes: even a look at it may work out a goal, and keep that."""
    threads: dict[str, set[int]] = {"status": set(), "alive": set(), "readdress": set()}

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            threads[name].add(threading.get_ident())
            return call(*arguments)

        return noting

    async def test() -> None:
        control = control_of(tmp_path)

        async def launch(name: str) -> Member:
            member = control.members.by_name[name]
            member.state, member.incarnation, member.addresses = "alive", 10 + int(name[-1]), (f"tcp:h:{name[-1]}",)
            return member

        written = asyncio.Event()
        loop = asyncio.get_running_loop()

        def readdress(path: str, cluster: int, addresses: tuple[str, ...]) -> bool:
            loop.call_soon_threadsafe(written.set)
            return True

        monkeypatch.setattr(control.members, "launch", launch)
        monkeypatch.setattr(control, "status", noted("status", control.status))
        monkeypatch.setattr(control.members, "alive", noted("alive", control.members.alive))
        monkeypatch.setattr(actor, "readdress", noted("readdress", readdress))
        async with asyncio.timeout(60):
            await control.begin()
            page = await asyncio.to_thread(lambda: urllib.request.urlopen(control.metrics).read().decode())
            assert "embring_epoch 1.0" in page
            await control._publish()
            await written.wait()
        for task in control._tasks:
            task.cancel()
        control.shell.close()
        here = {threading.get_ident()}
        assert threads["status"] == threads["alive"] == here
        assert threads["readdress"]
        assert not threads["readdress"] & here

    asyncio.run(test())


def test_the_runtime_file_names_those_that_stay_before_the_others_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command right after `remove-server` must find the cluster by it."""
    file = tmp_path / "cluster.json"
    told: list[tuple[str, ...]] = []

    async def test() -> None:
        control = control_of(tmp_path, str(file))
        write_runtime(Runtime(("tcp:h:9",), "", cluster=control.shell.view.cluster), file)
        for name, incarnation in (("server-1", 11), ("server-9", 19)):
            addresses = (f"tcp:h:{name[-1]}",)
            control.members.by_name[name] = Member(name, None, incarnation, addresses=addresses, state="alive")
        ended = asyncio.Event()

        async def remove(name: str) -> None:
            told.append((name, *read_runtime(file).addresses))
            control.members.by_name.pop(name)
            ended.set()

        async def spread(epoch: int) -> bool:
            return True

        async def dial(server: Server) -> Any:
            raise NotApplied("it has ended already")

        monkeypatch.setattr(control.members, "remove", remove)
        monkeypatch.setattr(control.shell, "spread", spread)
        monkeypatch.setattr(control, "_dial", dial)
        task = asyncio.create_task(control._end_superfluous())
        async with asyncio.timeout(60):
            await ended.wait()
        task.cancel()
        control.shell.close()

    asyncio.run(test())
    assert told == [("server-9", "tcp:h:1")]


def test_a_controller_that_cannot_begin_tells_who_waits_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else, once Ray has started it again, it would live on, answer, and decide nothing."""
    ended: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(actor, "LINGER_S", 0.0)
    monkeypatch.setattr(actor, "log_to", lambda path: None)
    monkeypatch.setattr("os._exit", ended.put)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = Config().with_settings("control", metrics_port=taken.getsockname()[1])
        controller = Controller(Setup(asdict(config), str(tmp_path), str(tmp_path), "", "embring", "", {}))
        assert ended.get(timeout=60) == 1
        with pytest.raises(OSError, match="Address already in use"):
            controller.start()
    controller._thread.close()
    assert "the controller could not begin, and ends" in caplog.text
    assert "Address already in use" in caplog.text


def granted(view: View, wish: Wish) -> View:
    """The view that an administrator's wish leads to."""
    change = wish(view) if callable(wish) else wish
    assert change is not None
    return change if isinstance(change, View) else plan(view, change)


def control_of(folder: Path, runtime_file: str = "") -> Control:
    """A controller of three servers that has begun."""
    servers = tuple(Server(f"server-{i}", 10 + i, "h") for i in range(3))
    ViewLog(folder / "views").append(plan(View.empty(1, 3), Enlist(servers)))
    control = Control(Setup({}, str(folder), str(folder), "", "embring", "", {}, runtime_file), Config())
    control._begun.set()
    return control


def manifest_of(view: View) -> dict[str, Any]:
    """What a checkpoint of this view says of it."""
    return {
        "cluster": view.cluster,
        "term_max": 1,
        "tables": [[t.number, t.name, t.group, dict(t.spec)] for t in view.tables],
        "groups": [[g.number, g.placement, g.replicas, g.first, g.slots] for g in view.groups],
    }
