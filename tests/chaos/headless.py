"""Ray's head and the controller gone for good: what goes on without them. Nothing here asks Ray or the controller."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.chaos.cluster import Place, until, wait_gone
from tests.chaos.load import Load

SAY_S = 30.0
ACK_S = 60.0


def last_rounds(place: Place, load: Load, pids: dict[int, int]) -> list[dict[str, Any]]:
    """Three faults that nothing heals: the head, then a primary that only pings can tell dead, then the controller.

    pids: of server processes, by their incarnations.
    """
    everything = np.arange(len(load.ids))
    done = [_round(load, "head", ("head",), everything, place.end_head)]
    view, owners = place.owners()
    index = int(owners[0, 0])
    victim = view.servers[index]
    rows = np.flatnonzero(owners[:, 0] == index)
    kill = lambda: _kill([pids[victim.incarnation]])  # noqa: E731
    done.append(_round(load, "primary, no head", (victim.name,), rows, kill))
    done.append(_round(load, "controller, no head", ("controller",), everything, lambda: _kill(place.controllers())))
    time.sleep(5.0)  # long enough for a push or a pull to fail for want of them
    return done


def _round(
    load: Load, kind: str, victims: Sequence[str], rows: np.ndarray, strike: Callable[[], object]
) -> dict[str, Any]:
    begun = time.monotonic()
    while not (counted := load.in_flight(rows)) and time.monotonic() - begun < 5.0:
        time.sleep(0.0005)
    moment = time.monotonic()
    strike()
    until(lambda: load.acked_since(moment) is not None, ACK_S, "an acknowledged push")
    acked = round(load.acked_since(moment) or 0.0, 3)
    return {"kind": kind, "victims": victims, "counted": counted, "first_ack_s": acked}


def head_loss(place: Place, load: Load, minutes: float) -> dict[str, Any]:
    """Kill head and controller, and let the load go on; what it met meanwhile."""
    found = load.found
    controllers = place.controllers()
    place.end_head()
    _kill(controllers)
    begun, pulls, pushes = time.monotonic(), found.pulls, len(found.acks)
    told = begun
    while time.monotonic() - begun < minutes * 60:
        time.sleep(1.0)
        if time.monotonic() - told > SAY_S:
            told = time.monotonic()
            line = f"{told - begun:.0f} s: {len(found.acks) - pushes} pushes, {found.pulls - pulls} pulls"
            print(line, file=sys.stderr, flush=True)
    ends = np.array([end for _, end in found.acks[pushes:]])
    gaps = np.diff(np.concatenate([[begun], ends, [time.monotonic()]]))
    return {
        "seconds_without_head": round(time.monotonic() - begun, 1),
        "processes_of_head_left": len(place.controllers()) + len(place.pids("gcs_server")),
        "pushes_without_head": len(ends),
        "pulls_without_head": found.pulls - pulls,
        "longest_wait_for_a_push_s": round(float(gaps.max()), 3),
    }


def _kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_gone(pids)
