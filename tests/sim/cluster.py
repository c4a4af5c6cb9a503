"""A whole cluster in one thread, and one run of it."""

from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

import ps.client.core
import ps.replication.machine
import ps.window
from hashring import ring
from hashring.planner import CreateTable, Enlist, plan
from hashring.tokens import tokens
from hashring.view import Server as ServerEntry
from hashring.view import View
from ps.errors import EmbringError, NotApplied, RequestError, SlotsLost, WrongView
from ps.spec import SGD, Initializer, TableSpec
from tests.sim.changes import Changes
from tests.sim.checkpoints import Keeper
from tests.sim.checks import Checks
from tests.sim.client import Client
from tests.sim.controller import Controller, Log
from tests.sim.faults import Faults
from tests.sim.network import Connection, Network
from tests.sim.process import Process
from tests.sim.server import Server
from tests.sim.subscriber import Subscriber, owned_slots
from tests.sim.world import Violation, World

COLUMNS = 300
"""Pushes of a run that name themselves, at most."""

WANTED = 204
"""Pushes that are to be acknowledged: as many are sent as that takes."""

ACKED_MIN = 200
REFUSED_S = 0.1
"""How long nobody pushes where slots were lost: a restore may take seconds, and the pushes of a run are counted."""
CLIENTS_MAX = 7
"""Clients of a run, with those that came in the place of others."""

IDS = 8
CHURNED = 100
REST_S = 40.0
"""Virtual seconds within which all must be level once faults have ended: disputes and waits pass first."""


ring._distances = lru_cache(maxsize=None)(ring._distances.__wrapped__)  # the same few servers, in every order


@cache
def first_views(names: tuple[str, ...], replicas: int) -> list[View]:
    """Servers that own the slots of three tables; processes are yet to be named."""
    entries = tuple(ServerEntry(name, i, f"host-{name}") for i, name in enumerate(names, 1))
    views = [plan(View.empty(7, slot_bits=2), Enlist(entries))]
    for name, placement, dim in (("a", "sharded", COLUMNS), ("b", "sharded", COLUMNS + 4), ("w", "whole", COLUMNS)):
        spec = TableSpec(name, dim, SGD(lr=1.0), Initializer(0.0, 0.0), placement=placement, replicas=replicas).check()
        views.append(plan(views[-1], CreateTable(name, spec.to_plain(), placement, replicas)))
    return views


class _Time:
    """What stands for the module `time` in the client."""

    def __init__(self, world: World) -> None:
        self.monotonic = lambda: world.now


@dataclass
class Report:
    """What came of a run."""

    seed: int
    acked: int = 0
    violation: str = ""
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    cells: list[tuple[str, str]] = field(default_factory=list)
    epochs: int = 0
    broken_invariant: bool = False
    """Whether `violation` is of an invariant, not an exception."""

    trace: str = ""
    """A hash of how many events there were, when the last was, and where chance stood: of two different runs never the
    same."""


