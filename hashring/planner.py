"""The planner: `plan(view, change)` gives the next view. Pure, incremental, and the same in every process.

    Join(servers)        new servers take their share of every slot's owners from the others, and nothing else moves
    Leave(names)         the leavers' slots, and only those, go to others
    Fail(name)           a dead server leaves every owner list but those where it is last: such slots are lost
    Return(server)       a name comes back as a new process: it owns nothing of what its predecessor held
    Recover()            lost slots get living owners, in a new term, without their rows
    CreateTable, AlterTable, TruncateTable, DropTable

Every plan has epoch + 1, and slots whose owner list changed have the new epoch as their term. A change that cannot be
made is refused with `PlanError`, in one sentence.

Bounds, held by property tests for 1 to 64 servers: with equal weights and hosts of equal size, max/mean of slots per
server is at most 1.02 for primaries and for copies; a join moves at most 1.005 / (N + 1) of the (slot, copy) pairs, all
of them to the newcomer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hashring.placement import Board, balance_primaries, fill, hand_over
from hashring.ring import preferences
from hashring.view import Group, Placement, Server, Table, View

SERVERS_MAX = 1024
"""Servers in one view; owners are int16."""


class PlanError(ValueError):
    """The change is refused; the message says why in one sentence."""


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
class CreateTable:
    """weight: of a whole table, what balancing counts (its size, in any one unit)."""

    name: str
    spec: Mapping[str, object]
    placement: Placement = "sharded"
    replicas: int | Literal["all"] = 1
    weight: float = 1.0


@dataclass(frozen=True)
class AlterTable:
    """Another specification under the same number."""

    name: str
    spec: Mapping[str, object]


@dataclass(frozen=True)
class TruncateTable:
    """The same table without its rows: it gets a new number."""

    name: str


@dataclass(frozen=True)
class DropTable:
    """The table and its rows are gone."""

    name: str


Change = Join | Leave | Fail | Return | Recover | CreateTable | AlterTable | TruncateTable | DropTable


def plan(view: View, change: Change) -> View:
    """The view after the change. Raises PlanError where the change cannot be made."""
    match change:
        case Join(servers):
            for server in servers:
                view = replace(_join(view, server), epoch=view.epoch)
            after = view
        case Leave(names):
            after = _leave(view, names)
        case Fail(name):
            after = _fail(view, name)
        case Return(server):
            after = _return(view, server)
        case Recover():
            after = _recover(view)
        case CreateTable():
            after = _create(view, change)
        case AlterTable(name, spec):
            after = replace(view, tables=_swap_table(view, replace(_table(view, name), spec=spec)))
        case TruncateTable(name):
            fresh = replace(_table(view, name), number=view.next_table)
            after = replace(view, tables=_swap_table(view, fresh), next_table=view.next_table + 1)
        case DropTable(name):
            after = _drop(view, name)
    return replace(after, epoch=view.epoch + 1).check()


# -- servers ----------------------------------------------------------------------------------------------------------


def _join(view: View, server: Server) -> View:
    if view.server_index(server.name) is not None:
        raise PlanError(f"server {server.name!r} is in the view already")
    if len(view.servers) >= SERVERS_MAX:
        raise PlanError(f"the view has {len(view.servers)} servers; the limit is {SERVERS_MAX}")
    wider = replace(view, servers=(*view.servers, server))
    newcomer = len(view.servers)
    groups = []
    for group in wider.groups:
        board = _board(wider, group)
        fill(board, _copies(group.replicas, len(board.usable)))
        hand_over(board, newcomer)
        balance_primaries(board)
        groups.append(_group_of(board, group, view.epoch + 1))
    return _spread_whole(replace(wider, groups=tuple(groups)), newcomer, view.epoch + 1)


def _spread_whole(view: View, newcomer: int, term: int) -> View:
    """Move whole tables to the newcomer, biggest first from the most loaded, while it stays at or below the mean."""
    groups = list(view.groups)
    loads = _whole_loads(view)
    alive = [i for i, s in enumerate(view.servers) if s.alive]
    mean = sum(loads[i] for i in alive) / len(alive)
    whole = [k for k, g in enumerate(groups) if g.placement == "whole" and newcomer not in g.owners[0]]
    for k in sorted(whole, key=lambda k: (-float(groups[k].weights[0]), groups[k].number)):
        weight = float(groups[k].weights[0])
        board = _board(view, groups[k])
        listed = [s for s in board.owners[0] if view.servers[s].alive]
        if not listed or loads[newcomer] + weight > mean:
            continue
        victim = max(listed, key=lambda s: loads[s])
        others = [s for s in board.owners[0] if s != victim]
        if loads[victim] > mean and board.clash(newcomer, others) <= board.clash(victim, others):
            board.replace(0, victim, newcomer)
            loads[victim] -= weight
            loads[newcomer] += weight
            groups[k] = _group_of(board, groups[k], term)
    return replace(view, groups=tuple(groups))


def _leave(view: View, names: Sequence[str]) -> View:
    for name in names:
        if view.server_index(name) is None:
            known = ", ".join(s.name for s in view.servers)
            raise PlanError(f"no server is named {name!r}; the servers are {known}")
    left = [s for s in view.servers if s.name not in names]
    if not any(s.alive for s in left):
        raise PlanError(f"removing {', '.join(names)} would leave no living server")
    for group in view.groups:
        if group.replicas != "all" and group.replicas > len(left) and group.owners.shape[1] > len(left):
            raise PlanError(
                f"removing {', '.join(names)} would leave {len(left)} servers, fewer than replicas = {group.replicas}"
            )
    leavers = [i for i, s in enumerate(view.servers) if s.name in names]
    groups = []
    for group in view.groups:
        board = _board(view, group, without=leavers)
        for slot, listed in enumerate(board.owners):
            for server in [s for s in listed if s in leavers]:
                board.remove(slot, server)
        fill(board, _copies(group.replicas, len(board.usable)))
        balance_primaries(board)
        groups.append(_group_of(board, group, view.epoch + 1))
    return _renumber(replace(view, groups=tuple(groups)), left)


def _fail(view: View, name: str) -> View:
    at = view.server_index(name)
    if at is None:
        raise PlanError(f"no server is named {name!r}")
    if not view.servers[at].alive:
        raise PlanError(f"server {name!r} is already known dead")
    servers = tuple(replace(s, alive=False) if i == at else s for i, s in enumerate(view.servers))
    groups = []
    for group in view.groups:
        board = _board(view, group)
        for slot, listed in enumerate(board.owners):
            if at in listed and len(listed) > 1:
                board.remove(slot, at)
        groups.append(_group_of(board, group, view.epoch + 1))
    return replace(view, servers=servers, groups=tuple(groups))


def _return(view: View, server: Server) -> View:
    """The dead process keeps its entry, under a name of its own, for as long as slots are lost with it."""
    at = view.server_index(server.name)
    if at is None:
        raise PlanError(f"no server is named {server.name!r}; it can join")
    dead = view.servers[at]
    if dead.alive:
        raise PlanError(f"server {server.name!r} is alive in the view (incarnation {dead.incarnation})")
    grave = replace(dead, name=f"{dead.name}~{dead.incarnation:016x}")
    servers = [grave if i == at else s for i, s in enumerate(view.servers)]
    return _bury(replace(view, servers=(*servers, server)))


def _recover(view: View) -> View:
    lost = view.lost()
    groups = []
    for group in view.groups:
        board = _board(view, group)
        gone = np.flatnonzero(lost[group.first : group.first + group.slots]).tolist()
        if gone and not board.usable:
            raise PlanError("no living server can take the lost slots")
        for slot in gone:
            for server in list(board.owners[slot]):
                board.remove(slot, server)
        fill(board, _copies(group.replicas, len(board.usable)))
        balance_primaries(board)
        groups.append(_group_of(board, group, view.epoch + 1))
    return _bury(replace(view, groups=tuple(groups)))


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


# -- tables -----------------------------------------------------------------------------------------------------------


def _create(view: View, change: CreateTable) -> View:
    if view.table(change.name) is not None:
        raise PlanError(f"table {change.name!r} exists already")
    if not any(s.alive for s in view.servers):
        raise PlanError(f"table {change.name!r} cannot be made: the cluster has no living server")
    group = None
    if change.placement == "sharded":
        group = next((g for g in view.groups if (g.placement, g.replicas) == ("sharded", change.replicas)), None)
    if group is None:
        view, group = _new_group(view, change)
    table = Table(view.next_table, change.name, group.number, change.spec)
    return replace(view, tables=(*view.tables, table), next_table=view.next_table + 1)


def _new_group(view: View, change: CreateTable) -> tuple[View, Group]:
    slots = 1 if change.placement == "whole" else 2**view.slot_bits
    weight = change.weight if change.placement == "whole" else 1.0
    bare = Group(
        number=view.next_group,
        placement=change.placement,
        replicas=change.replicas,
        first=view.next_slot,
        owners=np.empty((slots, 0), np.int16),
        terms=np.full(slots, view.epoch + 1, np.int64),
        weights=np.full(slots, weight),
    )
    board = _board(view, bare)
    copies = _copies(change.replicas, len(board.usable))
    if change.placement == "whole":
        _place_whole(view, board, copies)
    else:
        fill(board, copies)
        balance_primaries(board)
    group = _group_of(board, bare, view.epoch + 1)
    wider = replace(
        view, groups=(*view.groups, group), next_group=view.next_group + 1, next_slot=view.next_slot + slots
    )
    return wider, group


def _place_whole(view: View, board: Board, copies: int) -> None:
    """Give a whole table's slot to the servers that carry the least weight of whole tables, apart from each other."""
    loads = _whole_loads(view)
    listed = board.owners[0]
    while len(listed) < min(copies, len(board.usable)):
        candidates = [s for s in board.order[0].tolist() if s in board.usable and s not in listed]
        board.append(0, min(candidates, key=lambda s: (board.clash(s, listed), loads[s])))


