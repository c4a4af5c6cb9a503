"""Runs of the simulation, one a seed; a failing seed prints itself, and runs the same again.

    python -m tests.sim --seeds 100 [--first K] [--json] [--calm]
    python -m tests.sim --first 17 --seeds 1 --trace        what happened in one run
    python -m tests.sim --plant nothing_undone --seeds 500  a planted bug, until it is found ("all": one after another)

Exit status: 0 where no invariant was broken (with a plant: where it was found), else 1.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator

from tests.sim.cluster import Cluster, Report
from tests.sim.faults import KINDS, STEPS
from tests.sim.plants import PLANTS, planted


def run(seed: int, plant: str = "", calm: bool = False, trace: bool = False) -> tuple[Report, list[str]]:
    """One run; an exception of the product is a violation too."""
    with planted(plant):
        cluster = Cluster(seed, calm, trace)
        try:
            report = cluster.run()
        except Exception as error:
            where = "".join(traceback.format_exception(error)[-4:])
            report = Report(seed, violation=f"{type(error).__name__}: {error}\n{where}")
    if seed % 8 == 0:
        gc.collect()  # processes and their memory hang together in circles
    return report, cluster.world.trace or []


def runs(options: argparse.Namespace) -> Iterator[Report]:
    """The reports of the seeds asked for, failures told as they come."""
    for seed in range(options.first, options.first + options.seeds):
        report, trace = run(seed, options.plant, options.calm, options.trace)
        print("\n".join(trace), end="\n" if trace else "")
        if report.violation:
            print(f"seed {seed}: {report.violation}", file=sys.stderr, flush=True)
        yield report


def summary(reports: list[Report], seconds: float) -> dict[str, object]:
    """What many runs showed."""
    faults: Counter[str] = Counter()
    cells: Counter[tuple[str, str]] = Counter()
    for report in reports:
        faults.update(report.faults)
        cells.update(report.cells)
    wanted = [(kind, step) for kind in KINDS for step in STEPS]
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
        "cells_hit": sum(cells[cell] > 0 for cell in wanted),
        "cells_missed": [f"{kind} x {step}" for kind, step in wanted if not cells[(kind, step)]],
    }


def hunt(names: list[str], first: int, seeds: int) -> dict[str, int]:
    """For each plant the number of runs until it was found; 0 where it was not."""
    found = {}
    for name in names:
        begun = time.perf_counter()
        found[name] = 0
        for n in range(seeds):
            report, _ = run(first + n, name)
            if report.violation:
                found[name] = n + 1
                break
        what = report.violation.splitlines()[0] if found[name] else "NOT FOUND"
        print(
            f"{name}: run {found[name]}, {time.perf_counter() - begun:.0f} s: {what}"[:200], file=sys.stderr, flush=True
        )
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--plant", default="", help=f'a bug to plant, or "all": {", ".join(PLANTS)}')
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument("--trace", action="store_true", help="print what happens")
    parser.add_argument("--calm", action="store_true", help="without faults")
    options = parser.parse_args()
    if options.plant:
        names = list(PLANTS) if options.plant == "all" else options.plant.split(",")
        found = hunt(names, options.first, options.seeds)
        print(json.dumps({"seeds_max": options.seeds, "found_at_run": found}))
        return 0 if all(found.values()) else 1
    begun = time.perf_counter()
    reports = list(runs(options))
    told = summary(reports, time.perf_counter() - begun)
    if options.json:
        print(json.dumps(told))
    else:
        for name in ("seeds", "failed", "acknowledged", "acknowledged_min", "virtual_seconds", "seconds", "faults"):
            print(f"{name}: {told[name]}")
        print(f"cells hit: {told['cells_hit']} of {len(KINDS) * len(STEPS)}")
    return 1 if told["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
