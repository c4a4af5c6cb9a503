"""A cluster grows by a server and shrinks by it again, under load: what clients notice, and what is moved (S8, S9, R5).
Before that a server leaves at rest, beside Valkey's migration of slots (S10).

The load is that of benchmarks/counted.py, of several clients, at a part of the rate that the cluster can answer. That
is measured first, with the greater and with the smaller number of servers, and the lower counts: on a machine whose
cores all servers share, one more of them answers less. So pulls during a change stand beside those of before it all,
and beside the slower of the two quiet phases around the change.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import uvloop

import ps
from benchmarks.counted import PUSH_S, TABLE, Counted, Trace, make_table
from benchmarks.load import closed, percentiles_ms
from benchmarks.model import block_bytes, slots_of
from benchmarks.peers.process import PeerMissing
from benchmarks.peers.valkey_slots import ValkeySlots
from benchmarks.report import Findings
from benchmarks.servers import Servers, host_cpu_seconds, moving, watching
from benchmarks.suites.cluster import Report, benchmark_config, cluster
from hashring.view import View
from ps.errors import EmbringError
from ps.runtime import Runtime, read_token

MOVE_S = 300.0
POLL_S = 0.25
TURN_S = 0.5
"""After a view that gives a slot another primary every client knows of it within this time."""

IN_FLIGHT = 8
ROUNDS = 3
CLIENTS = 4
"""Of one client 64 pushes are under way at the most; a single one that waits for 100 ms would hold up those behind."""


@dataclass(frozen=True)
class Settings:
    """What is measured. load: part of what the cluster can answer, with `servers` and with one more, whichever is less.
    seconds: of each phase without a change."""

    rows: int = 2_000_000
    dim: int = 64
    replicas: int = 2
    servers: int = 3
    load: float = 0.7
    seconds: float = 10.0
    bandwidth_mib: int = 0


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Start a cluster, measure, end it; one JSON-able result."""
    findings = Findings()
    with (
        cluster(benchmark_config(settings.servers + 1), report, in_place=False) as (runtime, client),
        watching(runtime) as servers,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        report(f"loading {settings.rows} rows, {settings.replicas} copies of each")
        make_table(client, settings.rows, settings.dim, settings.replicas)
        bench = Bench(settings, runtime, servers, report)
        figures = runner.run(bench.measure())
        report("comparing rows with what was acknowledged")
        with servers.fresh_client() as fresh:
            figures["rows"] = bench.load.check(fresh)
        figures["slots_that_differ"] = servers.slots_that_differ()
    findings.figures["S10"] = _beside_valkey(figures["at_rest"], settings.dim * 4, findings, report)
    findings.equal = (
        figures["rows"]["lost"]
        == figures["rows"]["doubled"]
        == figures["rows"]["unseen"]
        == figures["slots_that_differ"]
        == 0
    )
    findings.figures["rebalance"] = figures
    return findings.to_plain({"command": "embring bench rebalance", **asdict(settings)})


def _beside_valkey(at_rest: dict[str, Any], row_bytes: int, findings: Findings, report: Report) -> float | None:
    """Rows/s of a leave at rest, to the keys/s that Valkey moves from one server to another; None without Valkey."""
    try:
        with contextlib.closing(ValkeySlots()) as valkey:
            at_rest["valkey_rows_per_s"] = round(at_rest["rows"] / valkey.migrate(at_rest["rows"], row_bytes))
    except PeerMissing as error:
        findings.missing.append(str(error))
        report(str(error))
        return None
    report(f"a leave at rest: {at_rest['rows_per_s']} rows/s; Valkey moves {at_rest['valkey_rows_per_s']} keys/s")
    return round(at_rest["rows_per_s"] / at_rest["valkey_rows_per_s"], 3)


@dataclass(frozen=True)
class Turn:
    """A view that gives slots another primary, and when pushes may notice it."""

    slots: set[int]
    begin: float
    end: float


@dataclass(frozen=True)
class Phase:
    """What was measured from one moment to another; what clients noticed is known only later."""

    begin: float
    end: float
    figures: dict[str, Any]
    turns: Sequence[Turn] = ()
    started: float = 0.0
    """When the last process that the change needs had started; the same as begin where none had to."""


class Bench:
    """The load, and the changes under it."""

    def __init__(self, settings: Settings, runtime: Runtime, servers: Servers, report: Report) -> None:
        self.settings, self.servers, self.report = settings, servers, report
        self.load = Counted(servers.view(), settings.rows, settings.dim)
        self._runtime = runtime

    async def measure(self) -> dict[str, Any]:
        """Find the rate, then before, join, between, leave and after, under one load."""
        token = read_token(self._runtime.token_path)
        addresses = list(self._runtime.addresses)
        clients = [await ps.AsyncClient.connect(addresses, token, PUSH_S, in_place=False) for _ in range(CLIENTS)]
        more = await self._capacity(clients)
        at_rest = await asyncio.to_thread(self._leave_at_rest)
        fewer = await self._capacity(clients)
        rate = min(more, fewer) * self.settings.load
        self.report(f"{rate:.0f} requests/s, {self.settings.load:.0%} of the lesser")
        stop = asyncio.Event()
        load = asyncio.create_task(self.load.run(clients, rate, stop))
        figures: dict[str, Any] = {
            "at_rest": at_rest,
            "requests_per_s": round(rate, 1),
            "requests_per_s_max": {str(self.settings.servers + k): round(x, 1) for k, x in ((0, fewer), (1, more))},
        }
        phases: dict[str, Phase] = {}
        try:
            await asyncio.sleep(1.0)
            phases["before"] = await self._quiet()
            phases["join"] = await self._change("join", [])
            phases["between"] = await self._quiet()
            phases["leave"] = await self._change("leave", phases["join"].figures["names"])
            phases["after"] = await self._quiet()
        finally:
            stop.set()
            await load
            for client in clients:
                await client.close()
        figures |= {name: self._seen(phase) for name, phase in phases.items()}
        for phase, around in (("join", ("before", "between")), ("leave", ("between", "after"))):
            now, before = figures[phase], figures["before"]
            if before["pushes_per_s"] and all(figures[p]["pull"] for p in (phase, "before", *around)):
                quiet = max(figures[p]["pull"]["p99_ms"] for p in around)
                now["pull_p99_to_before"] = round(now["pull"]["p99_ms"] / before["pull"]["p99_ms"], 3)
                now["pull_p99_to_quiet"] = round(now["pull"]["p99_ms"] / quiet, 3)
                now["pushes_to_before"] = round(now["pushes_per_s"] / before["pushes_per_s"], 3)
        first, last = phases["before"].begin, phases["after"].end
        figures["load"] = self.load.trace.between(first, last)
        figures["errors"] = self.load.trace.errors[:20]
        return figures

    async def _capacity(self, clients: "list[ps.AsyncClient]") -> float:
        """Requests a second that the cluster answers at the most."""

        async def request(i: int) -> None:
            await self.load.request(clients[i % len(clients)], i, time.perf_counter(), Trace())

        await closed(request, IN_FLIGHT, 1.0)
        runs = [await closed(request, IN_FLIGHT, 2.0) for _ in range(ROUNDS)]
        rate = median(run.rate for run in runs)
        living = await asyncio.to_thread(self.servers.living)
        self.report(f"{len(living)} servers answer {rate:.0f} requests/s")
        return rate

    def _leave_at_rest(self) -> dict[str, Any]:
        """The last server leaves while nobody asks: the rows that it held, and how many a second went to others."""
        rows = int(self.servers.living()[-1]["rows"])
        seconds = self.servers.leave()
        return {"rows": rows, "seconds": round(seconds, 2), "rows_per_s": round(rows / max(seconds, 0.01))}

    def _seen(self, phase: "Phase") -> dict[str, Any]:
        """What was measured in a phase, and what clients noticed, once all of their requests have ended."""
        seen = {**self.load.trace.between(phase.begin, phase.end), **phase.figures}
        if phase.started > phase.begin:
            parts = (("starting", phase.begin, phase.started), ("moving", phase.started, phase.end))
            figures = {name: self.load.trace.between(*part) for name, *part in parts}
            seen |= {name: {key: of[key] for key in ("requests", "failed", "pull")} for name, of in figures.items()}
        if phase.turns:
            turned, others = self._pauses([turn for turn in phase.turns if turn.slots])
            seen["push_pause_ms"] = {"slots": len(turned), **percentiles_ms(turned, (50, 99, 100))}
            seen["other_slots_ms"] = {"slots": len(others), **percentiles_ms(others, (50, 99, 100))}
        return seen

    async def _quiet(self) -> "Phase":
        """A phase without a change, and what each server keeps in memory at its end."""
        begin, used = time.perf_counter(), host_cpu_seconds()
        await asyncio.sleep(self.settings.seconds)
        end, used = time.perf_counter(), host_cpu_seconds() - used
        usage = await asyncio.to_thread(self.servers.usage)
        resident = {name: round(size / 2**20, 1) for name, size in sorted(usage.resident.items())}
        busy = round(used / (end - begin), 2)
        return Phase(begin, end, {"cores_busy": busy, "resident_mib": resident})

    # -- the changes

    async def _change(self, kind: str, names: list[str]) -> "Phase":
        """Have servers join or leave, and wait until they have; what was moved, and when."""
        before = await asyncio.to_thread(self.servers.view)
        copied = await asyncio.to_thread(self.servers.copied)
        held = [sum(x) for x in zip(*copied.values(), strict=True)]
        rate = self.settings.bandwidth_mib << 20
        begin, used = time.perf_counter(), host_cpu_seconds()
        told = await asyncio.to_thread(self.servers.ask, "move", kind=kind, names=names, bytes_per_s=rate)
        self.report(f"{', '.join(told['names'])}: {kind}")
        copying = seen = begin
        view, turns = before, list[Turn]()
        while True:
            asked = time.perf_counter()
            record = await asyncio.to_thread(self.servers.status)
            if record["epoch"] > view.epoch:
                old, view = view, await asyncio.to_thread(self.servers.view)
                turns.append(Turn(_primaries_moved(old, view), seen, time.perf_counter() + TURN_S))
            seen = asked
            copied |= await asyncio.to_thread(self.servers.copied)  # what a leaver has counted goes with it
            if record["starting"]:
                copying = time.perf_counter()  # the process starts: nothing is moved yet
            if not moving(record):
                break
            if time.perf_counter() - begin > MOVE_S:
                raise EmbringError(f"the {kind} was not over after {MOVE_S:g} s: {record['slots_left']} slots are left")
            await asyncio.sleep(POLL_S)
        end = time.perf_counter()
        after = await asyncio.to_thread(self.servers.view)
        turns.append(Turn(_primaries_moved(view, after), seen, end + TURN_S))
        rows, size = (sum(x) - then for x, then in zip(zip(*copied.values(), strict=True), held, strict=True))
        figures = {
            "names": told["names"],
            "starting_s": round(copying - begin, 2),
            **await asyncio.to_thread(self._moved, after, rows, size),
            "cores_busy": round((host_cpu_seconds() - used) / (time.perf_counter() - begin), 2),
        }
        await asyncio.sleep(TURN_S)  # the quiet phase that comes next is not to have the last turn's pushes
        return Phase(begin, end, figures, turns, copying)

    def _pauses(self, turns: "list[Turn]") -> tuple[list[float], list[float]]:
        """The longest push of each probed slot while others got another primary, and it too, or not."""
        turned, others = list[float](), list[float]()
        for turn in turns:
            for slot, took in self.load.trace.longest(turn.begin, turn.end).items():
                (turned if slot in turn.slots else others).append(took)
        return turned, others

    def _moved(self, after: View, rows: int, size: int) -> dict[str, Any]:
        """What was copied beside the ideal: a newcomer's even share of all copies, or what the leaver held."""
        ideal = self.settings.rows * self.settings.replicas / (self.settings.servers + 1)
        rows_of_slot = np.bincount(slots_of(after, TABLE, self.settings.rows), minlength=after.slots_total)
        owners = after.owners()
        weights = np.where(owners >= 0, rows_of_slot[:, None], 0).ravel()
        held = np.bincount(owners.ravel() + 1, weights, len(after.servers) + 1)[1:]
        row_bytes = block_bytes(0, 1000, self.settings.dim, 0) / 1000
        return {
            "rows_moved": rows,
            "rows_moved_to_ideal": round(rows / ideal, 4),
            "bytes_moved": size,
            "bytes_moved_to_ideal": round(size / (ideal * row_bytes), 4),
            "max_to_mean_rows": round(float(held.max() / held.mean()), 4),
        }


def _primaries_moved(before: View, after: View) -> set[int]:
    """Slots whose primary is another server now."""
    names = [np.array([s.name for s in view.servers] + [""]) for view in (before, after)]
    first = [table[view.owners()[:, 0]] for table, view in zip(names, (before, after), strict=True)]
    return set(np.flatnonzero(first[0] != first[1]).tolist())
