"""The planner: `plan(view, change)` gives the next view. Pure, incremental, and the same in every process.

    Join(servers)        new servers take their share of every slot's owners from the others, and nothing else moves
    Leave(names)         the leavers' slots, and only those, go to others
    Rebalance()          missing copies and uneven loads are mended, after failures and returns
    Begin(move, servers) servers are to join, owning nothing yet, or to leave: the view has a goal (hashring.goal)
    Abort(kind, names)   who was to join leaves, who was to leave stays
    End()                the goal is reached: leavers, who own nothing any more, are no longer in the view
    Fail(name)           a dead server leaves every owner list but those where it is last: such slots are lost
    Return(server)       a name comes back as a new process: it owns nothing of what its predecessor held
    Recover()            lost slots get living owners, in a new term, without their rows
    Enlist(servers)      servers are in the view, and own nothing yet
    Withdraw(slots)      servers leave the owner lists of named slots, but those where they are last
    Reassign(slots)      slots get the owners that are given, who must hold them
    Renew(slots)         a new term under the same owners
    Place(tables)        tables get another placement or number of copies: first, where others share them, own slots
    CreateTable, AlterTable, TruncateTable, DropTable

`Join`, `Leave` and `Rebalance` are the goal of a view in one step, which a cluster with rows goes in many: slots are
copied first. Every plan has epoch + 1, and slots whose owner list changed have the new epoch as their term. A change
that cannot be made is refused with `PlanError`, in one sentence.

Bounds, held by property tests for 1 to 64 servers: max/mean of slots per server is at most 1.02 for primaries, and for
copies too unless distinct hosts forbid it (a host of many servers can hold no more than one copy of each slot); a join
moves at most 1.005 / (N + 1) of the (slot, copy) pairs, more only where it parts owners that shared a host, and all of
them to the newcomer; a leave moves only what the leaver held. Lost slots are never given away but by Recover.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hashring.desk import Desk, trimmed
from hashring.goal import goal
from hashring.placement import fill, without
from hashring.succession import reassign, renew, withdraw
from hashring.tables import (
    AlterTable,
    CreateTable,
    DropTable,
    Place,
    PlanError,
    TruncateTable,
    create,
    drop,
    named,
    place,
    swap_table,
)
from hashring.view import Group, Move, Server, View

SERVERS_MAX = 1024
"""Servers in one view; owners are int16."""


@dataclass(frozen=True)
class Join:
    """Servers that are new to the view."""

    servers: tuple[Server, ...]


@dataclass(frozen=True)
class Leave:
    """Servers that give up their slots and go."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Fail:
    """A server known dead."""

    name: str


@dataclass(frozen=True)
class Return:
    """A new process under a name that the view knows as dead."""

    server: Server


@dataclass(frozen=True)
class Recover:
    """Lost slots are to be owned again; their rows are accepted as lost, or are about to be restored."""


@dataclass(frozen=True)
class Enlist:
    """Servers that are new to the view, and own nothing until slots have been copied to them."""

    servers: tuple[Server, ...]


@dataclass(frozen=True, eq=False)
class Withdraw:
    """Slots (global numbers, int64[k]) that servers, by name, no longer own; each keeps those where it is last."""

    slots: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Reassign:
    """New owner lists int16[k, c] (indexes of the view's servers, -1 behind the last) of slots int64[k].

    Only owners, and learners admitted in the present term, may be named: they are primary or owner at once.
    """

    slots: NDArray[np.int64]
    owners: NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Renew:
    """Slots int64[k] that begin a new term under the same owners: what learners were promised is void."""

    slots: NDArray[np.int64]


@dataclass(frozen=True)
class Rebalance:
    """Missing copies and uneven loads are mended."""


@dataclass(frozen=True)
class Begin:
    """A move of servers begins; of those that join, as they are new to the view, in the order of its names."""

    move: Move
    servers: tuple[Server, ...] = ()


