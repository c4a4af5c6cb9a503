"""Inside one process: a store's pull beside the memory's own limit (S14), its memory (S16), and its slowest moments."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.kernel_sides import POOLING, KernelBench, Question, change, gather, one_server_store
from benchmarks.measure import interleave, timed
from benchmarks.report import Findings
from ps.exports import EXPORT_ROWS
from ps.kernels import warmup
from ps.spec import Adagrad, Placement, TableSpec
from ps.store import Store

BAGS, IDS = 8_192, 8
"""Bags of a request, and ids of a bag."""

PUSH_IDS = 4_096
WHOLE_ROWS_MAX = 4_000_000
EXPORTS = 300
DIM = 64


@dataclass(frozen=True)
class Settings:
    """rows: of the store that pulls are measured on. large: of stores filled to measure memory, 0: none."""

    rows: int = 2_000_000
    large: int = 1_000_000
    rounds: int = 5
    seconds: float = 0.4


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and give one JSON-able result."""
    report("compiling kernels, or loading them")
    warmup()
    findings = Findings()
    if settings.large:
        _memory("sharded", settings.large, findings, report)
        _memory("whole", min(settings.large, WHOLE_ROWS_MAX), findings, report)
    report(f"filling a store of {settings.rows} rows")
    _pulls(settings, findings, report)
    return findings.to_plain({"command": "embring bench kernels", **asdict(settings)})


def _pulls(settings: Settings, findings: Findings, report: Callable[[str], None]) -> None:
    """S14, and how many ids and rows a second each part does alone."""
    bench = KernelBench(settings.rows, DIM)
    asked = [bench.question(BAGS, IDS, number) for number in range(8)]
    out = np.empty((BAGS * IDS, DIM), np.float32)
    for question in asked:
        expected = bench.values[question.share.ids].reshape(BAGS, IDS, DIM).sum(axis=1)
        findings.equal &= all(np.array_equal(way(bench, question), expected) for way in POOLING.values())
        findings.equal &= bool(np.array_equal(bench.by_gather(question), bench.values[question.share.ids]))

    def by_gather(question: Question) -> None:
        gather(question.rows, bench.arena.values, out)

    def by_find(question: Question) -> None:
        bench.find_rows(question.share)

    sides = {name: timed(partial(way, bench), asked) for name, way in POOLING.items()}
    rounds = interleave(
        {**sides, "find": timed(by_find, asked), "gather": timed(by_gather, asked)}, settings.rounds, settings.seconds
    )
    ratio = findings.ratio(rounds, "gather", "store", "S14")
    findings.samples(rounds, tuple(rounds.samples), "S14")
    rates = {name: round(BAGS * IDS / rounds.median(name) / 1e6, 2) for name in rounds.samples}
    findings.figures["million_rows_per_s"] = rates
    report(f"S14: {ratio:.2f} of the gather's speed; million rows a second: {rates}")


def _memory(placement: Placement, n: int, findings: Findings, report: Callable[[str], None]) -> None:
    """S16 and the slowest push and export, while and after one table is filled by pushes of new ids."""
    before = resident()
    store = one_server_store([TableSpec("table", DIM, Adagrad(), placement=placement)])
    rng = np.random.default_rng(16)
    grads = rng.standard_normal((PUSH_IDS, DIM), np.float32)
    pushes = []
    for number, at in enumerate(range(0, n, PUSH_IDS)):
        ids = np.arange(at, min(at + PUSH_IDS, n)) * 2_654_435_761
        begun = time.perf_counter()
        change(store, "table", ids, grads[: len(ids)], number + 1, "push")
        pushes.append(time.perf_counter() - begun)
    used = resident() - before
    bytes_of_rows = n * 4 * 2 * DIM
    found = {
        "rows": n,
        "bytes_of_rows": bytes_of_rows,
        "bytes_resident": used,
        "ratio": round(used / bytes_of_rows, 4),
        "push_ms_median": round(float(np.median(pushes)) * 1e3, 3),
        "push_ms_max": round(max(pushes) * 1e3, 3),
        **_exports(store, n),
    }
    findings.figures.setdefault("S16", {})[placement] = found
    report(f"S16 {placement}: {found}")


def _exports(store: Store, n: int) -> dict[str, float]:
    """Milliseconds to export a slot of average size, and the longest single part of an export of the fullest slot."""
    slots = np.arange(store.view.slots_total if store.view else 0)
    counts = store.held.registry.arenas[0].counts(slots)
    held = slots[counts > 0]
    slots = held[np.argsort(np.abs(counts[held] - n / len(held)))][:EXPORTS]
    parts: list[float] = []
    totals: list[float] = []
    for slot in slots:
        begun = mark = time.perf_counter()
        for _ in store.export(_one(int(slot)), rows_max=EXPORT_ROWS):
            now = time.perf_counter()
            parts.append(now - mark)
            mark = now
        totals.append(time.perf_counter() - begun)
    return {
        "export_slot_ms_median": round(float(np.median(totals)) * 1e3, 3),
        "export_part_ms_max": round(max(parts) * 1e3, 3),
    }


def _one(slot: int) -> NDArray[np.int64]:
    return np.array([slot], np.int64)


def resident() -> int:
    """Bytes of memory that this process has to itself now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
