"""The servers of a benchmark's cluster from outside: their counters, their view, what their processes use."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ps
from hashring.view import View
from ps.cluster import controller
from ps.errors import EmbringError, NotApplied, Overloaded
from ps.fabric.address import pick
from ps.fabric.blocking import BlockingConnection
from ps.fabric.protocol import Hello
from ps.rayhead import marked
from ps.runtime import Runtime, read_token
from ps.wire import Message, view_of

ASK_S = 30.0
MOVE_S = 240.0
POLL_S = 0.2
LOOK_S = 0.02
"""Between two looks at a change at rest, which is timed."""
DIGESTS = 1024
"""Slots whose digests are asked for at once."""


@dataclass(frozen=True)
class Usage:
    """Of all servers, counted since they began: CPU seconds and bytes received; the rest of each server, by name.

    ids_pulled: since it began. bytes_used: of rows and directory, by its own account. resident: its private memory.
    """

    cpu_s: float
    bytes_received: int
    ids_pulled: Mapping[str, int]
    bytes_used: Mapping[str, int]
    resident: Mapping[str, int]


class Servers:
    """The living servers of a cluster, asked over connections of their own; make it with `watching`."""

    def __init__(self, runtime: Runtime, ask: Any) -> None:
        self.ask = ask
        self._token = read_token(runtime.token_path)
        self._open: dict[int, BlockingConnection] = {}

    def status(self) -> dict[str, Any]:
        """The controller's status."""
        found: dict[str, Any] = self.ask("status")
        return found

    def living(self) -> list[dict[str, Any]]:
        """Their lines of the status, by name."""
        return [s for s in self.status()["servers"] if s["state"] == "alive"]

    def fresh_client(self) -> "ps.Client":
        """A client that knows the servers there are now: those of the start may all be gone."""
        return ps.connect([a for s in self.living() for a in s["addresses"]], self._token, ASK_S, in_place=False)

    def view(self) -> View:
        """The newest view that a server knows."""
        views = [view_of(reply.fields, reply.arrays) for _, reply in self._each("view")]
        return max(views, key=lambda view: view.epoch)

    def usage(self) -> Usage:
        """What the servers have used."""
        cpu, received = 0.0, 0
        ids, used, resident = {}, {}, {}
        for server, reply in self._each("statistics"):
            cpu += cpu_seconds(server["pid"])
            received += reply.fields["listener"]["bytes_received"]
            ids[server["name"]] = reply.fields["store"]["ids_pulled"]
            used[server["name"]] = reply.fields["store"]["bytes_used"]
            resident[server["name"]] = resident_bytes(server["pid"])
        return Usage(cpu, received, ids, used, resident)

    def _each(self, op: str) -> Iterator[tuple[dict[str, Any], Any]]:
        for server in self.living():
            yield server, self._ask(server, op, {})

    def _ask(self, server: Mapping[str, Any], op: str, arrays: dict[str, NDArray[Any]]) -> Message:
        found = self._open.get(server["incarnation"])
        if found is None or found.closed:
            address = next(iter(pick(server["addresses"])))
            found = BlockingConnection.connect(address, Hello(self._token), ASK_S)
            self._open[server["incarnation"]] = found
        until = time.monotonic() + ASK_S
        while True:
            try:
                return found.receive(found.send(op, {}, arrays, ASK_S), ASK_S)
            except Overloaded:  # the load that is measured fills it, for the moment
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)
            except NotApplied:
                if not found.closed:
                    raise
                return self._ask(server, op, arrays)  # it was silent for so long that the server had closed it

    def join(self) -> dict[str, int]:
        """Have one more server join, and wait until it has: its rows by table. EmbringError where it takes too long."""
        name, _ = self._moved("join", [])
        newcomer = next((s for s in self.living() if s["name"] == name), None)
        if newcomer is None:
            raise EmbringError(f"{name} did not join: {self.status()['move_failed']}")
        return dict(self._ask(newcomer, "statistics", {}).fields["store"]["rows_by_table"])

    def leave(self) -> float:
        """Have the last server leave, and wait until it has; the seconds in which its slots went to others.

        EmbringError where it takes too long.
        """
        name, seconds = self._moved("leave", [self.living()[-1]["name"]])
        if any(s["name"] == name for s in self.living()):
            raise EmbringError(f"{name} did not leave: {self.status()['move_failed']}")
        return seconds

    def _moved(self, kind: str, names: list[str]) -> tuple[str, float]:
        """Have one server join or leave; its name, and the seconds until the view had no move any more, once nothing is
        on its way."""
        begin = time.monotonic()
        (name,) = self.ask("move", kind=kind, names=names, bytes_per_s=0)["names"]
        seconds, seen = 0.0, False
        while moving(record := self.status()):
            took = time.monotonic() - begin
            there = record["move"] is not None
            if there or seen:  # the first look that finds it gone counts: never less than it took
                seconds = took
            seen = there
            if took > MOVE_S:
                raise EmbringError(f"the {kind} of {name} was not over after {MOVE_S:g} s")
            time.sleep(LOOK_S)
        return str(name), max(seconds, time.monotonic() - begin) if seen else seconds

    def copied(self) -> dict[int, tuple[int, int]]:
        """Rows and bytes that each incarnation has copied to others; one that is ending answers as long as it can."""
        out = {}
        for server in self.status()["servers"]:
            if server["state"] in ("alive", "ending"):
                with contextlib.suppress(EmbringError):
                    told = self._ask(server, "statistics", {}).fields
                    out[server["incarnation"]] = (told["copied_rows"], told["copied_bytes"])
        return out

    def slots_that_differ(self) -> int:
        """Slots of which two owners hold different rows, by their digests; nothing may be pushed meanwhile."""
        view = self.view()
        owners = view.owners()
        index = {s.incarnation: i for i, s in enumerate(view.servers)}
        found = np.zeros((len(owners), len(view.servers)), np.uint64)
        for server in self.living():
            place = index[server["incarnation"]]
            slots = np.flatnonzero((owners == place).any(axis=1))
            for at in range(0, len(slots), DIGESTS):
                some = slots[at : at + DIGESTS]
                reply = self._ask(server, "digest", {"slots": some})
                found[some, place] = reply.arrays["digests"].view(np.uint64).reshape(len(some), -1)[:, 0]
        theirs = np.take_along_axis(found, np.maximum(owners, 0).astype(np.int64), axis=1)
        return int(((theirs != theirs[:, :1]) & (owners >= 0)).any(axis=1).sum())

    def close(self) -> None:
        """Close the connections."""
        for connection in self._open.values():
            connection.close()


