"""The status of a cluster as plain data, from what the controller knows. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hashring.view import View
from ps.controller.members import Member
from ps.failover import Failover
from ps.server import RECONNECT

RECONNECT_MIN_S = 600.0
"""Servers that end sooner after the death of Ray's head are warned of."""


def under_replicated(view: View) -> int:
    """Slots that are not lost, and have fewer living owners than their tables ask for.

    A table that asks for more copies than the cluster has servers, dead ones counted, lacks nothing beyond those.
    """
    alive = np.array([s.alive for s in view.servers] + [False])
    names = sum("~" not in s.name for s in view.servers)
    count = 0
    for group in view.groups:
        wanted = names if group.replicas == "all" else min(group.replicas, names)
        living = alive[group.owners].sum(axis=1)
        count += int(((living > 0) & (living < wanted)).sum())
    return count


def warnings(members: Iterable[Member]) -> list[str]:
    """What an operator should change, though all goes well so far; a sentence each."""
    short = [m for m in members if m.state == "alive" and m.reconnect_s < RECONNECT_MIN_S]
    if not short:
        return []
    names = ", ".join(sorted(m.name for m in short))
    return [
        f"Ray ends {names} {min(m.reconnect_s for m in short):g} s after its head dies, and their rows with them: "
        f"start Ray on every node with {RECONNECT}=315360000"
    ]


def cluster_status(mind: Failover, members: Sequence[Member]) -> dict[str, Any]:
    """Epoch, tables, servers, warnings, and what is lost, lacks copies or is being copied.

    slots of a server: those whose primary it is; copies: those that it owns at all. slots_left: copies to be made, and
    slots to be given another primary; slots_held: of these, copies that are there and wait for others. unheard: servers
    that have not answered this controller, or do not any more; while there are some, slots_left may be 0 though it is
    not known. move: which servers join or leave; undoes: because their join was aborted. unanswered: pings, one after
    another. A server has ps.controller.figures from when it was asked first, within a `statistics_interval_ms` of its
    start.
    """
    view = mind.view
    owners = view.owners()
    index = {s.incarnation: i for i, s in enumerate(view.servers)}
    primary = np.bincount(owners[owners[:, 0] >= 0, 0], minlength=len(view.servers))
    servers = []
    for member in sorted(members, key=lambda m: m.name):
        place = index.get(member.incarnation, -1)
        health = mind.servers.get(member.incarnation)
        missed = health.missed if health is not None else 0
        silent = member.state == "alive" and missed >= mind.limits.pings_max
        servers.append(
            {
                **member.figures,
                "name": member.name,
                "state": "silent" if silent else member.state,
                "host": member.host,
                "pid": member.pid,
                "incarnation": member.incarnation,
                "addresses": list(member.addresses),
                "slots": int(primary[place]) if place >= 0 else 0,
                "copies": int((owners == place).sum()) if place >= 0 else 0,
                "restarts": member.restarts,
                "unanswered": missed,
            }
        )
    return {
        "cluster": view.cluster,
        "epoch": view.epoch,
        "slots_lost": int(view.lost().sum()),
        "slots_under_replicated": under_replicated(view),
        "slots_learning": mind.learning,
        "warnings": warnings(members),
        "slots_left": mind.left,
        "slots_held": mind.held,
        "unheard": mind.unheard,
        "move": {"kind": move.kind, "names": list(move.names), "undoes": move.undoes} if (move := view.move) else None,
        "tables": [{"name": t.name, "number": t.number, **dict(t.spec)} for t in view.tables],
        "servers": servers,
    }
