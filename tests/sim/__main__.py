"""`python -m tests.sim --seeds N [--first K] [--plant NAME] [--json] [--trace]`: runs, one a seed."""

import argparse
import json
import sys
import time
import traceback
from collections import Counter

from tests.sim.cluster import Cluster, Report
from tests.sim.world import Violation


def run(seed: int, calm: bool = False, trace: bool = False) -> tuple[Report, list[str]]:
    """One run; an exception of the product is a violation too."""
    cluster = Cluster(seed, calm, trace)
    try:
        report = cluster.run()
    except Violation:
        raise
    except Exception as error:
        report = Report(seed, violation=f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}")
    return report, cluster.world.trace or []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--plant", default="")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--calm", action="store_true")
    options = parser.parse_args()
    begun = time.perf_counter()
    faults: Counter[str] = Counter()
    failed: list[Report] = []
    acked = 0
    for seed in range(options.first, options.first + options.seeds):
        report, trace = run(seed, options.calm, options.trace)
        acked += report.acked
        faults.update(report.faults)
        for line in trace:
            print(line)
        if report.violation:
            failed.append(report)
            print(f"seed {seed}: {report.violation}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begun
    print(f"{options.seeds} seeds, {acked} acked, {len(failed)} failed, {seconds:.1f} s", dict(faults))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
