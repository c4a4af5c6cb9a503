"""Kills and pauses at the steps of a join, a leave, a failover and a checkpoint, on real processes under load (R5, R1).

A round begins a change, waits until it is at a step, kills or pauses a server, and waits until the cluster has settled:
it must be in the old or in the new membership, whole, and no acknowledged push may be lost or applied twice. Of
checkpoints every one that was committed must stand every checksum.
"""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

import ps
from benchmarks.counted import PUSH_S, Counted, make_table
from benchmarks.report import Findings
from benchmarks.saves import Saves
from benchmarks.servers import Servers, controller_pid, moving, watching
from benchmarks.suites.cluster import Report, benchmark_config, cluster
from ps.errors import EmbringError, NotApplied
from ps.runtime import Runtime, read_token

STEP_S = 120.0
SETTLE_S = 240.0
POLL_S = 0.05
PAUSE_S = 1.5
"""How long a paused server is stopped: its silence is noticed, and it comes back to a view without it."""

Record = Mapping[str, Any]
"""The controller's status."""


@dataclass(frozen=True)
class Round:
    """change: see CHANGES. step: see STEPS. fault: kill or pause. victim: old (a server that was there before and
    stays), new (who joins, leaves, or came back), the controller, or the process that saves."""

    change: str
    step: str
    fault: str
    victim: str


STEPS: Mapping[str, Callable[[Record], bool]] = {
    "starting": lambda now: bool(now["starting"]) or any(s["state"] != "alive" for s in now["servers"]),
    "copying": lambda now: now["slots_left"] > 0 or now["slots_learning"] > 0,
    "ending": lambda now: any(s["state"] == "ending" for s in now["servers"]) or not moving(now),
}

ROUNDS = (  # a leave after a join, so that the cluster mostly has the size that the next round begins with
    Round("join", "copying", "kill", "new"),
    Round("leave", "copying", "kill", "old"),
    Round("join", "copying", "pause", "old"),
    Round("leave", "copying", "kill", "new"),
    Round("failover", "copying", "kill", "new"),
    Round("join", "copying", "kill", "old"),
    Round("leave", "copying", "pause", "new"),
    Round("join", "starting", "kill", "old"),
    Round("leave", "copying", "pause", "old"),
    Round("failover", "starting", "pause", "old"),
    Round("join", "copying", "pause", "new"),
    Round("leave", "ending", "kill", "old"),
    Round("join", "ending", "kill", "new"),
    Round("failover", "copying", "pause", "old"),
    Round("join", "copying", "kill", "controller"),
    Round("leave", "copying", "kill", "controller"),
    Round("failover", "starting", "kill", "controller"),
    Round("checkpoint", "saving", "kill", "old"),
    Round("checkpoint", "saving", "kill", "saver"),
    Round("checkpoint", "saving", "pause", "old"),
    Round("checkpoint", "saving", "kill", "controller"),
)

CHANGES = ("join", "leave", "failover", "checkpoint")


