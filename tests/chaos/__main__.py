"""Kill and stop servers of a real Ray cluster under load, round after round, and check what was promised.

python -m tests.chaos --rounds 20 --replicas 2 [--kinds kill,stop] [--seed 0]

prints JSON; its status is 1 if anything was broken.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ps
from ps.cluster import controller, start, stop
from ps.config import load_config
from ps.runtime import Runtime, read_token
from tests.chaos.load import TABLE, Load, make_table

SETTLE_S = 120.0
PULL_DEADLINE_S = 0.25
STOPPED_S = 3.0


Ask = Callable[..., dict[str, Any]]
"""The controller, by verb."""


def settled(ask: Ask, servers: int, killed: int) -> bool:
    """Whether every server is there, the one that was killed as another incarnation, and no copy is missing."""
    now = ask("status")
    if any(s["incarnation"] == killed for s in now["servers"]):
        return False
    alive = [s for s in now["servers"] if s["state"] == "alive"]
    return len(alive) == servers and not now["slots_lost"] and not now.get("slots_under_replicated", 1)


def wait_settled(ask: Ask, servers: int, killed: int) -> float:
    """Seconds until then; raises TimeoutError after SETTLE_S."""
    begun = time.monotonic()
    while not settled(ask, servers, killed):
        if time.monotonic() - begun > SETTLE_S:
            raise TimeoutError(f"the cluster did not settle: {json.dumps(ask('status'), default=str)[:2000]}")
        time.sleep(0.2)
    return time.monotonic() - begun


def one_round(ask: Ask, load: Load, kind: str, servers: int, chance: random.Random) -> dict[str, Any]:
    """One fault: who, whether pushes were in flight, seconds to the first acknowledged push and until all is well."""
    victim = chance.choice([s for s in ask("status")["servers"] if s["state"] == "alive" and s["slots"]])
    time.sleep(chance.uniform(0.05, 0.4))
    flying = any(load.in_flight)
    moment = time.monotonic()
    if kind == "kill":
        os.kill(victim["pid"], signal.SIGKILL)
    else:
        os.kill(victim["pid"], signal.SIGSTOP)
        time.sleep(STOPPED_S)
        os.kill(victim["pid"], signal.SIGCONT)
    settle = wait_settled(ask, servers, victim["incarnation"] if kind == "kill" else 0)
    while (ack := load.first_ack_after(moment)) is None and time.monotonic() - moment < SETTLE_S:
        time.sleep(0.05)
    return {
        "kind": kind,
        "victim": victim["name"],
        "counted": flying and victim["slots"] > 0,
        "first_ack_s": ack,
        "settled_s": round(settle, 3),
    }


def main() -> int:
    """Run the rounds and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--kinds", default="kill,stop")
    parser.add_argument("--ids", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="embring-chaos-") as folder:
        file = Path(folder) / "cluster.json"
        config = load_config(None).with_settings("server", servers=given.servers)
        config = config.with_settings("control", restarts_max=10_000)
        runtime = start(config, state=Path(folder) / "state", runtime_file=file, report=_say)
        try:
            report = rounds(given, runtime, chance)
        finally:
            stop(runtime, runtime_file=file)
    print(json.dumps(report))
    broken = ("lost", "doubled", "unseen", "failed_pulls", "failed_pushes")
    return int(any(report[name] for name in broken) or not report["rounds_counted"])


def rounds(given: argparse.Namespace, runtime: Runtime, chance: random.Random) -> dict[str, Any]:
    """The rounds, in a cluster that is running."""
    token = read_token(runtime.token_path)

    def connect() -> "ps.Client":
        return ps.connect(list(runtime.addresses), token=token, timeout=30.0)

    kinds = given.kinds.split(",")
    with controller(runtime) as ask, connect() as client:
        make_table(client, given.replicas, columns=4)
        client.push(TABLE, np.arange(given.ids), np.zeros((given.ids, 4), np.float32))
        load = Load(connect, given.ids, pushers=4, pull_deadline_s=PULL_DEADLINE_S)
        done = []
        try:
            for number in range(given.rounds):
                done.append(one_round(ask, load, kinds[number % len(kinds)], given.servers, chance))
                _say(f"round {number + 1}: {done[-1]}")
        finally:
            load.stop()
        # This client rested while every server was replaced: it knows none of those there are now.
        addresses = [address for server in ask("status")["servers"] for address in server["addresses"]]
        with ps.connect(addresses, token=token, timeout=30.0) as fresh:
            load.check(fresh.pull(TABLE, load.ids))
    found = load.found
    acks = [r["first_ack_s"] for r in done if r["first_ack_s"] is not None and r["kind"] == "kill"]
    return {
        "rounds": len(done),
        "rounds_counted": sum(r["counted"] for r in done),
        "replicas": given.replicas,
        "pushes_acknowledged": int(load.acked.sum()),
        "pulls": found.pulls,
        "lost": found.lost,
        "doubled": found.doubled,
        "unseen": found.unseen,
        "failed_pulls": found.failed_pulls,
        "failed_pushes": found.failed_pushes,
        "first_ack_s_p50": round(float(np.percentile(acks, 50)), 3) if acks else None,
        "first_ack_s_p99": round(float(np.percentile(acks, 99)), 3) if acks else None,
        "settled_s_max": max((r["settled_s"] for r in done), default=None),
        "errors": found.errors[:20],
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
