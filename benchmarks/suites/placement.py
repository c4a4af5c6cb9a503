"""Sharding against replication: one workload under several placements of its tables, measured beside the arithmetic.

All placements lie in one cluster at the same time, under names of their own, and take turns in every phase: as fast as
it goes (rate, CPU, what is on the wire), at a stated rate that does not wait for answers (latency), pushes. The same
requests go to each, and what they answer is compared bit for bit, before the first push and after the last.
Then one more server joins, and at last one is killed under reads of every placement.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
import uvloop
from numpy.typing import NDArray

import ps
from benchmarks.implementations import LOAD_ROWS, same
from benchmarks.load import Outcome, Request, arrivals, closed, opened, percentiles_ms
from benchmarks.model import Model
from benchmarks.placements import ABOUT, LABELS, NAMES, Lay, lay_out, mixed_tables
from benchmarks.report import Findings
from benchmarks.servers import Servers, own_cpu_seconds, watching
from benchmarks.suites.cluster import Report, benchmark_config, cluster
from benchmarks.suites.loss import lose_a_server
from benchmarks.tradeoff import CHECKED, summary
from benchmarks.workloads import PUBLISHED_ROWS, SHAPES, Batch, Shape, Workload
from hashring.view import Server, View
from ps.client.verbs import CHUNK
from ps.controller.outlook import names_for
from ps.errors import EmbringError, RequestError
from ps.runtime import Runtime, read_token

T = TypeVar("T")

IDS_IN_TURN = 400_000
"""Ids of the different requests that are asked in turn, so that no cache holds all their rows."""

SMALL = 8
"""Samples of the requests that go on while a server is lost."""

OPTIMIZER = ps.SGD(lr=1.0)
"""Without a state of its own, and exact: others take more memory, and more bytes for each copy of a push."""

TIMEOUT_S = 10.0
"""Of a request. One that failed counts as having taken as long: its caller has waited for nothing."""

LOAD_TIMEOUT_S = 60.0
IDLE_S = 1.0
MIXED_MIN, MIXED_MAX = 40, 4000
"""Requests of the closed loop that finds the rate, where there are writes."""

PERCENTILE_MIN = 100
"""Requests of a round below which no p99 is told."""


@dataclass(frozen=True)
class Settings:
    """What is measured. ids: of each table's bag, where the shape is not M or O. rows: of each table at most.

    budget: of the mixed placement, see `mixed_tables`. rate: samples a second of the open loop, 0: half of what the
    slowest placement answers in the closed one. writes: the share of its requests that are pushes.
    """

    shape: str = "M"
    ids: tuple[int, ...] = ()
    dim: int = 64
    rows: int = 100_000
    zipf: float = 1.05
    batch: int = 32
    writes: float = 0.1
    placements: Sequence[str] = NAMES
    servers: int = 3
    budget: float = 0.3
    rate: float = 0.0
    arrivals: str = "poisson"
    in_flight: int = 4
    rounds: int = 5
    seconds: float = 2.0
    pushes: int = 16
    join: bool = True
    kill: bool = True

    def workload(self) -> Workload:
        """Tables and requests. Shape M has the published rows of its tables, as far as `rows` allows."""
        if self.ids:
            shape = Shape("own", self.ids, self.dim)
        else:
            known = SHAPES[self.shape]
            shape = Shape(known.name, known.ids_per_sample, self.dim, PUBLISHED_ROWS)
        return Workload(shape, self.rows, self.zipf)


@dataclass
class Placed:
    """One placement in the cluster: its tables, what is asked of it, and what came of it."""

    name: str
    lay: list[Lay]
    tables: tuple[str, ...]
    requests: Sequence[Batch]
    small: Sequence[Batch]
    memory: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    resident: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    closed: list[Outcome] = field(default_factory=list)
    opened: list[Outcome] = field(default_factory=list)
    read_s: list[list[float]] = field(default_factory=list)
    write_s: list[list[float]] = field(default_factory=list)
    pushed: list[Outcome] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)
    made: Counter[int] = field(default_factory=Counter)
    """How often each request was pushed to."""

    def count(self, **more: float) -> None:
        """Add to what was counted."""
        for name, value in more.items():
            self.counted[name] = self.counted.get(name, 0.0) + value

    def spreads(self, batch: int) -> dict[str, list[float]]:
        """[least, greatest] over the rounds; a round may be so short that it has pushes alone."""
        tails = [percentiles_ms(read)["p99_ms"] for read in self.read_s if read]
        return {
            "samples_per_s": [round(pick(o.rate for o in self.closed) * batch, 1) for pick in (min, max)],
            **({"p99_ms": [min(tails), max(tails)]} if tails else {}),
        }


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Start a cluster, measure, end it; one JSON-able result."""
    findings = Findings()
    workload = settings.workload()
    check_size(settings, workload)
    with (
        cluster(benchmark_config(settings.servers), report, in_place=False) as (runtime, client),
        watching(runtime) as servers,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        bench = Bench(settings, workload, runtime, client, servers, runner, report)
        bench.load()
        findings.equal &= bench.equal()
        bench.measure()
        findings.equal &= bench.equal()
        if settings.join:
            report("one more server joins")
            bench.join()
        figures = bench.figures()
        if settings.kill:
            report("killing a server under reads of every placement")
            small = {p.name: p.small for p in bench.placed}
            for name, lost in runner.run(lose_a_server(runtime, servers, small)).items():
                figures[name]["measured"] |= lost
    findings.figures["placement"] = figures
    findings.figures["summary"] = summary(figures)
    findings.figures["workload"] = described(settings, workload, bench.rate)
    for p in bench.placed:
        findings.figures.setdefault("errors", {})[p.name] = [
            e for o in (*p.closed, *p.opened, *p.pushed) for e in o.errors
        ]
        findings.raw[p.name] = {"read": [*map(_us, p.read_s)], "push": [*map(_us, p.write_s)]}
        findings.raw[p.name]["lag"] = [_us(o.lag_s) for o in p.opened]
        findings.spreads[p.name] = p.spreads(settings.batch)
    return findings.to_plain({"command": "embring bench placement", **asdict(settings)})


def check_size(settings: Settings, workload: Workload) -> None:
    """Raise RequestError for requests that a client cuts into parts: then calls are no servers."""
    shape = workload.shape
    reply, asked = len(workload.tables) * shape.dim * 4, sum(shape.ids_per_sample) * 8
    most = CHUNK // max(reply, asked)
    if settings.batch > most:
        raise RequestError(
            f"--batch is {settings.batch}; at most {most} such samples ({reply} bytes of sums and {asked} of ids each) "
            "go into one request"
        )


class Bench:
    """The placements of one workload in a running cluster."""

    def __init__(
        self,
        settings: Settings,
        workload: Workload,
        runtime: Runtime,
        client: "ps.Client",
        servers: Servers,
        runner: asyncio.Runner,
        report: Report,
    ) -> None:
        self.settings, self.workload, self.servers, self.report = settings, workload, servers, report
        self.rate = settings.rate
        self.view: View | None = None
        """Of before the newcomer, if there was one."""
        self._runtime, self._client, self._runner = runtime, client, runner
        ids = settings.batch * sum(workload.shape.ids_per_sample)
        batches = workload.batches(settings.batch, int(np.clip(IDS_IN_TURN // ids, 8, 64)))
        self._rows_pushed = [sum(len(np.unique(ids)) for ids, _ in batch.values()) for batch in batches]
        self.placed = []
        for name in settings.placements:
            tables = tuple(f"{name}_{table}" for table in workload.tables)
            requests, few = (
                [dict(zip(tables, batch.values(), strict=True)) for batch in some]
                for some in (batches, workload.batches(SMALL, 8))
            )
            lay = lay_out(name, workload, settings.servers, settings.budget)
            self.placed.append(Placed(name, lay, tables, requests, few))
        rng = np.random.default_rng(7)
        self._grads = np.float32(1 / 64) * rng.integers(-1, 2, (settings.batch, workload.shape.dim)).astype(np.float32)
        self._turn = 0

    # -- rows

    def load(self) -> None:
        """Make and fill the tables of every placement; note what memory that took, server by server."""
        for placed in self.placed:
            self.report(f"loading {sum(self.workload.sizes)} rows, {LABELS[placed.name]}")
            before = self.servers.usage()
            for f, (table, lay) in enumerate(zip(placed.tables, placed.lay, strict=True)):
                self._client.create_table(
                    table, self.workload.shape.dim, OPTIMIZER, placement=lay.placement, replicas=lay.replicas
                )
                values = self.workload.values(f)
                for at in range(0, len(values), LOAD_ROWS):
                    part = values[at : at + LOAD_ROWS]
                    self._client.assign(table, np.arange(at, at + len(part)), part, timeout=LOAD_TIMEOUT_S)
            after = self.servers.usage()
            placed.memory = np.array([after.bytes_used[s] - before.bytes_used[s] for s in sorted(after.bytes_used)])
            placed.resident = np.array([after.resident[s] - before.resident[s] for s in sorted(after.resident)])

    def equal(self) -> bool:
        """Whether every placement answers every request alike, in every bit."""
        self.report("comparing what the placements answer")
        for number in range(len(self.placed[0].requests)):
            answers = [list(self._client.pull_bags(p.requests[number]).values()) for p in self.placed]
            if not all(same(answers[0], other) for other in answers[1:]):
                return False
        return True

    # -- load

    def measure(self) -> None:
        """Every phase, all placements taking turns in each round."""
        self._runner.run(self._measure())

    async def _measure(self) -> None:
        settings = self.settings
        token = read_token(self._runtime.token_path)
        # A client each: one that several placements shared would even out with the one what another made uneven.
        clients = [
            await ps.AsyncClient.connect(list(self._runtime.addresses), token, TIMEOUT_S, in_place=False)
            for _ in self.placed
        ]
        pairs = list(zip(clients, self.placed, strict=True))
        idle = await self._idle()
        for client, placed in pairs:  # not counted: connections, and kernels' first calls
            await closed(partial(self._pull, client, placed), settings.in_flight, requests_max=8)
        for number in range(settings.rounds):
            self.report(f"round {number + 1} of {settings.rounds}: as fast as it goes")
            for client, placed in _shuffled(pairs, (number, 0)):
                await self._closed(client, placed)
                if not placed.closed[-1].answered:
                    raise EmbringError(f"{LABELS[placed.name]}: no pull was answered: {placed.closed[-1].errors[0]}")
        if not self.rate:
            self.rate = await self._half(pairs)
        for number in range(settings.rounds):
            due = arrivals(self.rate / settings.batch, settings.seconds, number, settings.arrivals)
            self.rate = len(due) / settings.seconds * settings.batch  # a whole number of requests
            self.report(f"round {number + 1} of {settings.rounds}: {self.rate:.0f} samples/s, then pushes")
            written = self._written(len(due), number)
            for client, placed in _shuffled(pairs, (number, 2)):
                await self._opened(client, placed, due, written)
                await self._pushed(client, placed, idle)
            self._turn += len(due)
        for client in clients:
            await client.close()

    def _written(self, requests: int, number: int) -> NDArray[np.bool_]:
        """Which requests of a round are pushes."""
        return np.random.default_rng((number, 1)).random(requests) < self.settings.writes

    async def _half(self, pairs: "list[tuple[ps.AsyncClient, Placed]]") -> float:
        """Half of the samples a second, reads and writes as they will be mixed, that the slowest placement answers."""
        settings = self.settings
        reads = min(median(o.rate for o in p.closed) for p in self.placed)
        if not settings.writes:
            return reads * settings.batch / 2
        requests = int(np.clip(reads * settings.seconds / 2, MIXED_MIN, MIXED_MAX))  # as many to each: rows stay alike
        written = self._written(requests, 0)
        rates = []
        for client, placed in pairs:
            self.report(f"{LABELS[placed.name]}: reads and writes as fast as it goes")
            found = await closed(self._mixed(client, placed, written, 0), settings.in_flight, requests_max=requests)
            rates.append(found.rate)
        return min(rates) * settings.batch / 2

    async def _idle(self) -> float:
        """Bytes a second that servers receive while nothing is asked: pings, and copies being compared."""
        before = self.servers.usage()
        await asyncio.sleep(IDLE_S)
        return (self.servers.usage().bytes_received - before.bytes_received) / IDLE_S

    async def _pull(self, client: "ps.AsyncClient", placed: Placed, number: int) -> None:
        await client.pull_bags(placed.requests[number % len(placed.requests)])

    async def _push(self, client: "ps.AsyncClient", placed: Placed, number: int) -> None:
        at = number % len(placed.requests)
        bags = placed.requests[at]
        # Every second push to the same rows takes the one before back, so that sums stay exact in float32.
        grads = self._grads if placed.made[at] % 2 == 0 else -self._grads
        placed.made[at] += 1
        await client.push_bags(bags, dict.fromkeys(bags, grads))

    def _mixed(self, client: "ps.AsyncClient", placed: Placed, written: NDArray[np.bool_], first: int) -> Request:
        """Reads and writes, the first of which has this number."""

        async def request(i: int) -> None:
            if written[i - first]:
                await self._push(client, placed, i)
            else:
                await self._pull(client, placed, i)

        return request

    async def _closed(self, client: "ps.AsyncClient", placed: Placed) -> None:
        before, used, own = client.statistics(), self.servers.usage(), own_cpu_seconds()
        settings = self.settings
        outcome = await closed(partial(self._pull, client, placed), settings.in_flight, settings.seconds)
        own, spent, now = own_cpu_seconds() - own, self.servers.usage(), client.statistics()
        placed.closed.append(outcome)
        placed.count(
            pulls=now.pulls - before.pulls,
            calls=now.calls - before.calls,
            rows=now.rows - before.rows,
            bytes_sent=now.bytes_sent - before.bytes_sent,
            bytes_received=now.bytes_received - before.bytes_received,
            frames=now.frames_sent + now.frames_received - before.frames_sent - before.frames_received,
            servers_cpu_s=spent.cpu_s - used.cpu_s,
            client_cpu_s=own,
            **{f"ids_of_{s}": spent.ids_pulled[s] - used.ids_pulled[s] for s in spent.ids_pulled},
        )

    async def _opened(
        self, client: "ps.AsyncClient", placed: Placed, due: NDArray[np.float64], written: NDArray[np.bool_]
    ) -> None:
        found = await opened(self._mixed(client, placed, written, self._turn), due, self._turn)
        placed.opened.append(found)
        took = [*zip(found.answered, found.latency_s, strict=True), *((number, TIMEOUT_S) for number in found.refused)]
        placed.read_s.append([s for number, s in took if not written[number - self._turn]])
        placed.write_s.append([s for number, s in took if written[number - self._turn]])

    async def _pushed(self, client: "ps.AsyncClient", placed: Placed, idle: float) -> None:
        """The same pushes to each placement: some in flight, for their rate; then one by one, for what is sent.

        What is pushed while another owner owes an answer leaves as one block, each row once: fewer bytes than the
        arithmetic has for pushes that meet nobody.
        """
        pushes, in_flight = self.settings.pushes, self.settings.in_flight
        push = partial(self._push, client, placed)
        placed.pushed.append(await closed(push, in_flight, requests_max=pushes))
        before, used = client.statistics(), self.servers.usage()
        outcome = await closed(push, 1, requests_max=pushes)
        now, spent = client.statistics(), self.servers.usage()
        sent = now.bytes_sent - before.bytes_sent
        placed.count(
            pushes=pushes,
            rows_pushed=sum(self._rows_pushed[i % len(self._rows_pushed)] for i in range(pushes)),
            push_bytes_sent=sent,
            push_bytes_between=max(0.0, spent.bytes_received - used.bytes_received - sent - idle * outcome.seconds),
        )

    # -- figures

    def join(self) -> None:
        """One more server joins: how many rows of each placement it was given."""
        self.view = self.servers.view()
        rows = self.servers.join()
        for placed in self.placed:
            placed.count(joined=sum(rows.get(table, 0) for table in placed.tables))

    def figures(self) -> dict[str, Any]:
        """Of each placement: what was measured, what the arithmetic says, and how far they are apart."""
        now = self.servers.view()
        view = self.view or now
        beside = np.zeros(view.slots_total, np.int64)
        out = {}
        for placed in self.placed:
            model = Model(view, placed.tables, self.workload)
            measured, expected = self._measured(placed), self._expected(model, beside)
            expected |= self._loss(model if view is now else Model(now, placed.tables, self.workload))
            beside = beside + model.rows_of_slot
            off = {
                name: round(measured[name] / expected[name] - 1, 5)
                for name in (*CHECKED, "busiest_share")
                if name in measured and expected[name]
            }
            out[placed.name] = {"measured": measured, "model": expected, "off": off}
        return out

    def _measured(self, placed: Placed) -> dict[str, Any]:
        c, batch = placed.counted, self.settings.batch
        samples, rows_pushed = c["pulls"] * batch, max(c["rows_pushed"], 1.0)
        asked = np.array([c[s] for s in sorted(c) if s.startswith("ids_of_")])
        return {
            **({"join_rows_moved": c["joined"]} if "joined" in c else {}),
            "rows_per_sample": c["rows"] / samples,
            "servers_per_request": c["calls"] / c["pulls"],
            "bytes_per_sample": (c["bytes_sent"] + c["bytes_received"]) / samples,
            "frames_per_sample": c["frames"] / samples,
            "memory_bytes": float(placed.memory.sum()),
            "memory_max_bytes": float(placed.memory.max()),
            "resident_bytes": float(placed.resident.sum()),
            "busiest_share": float(asked.max() / asked.sum()),
            "samples_per_s": median(o.rate for o in placed.closed) * batch,
            "servers_cpu_us_per_sample": c["servers_cpu_s"] / samples * 1e6,
            "client_cpu_us_per_sample": c["client_cpu_s"] / samples * 1e6,
            **_percentiles(placed.read_s, (50, 95, 99)),
            **{f"push_{name}": value for name, value in _percentiles(placed.write_s, (50, 99)).items()},
            "overrun": max(o.seconds for o in placed.opened) / self.settings.seconds - 1,
            "lag_p99_ms": median(percentiles_ms(o.lag_s)["p99_ms"] for o in placed.opened),
            "reads_timed": sum(map(len, placed.read_s)),
            "pushes_timed": sum(map(len, placed.write_s)),
            "failed": sum(o.failed for o in (*placed.closed, *placed.opened, *placed.pushed)),
            "push_rows_per_s": median(o.rate for o in placed.pushed) * c["rows_pushed"] / c["pushes"],
            "push_bytes_per_row": (c["push_bytes_sent"] + c["push_bytes_between"]) / rows_pushed,
        }

    def _expected(self, model: Model, beside: NDArray[np.int64]) -> dict[str, Any]:
        batch = self.settings.batch
        pull, push, memory = model.pull(batch), model.push(batch, 0), model.memory(beside)
        (name,) = names_for(model.view, (), 0)
        join = model.join(Server(name, 1, model.view.servers[0].host))
        return {
            "rows_per_sample": pull.rows / batch,
            "servers_per_request": pull.servers,
            "bytes_per_sample": (pull.bytes_sent + pull.bytes_received) / batch,
            "frames_per_sample": pull.frames / batch,
            "memory_bytes": float(memory.sum()),
            "memory_max_bytes": float(memory.max()),
            "busiest_share": pull.busiest,
            "push_bytes_per_row": (push.bytes_sent + push.bytes_between) / push.rows,
            "join_rows_moved": join.rows_moved,
            "join_rows_ideal": join.rows_ideal,
        }

    def _loss(self, model: Model) -> dict[str, float]:
        """Of the view in which a server is killed: there is one more of them after a join."""
        loss = model.loss()
        return {
            "loss_slots_lost": loss.slots_lost,
            "loss_slots_under_replicated": loss.slots_under_replicated,
            "loss_rows": loss.rows_lost,
            "loss_bags_failed": loss.bags_failed,
        }


def described(settings: Settings, workload: Workload, rate: float) -> dict[str, Any]:
    """The workload in words and numbers, for whoever reads the result alone."""
    return {
        "shape": workload.shape.name,
        "tables": len(workload.tables),
        "ids_per_sample": sum(workload.shape.ids_per_sample),
        "rows": sum(workload.sizes),
        "dim": workload.shape.dim,
        "zipf": workload.zipf,
        "batch": settings.batch,
        "servers": settings.servers,
        "rate_samples_per_s": round(rate, 1),
        "arrivals": settings.arrivals,
        "writes": settings.writes,
        "optimizer": OPTIMIZER.kind,
        "replicated_in_mixed": sorted(mixed_tables(workload, settings.servers, settings.budget)),
        "placements": {name: {"label": LABELS[name], "about": ABOUT[name]} for name in settings.placements},
    }


def _percentiles(rounds: list[list[float]], shares: Sequence[float]) -> dict[str, float]:
    """Of each percentile the median over the rounds; none where no round has anything, and no p99 of few."""
    few = min(map(len, rounds), default=0) < PERCENTILE_MIN
    found = [percentiles_ms(seconds, [q for q in shares if q < 99 or not few]) for seconds in rounds if seconds]
    return {name: median(of[name] for of in found) for name in found[0]} if found else {}


def _us(seconds: Sequence[float]) -> list[float]:
    return [round(s * 1e6, 1) for s in seconds]


def _shuffled(pairs: list[T], seed: tuple[int, int]) -> list[T]:
    """In another order each round: what one leaves behind does not always meet the same next one."""
    return [pairs[k] for k in np.random.default_rng(seed).permutation(len(pairs))]
