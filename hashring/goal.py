"""The goal of a view: who should own what, given its servers, their health, and the move that is under way. Pure.

One goal serves everything that moves slots: missing copies are to be made, copies beyond what tables ask for given up,
newcomers take their share, leavers give up all, loads and first places are evened out. Whoever goes towards it in
steps, and looks again after each, arrives: what is there already is never asked for, and where nothing would get
better the goal is what is there.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hashring.desk import Desk
from hashring.placement import Owners, Sites, even_primaries, excess, fill, join, shed, spread
from hashring.view import View

_PASSES = 4
_SPREAD_ABOVE = 0.01
"""Part of all copies that may lie unevenly before any server gives slots to any other."""


def leavers(view: View) -> NDArray[np.bool_]:
    """bool[servers + 1]: who is leaving; the last is for "no owner"."""
    names = view.move.names if view.move is not None and view.move.kind == "leave" else ()
    return np.array([s.name in names for s in view.servers] + [False])


def goal(view: View, unusable: frozenset[str] = frozenset()) -> Owners:
    """The owners that every slot should have, int16[slots_total, copies]: indexes of the view's servers.

    unusable: names of servers that are given nothing, although the view has them alive. Slots whose primary is dead or
    unusable stay as they are, since nobody could copy them.
    """
    alive = [s.alive and s.name not in unusable for s in view.servers]
    servers = tuple(replace(s, alive=up) for s, up in zip(view.servers, alive, strict=True))
    present = view.owners()
    movable = (present[:, 0] >= 0) & np.array([*alive, False])[present[:, 0]]
    desk = Desk(replace(view, servers=servers), leavers(view), movable)
    if not desk.sites.servers:
        return present
    takers = desk.sites.servers if not view.lost().any() else []  # the lost will return to whoever has room
    if view.move is not None:  # a join moves rows to newcomers only, and a leave only what leavers had
        joining = view.move.names if view.move.kind == "join" else ()
        takers = [s for s in takers if view.servers[s].name in joining]
    found = {g.number: settled(**desk.of(g), takers=takers) for g in desk.sharded()}
    whole = desk.whole()
    for i, group in enumerate(desk.whole_groups):
        whole.shed(i, desk.copies(group))
        whole.fill(i, desk.copies(group), desk.sites.servers)
    for server in sorted(takers, key=lambda s: (whole.loads[s], s)) * _PASSES:
        whole.spread(server)
    whole.even_primaries()
    for group, row in zip(desk.whole_groups, whole.rows, strict=True):
        found[group.number] = np.tile(np.array([row or [-1]], np.int16), (group.slots, 1))
    width = max([present.shape[1], *(owners.shape[1] for owners in found.values())])
    out = np.full((len(present), width), -1, np.int16)
    for group in view.groups:
        owners = found[group.number]
        out[group.first : group.first + group.slots, : owners.shape[1]] = owners
    out[~movable] = -1
    out[~movable, : present.shape[1]] = present[~movable]
    return out


def settled(
    owners: Owners,
    sites: Sites,
    distances: NDArray[np.int32],
    copies: int,
    live: NDArray[np.bool_],
    takers: Sequence[int],
) -> Owners:
    """The owners of a sharded group as they should be, with no more moved than that takes.

    Those of the takers that are below their fair share take from those above. Only where distinct hosts keep that from
    evening out the loads, and all servers are takers, slots move between any two.
    """
    owners = fill(shed(owners, sites, distances, copies, live), sites, distances, copies, live)
    bad = excess(owners, sites, copies, live)
    for _ in range(_PASSES):
        better = owners
        shortest = sorted(takers, key=lambda s: (int((better[live] == s).sum()), s))
        for server in shortest if bad > (0, 0) else ():
            better = join(better, server, sites, distances, copies, live)
        if (
            len(takers) == len(sites.servers)
            and excess(better, sites, copies, live)[1] > _SPREAD_ABOVE * live.sum() * copies
        ):
            better = min(
                better, spread(better, sites, distances, copies, live), key=lambda o: excess(o, sites, copies, live)
            )
        if (left := excess(better, sites, copies, live)) >= bad:
            break
        owners, bad = better, left
    return even_primaries(owners, sites, distances, live)