def _whole_loads(view: View) -> list[float]:
    loads = [0.0] * len(view.servers)
    for group in view.groups:
        if group.placement == "whole":
            for server in group.owners[0]:
                if server >= 0:
                    loads[server] += float(group.weights[0])
    return loads


def _drop(view: View, name: str) -> View:
    gone = _table(view, name)
    tables = tuple(t for t in view.tables if t.name != name)
    used = {t.group for t in tables}
    return _bury(
        replace(view, tables=tables, groups=tuple(g for g in view.groups if g.number in used or g.number != gone.group))
    )


def _table(view: View, name: str) -> Table:
    table = view.table(name)
    if table is None:
        known = ", ".join(sorted(t.name for t in view.tables)) or "none"
        raise PlanError(f"no table is named {name!r}; the tables are: {known}")
    return table


def _swap_table(view: View, table: Table) -> tuple[Table, ...]:
    return tuple(table if t.name == table.name else t for t in view.tables)


# -- groups and boards ------------------------------------------------------------------------------------------------


def _copies(replicas: int | Literal["all"], servers: int) -> int:
    return servers if replicas == "all" else min(replicas, servers)


def _board(view: View, group: Group, without: Sequence[int] = ()) -> Board:
    listed = [[s for s in row if s >= 0] for row in group.owners.tolist()]
    order = preferences([s.name for s in view.servers], 2**view.slot_bits)
    if group.placement == "whole":
        # A whole table stands where its number hashes to, so that equal loads do not all fall to one server.
        order = order[(group.number * 0x9E3779B1 % 2**32) * len(order) >> 32][None, :]
    usable = [s.alive and i not in without for i, s in enumerate(view.servers)]
    return Board(listed, [(s.zone, s.host) for s in view.servers], usable, order)


