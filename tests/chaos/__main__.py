"""Kill and stop processes of a real Ray cluster under load, round after round, and check what was promised.

python -m tests.chaos --rounds 100 --replicas 2 [--kinds primary,backup-stop] [--seed 0]
python -m tests.chaos --head-loss --minutes 10

prints JSON; its status is 1 if anything was broken. A round counts only if pushes of the victim's slots were in flight
when it was struck, and (for primaries) the victim was the primary of them. Kinds: see tests/chaos/faults.py. At last
Ray's head is killed, then a primary, then the controller, and nothing is started again.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ps.cluster import controller, start, stop
from ps.config import Config
from tests.chaos.cluster import Place, until
from tests.chaos.faults import KINDS, SETTLE_S, NotNow, Scene
from tests.chaos.headless import head_loss, last_rounds
from tests.chaos.load import TABLE, Load, make_table

BROKEN = ("lost", "doubled", "unseen", "failed_pulls", "failed_pushes")
PUSHERS = 4


def main() -> int:
    """Run the rounds and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__, formatter_class=_Help)
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--servers", type=int, help="one more than replicas, where it is left out")
    parser.add_argument("--kinds", help="some of them, after commas; head: the last rounds")
    parser.add_argument("--ids", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="a new folder for the logs of the processes")
    parser.add_argument("--head-loss", action="store_true", help="no rounds: head and controller killed at once")
    parser.add_argument("--minutes", type=float, help="no round begins later than that; of --head-loss 10")
    given = parser.parse_args()
    servers = given.servers or given.replicas + 1
    kinds = given.kinds.split(",") if given.kinds else [*KINDS, *(["pair"] if given.replicas > 2 else []), "head"]
    # Ray's driver prints what dies to standard output.
    with tempfile.TemporaryDirectory(prefix="embring-chaos-") as folder, contextlib.redirect_stdout(sys.stderr):
        file = Path(folder) / "cluster.json"
        config = Config().with_settings("server", servers=servers).with_settings("control", restarts_max=10_000)
        runtime = start(config, state=Path(folder) / "state", runtime_file=file, report=_say)
        try:
            place = Place(runtime, file, config, TABLE, np.arange(given.ids))
            try:
                report = _trial(given, place, servers, kinds)
            finally:
                place.close()
        finally:
            stop(runtime, runtime_file=file)
            if given.logs:
                shutil.copytree(Path(runtime.state) / "logs", given.logs)
    print(json.dumps(report))
    return int(any(report[name] for name in BROKEN) or not (given.head_loss or report["rounds_counted"]))


def _trial(given: argparse.Namespace, place: Place, servers: int, kinds: list[str]) -> dict[str, Any]:
    """The load from its begin to its end, what is done to the cluster meanwhile, and what was found."""
    begun = time.monotonic()
    with place.connect() as client:
        make_table(client, given.replicas, PUSHERS)
        client.push(TABLE, np.arange(given.ids), np.zeros((given.ids, PUSHERS), np.float32))
    load = Load(place.connect, given.ids, PUSHERS, 0.1 if given.head_loss else 0.002)
    done: list[dict[str, Any]] = []
    told: dict[str, Any] = {}
    try:
        until(lambda: len(load.found.acks) > 50, SETTLE_S, "the first pushes")
        with controller(place.runtime) as ask:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # Ray's handling leaves a cluster
            scene = Scene(place, load, ask, servers, given.replicas, random.Random(given.seed))
            end = time.monotonic() + 60 * (given.minutes or 600.0)
            _rounds(scene, 0 if given.head_loss else given.rounds, [k for k in kinds if k != "head"], done, end)
            pids = {s["incarnation"]: s["pid"] for s in ask("status")["servers"]}
        if given.head_loss:
            told = head_loss(place, load, given.minutes or 10.0)
        elif "head" in kinds:
            done += last_rounds(place, load, pids)
            _say(str(done[-3:]))
    finally:
        load.stop()
    with place.fresh() as fresh:
        load.check(fresh.pull(TABLE, load.ids))
    return {**_figures(given, servers, load, done), **told, "seconds": round(time.monotonic() - begun, 1)}


def _rounds(scene: Scene, wanted: int, kinds: list[str], done: list[dict[str, Any]], end: float) -> None:
    """So many rounds that count, the kinds in turn; before one that cannot be now, a primary is killed."""
    turn = 0
    while kinds and sum(r["counted"] for r in done) < wanted and len(done) < 2 * wanted and time.monotonic() < end:
        kind = kinds[turn % len(kinds)]
        try:
            found = scene.round(kind)
            turn += 1
        except NotNow as error:
            _say(f"not now: {kind}: {error}")
            found = scene.round("primary", error.instead)
        done.append(found)
        _say(f"round {len(done)}: {found}")


def _figures(given: argparse.Namespace, servers: int, load: Load, done: list[dict[str, Any]]) -> dict[str, Any]:
    found = load.found
    killed = [r["first_ack_s"] for r in done if r["kind"] in ("primary", "raylet", "pair")]
    return {
        "replicas": given.replicas,
        "servers": servers,
        "rounds": len(done),
        "rounds_counted": sum(r["counted"] for r in done),
        "kinds": {
            kind: _of_kind([r for r in done if r["kind"] == kind]) for kind in dict.fromkeys(r["kind"] for r in done)
        },
        "pushes_acknowledged": len(found.acks),
        "pulls": found.pulls,
        **{name: getattr(found, name) for name in BROKEN},
        "longest_pull_s": round(found.pull_max_s, 3),
        "load_late_max_s": round(found.late_max_s, 3),
        "first_ack_of_killed_primaries_s": _spread(killed),
        "errors": found.errors[:20],
        "failed_reads": found.failed_reads[:20],
        "slow_pushes": found.slow_pushes[:20],
    }


def _of_kind(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rounds": len(rounds),
        "counted": sum(r["counted"] for r in rounds),
        "first_ack_s": _spread([r["first_ack_s"] for r in rounds]),
        "round_s": _spread([r["round_s"] for r in rounds if "round_s" in r]),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {name: round(float(np.percentile(values, p)), 3) for name, p in (("p50", 50), ("p99", 99), ("max", 100))}


class _Help(argparse.RawDescriptionHelpFormatter):
    """The text above, as it is."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
