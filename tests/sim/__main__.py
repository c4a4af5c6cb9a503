"""Runs of the simulation, one a seed; a failing seed prints itself, and runs the same again.

    python -m tests.sim --seeds 100 [--first K] [--json] [--calm]
    python -m tests.sim --first 17 --seeds 1 --trace        what happened in one run
    python -m tests.sim --plant nothing_undone --seeds 500  a planted bug, until it is found ("all": one after another)

Exit status: 0 where no invariant was broken (with a plant: where it was found), else 1.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator

from tests.sim.cluster import Report
from tests.sim.plants import PLANTS
from tests.sim.runner import hunt, run, runs, summary, workers


def traced(first: int, seeds: int, plant: str, calm: bool) -> Iterator[Report]:
    """Runs whose every event is printed."""
    for seed in range(first, first + seeds):
        report, lines = run(seed, plant, calm, trace=True)
        print("\n".join([*lines, f"seed {seed}: {report.violation or 'no violation'}"]))
        yield report


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (as many as there are cores)")
    parser.add_argument("--plant", default="", help=f'a bug to plant, or "all": {", ".join(PLANTS)}')
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument("--trace", action="store_true", help="print what happens, in one process")
    parser.add_argument("--calm", action="store_true", help="without faults")
    options = parser.parse_args()
    jobs = max(1, options.jobs)
    if options.plant and not options.trace:
        names = list(PLANTS) if options.plant == "all" else options.plant.split(",")
        with workers(jobs) as pool:
            found = hunt(pool, names, options.first, options.seeds, jobs)
        print(json.dumps({"seeds_max": options.seeds, "plants": len(found), "found_at_run": found}))
        return 0 if all(found.values()) else 1
    begun = time.perf_counter()
    if options.trace:
        reports = list(traced(options.first, options.seeds, options.plant, options.calm))
    else:
        with workers(jobs) as pool:
            reports = list(runs(pool, options.first, options.seeds, 2 * jobs, options.calm))
    told = summary(reports, time.perf_counter() - begun)
    if options.json:
        print(json.dumps(told))
    else:
        for name in ("seeds", "failed", "acknowledged", "acknowledged_min", "virtual_seconds", "seconds", "faults"):
            print(f"{name}: {told[name]}")
        print(f"cells hit: {told['cells_hit']} of {told['cells_wanted']}")
    return 1 if told["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