def moving(record: Mapping[str, Any]) -> bool:
    """Whether servers are joining or leaving, or processes of theirs are starting or ending, by a status."""
    ending = any(s["state"] == "ending" for s in record["servers"])
    return bool(record["move"] is not None or record["starting"] or ending)


@contextmanager
def watching(runtime: Runtime) -> Iterator[Servers]:
    """The servers of a running cluster of this machine."""
    with controller(runtime) as ask:
        servers = Servers(runtime, ask)
        try:
            yield servers
        finally:
            servers.close()


def controller_pid(runtime: Runtime) -> int:
    """The process of a cluster's controller, which Ray starts again; NotApplied where there is none just now."""
    for pid in marked(Path(runtime.scratch).name):
        with contextlib.suppress(OSError):
            if "ray::Controller" in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    raise NotApplied("the cluster has no controller at the moment")


def cpu_seconds(pid: int) -> float:
    """CPU seconds of all living threads of a process, to the nanosecond where the kernel says so."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[0])
        except OSError:  # the thread has just ended
            continue
    return total / 1e9


def resident_bytes(pid: int) -> int:
    """Bytes of memory that a process has written: its own, and what it lets others of its host read."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "RssShmem:"))


def host_cpu_seconds() -> float:
    """CPU seconds that all cores of this host have spent on anything."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_cpu_seconds() -> float:
    """CPU seconds of this process."""
    return cpu_seconds(os.getpid())
