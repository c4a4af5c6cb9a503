"""A cluster grows by a server and shrinks by it again, under load: what clients notice, and what is moved (S8, S9, R5).

The load is open: pulls of 64 rows, pushes of 64 rows, and probes, pushes of a single row each of one of some slots in
turn, fall due at a rate that is a part of what the cluster can answer, which is measured first. A request fails where
it met an error or took longer than its 250 ms. Each push adds one to its rows, so that the rows of the end say whether
one was lost, or applied twice.
"""

import asyncio
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
import uvloop

import ps
from benchmarks.load import closed, percentiles_ms
from benchmarks.model import block_bytes, slots_of
from benchmarks.report import Findings
from benchmarks.servers import Servers, moving, watching
from benchmarks.suites.cluster import Report, benchmark_config, cluster
from hashring.view import View
from ps.errors import EmbringError
from ps.runtime import Runtime, read_token

TABLE = "rows"
LOAD_ROWS = 25_000
IDS = 64
"""Rows of one pull, and of one push."""

DEADLINE_S = 0.25
PUSH_S = 60.0
"""How long a push is retried; one that took longer than DEADLINE_S has failed all the same."""

PROBED = 64
"""Slots that are probed in turn, by one of their rows each."""

MIX = ("pull", "pull", "pull", "push", "probe")
"""Requests, drawn evenly."""

MOVE_S = 300.0
POLL_S = 0.1
SETTLE_S = 60.0
IN_FLIGHT = 8
ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """What is measured. load: part of what the cluster can answer. seconds: of each phase without a change."""

    rows: int = 2_000_000
    dim: int = 64
    replicas: int = 2
    servers: int = 3
    load: float = 0.7
    seconds: float = 10.0
    bandwidth_mib: int = 0


