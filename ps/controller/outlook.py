"""What a move of servers would do: slots, rows, bytes, time, and loads before and after. Pure."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.goal import goal
from hashring.planner import Begin, PlanError, plan
from hashring.view import Move, Server, View
from ps.arena import ArenaKey
from ps.errors import RequestError
from ps.spec import TableSpec

COPY_BYTES_PER_S = 64 * 2**20
"""What one server is taken to copy in a second where nothing limits it, for an estimate of the time."""

ROW_EXTRA_BYTES = 12
"""An id and its table's number, which travel with each row."""

NAMES_MAX = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}")
"""Names of servers, and of routers."""

_TAKEN = re.compile(r"controller|ray|router(-\d+)?")


def names_for(view: View, names: Iterable[str], port: int, ending: Collection[str] = ()) -> tuple[str, ...]:
    """The names of servers that are to join, as asked for, or the next free "server-N". Raises RequestError.

    port: of the first server, where it is fixed: then names tell the ports, by the numbers at their ends. ending: of
    processes that have left the view and are about to be ended, by their names.
    """
    chosen = tuple(str(name) for name in names)
    if not chosen:
        known = [*(s.name for s in view.servers), *ending]
        numbers = [int(name[7:]) for name in known if re.fullmatch(r"server-\d{1,9}", name)]
        return (f"server-{max(numbers, default=-1) + 1}",)
    if len(chosen) > NAMES_MAX:
        raise RequestError(f"{len(chosen)} servers are named; at most {NAMES_MAX} join at a time")
    for name in chosen:
        if not NAME.fullmatch(name) or _TAKEN.fullmatch(name):
            raise RequestError(
                f"a server cannot be named {name[:80]!r}: a name has up to 63 letters, digits, '.', '_' and '-', and "
                "the cluster's other processes are named controller, ray and router-N"
            )
        if name in ending:
            raise RequestError(f"server {name!r} has left and its process is still ending: try again in some seconds")
        if port and not re.fullmatch(r".*-\d{1,4}", name):
            raise RequestError(f"server {name!r} has no port: with [server] port = {port} its name must end in -N")
    return chosen


def placeholders(view: View, move: Move) -> tuple[Server, ...]:
    """Servers as they may join: on the host of all others where that is one, else each on a host of its own."""
    hosts = {s.host for s in view.servers}
    taken = max((s.incarnation for s in view.servers), default=0)
    return tuple(
        Server(name, taken + 1 + i, hosts.copy().pop() if len(hosts) == 1 else f"(new host of {name})")
        for i, name in enumerate(move.names if move.kind == "join" else ())
    )


def begun(view: View, move: Move) -> View:
    """The view at the beginning of a move, with placeholders. Raises RequestError where it is refused."""
    try:
        return plan(view, Begin(move, placeholders(view, move)))
    except PlanError as error:
        raise RequestError(str(error)) from None


def pair_loads(view: View, figures: Mapping[str, Mapping[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows, and their bytes on the wire, in one copy of each slot: float64[slots_total] each, an average by table; 0 of
    slots that are lost.

    figures: of each server by name, with rows_by_table.
    """
    rows, size = np.zeros(view.slots_total), np.zeros(view.slots_total)
    owners, there = view.owners(), ~view.lost()
    for table in view.tables:
        group = view.group(table.group)
        mine = slice(group.first, group.first + group.slots)
        copies = max(1, int((owners[mine][there[mine]] >= 0).sum()))
        held = sum(int(f.get("rows_by_table", {}).get(table.name, 0)) for f in figures.values())
        spec = TableSpec.from_plain(table.spec)
        each = there[mine] * held / copies
        rows[mine] += each
        size[mine] += each * (ArenaKey(spec.dim, spec.optimizer.kind).row_bytes + ROW_EXTRA_BYTES)
    return rows, size


def outlook(view: View, move: Move, figures: Mapping[str, Mapping[str, Any]], limit: int = 0) -> dict[str, Any]:
    """What the move would do. Raises RequestError where it is refused.

    limit: bytes a second of a server's copies by the settings, 0 for none. slots: copies of slots that are made. lost:
    slots that nobody has: while there are some, who joins is given no more than copies that are missing.
    servers, hosts: copies, primaries and bytes of each before and after.
    """
    after = begun(view, move)
    wanted, present = goal(after), view.owners()
    k = len(after.servers)
    was, will = _held(present, k), _held(wanted, k)
    made = will & ~was
    rows, size = pair_loads(view, figures)
    copied, each = made.any(axis=1), size * made.sum(axis=1)
    busiest = float(np.bincount(present[copied, 0], each[copied], minlength=k).max(initial=0.0))
    rates = [rate for rate in (move.bytes_per_s, limit) if rate]
    servers = []
    for i, server in enumerate(after.servers):
        servers.append(
            {
                "name": server.name,
                "host": server.host,
                "slots": [int(was[:, i].sum()), int(will[:, i].sum())],
                "primaries": [int((o[:, 0] == i).sum()) for o in (present, wanted)],
                "bytes": [round(float((size * held[:, i]).sum())) for held in (was, will)],
            }
        )
    return {
        "kind": move.kind,
        "names": list(move.names),
        "slots": int(made.sum()),
        "lost": int(view.lost().sum()),
        "turns": int((present[:, 0] != wanted[:, 0]).sum()),
        "rows": round(float((rows * made.sum(axis=1)).sum())),
        "bytes": round(float(each.sum())),
        "seconds": round(busiest / min(rates, default=COPY_BYTES_PER_S), 1),
        "bytes_per_s": min(rates, default=0),
        "servers": servers,
        "hosts": _by_host(servers),
    }


def _held(owners: NDArray[np.int16], servers: int) -> NDArray[np.bool_]:
    """bool[slots, servers]: who holds what."""
    held = np.zeros((len(owners), servers + 1), np.bool_)
    np.put_along_axis(held, owners.astype(np.int64), True, axis=1)
    return held[:, :servers]


def _by_host(servers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    hosts: dict[str, dict[str, Any]] = {}
    for server in servers:
        entry = hosts.setdefault(
            server["host"], {"host": server["host"], "slots": [0, 0], "primaries": [0, 0], "bytes": [0, 0]}
        )
        for key in ("slots", "primaries", "bytes"):
            entry[key] = [a + b for a, b in zip(entry[key], server[key], strict=True)]
    return list(hosts.values())