class Cluster:
    """Servers, controllers, clients, and the log between them."""

    def __init__(self, seed: int, calm: bool = False, trace: bool = False) -> None:
        self.world = World(seed)
        if trace:
            self.world.trace = []
        rng = self.world.rng
        self.columns = COLUMNS
        self.replicas = rng.choice((2, 2, 2, 3))
        names = [f"s{i}" for i in range(self.replicas + rng.choice((1, 1, 2)))]
        self.network = Network(self.world)
        self.dead: list[int] = []
        self.by_incarnation: dict[int, Server] = {}
        self.controllers: list[Controller] = []
        self.clients: list[Client] = []
        self._incarnations = 0
        entries = tuple(ServerEntry(n, self._incarnation(), f"host-{n}") for n in names)
        self.log = Log(
            self,
            [
                replace(view, servers=entries if view.servers else ())
                for view in first_views(tuple(names), self.replicas)
            ],
        )
        view = self.log.newest
        self.checks = Checks(self)
        self.faults = Faults(self, calm)
        self.changes = Changes(self, calm)
        for entry in entries:
            server = self.by_incarnation[entry.incarnation] = Server(self, entry.name, entry.incarnation)
            server.install(view)
        self.controllers.append(Controller(self, "controller0"))
        self._controllers_made = 1
        self.clients = [Client(self, f"client{i}") for i in range(rng.choice((2, 3)))]
        self._clients_made = len(self.clients)
        self.subscriber = Subscriber(self)
        self.lost: set[int] = set()
        self._refused_at = -1.0
        self.keeper = Keeper(self, calm)
        self.column = 0
        self.acked = 0
        if not calm:
            self.faults.begin()
        self.changes.begin()

    def _incarnation(self) -> int:
        self._incarnations += 1
        return self._incarnations * 1000 + self.world.rng.randrange(1000)

    # -- who is where

    def running(self) -> list[Server]:
        """Servers whose process lives."""
        return [s for s in self.by_incarnation.values() if s.alive]

    def name_of(self, incarnation: int) -> str:
        return self.by_incarnation[incarnation].name if incarnation in self.by_incarnation else ""

    def reach(self, name: str, incarnation: int) -> Server:
        """Who listens at an address; the handshake refuses whoever means another incarnation (0: any)."""
        found = next((s for s in self.running() if s.name == name), None)
        if found is None:
            raise NotApplied(f"nobody listens at {name}")
        if incarnation and found.incarnation != incarnation:
            raise WrongView(f"incarnation {incarnation} was meant", found.view.epoch if found.view else 0)
        return found

    def slot_of(self, table: int, id_: int) -> int:
        view = self.log.newest
        entry = next(t for t in view.tables if t.number == table)
        group = view.group(entry.group)
        bits = group.slots.bit_length() - 1
        token = int(tokens(np.array([id_]), int(entry.spec["seed"]))[0])
        return group.first + (token >> (64 - bits) if bits else 0)

    # -- what happens to processes

    def step(self, name: str, process: Process, connection: Connection | None = None) -> None:
        """A step of the protocol, at a process and by a connection."""
        self.world.counts["step " + name] += 1
        self.faults.step(name, process, connection)

    def may_die(self, victim: Server) -> bool:
        """Whether every slot has a living owner without it: the loss of all is another matter."""
        return not self._orphans(self.log.newest, victim)

    def would_orphan(self, view: View) -> bool:
        """Whether a view that is about to be logged names only dead owners of some slot."""
        return self._orphans(view, None)

    def _orphans(self, view: View, without: Server | None) -> bool:
        alive = {s.incarnation for s in self.running() if s is not without}
        there = np.array([s.incarnation in alive for s in view.servers] + [False])
        owners = view.owners()[[slot for slot in owned_slots(view) if slot not in self.lost]]
        return bool((~there[owners].any(axis=1)).any())

    def mourn(self) -> None:
        """Slots without a living owner are lost, and with them what was acknowledged there."""
        self.lost = self._orphaned(self.log.newest)
        self.checks.lost(self.lost)

    def _orphaned(self, view: View) -> set[int]:
        running = {s.incarnation for s in self.running()}
        alive = np.array([s.incarnation in running for s in view.servers] + [False])
        return {slot for slot in owned_slots(view) if not alive[view.owners()[slot]].any()}

    def crash(self, victim: Server) -> None:
        """Kill a server; it is started again under its name, and Ray says so to the controllers, in any order."""
        rng = self.world.rng
        victim.kill()
        self.dead.append(victim.incarnation)
        for controller in self.controllers:
            self.world.at(rng.uniform(0.05, 1.3), controller.told_dead, victim.incarnation)
        self.world.at(rng.choice((0.05, 0.5, 2.0)), self._restart, victim.name)

    def _restart(self, name: str) -> None:
        if self.listens(name):  # a process of this name joins again already
            return
        if self.log.newest.server_index(name) is None:
            if name in self.changes.starting:  # it may be about to join
                self.world.at(0.3, self._restart, name)
            return  # else it has left meanwhile, or never joined
        server = self.start(name)
        for controller in self.controllers:
            self.world.at(self.world.rng.uniform(0.0, 0.3), self._tell_of, server, controller)

    def _tell_of(self, server: Server, controller: Controller) -> None:
        """Of a start, unless a later process of the name runs: a controller starts them one after another."""
        if all(other is server for other in self.running() if other.name == server.name):
            controller.told_started(server.entry)

    def listens(self, name: str) -> bool:
        """Whether a process of this name runs."""
        return any(s.name == name for s in self.running())

    def start(self, name: str) -> Server:
        """Start a process, of which no controller knows yet."""
        incarnation = self._incarnation()
        server = self.by_incarnation[incarnation] = Server(self, name, incarnation)
        return server

    def end(self, name: str) -> None:
        """End the process of a server that has left, or never joined, if it runs and that is still so."""
        if self.log.newest.server_index(name) is not None or name in self.changes.starting:
            return
        for victim in [s for s in self.running() if s.name == name]:
            self.world.counts["servers ended"] += 1
            victim.kill()
            self.dead.append(victim.incarnation)
            for controller in self.controllers:
                self.world.at(self.world.rng.uniform(0.05, 1.3), controller.told_dead, victim.incarnation)

    def crash_client(self, victim: Client) -> None:
        """A client vanishes with all that it has under way; another comes in its place, as somebody else."""
        victim.kill()
        client = self.clients[self.clients.index(victim)] = Client(self, f"client{self._clients_made}")
        self._clients_made += 1
        self.world.at(self.world.rng.choice((0.05, 1.0)), self._work, client)

    def may_crash_a_client(self) -> bool:
        """Servers remember a few only."""
        return self._clients_made < CLIENTS_MAX

    def add_controller(self) -> None:
        """Start a controller, which reads the log, and ends processes that are in no view."""
        for name in sorted({s.name for s in self.running()}):
            self.end(name)
        self.controllers.append(Controller(self, f"controller{self._controllers_made}"))
        self._controllers_made += 1

    def replace_controller(self, victim: Controller) -> None:
        """A controller ends; where it was the only one, another is started a while later."""
        victim.kill()
        self.controllers.remove(victim)
        self.world.at(self.world.rng.choice((0.1, 1.0)), self._restart_controller)

    def _restart_controller(self) -> None:
        if not self.controllers:
            self.add_controller()

    def logged(self, view: View) -> None:
        """A view is in the log, and nobody knows it yet."""
        before = self.log.views[view.epoch - 1]
        self.world.say(f"logged epoch {view.epoch}: {[r.tolist() for r in view.owners()]} {view.move or ''}")
        self.checks.logged(view, before)
        if self.lost:
            still = self._orphaned(view)
            back = {slot for slot in self.lost - still if before.lost()[slot]}  # else a learner was made owner in time
            self.lost = (self.lost & still) | {slot for slot in still if slot >= before.slots_total}  # a table's own
            if back:
                self.keeper.concluded(back)
        for name in sorted({s.name for s in before.servers} - {s.name for s in view.servers}):
            if "~" not in name:
                self.world.at(self.world.rng.uniform(0.05, 2.0), self.end, name)

    # -- work

    def _work(self, client: Client) -> None:
        rng = self.world.rng
        if self.done() or not client.alive:
            return
        self.world.at(rng.expovariate(1 / self.pace), self._work, client)
        if client.undecided >= 6:
            return
        if self.forgetful and client is self.clients[0] and 2.0 < self.world.now < 17.0:
            return  # it is away for so long that it is forgotten, and comes back
        x = rng.random()
        if x < 0.7:
            self._push(client)
        elif x < 0.8:
            ids = np.array([CHURNED + rng.randrange(4)])
            client.push("a", ids, None, "delete", self._churned)
        elif x < 0.9:
            ids = np.array([CHURNED + rng.randrange(4)])
            client.push("a", ids, np.zeros((1, COLUMNS), np.float32), "assign", self._churned)
        else:
            client.pull(rng.choice("abw"), np.array(rng.sample(range(IDS), 2)), self._pulled)

    def _churned(self, error: EmbringError | None) -> None:
        if error is not None:
            self._given_up(error)

    def _pulled(self, _: Any, error: EmbringError | None) -> None:
        self.world.counts["pulls failed" if error else "pulls"] += 1

    def done(self) -> bool:
        """Whether enough pushes were sent."""
        return self.acked + sum(c.undecided for c in self.clients) >= WANTED + 4 or self.column >= self.columns

    def _push(self, client: Client) -> None:
        rng = self.world.rng
        column, name = self.column, rng.choice(["a", "a", "b", "w", *self.changes.tables * 2])
        entry = self.log.newest.table(name) or self.log.newest.table("a")
        assert entry is not None
        table, name = entry.number, entry.name
        ids = rng.sample(range(IDS), rng.choice((1, 2, 2, 4)))
        if self.lost and any(self.slot_of(table, id_) in self.lost for id_ in ids):
            return
        if self.world.now < self._refused_at + REFUSED_S:
            return
        self.column += 1
        grads = np.zeros((len(ids), entry.spec["dim"]), np.float32)  # type: ignore[call-overload]
        grads[:, column] = -1.0
        self.checks.begin(table, ids, column)
        begun = self.world.now

        def done(error: EmbringError | None) -> None:
            if error is None:
                self.acked += 1
                self.checks.acknowledge(table, ids, column, begun)
            elif type(error) is RequestError and (table not in self.checks.tables or not client.knows(table)):
                self.world.counts["given up: the table was dropped, or is too new"] += 1
            else:
                self._given_up(error)

        client.push(name, np.array(ids), grads, "push", done)

    def _given_up(self, error: EmbringError) -> None:
        self.world.counts[f"given up: {type(error).__name__}"] += 1
        if isinstance(error, SlotsLost) and self.world.counts["losses"]:
            self._refused_at = self.world.now
            return
        if not isinstance(error, NotApplied) and type(error).__name__ not in ("PerhapsApplied", "WrongView"):
            self.checks.fail(f"a push met {type(error).__name__}: {error}")

    # -- a run

    def run(self) -> Report:
        """Work under faults until every push is sent, then heal, and wait until all is level."""
        report = Report(self.world.seed)
        before = ps.client.core.time
        idle = ps.window.CLIENT_IDLE_S, ps.replication.machine.FORGET_S
        ps.client.core.time = _Time(self.world)  # type: ignore[assignment]
        try:
            self.pace = 0.02 if self.faults.hasty else self.world.rng.choice((0.01, 0.05, 0.1))
            self.forgetful = self.world.chance(0.15)
            ps.window.CLIENT_IDLE_S = 12.0 if self.forgetful else 3600.0
            ps.replication.machine.FORGET_S = 1.0
            if self.forgetful:
                self.pace = 0.2
            for client in self.clients:
                self._work(client)
            self.world.until(60.0, self.done)
            self.world.until(self.world.now + 0.3)
            while self.acked < WANTED and self.column < self.columns and self.world.now < 80.0:
                for client in self.clients:
                    self._work(client)
                self.world.until(self.world.now + 1.0)
            self.faults.stop()
            self.changes.stop()
            began = self.world.now
            self._rest(began)
            self.checks.end()
            if self.acked < ACKED_MIN:
                self.checks.fail(f"only {self.acked} pushes were acknowledged")
        except Violation as violation:
            report.violation, report.broken_invariant = str(violation), True
        finally:
            ps.client.core.time = before
            ps.window.CLIENT_IDLE_S, ps.replication.machine.FORGET_S = idle
        report.acked, report.seconds, report.epochs = self.acked, self.world.now, self.log.newest.epoch
        report.faults = dict(sorted(self.world.counts.items()))
        report.cells = sorted(self.faults.cells)
        report.trace = self.world.fingerprint()
        return report

    def _rest(self, began: float) -> None:
        while self.world.now < began + REST_S:
            self.world.until(self.world.now + 0.5)
            if not self.checks.resting():
                return
        self.checks.fail(f"I11: after {REST_S:g} s without faults {self.checks.resting()}")