def _group_of(board: Board, before: Group, term: int) -> Group:
    width = max((len(listed) for listed in board.owners), default=0)
    owners = np.full((len(board.owners), max(1, width)), -1, np.int16)
    for slot, listed in enumerate(board.owners):
        owners[slot, : len(listed)] = listed
    old = np.full_like(owners, -1)
    shared = min(owners.shape[1], before.owners.shape[1])
    old[:, :shared] = before.owners[:, :shared]
    changed = (owners != old).any(axis=1)
    if before.owners.shape[1] > shared:
        changed |= (before.owners[:, shared:] >= 0).any(axis=1)
    return replace(before, owners=owners, terms=np.where(changed, term, before.terms))


@dataclass(frozen=True)
class Balance:
    """Slots per living server: max / mean of primaries and of copies (weighted), and the mean of each."""

    primaries: float
    copies: float
    primaries_mean: float
    copies_mean: float


def balance(view: View, group: Group) -> Balance:
    """How evenly the living servers share a group's weight."""
    alive = np.flatnonzero([s.alive for s in view.servers])
    n = len(view.servers)
    owners = group.owners.astype(np.int64)
    weights = np.broadcast_to(group.weights[:, None], owners.shape)
    held = owners >= 0
    copies = np.bincount(owners[held], weights[held], minlength=n)[alive]
    first = held[:, 0]
    primaries = np.bincount(owners[first, 0], group.weights[first], minlength=n)[alive]
    ratio = [float(x.max() / x.mean()) if len(x) and x.mean() else 1.0 for x in (primaries, copies)]
    means = [float(x.mean()) if len(x) else 0.0 for x in (primaries, copies)]
    return Balance(ratio[0], ratio[1], means[0], means[1])