@dataclass(frozen=True)
class Abort:
    """The move of this kind, of these servers, is to be undone, if it is the one that is under way."""

    kind: Literal["join", "leave"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """The move that is under way has arrived."""


Membership = (
    Join | Leave | Fail | Return | Recover | Rebalance | Enlist | Withdraw | Reassign | Renew | Begin | Abort | End
)
Change = Membership | CreateTable | AlterTable | Place | TruncateTable | DropTable


def plan(view: View, change: Change) -> View:
    """The view after the change. Raises PlanError where the change cannot be made."""
    match change:
        case Join(servers):
            after = _at_goal(_enlist(view, servers), Move("join", tuple(s.name for s in servers)))
        case Leave(names):
            after = _leave(view, names)
        case Fail(name):
            after = _fail(view, name)
        case Return(server):
            after = _return(view, server)
        case Recover():
            after = _recover(view)
        case Rebalance():
            after = _bury(_at_goal(view))
        case Enlist(servers):
            after = _enlist(view, servers)
        case Begin(move, servers):
            after = _begin(view, move, servers)
        case Abort(kind, names):
            after = _abort(view, Move(kind, names))
        case End():
            after = _end(view)
        case Withdraw(slots):
            after = withdraw(view, slots)
        case Reassign(slots, owners):
            after = _bury(reassign(view, slots, owners))
        case Renew(slots):
            after = renew(view, slots)
        case CreateTable():
            after = create(view, change)
        case AlterTable(name, spec):
            after = replace(view, tables=swap_table(view, replace(named(view, name), spec=spec)))
        case Place():
            after = place(view, change)
        case TruncateTable(name):
            fresh = replace(named(view, name), number=view.next_table)
            after = replace(view, tables=swap_table(view, fresh), next_table=view.next_table + 1)
        case DropTable(name):
            after = _bury(drop(view, name))
    return replace(_with_terms(view, after), epoch=view.epoch + 1).check()


# -- servers ----------------------------------------------------------------------------------------------------------


def _check_new(view: View, server: Server) -> None:
    if view.server_index(server.name) is not None:
        raise PlanError(f"server {server.name!r} is in the view already")
    if any(s.incarnation == server.incarnation for s in view.servers):
        raise PlanError(f"server {server.name!r} has incarnation {server.incarnation}, which is in the view already")
    if len(view.servers) >= SERVERS_MAX:
        raise PlanError(f"the view has {len(view.servers)} servers; the limit is {SERVERS_MAX}")


def _enlist(view: View, servers: Sequence[Server]) -> View:
    for server in servers:
        _check_new(view, server)
        view = replace(view, servers=(*view.servers, server))
    return view


def _at_goal(view: View, move: Move | None = None) -> View:
    """The view with the owners that it should have while a move is under way, or at rest."""
    if not any(s.alive for s in view.servers):
        raise PlanError("no living server can be given slots")
    owners = goal(replace(view, move=move))
    return replace(
        view, groups=tuple(replace(g, owners=trimmed(owners[g.first : g.first + g.slots])) for g in view.groups)
    )


def _leave(view: View, names: Sequence[str]) -> View:
    _check_leave(view, names)
    return _without(_at_goal(view, Move("leave", tuple(names))), names)


def _without(view: View, names: Sequence[str]) -> View:
    return _renumber(view, [s for s in view.servers if s.name not in names])


def _check_leave(view: View, names: Sequence[str]) -> None:
    for name in names:
        if view.server_index(name) is None:
            known = ", ".join(sorted(s.name for s in view.servers))
            raise PlanError(f"no server is named {name!r}; the servers are {known}")
    left = [s for s in view.servers if s.name not in names]
    alive, before = sum(s.alive for s in left), sum(s.alive for s in view.servers)
    if not alive:
        raise PlanError(f"removing {', '.join(names)} would leave no living server")
    leavers = np.array([s.name in names for s in view.servers] + [False])
    for group in view.groups:
        if group.replicas != "all" and alive < min(group.replicas, before):
            raise PlanError(
                f"removing {', '.join(names)} would leave {alive} server{'s' * (alive > 1)}, "
                f"fewer than replicas = {group.replicas}"
            )
    kept_for = int(leavers[view.owners()[view.lost()]].any(axis=1).sum()) if view.groups else 0
    if kept_for:
        raise PlanError(
            f"{', '.join(names)} held the last copy of {kept_for} lost slots; restore or recover them first"
        )


def _begin(view: View, move: Move, servers: Sequence[Server]) -> View:
    if view.move is not None:
        raise PlanError(f"a change is under way ({view.move}): wait until it is done, or abort it")
    if len(set(move.names)) < len(move.names) or not move.names:
        raise PlanError(f"the servers are {', '.join(move.names) or 'none'}; each must be named once")
    if move.kind == "join":
        if tuple(s.name for s in servers) != move.names:
            raise PlanError(f"{', '.join(move.names)} are to join, {', '.join(s.name for s in servers)} have started")
        return replace(_enlist(view, servers), move=move)
    _check_leave(view, move.names)
    return replace(view, move=move)


def _abort(view: View, undone: Move) -> View:
    move = view.move
    if move is None:
        raise PlanError("no server is joining or leaving")
    if move.undoes or (move.kind, set(move.names)) != (undone.kind, set(undone.names)):
        raise PlanError(f"the change that is under way is {move}, not {undone}")
    if move.kind == "leave":
        return replace(view, move=None)
    _check_leave(view, move.names)
    return replace(view, move=replace(move, kind="leave", undoes=True))


def _end(view: View) -> View:
    if view.move is None:
        raise PlanError("no server is joining or leaving")
    if view.move.kind == "join":
        return replace(view, move=None)
    leaving = np.array([s.name in view.move.names for s in view.servers] + [False])
    if owned := int(leaving[view.owners()].any(axis=1).sum()):
        raise PlanError(f"{', '.join(view.move.names)} still own {owned} slots")
    return replace(_without(view, view.move.names), move=None)


def _fail(view: View, name: str) -> View:
    at = view.server_index(name)
    if at is None:
        raise PlanError(f"no server is named {name!r}")
    if not view.servers[at].alive:
        raise PlanError(f"server {name!r} is already known dead")
    servers = tuple(replace(s, alive=False) if i == at else s for i, s in enumerate(view.servers))
    gone = np.arange(len(servers) + 1) == at
    groups = tuple(replace(g, owners=without(g.owners, gone, (g.owners >= 0).sum(axis=1) > 1)) for g in view.groups)
    return replace(view, servers=servers, groups=groups)


def _return(view: View, server: Server) -> View:
    """The dead process keeps its entry, under a name of its own, for as long as slots are lost with it."""
    at = view.server_index(server.name)
    if at is None:
        raise PlanError(f"no server is named {server.name!r}; it can join")
    dead = view.servers[at]
    if dead.alive:
        raise PlanError(f"server {server.name!r} is alive in the view (incarnation {dead.incarnation})")
    if any(s.incarnation == server.incarnation for s in view.servers):
        raise PlanError(f"server {server.name!r} returned with incarnation {server.incarnation}, which is known dead")
    grave = replace(dead, name=f"{dead.name}~{dead.incarnation:016x}")
    servers = [grave if i == at else s for i, s in enumerate(view.servers)]
    return _bury(replace(view, servers=(*servers, server)))


def _recover(view: View) -> View:
    if view.lost().any() and not any(s.alive for s in view.servers):
        raise PlanError("no living server can take the lost slots")
    dead = np.array([not s.alive for s in view.servers] + [False])
    desk = Desk(view, dead)
    for group in desk.sharded():
        lost = view.lost()[group.first : group.first + group.slots]
        if lost.any():
            before, filled = desk.owners[group.number], fill(**desk.of(group))
            filled[~lost, : before.shape[1]] = before[~lost]  # slots that lack a copy keep lacking it: only the lost
            filled[~lost, before.shape[1] :] = -1  # may be owned by somebody who has no rows of them
            desk.owners[group.number] = filled
    whole = desk.whole()
    for i, group in enumerate(desk.whole_groups):
        lost = view.lost()[group.first : group.first + group.slots]
        if lost.any():
            whole.fill(i, desk.copies(group), desk.sites.servers)
            desk.give(group, whole.rows[i], lost)
    return _bury(desk.done())


def _bury(view: View) -> View:
    """The view without dead servers that own nothing and whose name was given on."""
    owning = set(np.unique(view.owners()).tolist())
    return _renumber(view, [s for i, s in enumerate(view.servers) if s.alive or "~" not in s.name or i in owning])


def _renumber(view: View, servers: Sequence[Server]) -> View:
    """The view with just these servers, owners pointing at them."""
    index = {s.name: i for i, s in enumerate(servers)}
    mapping = np.array([index.get(s.name, -1) for s in view.servers] + [-1], np.int16)  # the last is for -1: no owner
    groups = tuple(replace(g, owners=mapping[g.owners]) for g in view.groups)
    return replace(view, servers=tuple(servers), groups=groups)


# -- terms -----------------------------------------------------------------------------------------------------------


def _with_terms(before: View, after: View) -> View:
    """The new epoch as the term of every slot whose owners are not what they were, in their order."""
    groups = []
    known = {group.number: group for group in before.groups}
    for group in after.groups:
        old = known.get(group.number)
        if old is None:
            groups.append(group)
            continue
        changed = _padded_incarnations(before, old, group) != _padded_incarnations(after, group, old)
        renewed = changed.any(axis=1) | (group.terms != old.terms)
        groups.append(replace(group, terms=np.where(renewed, before.epoch + 1, old.terms)))
    return replace(after, groups=tuple(groups))


def _padded_incarnations(view: View, group: Group, other: Group) -> NDArray[np.object_]:
    width = max(group.owners.shape[1], other.owners.shape[1])
    wide = np.full((group.slots, width), -1, np.int16)
    wide[:, : group.owners.shape[1]] = group.owners
    return np.array([s.incarnation for s in view.servers] + [-1], object)[wide]
