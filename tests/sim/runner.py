"""Runs of the simulation: one, many in several processes, hunts for planted bugs, and what they showed."""

import gc
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from typing import Any

from ps.kernels import warmup
from tests.sim.cluster import Cluster, Report
from tests.sim.faults import CELLS, KINDS
from tests.sim.plants import planted

MISFITS_MAX = 5
"""Exceptions in runs with a planted bug before that is held to be no bug of the product."""

BLOCK = 8
"""Seeds that a worker process is given at a time."""

TOLD_S = 10.0
"""Seconds between two lines of progress."""


def run(seed: int, plant: str = "", calm: bool = False, trace: bool = False) -> tuple[Report, list[str]]:
    """One run; an exception of the product is a violation too."""
    gc.disable()  # processes and their memory hang together in circles: they are collected between two runs
    with planted(plant):
        cluster = None
        try:
            cluster = Cluster(seed, calm, trace)
            report = cluster.run()
        except Exception as error:
            where = "".join(traceback.format_exception(error)[-4:])
            report = Report(seed, violation=f"{type(error).__name__}: {error}\n{where}")
    lines = (cluster.world.trace if cluster else None) or []
    del cluster
    gc.enable()
    if seed % 4 == 0:
        gc.collect()
    return report, lines


def prepare() -> None:
    """Begin a process of runs: what is there by now need not be looked at when memory is collected."""
    warmup()
    gc.collect()
    gc.freeze()


def workers(count: int) -> Executor:
    """Processes that run seeds. Each is started afresh (no lock or thread is inherited), the kernels being compiled."""
    prepare()
    return ProcessPoolExecutor(count, get_context("spawn"), prepare)


def run_block(seeds: list[int], calm: bool = False) -> list[Report]:
    """Some runs, in a worker."""
    return [run(seed, calm=calm)[0] for seed in seeds]


def hunt_block(name: str, seeds: list[int]) -> tuple[int, str]:
    """Run with a planted bug until it is found: (the seed, the violation), or (-1, why not).

    Found is what breaks an invariant: an exception may come of a plant that does not fit the product any more.
    """
    misfits = 0
    for seed in seeds:
        report, _ = run(seed, name)
        if report.broken_invariant:
            return seed, report.violation.splitlines()[0]
        misfits += bool(report.violation)
        if misfits > MISFITS_MAX:
            return -1, f"NOT FOUND, it does not fit the product: {report.violation.splitlines()[0]}"
    return -1, "NOT FOUND"


def blocks(first: int, seeds: int) -> Iterator[list[int]]:
    """Seeds in blocks, in order."""
    for at in range(first, first + seeds, BLOCK):
        yield list(range(at, min(at + BLOCK, first + seeds)))


class Progress:
    """A line on stderr now and then."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.begun = self.told = time.perf_counter()

    def tell(self, done: int, more: str = "") -> None:
        now = time.perf_counter()
        if now - self.told >= TOLD_S and done:
            self.told = now
            left = (now - self.begun) * (self.total - done) / done
            print(f"{done} of {self.total} {self.what}, {more}about {left:.0f} s left", file=sys.stderr, flush=True)


def runs(pool: Executor, first: int, seeds: int, ahead: int, calm: bool = False) -> Iterator[Report]:
    """The reports of the seeds asked for, in order; failures are told as they come. ahead: blocks under way."""
    progress, done, failed = Progress(seeds, "seeds"), 0, 0
    for reports in _in_order(pool, run_block, ((block, calm) for block in blocks(first, seeds)), ahead):
        for report in reports:
            done += 1
            if report.violation:
                failed += 1
                print(f"seed {report.seed}: {report.violation}", file=sys.stderr, flush=True)
            yield report
        progress.tell(done, f"{failed} failed, ")


def _in_order(
    pool: Executor, function: Callable[..., Any], calls: Iterator[tuple[Any, ...]], ahead: int
) -> Iterator[Any]:
    """Results of calls in the order of the calls, of which so many are under way at a time."""
    waiting = [pool.submit(function, *call) for call in islice(calls, ahead)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(function, *call) for call in islice(calls, 1)]


def summary(reports: list[Report], seconds: float) -> dict[str, object]:
    """What many runs showed."""
    faults: Counter[str] = Counter()
    cells: Counter[tuple[str, str]] = Counter()
    for report in reports:
        faults.update(report.faults)
        cells.update(report.cells)
    return {
        "seeds": len(reports),
        "failed": [{"seed": r.seed, "violation": r.violation.splitlines()[0]} for r in reports if r.violation],
        "acknowledged": sum(r.acked for r in reports),
        "acknowledged_min": min((r.acked for r in reports), default=0),
        "virtual_seconds": round(sum(r.seconds for r in reports), 1),
        "seconds": round(seconds, 1),
        "epochs": sum(r.epochs for r in reports),
        "faults": {kind: faults[kind] for kind in (*KINDS, "late", "duplicate", "after a break")},
        "steps": {name.removeprefix("step "): n for name, n in sorted(faults.items()) if name.startswith("step ")},
        "other": {k: n for k, n in sorted(faults.items()) if not k.startswith("step ") and k not in KINDS},
        "cells": {f"{kind} x {step}": n for (kind, step), n in sorted(cells.items())},
        "cells_wanted": len(CELLS),
        "cells_hit": sum(cells[cell] > 0 for cell in CELLS),
        "cells_missed": [f"{kind} x {step}" for kind, step in CELLS if not cells[(kind, step)]],
    }


def hunt(pool: Executor, names: list[str], first: int, seeds: int, jobs: int) -> dict[str, int]:
    """For each plant the number of runs until it was found; 0 where it was not. Each worker hunts one plant."""
    found: dict[str, int] = {}
    begun = time.perf_counter()
    left = iter(names)
    searches: dict[Future[tuple[int, str]], str] = {}
    todo = list(range(first, first + seeds))
    while len(found) < len(names):
        searches |= {pool.submit(hunt_block, name, todo): name for name in islice(left, jobs - len(searches))}
        for future in wait(searches, return_when=FIRST_COMPLETED).done:
            name = searches.pop(future)
            seed, what = future.result()
            found[name] = seed - first + 1 if seed >= 0 else 0
            line = f"{name}: run {found[name]}, {time.perf_counter() - begun:.0f} s: {what}"
            print(line[:200], file=sys.stderr, flush=True)
    return {name: found[name] for name in names}
