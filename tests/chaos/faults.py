"""What is done to the cluster, one function a kind: each strikes under load, heals what only we can heal, and tells
whom it struck.

kind                what
primary             kill -9 of a primary of slots that are being written
primary-stop        SIGSTOP of one, for longer than it takes others to take over
backup              kill -9 of a server that is a backup, and not the primary, of every slot that is being written
backup-stop         SIGSTOP of one
controller          kill -9 of the controller: Ray starts it again, and it reads its log
controller-stop     SIGSTOP of the controller, for longer than it waits for pings
controller+server   both killed at once
rivals              the controller stopped, another one started, a primary killed; then both go on at once
pair                two servers killed at once (three copies or more)
raylet              kill -9 of the second node's raylet: every server there dies
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ps.rayhead import start_time
from tests.chaos.cluster import NODE_S, SECOND_HOST, Ask, Place, until, wait_gone
from tests.chaos.load import Load, Rows

STOPPED_S = 2.5
SETTLE_S = 120.0
EVEN_S = 20.0
KINDS = (
    "primary", "primary-stop", "backup", "controller+server", "primary", "rivals", "backup-stop", "primary",
    "controller", "primary-stop", "backup", "controller-stop", "primary", "raylet", "backup-stop",
)  # fmt: skip
"""Those of one turn, in this order; `pair` joins them where there are three copies."""


class NotNow(Exception):
    """The cluster is not such that this kind could count. instead: servers whose deaths bring it nearer to that."""

    def __init__(self, why: str, instead: set[str]) -> None:
        super().__init__(why)
        self.instead = instead


@dataclass
class Strike:
    """Who was struck, when (monotonic), whether it counts, and which incarnations and processes must be gone."""

    victims: tuple[str, ...]
    moment: float
    counted: bool
    killed: tuple[int, ...] = ()


class Scene:
    """One cluster under one load."""

    def __init__(self, place: Place, load: Load, ask: Ask, servers: int, replicas: int, chance: random.Random) -> None:
        self.place, self.load, self.ask = place, load, ask
        self.servers, self.replicas, self.chance = servers, replicas, chance

    # -- rounds

    def round(self, kind: str, among: set[str] | None = None) -> dict[str, Any]:
        """One fault, from the load's full swing until all is well again. Raises NotNow, TimeoutError.

        among: a primary of these is killed, whatever the kind.
        """
        begun = time.monotonic()
        epoch = self.ask("status")["epoch"]
        strike = _STRIKES[kind](self) if among is None else self.strike(*self.choose(among=among))
        try:
            settled = until(lambda: self.settled(strike), SETTLE_S, "a settled cluster")
        except TimeoutError as error:
            raise TimeoutError(f"{error} after {strike}; the status is {self.ask('status')}") from None
        self.load.chosen = np.arange(len(self.load.ids))
        acked = until(lambda: self.load.acked_since(strike.moment) is not None, SETTLE_S, "an acknowledged push")
        return {
            "kind": kind,
            "victims": strike.victims,
            "counted": strike.counted,
            "first_ack_s": round(self.load.acked_since(strike.moment) or acked, 3),
            "settled_s": round(settled, 3),
            "views": self.ask("status")["epoch"] - epoch,
            "round_s": round(time.monotonic() - begun, 3),
        }

    def settled(self, strike: Strike) -> bool:
        """Whether every server is there, the killed ones as other incarnations, and no copy is missing."""
        now = self.ask("status")
        alive = [s for s in now["servers"] if s["state"] == "alive" and s["incarnation"] not in strike.killed]
        good = len(alive) == self.servers and len({s["incarnation"] for s in alive}) == self.servers
        return good and not now["slots_lost"] and not now["slots_under_replicated"] and not now["slots_learning"]

    # -- who

    def status_of(self, name: str) -> dict[str, Any]:
        """What the status says of a server."""
        return next(s for s in self.ask("status")["servers"] if s["name"] == name)

    def candidates(self, backup: bool = False) -> dict[str, Rows]:
        """Names of servers and the ids (as numbers) of whose slots each is primary, or backup and nothing else."""
        view, owners = self.place.owners()
        columns = owners[:, 1:] if backup else owners[:, :1]
        found = {s.name: np.flatnonzero((columns == i).any(axis=1)) for i, s in enumerate(view.servers) if s.alive}
        return {name: rows for name, rows in found.items() if len(rows)}

    def choose(self, backup: bool = False, among: set[str] | None = None) -> tuple[str, Rows]:
        """A victim, and the rows of the load that it holds so."""
        found = self.candidates(backup)
        name = self.chance.choice(sorted(found.keys() & among if among else found) or sorted(found))
        return name, found[name]

    def aim(self, rows: Rows, chosen: Rows | None = None) -> bool:
        """Let the load get going on `chosen` rows (all of them), then wait until a push of `rows` is in flight."""
        self.load.chosen = np.arange(len(self.load.ids)) if chosen is None else chosen
        begun = time.monotonic()
        until(lambda: self.load.acked_since(begun) is not None, SETTLE_S, "a push of the chosen rows", pause=0.005)
        time.sleep(self.chance.uniform(0.0, 0.3))
        deadline = time.monotonic() + 5.0
        while not (flying := self.load.in_flight(rows)) and time.monotonic() < deadline:
            time.sleep(0.0005)
        return flying

    def strike(
        self, names: str | tuple[str, ...], rows: Rows, chosen: Rows | None = None, stop: bool = False
    ) -> Strike:
        """Kill servers at once, or stop them for a while."""
        names = (names,) if isinstance(names, str) else names
        struck = [self.status_of(name) for name in names]
        counted = self.aim(rows, chosen)
        moment = time.monotonic()
        for server in struck:
            os.kill(server["pid"], signal.SIGSTOP if stop else signal.SIGKILL)
        if stop:
            time.sleep(STOPPED_S)
            for server in struck:
                os.kill(server["pid"], signal.SIGCONT)
        return Strike(names, moment, counted, () if stop else tuple(s["incarnation"] for s in struck))


def _servers(backup: bool, stop: bool) -> Callable[[Scene], Strike]:
    def strike(scene: Scene) -> Strike:
        name, rows = scene.choose(backup)
        return scene.strike(name, rows, rows if backup else None, stop)

    return strike


def _pair(scene: Scene) -> Strike:
    first, rows = scene.choose()
    second = scene.chance.choice(sorted({s["name"] for s in scene.ask("status")["servers"]} - {first}))
    return scene.strike((first, second), rows)


def _controller(stop: bool) -> Callable[[Scene], Strike]:
    def strike(scene: Scene) -> Strike:
        (pid,) = scene.place.controllers()
        counted = scene.aim(np.arange(len(scene.load.ids)))
        moment = time.monotonic()
        os.kill(pid, signal.SIGSTOP if stop else signal.SIGKILL)
        if stop:
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
        else:
            wait_gone([pid])
        return Strike(("controller",), moment, counted)

    return strike


def _controller_and_server(scene: Scene) -> Strike:
    (pid,) = scene.place.controllers()
    name, rows = scene.choose()
    victim = scene.status_of(name)
    counted = scene.aim(rows)
    moment = time.monotonic()
    for each in (pid, victim["pid"]):
        os.kill(each, signal.SIGKILL)
    wait_gone([pid])
    return Strike(("controller", name), moment, counted, (victim["incarnation"],))


def _rivals(scene: Scene) -> Strike:
    """A controller that was thought dead wakes beside its successor: whoever logs the next view goes on alone."""
    import ray

    from ps.cluster import start_controller

    place = scene.place
    (old,) = place.controllers()
    name, rows = scene.choose()
    victim = scene.status_of(name)
    os.kill(old, signal.SIGSTOP)
    try:
        rival = start_controller(place.runtime, place.config, place.runtime_file, name="rival", restarts=0)
        ray.get(rival.start.remote(), timeout=SETTLE_S)
        counted = scene.aim(rows)
        moment = time.monotonic()
        os.kill(victim["pid"], signal.SIGKILL)
        until(lambda: scene.load.acked_since(moment) is not None, SETTLE_S, "an acknowledged push under the rival")
    finally:
        os.kill(old, signal.SIGCONT)
    wait_gone([old], SETTLE_S)  # it meets the rival's views, and retires; Ray starts it again
    tables = iter(range(1000))

    def alone() -> bool:
        table = f"rival{next(tables)}"
        scene.ask("create_table", spec={"name": table, "dim": 1})
        scene.ask("drop_table", name=table)
        return len(place.controllers()) == 1

    until(alone, SETTLE_S, "the rival's end", pause=0.5)
    return Strike(("controller", "rival", name), moment, counted, (victim["incarnation"],))


def _raylet(scene: Scene) -> Strike:
    place = scene.place
    _prepare_node(scene)
    status = scene.ask("status")["servers"]
    there = {s["name"]: s for s in status if s["host"] == SECOND_HOST}
    elsewhere = {s["name"] for s in status} - there.keys()
    if not there:
        raise NotNow("no server is on the second node", elsewhere)

    def held() -> tuple[Rows, bool]:
        """Rows whose primaries are there, and whether every slot has an owner elsewhere."""
        view, owners = place.owners()
        struck = [i for i, s in enumerate(view.servers) if s.name in there]
        everywhere = view.owners()
        safe = ((everywhere >= 0) & ~np.isin(everywhere, struck)).any(axis=1)
        return np.flatnonzero(np.isin(owners[:, 0], struck)), bool(safe.all())

    with suppress(TimeoutError):  # first places are evened out some seconds after the copies are there
        until(lambda: len(held()[0]) > 0 and held()[1], EVEN_S, "primaries on the second node")
    rows, safe = held()
    if not safe:
        raise NotNow("every owner of some slots is on the second node", set(there))
    if not len(rows):
        raise NotNow("no server of the second node is a primary", elsewhere)
    (raylet,) = place.pids("raylet/raylet", SECOND_HOST)
    counted = scene.aim(rows)
    moment = time.monotonic()
    os.kill(raylet, signal.SIGKILL)
    until(lambda: all(start_time(s["pid"]) is None for s in there.values()), NODE_S, "the end of the node's servers")
    _prepare_node(scene)
    return Strike(("raylet", *there), moment, counted, tuple(s["incarnation"] for s in there.values()))


def _prepare_node(scene: Scene) -> None:
    if not scene.place.node_up():
        scene.place.start_node()
        until(scene.place.node_up, NODE_S, "the second node")


_STRIKES: dict[str, Callable[[Scene], Strike]] = {
    "primary": _servers(False, False),
    "primary-stop": _servers(False, True),
    "backup": _servers(True, False),
    "backup-stop": _servers(True, True),
    "controller": _controller(False),
    "controller-stop": _controller(True),
    "controller+server": _controller_and_server,
    "rivals": _rivals,
    "pair": _pair,
    "raylet": _raylet,
}