@dataclass
class Trace:
    """Every request of a load: its kind, when it was due, seconds until its answer, whether that was in time."""

    kinds: list[str] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    ok: list[bool] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """Figures of the requests that were due between two moments."""
        due = np.array(self.due)
        kinds, took, ok = (np.array(x)[(due >= begin) & (due < end)] for x in (self.kinds, self.took, self.ok))
        pulls, pushes = took[kinds == "pull"], took[kinds != "pull"]
        return {
            "seconds": round(end - begin, 2),
            "requests": len(took),
            "failed": int((~ok).sum()),
            "pull": percentiles_ms(pulls, (50, 99)),
            "push": percentiles_ms(pushes, (50, 99)),
            "pushes_per_s": round(float((ok & (kinds != "pull")).sum()) / (end - begin), 1),
        }

    def pauses(self, begin: float, end: float) -> dict[int, float]:
        """Of each probed slot, the longest seconds that a probe of it took which was under way between two moments."""
        out: dict[int, float] = {}
        for kind, due, took, slot in zip(self.kinds, self.due, self.took, self.probed, strict=True):
            if kind == "probe" and due < end and due + took >= begin:
                out[slot] = max(out.get(slot, 0.0), took)
        return out


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Start a cluster, measure, end it; one JSON-able result."""
    findings = Findings()
    with (
        cluster(benchmark_config(settings.servers), report) as (runtime, client),
        watching(runtime) as servers,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        report(f"loading {settings.rows} rows, {settings.replicas} copies of each")
        client.create_table(TABLE, settings.dim, ps.SGD(lr=1.0), ps.Initializer(0.0, 0.0), replicas=settings.replicas)
        zeros = np.zeros((LOAD_ROWS, settings.dim), np.float32)
        for at in range(0, settings.rows, LOAD_ROWS):
            ids = np.arange(at, min(at + LOAD_ROWS, settings.rows))
            client.assign(TABLE, ids, zeros[: len(ids)], timeout=60.0)
        bench = Bench(settings, runtime, servers, report)
        figures = runner.run(bench.measure())
        figures["rows"] = bench.check()
        figures["slots_that_differ"] = servers.slots_that_differ()
    findings.equal = figures["rows"]["lost"] == figures["rows"]["doubled"] == figures["slots_that_differ"] == 0
    findings.figures["rebalance"] = figures
    return findings.to_plain({"command": "embring bench rebalance", **asdict(settings)})


class Bench:
    """The load, and the changes under it."""

    def __init__(self, settings: Settings, runtime: Runtime, servers: Servers, report: Report) -> None:
        self.settings, self.servers, self.report = settings, servers, report
        self.trace = Trace()
        self._runtime = runtime
        self._rng = np.random.default_rng(11)
        self._grads = np.full((IDS, settings.dim), -1.0, np.float32)
        self.sent = np.zeros(settings.rows, np.int64)
        self.acknowledged = np.zeros(settings.rows, np.int64)
        slots = slots_of(servers.view(), TABLE, settings.rows)
        self._probes = np.sort(self._rng.choice(np.unique(slots, return_index=True)[1], PROBED, replace=False))
        self._slots_of_probes = slots[self._probes]

    async def measure(self) -> dict[str, Any]:
        """Calibrate, then before, join, between, leave and after, under one load."""
        token = read_token(self._runtime.token_path)
        addresses = list(self._runtime.addresses)
        client = await ps.AsyncClient.connect(addresses, token, PUSH_S)
        self.report("measuring what the cluster can answer")
        await closed(lambda i: self._request(client, i, time.perf_counter(), Trace()), IN_FLIGHT, 1.0)
        runs = [
            await closed(lambda i: self._request(client, i, time.perf_counter(), Trace()), IN_FLIGHT, 2.0)
            for _ in range(ROUNDS)
        ]
        rate = median(run.rate for run in runs) * self.settings.load
        self.report(f"{rate:.0f} requests/s, {self.settings.load:.0%} of what it can answer")
        stop = asyncio.Event()
        load = asyncio.create_task(self._load(client, rate, stop))
        figures: dict[str, Any] = {"requests_per_s": round(rate, 1)}
        try:
            await asyncio.sleep(1.0)
            figures["before"] = await self._quiet()
            figures["join"] = await self._change("join", [])
            figures["between"] = await self._quiet()
            figures["leave"] = await self._change("leave", figures["join"]["names"])
            figures["after"] = await self._quiet()
        finally:
            stop.set()
            await load
            await client.close()
        for phase in ("join", "leave"):
            now, before = figures[phase], figures["before"]
            now["pull_p99_to_before"] = round(now["pull"]["p99_ms"] / before["pull"]["p99_ms"], 3)
            now["pushes_to_before"] = round(now["pushes_per_s"] / before["pushes_per_s"], 3)
        figures["failed"] = sum(figures[p]["failed"] for p in ("before", "join", "between", "leave", "after"))
        figures["errors"] = self.trace.errors[:20]
        return figures

    async def _quiet(self) -> dict[str, Any]:
        begin = time.perf_counter()
        await asyncio.sleep(self.settings.seconds)
        return self.trace.between(begin, time.perf_counter())

    # -- the load

    async def _load(self, client: "ps.AsyncClient", rate: float, stop: asyncio.Event) -> None:
        """Requests that fall due by a Poisson law, until `stop`."""
        due, number = time.perf_counter(), 0
        pending: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            due += self._rng.exponential(1 / rate)
            number += 1
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self._request(client, number, due, self.trace))
            pending.add(task)
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)

    async def _request(self, client: "ps.AsyncClient", number: int, due: float, trace: Trace) -> None:
        kind = MIX[int(self._rng.integers(len(MIX)))]
        probe = number % PROBED
        if kind == "probe":
            ids = self._probes[probe : probe + 1]
        else:
            ids = self._rng.choice(self.settings.rows, IDS, replace=False)
        begun = time.perf_counter()
        try:
            if kind == "pull":
                await client.pull(TABLE, ids, timeout=DEADLINE_S)
            else:
                self.sent[ids] += 1
                await client.push(TABLE, ids, self._grads[: len(ids)])
                self.acknowledged[ids] += 1
            ok = time.perf_counter() - begun <= DEADLINE_S
        except EmbringError as error:
            ok = False
            trace.errors.append(f"{kind}: {type(error).__name__}: {error}"[:200])
        trace.kinds.append(kind)
        trace.due.append(due)
        trace.took.append(time.perf_counter() - due)
        trace.ok.append(ok)
        trace.probed.append(int(self._slots_of_probes[probe]))

    # -- the changes

    async def _change(self, kind: str, names: list[str]) -> dict[str, Any]:
        """Have servers join or leave, and wait until they have; what clients noticed meanwhile, and what was moved."""
        before = await asyncio.to_thread(self.servers.view)
        copied = await asyncio.to_thread(self.servers.copied)
        held = [sum(x) for x in zip(*copied.values(), strict=True)]
        rate = self.settings.bandwidth_mib << 20
        begin = time.perf_counter()
        told = await asyncio.to_thread(self.servers.ask, "move", kind=kind, names=names, bytes_per_s=rate)
        self.report(f"{', '.join(told['names'])}: {kind}")
        copying = begin
        while True:
            record = await asyncio.to_thread(self.servers.status)
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
        rows, size = (sum(x) - then for x, then in zip(zip(*copied.values(), strict=True), held, strict=True))
        pauses = self.trace.pauses(begin, end)
        moved = _primaries_moved(before, after)
        paused = [pauses[slot] for slot in pauses if slot in moved]
        return {
            "names": told["names"],
            "starting_s": round(copying - begin, 2),
            **self.trace.between(begin, end),
            **self._moved(after, rows, size),
            "push_pause_ms": {"slots": len(paused), **percentiles_ms(paused, (50, 99, 100))},
        }

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

    # -- what is left

    def check(self) -> dict[str, int]:
        """Compare every row that was pushed to with what was acknowledged."""
        self.report("comparing rows with what was acknowledged")
        addresses = [a for s in self.servers.living() for a in s["addresses"]]
        touched = np.flatnonzero(self.sent)
        lost = doubled = 0
        with ps.connect(addresses, read_token(self._runtime.token_path), 60.0) as client:
            for at in range(0, len(touched), LOAD_ROWS):
                ids = touched[at : at + LOAD_ROWS]
                rows = client.pull(TABLE, ids)
                lost += int((rows.min(axis=1) < self.acknowledged[ids] - 0.5).sum())
                doubled += int((rows.max(axis=1) > self.sent[ids] + 0.5).sum())
        return {"pushed_to": len(touched), "pushes": int(self.acknowledged.sum()), "lost": lost, "doubled": doubled}


def _primaries_moved(before: View, after: View) -> set[int]:
    """Slots whose primary is another server now."""
    names = [np.array([s.name for s in view.servers] + [""]) for view in (before, after)]
    first = [table[view.owners()[:, 0]] for table, view in zip(names, (before, after), strict=True)]
    return set(np.flatnonzero(first[0] != first[1]).tolist())
