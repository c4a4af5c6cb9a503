"""A controller of the simulation: the real decisions, over a log in memory and frames to the servers."""

from typing import TYPE_CHECKING

from hashring.view import Server as ServerEntry
from hashring.view import View
from ps.errors import NotApplied, WrongView
from ps.failover import Append, Deliver, Failover, FailoverLimits, Learn, Ping, Retire
from ps.replication import Standing
from ps.wire import Message, view_message
from tests.sim.network import Connection
from tests.sim.process import Process, frame, unframe

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

ROUND_S = 0.2
LIMITS = FailoverLimits(pings_max=5, wait_rounds=8, learn_rounds=3, turn_rounds=6, dispute_rounds=15, learn_max=6)


class Log:
    """The view log: one view an epoch, created only where it is absent."""

    def __init__(self, cluster: "Cluster", views: list[View]) -> None:
        self.cluster = cluster
        self.views = {view.epoch: view for view in views}

    @property
    def newest(self) -> View:
        return self.views[max(self.views)]

    def create(self, view: View) -> bool:
        """Log a view; False where its epoch is there."""
        if view.epoch in self.views:
            return False
        self.views[view.epoch] = view
        return True


def handed_over(before: View, view: View) -> list[tuple[int, int]]:
    """(from, to) incarnations of the primaries of slots that went from one living server to another."""
    alive = {s.incarnation for s in view.servers if s.alive}
    out = set()
    for old, new in zip(before.owners()[:, 0].tolist(), view.owners()[: before.slots_total, 0].tolist(), strict=True):
        pair = (before.servers[old].incarnation, view.servers[new].incarnation)
        if old >= 0 and new >= 0 and pair[0] != pair[1] and pair[0] in alive:
            out.add(pair)
    return sorted(out)


class Controller(Process):
    """One controller."""

    def __init__(self, cluster: "Cluster", name: str) -> None:
        super().__init__(cluster, name)
        self.mind = Failover(cluster.log.newest, LIMITS)
        self._connections: dict[int, Connection] = {}
        self._numbers = 0
        self._asked: dict[int, int] = {}
        self.every(ROUND_S, self.tick)
        for incarnation in cluster.dead:
            self.mind.died(incarnation)
        for server in (s for s in cluster.running() if self.mind.view.server_index(s.name) is not None):
            self.mind.started(server.entry)

    def tick(self) -> None:
        if not self.mind.appending and self.mind.view.epoch + 1 in self.cluster.log.views:
            self.mind.taken()
        self.mind.tick()
        self.perform()

    def told_dead(self, incarnation: int) -> None:
        """Ray's word."""
        if self.alive and not self.paused:
            self.mind.died(incarnation)
            self.perform()
        elif self.alive:
            self._inbox.append((self.told_dead, (incarnation,)))

    def told_started(self, entry: ServerEntry) -> None:
        if self.alive and not self.paused:
            self.mind.started(entry)
            self.perform()
        elif self.alive:
            self._inbox.append((self.told_started, (entry,)))

    def message(self, connection: Connection, data: bytes) -> None:
        reply = unframe(data)
        incarnation = connection.context
        if reply.op == "ok" and "kinds" in reply.arrays:
            a = reply.arrays
            self.cluster.step("a ping's answer", self)
            if self.alive:
                standing = Standing(a["kinds"], a["peers"], a["slots"], a["terms"])
                self.mind.answered(incarnation, reply.fields["epoch"], standing)
        self.perform()

    def disconnected(self, connection: Connection) -> None:
        self._connections.pop(connection.context, None)

    def perform(self) -> None:
        while self.alive and (actions := self.mind.actions()):
            for action in actions:
                if isinstance(action, Append):
                    self.cluster.step("a view is planned", self)
                    self.world.at(self.world.between(0.0005, 0.01), self._create, action.view)
                elif isinstance(action, Ping):
                    self._send(action.incarnation, Message("ping", 0, {"copying": action.copying}))
                elif isinstance(action, Deliver):
                    self.cluster.step("a view leaves", self)
                    self._send(action.incarnation, Message("install", 0, *view_message(action.view)))
                elif isinstance(action, Learn):
                    self.cluster.step("learn leaves", self)
                    fields = {"learner": action.learner, "term_epoch": action.epoch}
                    self._send(action.primary, Message("learn", 0, fields, {"slots": action.slots}))
                elif isinstance(action, Retire):
                    self.world.counts["retired"] += 1
                    self.cluster.replace_controller(self)
                    return
                if not self.alive:
                    return

    def _create(self, view: View) -> None:
        """The disk: done whether or not the process is paused meanwhile, or killed right after."""
        if not self.alive:
            return
        if self.cluster.would_orphan(view) or not self.cluster.log.create(view):
            self._after(self.mind.taken)
            return
        self.cluster.logged(view)
        self.cluster.step("a view is logged", self)
        before = self.cluster.log.views[view.epoch - 1]
        if view.move != before.move:
            self.cluster.step("a move begins or ends", self)
        for pair in handed_over(before, view):
            server = self.cluster.by_incarnation[self.world.rng.choice(pair)]
            if server.alive:
                self.cluster.step("a slot is handed over", server)
        if self.alive:
            self._after(lambda: self.mind.logged(view))

    def _after(self, what: object) -> None:
        if self.paused:
            self._inbox.append((self._after, (what,)))
            return
        what()  # type: ignore[operator]
        self.perform()

    def _send(self, incarnation: int, message: Message) -> None:
        connection = self._connections.get(incarnation)
        if connection is None or not connection.open:
            name = self.cluster.name_of(incarnation)
            try:
                target = self.cluster.reach(name, incarnation)
            except (WrongView, NotApplied):
                return
            connection = self._connections[incarnation] = self.cluster.network.connect(self, target)
            connection.context = incarnation
        self._numbers += 1
        message.request = self._numbers
        connection.send(self, frame(message))
