"""What goes wrong, when, and how often: each seed draws its own mix (swarm testing)."""

from typing import TYPE_CHECKING

import numpy as np

from hashring.planner import Withdraw
from tests.sim.network import Connection
from tests.sim.process import Process

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.server import Server

WISHES = ("join", "leave", "abort", "place")
"""Made at steps; elsewhere they come at a rate of their own (tests.sim.changes)."""

KINDS = (
    *("crash", "pause", "cut", "block", "one-way", "island", "slow", "jump"),
    *("suspicion", "controller crash", "controller pause", "second controller", "old view", "client crash"),
    *WISHES,
)


class Faults:
    """Draws and makes the faults of one run."""

    def __init__(self, cluster: "Cluster", calm: bool = False) -> None:
        self.cluster, self.world = cluster, cluster.world
        rng = self.world.rng
        chosen = [kind for kind in KINDS if kind not in WISHES and rng.random() < 0.55] or ["crash"]
        self.weights = {kind: rng.choice((0.3, 1.0, 3.0)) for kind in chosen}
        self.rate = rng.choice((0.5, 1.0, 2.0, 4.0))
        self.aim = rng.choice((0.0, 0.001, 0.002, 0.004))
        cells = [(kind, step) for step in STEPS for kind in KINDS]
        first = self.world.seed * 8  # eight cells a seed, so that every cell has its turn
        self.aimed_at = {cells[(first + i) % len(cells)]: 1 for i in range(8)}
        cluster.network.p_after_a_break = 0.3
        self.hasty = False
        if rng.random() < 0.25:  # a run of copies to learners that break and begin again
            self.weights["suspicion"] = 3.0
            self.aimed_at |= {
                ("cut", "copy leaves"): 8,
                ("cut", "copy taken"): 4,
                ("block", "a learner is admitted"): 3,
                ("cut", "a learner is admitted"): 8,
            }
            cluster.network.p_after_a_break = 0.8
            # Within the next copy, behind it, or right behind a part of it.
            cluster.network.after_a_break_s = rng.choice((0.05, 0.3, None))
            self.hasty = True
        elif rng.random() < 0.2:  # controllers that do not know of each other
            self.weights |= {"second controller": 3.0, "controller pause": 1.0, "suspicion": 1.0}
        elif rng.random() < 0.25:  # tables that get other slots in the middle of pushes and copies
            self.weights["suspicion"] = 3.0
            self.aimed_at |= {
                ("place", "copy taken"): 2,
                ("place", "copy leaves"): 1,
                ("place", "replicate leaves"): 2,
                ("place", "replicate arrives"): 2,
            }
        self.duplicates = rng.choice((0.0, 0.0, 0.02, 0.1))
        cluster.network.p_late = rng.choice((0.0, 0.0, 0.01, 0.05))
        cluster.network.delay = rng.choice((0.0003, 0.001, 0.004))
        self.active = False
        self.cells: set[tuple[str, str]] = set()
        if calm:
            self.duplicates = cluster.network.p_late = 0.0

    def aims_at(self, *names: str) -> bool:
        """Whether something is to go wrong at one of these steps, or is one of these kinds."""
        return any(step in names or kind in names for kind, step in self.aimed_at)

    def begin(self) -> None:
        """From here on things go wrong."""
        self.active = True
        self._next()

    def _next(self) -> None:
        self.world.at(self.world.rng.expovariate(self.rate), self._strike)

    def _strike(self) -> None:
        if self.active:
            self._make(self._draw(), None, None)
            self._next()

    def _draw(self) -> str:
        kinds = sorted(self.weights)
        return self.world.rng.choices(kinds, [self.weights[k] for k in kinds])[0]

    def step(self, name: str, process: Process, connection: Connection | None) -> None:
        """A step of the protocol is about to be taken: now and then something goes wrong right there."""
        if not self.active:
            return
        if name == "copy taken" and connection is not None:
            self.cluster.network.deliver_late(connection)
        for (kind, step), left in self.aimed_at.items():
            if step == name and left and self.world.rng.random() < 0.3 and self._make(kind, process, connection):
                self.aimed_at[(kind, step)] -= 1
                self.cells.add((kind, name))
        if self.aim and self.world.rng.random() < self.aim:
            kind = self._draw()
            if self._make(kind, process, connection):
                self.cells.add((kind, name))

    def _make(self, kind: str, process: Process | None, connection: Connection | None) -> bool:
        """Make a fault, at a process where it can be; whether it was made."""
        cluster, world = self.cluster, self.world
        rng = world.rng
        servers = cluster.running()
        if kind.startswith("controller") or kind == "second controller":
            made = self._controller(kind, process)
        elif kind in WISHES:
            made = cluster.changes.make(kind)
        elif kind == "client crash":
            caller = connection.caller if connection is not None else None
            made = cluster.may_crash_a_client()
            if made:
                cluster.crash_client(next((c for c in cluster.clients if c is caller), rng.choice(cluster.clients)))
        elif servers:
            from tests.sim.server import Server as ServerProcess

            victim = process if isinstance(process, ServerProcess) and process.alive else rng.choice(servers)
            made = self._server(kind, victim, [s for s in servers if s is not victim], connection)
        else:  # all of them are paused, or lost for a restore
            made = False
        if made:
            world.counts[kind] += kind not in WISHES
            world.say(f"FAULT {kind}")
        return made

    def _server(self, kind: str, victim: "Server", others: "list[Server]", connection: Connection | None) -> bool:
        cluster, world, rng = self.cluster, self.world, self.world.rng
        if kind == "crash":
            if not cluster.may_die(victim):
                return False
            world.say(f"crash of {victim.name}")
            cluster.crash(victim)
        elif kind == "pause":
            if victim.paused:
                return False
            world.say(f"pause of {victim.name}")
            victim.pause()
            world.at(rng.choice((0.1, 0.4, 1.2, 2.0)) * rng.uniform(0.7, 1.3), victim.resume)
        elif kind == "cut":
            mine = [c for c in cluster.network.connections if victim in (c.caller, c.called)]
            if not mine:
                return False
            cluster.network.cut(connection if connection in mine and rng.random() < 0.7 else rng.choice(mine))
        elif kind in ("block", "one-way"):
            names = [p.name for p in (*others, *cluster.controllers, *cluster.clients)]
            other = rng.choice(names)
            if connection is not None and victim in (connection.caller, connection.called) and rng.random() < 0.7:
                other = (connection.called if victim is connection.caller else connection.caller).name
            pairs = [(victim.name, other), (other, victim.name)]
            if kind == "one-way":
                pairs = [rng.choice(pairs)]
            seconds = rng.choice((0.1, 0.6, 2.0)) * rng.uniform(0.7, 1.3)
            for pair in pairs:
                cluster.network.block(*pair)
                world.at(seconds, cluster.network.heal, *pair)
        elif kind == "island":  # cut off from all but the clients: what it applies is to be undone
            seconds = rng.choice((0.8, 1.6, 2.5))
            for other in (*others, *cluster.controllers):
                for pair in ((victim.name, other.name), (other.name, victim.name)):
                    cluster.network.block(*pair)
                    world.at(seconds, cluster.network.heal, *pair)
        elif kind == "slow":
            cluster.network.slow[victim.name] = rng.choice((0.02, 0.1))
            world.at(rng.uniform(0.5, 2.0), cluster.network.slow.pop, victim.name, None)
        elif kind == "jump":
            victim.offset += rng.choice((0.3, 5.0, 4000.0))
        elif kind == "suspicion":
            live = [c for c in cluster.controllers if c.alive and not c.paused]
            if not live:
                return False
            everything = np.arange(cluster.log.newest.slots_total)
            controller = rng.choice(live)
            if cluster.log.newest.server_index(victim.name) is None or len(cluster.log.newest.owners()) == 0:
                return False
            controller.mind.change("suspicion", Withdraw({victim.name: everything}))
            controller.perform()
        elif kind == "old view":
            views = cluster.log.views
            victim.install(views[rng.choice(sorted(views))])
        return True

    def _controller(self, kind: str, process: Process | None) -> bool:
        cluster, world, rng = self.cluster, self.world, self.world.rng
        if kind == "second controller":
            if len(cluster.controllers) > 1:
                return False
            cluster.add_controller()
            return True
        live = [c for c in cluster.controllers if c.alive and not c.paused]
        if not live:
            return False
        victim = process if process in live else rng.choice(live)
        if kind == "controller pause":
            victim.pause()  # type: ignore[union-attr]
            world.at(rng.choice((0.5, 1.5, 3.0)), victim.resume)  # type: ignore[union-attr]
        else:
            cluster.replace_controller(victim)  # type: ignore[arg-type]
        return True

    def stop(self) -> None:
        """From here on nothing goes wrong, and what was broken is whole again."""
        self.active = False
        self.duplicates = 0.0
        cluster = self.cluster
        cluster.network.p_late = 0.0
        cluster.network.slow.clear()
        for pair in sorted(cluster.network.blocked):
            cluster.network.heal(*pair)
        for process in (*cluster.running(), *cluster.controllers):
            process.resume()


STEPS = (
    *("push arrives", "replicate leaves", "replicate arrives", "replicate taken", "a peer's reply"),
    *("fork leaves", "fork arrives", "fork taken", "repair leaves", "repair arrives", "repair taken"),
    *("copy leaves", "copy arrives", "copy taken"),
    *("install leaves", "install arrives", "learn leaves", "learn arrives"),
    *("a learner is admitted", "a view is planned", "a view is logged", "a view leaves", "a ping's answer"),
    *("a move begins or ends", "a slot is handed over", "absorb arrives", "a table moves"),
)

CELLS = tuple((kind, step) for kind in KINDS for step in STEPS)
"""Every kind of fault at every step."""
