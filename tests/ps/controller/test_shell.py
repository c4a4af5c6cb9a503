"""The controller's shell over servers that are fakes: what is decided reaches the log and the servers, in order."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hashring.planner import CreateTable, Enlist, Fail, plan
from hashring.view import Server, View
from ps.controller import shell as shells
from ps.controller.shell import INSTALLS_MAX, Shell
from ps.errors import EmbringError, NobodyListens, NotApplied, PerhapsApplied, RequestError, WrongView
from ps.failover import FailoverLimits
from ps.replication import ADMISSION, NOTHING, Standing
from ps.viewlog import EpochTakenError
from ps.wire import Message, view_of

DEADLINE_S = 20.0
LIMITS = FailoverLimits(pings_max=3, wait_rounds=2, learn_rounds=1)


def servers(count: int) -> tuple[Server, ...]:
    return tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(count))


def cluster(count: int, replicas: int) -> View:
    return plan(
        plan(View.empty(1, slot_bits=3), Enlist(servers(count))), CreateTable("t", {"dim": 1}, replicas=replicas)
    )


class Disk:
    """A view log in memory; `deny` errors come first."""

    def __init__(self, *deny: Exception) -> None:
        self.views: list[tuple[int, int]] = []
        self.deny = list(deny)

    def append(self, view: View, after: int) -> None:
        if self.deny:
            raise self.deny.pop(0)
        self.views.append((view.epoch, after))

    def holds(self, epoch: int) -> bool:
        return any(epoch == logged for logged, _ in self.views)


class Process:
    """A server: answers unless it is stopped, in which case requests wait until it goes on."""

    def __init__(self) -> None:
        self.epoch = 0
        self.standing: Standing = NOTHING
        self.asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.goes = asyncio.Event()
        self.goes.set()

    def ops(self, op: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        return [a for a in self.asked if a[0] == op]


class Wire:
    """A connection to a process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.closed = False

    async def request(self, op: str, fields: dict[str, Any], arrays: dict[str, Any], timeout: float) -> Message:
        self.process.asked.append((op, fields, arrays))
        try:
            async with asyncio.timeout(timeout):
                await self.process.goes.wait()
        except TimeoutError:
            raise PerhapsApplied("no answer") from None
        if op == "install":
            self.process.epoch = max(self.process.epoch, view_of(fields, arrays).epoch)
        arrays = dict(self.process.standing.to_arrays()) if op == "ping" else {}
        return Message("ok", 0, {"epoch": self.process.epoch}, arrays)

    def close(self) -> None:
        self.closed = True


class Network:
    """All processes, and the shell over them."""

    def __init__(self, view: View, disk: Disk | None = None) -> None:
        self.processes = {s.incarnation: Process() for s in view.servers}
        self.disk = disk or Disk()
        self.retired = 0
        self.wires: list[tuple[int, Wire]] = []
        self.gone: dict[int, EmbringError] = {}
        self.shell = Shell(view, self.disk, self.dial, LIMITS, 0.01, self.retire)

    async def dial(self, server: Server) -> Wire:
        if server.incarnation in self.gone:
            raise self.gone[server.incarnation]
        if server.incarnation not in self.processes:
            raise NotApplied("nobody there")
        self.wires.append((server.incarnation, Wire(self.processes[server.incarnation])))
        return self.wires[-1][1]

    def retire(self) -> None:
        self.retired += 1

    async def rounds(self, count: int) -> None:
        """So many rounds, each answered as far as servers go."""
        for _ in range(count):
            self.shell.tick()
            for _ in range(20):
                await asyncio.sleep(0)


def run(test: Callable[[], Any]) -> None:
    async def within() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(within())


def test_servers_join_in_one_view_which_is_logged_before_they_hear_of_it() -> None:
    async def test() -> None:
        net = Network(View.empty(1, slot_bits=3))
        net.processes = {s.incarnation: Process() for s in servers(3)}
        logged_at_first_install = []
        dial = net.shell._dial

        async def dialled(server: Server) -> Any:
            logged_at_first_install.append(list(net.disk.views))
            return await dial(server)

        net.shell._dial = dialled
        net.shell.started(*servers(3))
        assert await net.shell.until(lambda: net.shell.view.epoch == 1, DEADLINE_S)
        assert await net.shell.spread(1)
        assert net.disk.views == [(1, 0)]
        assert logged_at_first_install == [[(1, 0)]] * 3
        assert [p.epoch for p in net.processes.values()] == [1, 1, 1]

    run(test)


def test_an_administrators_wish_is_granted_or_refused() -> None:
    async def test() -> None:
        net = Network(cluster(2, 1))
        epoch = await net.shell.change(CreateTable("u", {"dim": 1}))
        assert epoch == 3
        assert await net.shell.spread(epoch)
        assert {p.epoch for p in net.processes.values()} == {3}
        with pytest.raises(RequestError, match="exists already"):
            await net.shell.change(CreateTable("u", {"dim": 1}))
        assert await net.shell.change(lambda view: None) == 3

    run(test)


