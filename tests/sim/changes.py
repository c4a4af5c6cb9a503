"""What administrators wish for during a run: servers that join and leave, wishes undone, tables that come and go."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hashring.planner import Abort, AlterTable, Begin, CreateTable, DropTable, Place
from hashring.view import Move
from ps.failover import Wish
from ps.spec import SGD, Initializer, TableSpec
from tests.sim.faults import WISHES

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

SERVERS_MORE = 3
"""Servers that there may be beyond the replicas of a table."""

MOVING = (
    *("copy leaves", "copy arrives", "copy taken", "learn leaves", "learn arrives", "a learner is admitted"),
    *("a move begins or ends", "a slot is handed over"),
)
"""Steps that there are more of where servers join and leave."""

GROUPS_MAX = 6
"""Groups of tables from which on none is given slots of its own."""

TABLES_MAX = 2
"""Tables of these that there are at a time."""


class Changes:
    """Draws and makes the wishes of one run, of whichever controller there is; what comes of them is not waited for."""

    def __init__(self, cluster: "Cluster", calm: bool = False) -> None:
        self.cluster, self.world = cluster, cluster.world
        rng = self.world.rng
        aimed = cluster.faults.aims_at(*MOVING, *WISHES)
        moves = rng.random() < 0.6 or aimed
        placing = cluster.faults.aims_at("a table moves")
        self.kinds = ["join", "leave", "join", "leave", "abort"] if moves else []
        self.kinds += ["create", "alter", "drop", "place", "place"] if rng.random() < 0.4 or placing else []
        self.rate = 1.5 if aimed or placing else rng.choice((0.3, 0.6, 1.2))
        self.names: list[str] = []
        self.tables: list[str] = []
        self.starting: dict[str, int] = {}
        """Servers whose processes were started, as these incarnations, and that are in no view yet."""
        self._made = 0
        self.active = bool(self.kinds) and not calm

    def begin(self) -> None:
        """From here on there are wishes."""
        if self.active:
            self.world.at(self.world.rng.expovariate(self.rate), self._next)

    def stop(self) -> None:
        """From here on there are none."""
        self.active = False

    def _next(self) -> None:
        if self.active:
            self.make(self.world.rng.choice(self.kinds))
            self.begin()

    def make(self, kind: str) -> bool:
        """Wish for a change of a kind; whether there was one to be wished for, and somebody to be told."""
        made: bool = getattr(self, "_" + kind)()
        return made

    def wish(self, change: Wish, what: str) -> bool:
        """Tell a controller; False where none can be told."""
        live = [c for c in self.cluster.controllers if c.alive and not c.paused]
        if not live:
            return False
        controller = self.world.rng.choice(live)
        self.world.counts[what] += 1
        self.world.say(f"WISH {what}")
        controller.mind.change(what, change)
        controller.perform()
        return True

    # -- servers

    def _present(self) -> list[str]:
        return [s.name for s in self.cluster.log.newest.servers if "~" not in s.name]

    def _join(self) -> bool:
        """One or two processes, of new names or of such as have left, are started and then join."""
        rng, names = self.world.rng, []
        for _ in range(rng.choice((1, 1, 1, 2))):
            taken = {*self._present(), *self.starting}  # a controller refuses the name of who is about to join
            left = [name for name in self.names if name not in taken and not self.cluster.listens(name)]
            if len(self._present()) + len(names) >= self.cluster.replicas + SERVERS_MORE:
                break
            if not left or rng.random() < 0.5:
                self._made += 1
                left = [f"n{self._made}"]
            names.append(left[0])
            self.names = [*(n for n in self.names if n != left[0]), left[0]]
        if names:
            entries = tuple(self.cluster.start(name).entry for name in names)
            self.starting |= {entry.name: entry.incarnation for entry in entries}
            self.world.at(rng.choice((0.0, rng.uniform(0.0, 0.5))), self._started, tuple(names), entries)
        return bool(names)

    def _started(self, names: tuple[str, ...], entries: tuple[Any, ...]) -> None:
        self.wish(Begin(Move("join", names), entries), "join")
        self.world.at(1.0, self._settled, entries)

    def _settled(self, entries: tuple[Any, ...]) -> None:
        """Processes whose wish came to nothing are ended, unless their names are used by another wish since."""
        if any(c.alive and (c.mind.appending or c.mind._wishes) for c in self.cluster.controllers):
            self.world.at(0.5, self._settled, entries)  # it may still be granted: by one that is paused, say
            return
        for entry in entries:
            if self.starting.get(entry.name) == entry.incarnation:
                del self.starting[entry.name]
                self.cluster.end(entry.name)

    def _leave(self) -> bool:
        rng, names = self.world.rng, self._present()
        if len(names) <= self.cluster.replicas:
            return False
        some = rng.sample(names, rng.choice((1, 1, 1, 2)))
        self.names += [name for name in some if name not in self.names]
        return self.wish(Begin(Move("leave", tuple(some))), "leave")

    def _abort(self) -> bool:
        move = self.cluster.log.newest.move
        return move is not None and self.wish(Abort(move.kind, move.names), "abort")

    # -- tables

    def _create(self) -> bool:
        if len(self.tables) >= TABLES_MAX:
            return False
        self._made += 1
        name, placement = f"t{self._made}", self.world.rng.choice(("sharded", "sharded", "whole"))
        spec = TableSpec(
            name, self.cluster.columns, SGD(lr=1.0), Initializer(0.0, 0.0), placement=placement,
            replicas=self.cluster.replicas,
        ).check()  # fmt: skip
        if not self.wish(CreateTable(name, spec.to_plain(), placement, self.cluster.replicas), "create table"):
            return False
        self.tables.append(name)
        return True

    def _alter(self) -> bool:
        """A setting that changes nothing which is checked."""
        table = self.cluster.log.newest.table(self.world.rng.choice(["a", *self.tables]))
        if table is None:
            return False
        rule = SGD(lr=1.0, clip=float(self.world.rng.randrange(100, 200)))
        spec = replace(TableSpec.from_plain(table.spec), optimizer=rule).check()
        return self.wish(AlterTable(table.name, spec.to_plain()), "alter table")

    def _place(self) -> bool:
        """Another placement or number of copies, of some tables: others may share their slots, and stay."""
        view, rng = self.cluster.log.newest, self.world.rng
        if len(view.groups) > GROUPS_MAX:
            return False
        tables = rng.sample(view.tables, rng.randint(1, len(view.tables)))
        placement, replicas = rng.choice(("sharded", "whole")), rng.choice((2, 3, "all"))
        if rng.random() < 0.3:
            placement = view.group(tables[0].group).placement
        specs = {
            t.name: replace(TableSpec.from_plain(t.spec), placement=placement, replicas=replicas).check().to_plain()
            for t in tables
        }
        return self.wish(Place(specs, placement, replicas), "place")

    def _drop(self) -> bool:
        return bool(self.tables) and self.wish(DropTable(self.tables.pop(0)), "drop table")