@dataclass(frozen=True)
class Settings:
    """What is done. rate: requests a second. changes: of CHANGES. seconds: no round begins after"""

    changes: Sequence[str] = CHANGES
    rounds: int = 1
    seconds: float = 0.0
    rows: int = 100_000
    dim: int = 16
    replicas: int = 2
    servers: int = 3
    rate: float = 100.0


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Start a cluster, go through the rounds, end it; one JSON-able result. `equal`: nothing promised was broken."""
    findings = Findings()
    config = benchmark_config(settings.servers).with_settings("control", restarts_max=10_000)
    with (
        cluster(config, report, in_place=False) as (runtime, client),
        watching(runtime) as servers,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        make_table(client, settings.rows, settings.dim, settings.replicas)
        with tempfile.TemporaryDirectory(prefix="embring-chaos-") as folder:
            bench = Chaos(settings, runtime, servers, Saves(Path(folder), runtime, servers, config), report)
            done = runner.run(bench.go())
            saves = bench.saves.check()
        report("comparing rows with what was acknowledged")
        with servers.fresh_client() as fresh:
            kept = bench.load.check(fresh)
        differ = servers.slots_that_differ()
    broken = kept["lost"] + kept["doubled"] + kept["unseen"] + differ
    findings.equal = broken == 0 and not saves["damaged"] and all(r["ended"] in ("old", "new") for r in done)
    findings.figures["chaos"] = {
        "rounds": done,
        "rounds_at_their_step": sum(r["reached"] for r in done),
        "rows": kept,
        "slots_that_differ": differ,
        "checkpoints": saves,
        "requests": len(bench.load.trace.due),
        "failed": int(bench.load.trace.failed().sum()),
        "errors": bench.load.trace.errors[:20],
    }
    return findings.to_plain({"command": "embring bench chaos", **asdict(settings)})


class Chaos:
    """The rounds, under one load."""

    def __init__(self, settings: Settings, runtime: Runtime, servers: Servers, saves: Saves, report: Report) -> None:
        self.settings, self.servers, self.saves, self.report = settings, servers, saves, report
        self.load = Counted(servers.view(), settings.rows, settings.dim)
        self._runtime = runtime
        self._spans: list[tuple[float, float]] = []
        """From the strike to the calm after it, of each round."""

    async def go(self) -> list[dict[str, Any]]:
        """Every round of the chosen changes, as often as asked for."""
        addresses, token = list(self._runtime.addresses), read_token(self._runtime.token_path)
        client = await ps.AsyncClient.connect(addresses, token, PUSH_S, in_place=False)
        stop = asyncio.Event()
        load = asyncio.create_task(self.load.run([client], self.settings.rate, stop))
        done: list[dict[str, Any]] = []
        begun = time.monotonic()
        try:
            for one in ROUNDS * self.settings.rounds:
                late = 0 < self.settings.seconds < time.monotonic() - begun
                if one.change in self.settings.changes and not late:
                    done.append(await self._round(one))
                    self.report(f"{one.change} {one.step} {one.fault} {one.victim}: {done[-1]}")
        finally:
            self.saves.close()
            stop.set()
            await load
            await client.close()
        for told, (begin, end) in zip(done, self._spans, strict=True):  # all requests have ended now
            told["requests_failed"] = self.load.trace.between(begin, end)["failed"]
        return done

    async def _round(self, one: Round) -> dict[str, Any]:
        small = self.settings.servers
        if one.change == "leave":  # from one more server, who then goes
            await self._size(small + 1)
        else:
            await self._size(small)
        before = await self._status()
        old = {s["name"] for s in before["servers"]}
        names, new = await self._begin(one.change, before)
        reached = await self._at_step(one.step)
        victim = await self._victim(one.victim, names, old)
        moment = time.perf_counter()
        await self._strike(victim, one.fault)
        saved = one.change == "checkpoint" and await asyncio.to_thread(self.saves.end)
        record = await self._settled()
        end = {s["name"] for s in record["servers"]}
        ended = "new" if end == new else "old" if end == old else str(sorted(end))
        self._spans.append((moment, time.perf_counter()))
        return {
            **asdict(one),
            "server": victim["name"] if victim else "",
            "reached": reached and victim is not None,
            "ended": "old" if one.change == "checkpoint" and ended == "new" and not saved else ended,
            "settled_s": round(time.perf_counter() - moment, 2),
        }

    async def _begin(self, change: str, before: Record) -> tuple[list[str], set[str]]:
        """Begin a change: (who joins, leaves or is lost; who is there when it is done)."""
        old = {s["name"] for s in before["servers"]}
        if change == "checkpoint":
            await asyncio.to_thread(self.saves.begin)
            return [], old
        if change == "join":
            names = (await self._ask("move", kind="join", names=[], bytes_per_s=0))["names"]
            return names, old | set(names)
        if change == "leave":
            names = (await self._ask("move", kind="leave", names=[max(old)], bytes_per_s=0))["names"]
            return names, old - set(names)
        lost = max(before["servers"], key=lambda s: s["slots"])
        os.kill(lost["pid"], signal.SIGKILL)
        until = time.monotonic() + STEP_S
        while self._whole(await self._status()) and time.monotonic() < until:  # until the death is noticed
            await asyncio.sleep(POLL_S)
        return [lost["name"]], old

    async def _at_step(self, step: str) -> bool:
        """Wait until the change is at a step; whether it came there before it was over."""
        until = time.monotonic() + STEP_S
        while step == "saving":
            if self.saves.over() or time.monotonic() > until:
                return False
            if self.saves.writing():
                return True
            await asyncio.sleep(0.001)
        while time.monotonic() < until:
            record = await self._status()
            if STEPS[step](record):
                return True
            if self._whole(record) and not moving(record):
                return False
            await asyncio.sleep(POLL_S)
        raise EmbringError(f"the change was not {step} within {STEP_S:g} s")

    async def _victim(self, which: str, names: Sequence[str], old: set[str]) -> dict[str, Any] | None:
        """A living server to strike: one of those that join, leave or returned, or the first of the others.

        Whoever returns after a death is waited for, as long as the change goes on.
        """
        if which == "saver":
            return {"name": which, "pid": self.saves.pid}
        if which == "controller":
            return {"name": which, "pid": controller_pid(self._runtime)}
        while True:
            record = await self._status()
            living = [s for s in record["servers"] if s["state"] in ("alive", "ending") and s["pid"]]
            for s in living:
                if (s["name"] in names) if which == "new" else (s["name"] in old and s["name"] not in names):
                    return dict(s)
            if self._whole(record) and not moving(record):
                return None
            await asyncio.sleep(POLL_S)

    async def _strike(self, victim: Mapping[str, Any] | None, fault: str) -> None:
        if victim is None:
            return
        try:
            if fault == "kill":
                os.kill(victim["pid"], signal.SIGKILL)
            else:
                os.kill(victim["pid"], signal.SIGSTOP)
                await asyncio.sleep(PAUSE_S)
                os.kill(victim["pid"], signal.SIGCONT)
        except ProcessLookupError:  # it ended by itself meanwhile
            return

    # -- waiting

    def _whole(self, record: Record) -> bool:
        alive = all(s["state"] == "alive" for s in record["servers"])
        return alive and not record["slots_lost"] and not record["slots_under_replicated"]

    async def _settled(self) -> Record:
        """Wait until nothing moves and no copy is missing, twice in a row: a death may not be noticed yet."""
        until, calm = time.monotonic() + SETTLE_S, 0
        while calm < 10:
            record = await self._status()
            calm = calm + 1 if self._whole(record) and not moving(record) and not record["slots_left"] else 0
            if time.monotonic() > until:
                raise EmbringError(f"the cluster did not settle within {SETTLE_S:g} s: {dict(record)}"[:2000])
            await asyncio.sleep(0.2)
        return record

    async def _size(self, servers: int) -> None:
        """Bring the cluster to so many servers, without a fault."""
        record = await self._settled()
        while len(record["servers"]) != servers:
            names = [] if len(record["servers"]) < servers else [max(s["name"] for s in record["servers"])]
            await self._ask("move", kind="leave" if names else "join", names=names, bytes_per_s=0)
            record = await self._settled()

    async def _status(self) -> Record:
        return await self._ask("status")

    async def _ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """The controller's answer; it may be slow for a while when processes die."""
        until = time.monotonic() + STEP_S
        while True:
            try:
                found: dict[str, Any] = await asyncio.to_thread(self.servers.ask, verb, **fields)
                return found
            except NotApplied:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(POLL_S)