def test_a_stopped_server_leaves_its_slots_and_is_asked_once() -> None:
    async def test() -> None:
        net = Network(cluster(3, 2))
        await net.rounds(2)
        stopped = net.processes[11]
        stopped.goes.clear()
        before = len(stopped.asked)
        await net.rounds(3)
        assert net.shell.view.epoch == 2
        await net.rounds(2)
        assert await net.shell.until(lambda: net.shell.view.epoch == 3, DEADLINE_S)
        assert not (net.shell.view.owners() == 1).any()
        assert (net.shell.view.owners()[:, 0] >= 0).all()
        await net.rounds(30)
        news = [op for op, _, _ in stopped.asked[before:]]
        assert news.count("ping") == 1
        assert 1 <= news.count("install") <= INSTALLS_MAX  # first places were evened out without it
        stopped.goes.set()
        await net.rounds(2)
        assert stopped.epoch >= 3
        assert net.shell.mind.servers[11].missed == 0

    run(test)


@pytest.mark.parametrize("meets", [NobodyListens("refused"), WrongView("another incarnation")])
def test_who_refuses_connections_leaves_its_slots_after_two_pings(meets: EmbringError) -> None:
    async def test() -> None:
        network = Network(cluster(3, 2))
        await network.rounds(2)
        for incarnation, wire in network.wires:
            wire.closed |= incarnation == 11
        network.gone[11] = meets
        await network.rounds(2)
        assert not (network.shell.view.owners() == 1).any()

    run(test)


def test_with_one_copy_a_pause_costs_no_slot() -> None:
    async def test() -> None:
        net = Network(cluster(3, 1))
        await net.rounds(2)
        net.processes[11].goes.clear()
        await net.rounds(20)
        assert net.shell.mind.servers[11].missed >= LIMITS.pings_max
        assert net.shell.view.epoch == 2
        net.shell.died(11)  # but where its process is dead they are lost, and stay lost
        assert await net.shell.until(lambda: net.shell.view.epoch == 3, DEADLINE_S)
        net.shell.started(Server("s1", 99, "h1"))
        net.processes[99] = Process()
        assert await net.shell.until(lambda: net.shell.view.epoch == 4, DEADLINE_S)
        await net.rounds(20)
        assert net.shell.view.epoch == 4
        assert net.shell.view.lost().sum() == (cluster(3, 1).owners()[:, 0] == 1).sum()
        assert not any(p.ops("learn") for p in net.processes.values())

    run(test)


def test_missing_copies_are_made_and_their_holders_become_owners() -> None:
    async def test() -> None:
        net = Network(cluster(3, 2))
        await net.rounds(2)
        net.shell.died(11)
        del net.processes[11]
        assert await net.shell.until(lambda: net.shell.view.epoch == 3, DEADLINE_S)
        await net.rounds(5)
        assert await net.shell.until(lambda: net.shell.view.epoch == 4, DEADLINE_S)  # first places were evened out
        await net.rounds(3)
        view = net.shell.view
        short = np.flatnonzero((view.owners() >= 0).sum(axis=1) < 2)
        learnt = []
        for incarnation, process in net.processes.items():
            for _, fields, arrays in process.ops("learn")[-1:]:
                assert fields == {"learner": 22 - incarnation, "term_epoch": 4}
                learnt += arrays["slots"].tolist()
                k, slots = len(arrays["slots"]), arrays["slots"]
                kinds, peers = np.full(k, ADMISSION, np.uint8), np.full(k, fields["learner"], np.uint64)
                process.standing = Standing(kinds, peers, slots, view.terms()[slots])
        assert sorted(learnt) == short.tolist()
        assert net.shell.mind.learning == 0
        await net.rounds(3)
        assert await net.shell.until(lambda: bool((net.shell.view.owners()[:, 1] >= 0).all()), DEADLINE_S)

    run(test)


def test_who_cannot_log_the_next_view_ends() -> None:
    async def test() -> None:
        net = Network(cluster(2, 1), Disk(EpochTakenError("epoch 3 is taken")))
        wish = asyncio.create_task(net.shell.change(Fail("s0")))
        assert await net.shell.until(lambda: net.retired > 0, 1.0) or net.retired
        await net.rounds(3)
        assert net.retired == 1
        assert net.shell.view.epoch == 2
        assert not any(p.ops("install") for p in net.processes.values())
        wish.cancel()

    run(test)


def test_who_finds_a_newer_view_in_the_log_ends_though_it_has_nothing_to_log() -> None:
    async def test() -> None:
        net = Network(cluster(2, 1))
        await net.rounds(2)
        assert net.retired == 0
        net.disk.views.append((3, 2))  # by another controller, which died before anybody heard of it
        await net.rounds(3)
        assert net.retired == 1

    run(test)


def test_a_full_disk_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shells, "RETRY_S", 0.001)

    async def test() -> None:
        net = Network(cluster(2, 1), Disk(OSError("no space left"), OSError("no space left")))
        assert await net.shell.change(CreateTable("u", {"dim": 1})) == 3
        assert net.disk.views == [(3, 2)]

    run(test)


def test_a_connection_without_an_answer_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        net = Network(cluster(2, 1))
        net.processes[10].goes.clear()
        line = net.shell._line(10)
        assert line is not None
        with pytest.raises(PerhapsApplied):
            await line.ask("ping", {}, {}, 0.001)
        net.processes[10].goes.set()
        await line.ask("ping", {}, {}, 1.0)
        assert [i for i, _ in net.wires] == [10, 10]
        assert [w.closed for _, w in net.wires] == [True, False]

    run(test)


def test_a_wait_that_is_in_vain_ends() -> None:
    async def test() -> None:
        net = Network(cluster(2, 1))
        assert not await net.shell.until(lambda: False, 0.001)

    run(test)
