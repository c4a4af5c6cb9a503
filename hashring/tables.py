"""Tables in a view: made, altered, emptied, dropped, and given another placement or number of copies. Pure.

Used by `hashring.planner.plan`, which gives the views their epochs and terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hashring.desk import Desk
from hashring.placement import fresh
from hashring.view import SLOTS_MAX, Group, Placement, Table, View


class PlanError(ValueError):
    """The change is refused; the message says why in one sentence."""


@dataclass(frozen=True)
class CreateTable:
    """replicas: at most the living servers. weight: of a whole table, what balancing counts (its size, in any unit).
    slots: of a group of its own, where they are not one for a whole table and 2**slot_bits for others."""

    name: str
    spec: Mapping[str, object]
    placement: Placement = "sharded"
    replicas: int | Literal["all"] = 1
    weight: float = 1.0
    slots: int | None = None


@dataclass(frozen=True)
class AlterTable:
    """Another specification under the same number."""

    name: str
    spec: Mapping[str, object]


@dataclass(frozen=True)
class Place:
    """Tables, by name with their specifications, are to have this placement and number of copies.

    The view only names it: rows follow as the goal (hashring.goal) is reached. A table that shares its slots with
    others that stay gets slots of its own first, where the same servers own them; so does one that is to be whole.
    """

    specs: Mapping[str, Mapping[str, object]]
    placement: Placement
    replicas: int | Literal["all"]


@dataclass(frozen=True)
class TruncateTable:
    """The same table without its rows: it gets a new number."""

    name: str


@dataclass(frozen=True)
class DropTable:
    """The table and its rows are gone."""

    name: str


def _check_replicas(view: View, name: str, replicas: int | Literal["all"]) -> None:
    alive = sum(s.alive for s in view.servers)
    if replicas != "all" and replicas > alive:
        raise PlanError(
            f"replicas of table {name!r} is {replicas}; the cluster has {alive} living servers, "
            "and a server holds one copy of a row at most"
        )


def _numbers(view: View, slots: int) -> int:
    """The first of so many new slot numbers; PlanError where they are used up."""
    if view.next_slot + slots > SLOTS_MAX:
        raise PlanError(
            f"{slots} slots more are too many for this cluster: {view.next_slot} of {SLOTS_MAX} slot numbers were "
            "given out; save it and restore the checkpoint into a new cluster, which counts from 0"
        )
    return view.next_slot


def place(view: View, change: Place) -> View:
    for name, spec in change.specs.items():
        _check_replicas(view, name, change.replicas)
        view = replace(view, tables=swap_table(view, replace(named(view, name), spec=spec)))
    tables = [named(view, name) for name in change.specs]
    for number in sorted({table.group for table in tables}):
        group = view.group(number)
        if lost := int(view.lost()[group.first : group.first + group.slots].sum()):
            raise PlanError(f"{lost} slots of {', '.join(change.specs)} are lost; restore or recover them first")
        mine = [table for table in tables if table.group == number]
        view = _place_group(view, group, mine, change)
    return view


def _place_group(view: View, group: Group, mine: Sequence[Table], change: Place) -> View:
    """Tables of one group: the group itself changes where they are all of it, and its slots are as they have to be."""
    together = [mine] if change.placement == "sharded" else [[table] for table in mine]
    shared = sum(t.group == group.number for t in view.tables) > len(together[0])
    if shared or (change.placement == "sharded" and group.slots < 2**view.slot_bits):
        for some in together:
            view = _part(view, group, some, change)
        return view
    weights = group.weights if group.placement == change.placement else np.ones(group.slots)
    changed = replace(group, placement=change.placement, replicas=change.replicas, weights=weights)
    return replace(view, groups=tuple(changed if g.number == group.number else g for g in view.groups))


def _part(view: View, group: Group, some: Sequence[Table], change: Place) -> View:
    """Tables leave a group for a new one, whose slots have the owners of those that their tokens lay in before.

    Servers that see a table in other slots carry everything over from the old ones, each for itself: so the old slots
    begin a new term with it, in which no server that has not done so takes part.
    """
    slots = 2**view.slot_bits
    own = replace(
        group,
        number=view.next_group,
        placement=change.placement,
        replicas=change.replicas,
        first=_numbers(view, slots),
        owners=group.owners[np.arange(slots) * group.slots // slots],
        terms=np.full(slots, view.epoch + 1, np.int64),
        weights=np.ones(slots),
    )
    names = {table.name for table in some}
    tables = tuple(replace(t, group=own.number) if t.name in names else t for t in view.tables)
    rest = replace(view.group(group.number), terms=np.full(group.slots, view.epoch + 1, np.int64))
    groups = [rest if g.number == group.number else g for g in view.groups]
    if not any(t.group == group.number for t in tables):
        groups = [g for g in view.groups if g.number != group.number]
    return replace(
        view,
        tables=tables,
        groups=(*groups, own),
        next_group=own.number + 1,
        next_slot=own.first + slots,
    )


def create(view: View, change: CreateTable) -> View:
    if view.table(change.name) is not None:
        raise PlanError(f"table {change.name!r} exists already")
    if not any(s.alive for s in view.servers):
        raise PlanError(f"table {change.name!r} cannot be made: the cluster has no living server")
    _check_replicas(view, change.name, change.replicas)
    group = None
    if change.placement == "sharded":
        alike = (g for g in view.groups if (g.placement, g.replicas) == ("sharded", change.replicas))
        group = next((g for g in alike if not any_lost(g, view.lost())), None)  # else it would lack those slots at once
    if group is None:
        view, group = _new_group(view, change)
    table = Table(view.next_table, change.name, group.number, change.spec)
    return replace(view, tables=(*view.tables, table), next_table=view.next_table + 1)


def any_lost(group: Group, lost: NDArray[np.bool_]) -> bool:
    """Whether some of a group's slots are; lost bool[slots_total]."""
    return bool(lost[group.first : group.first + group.slots].any())


def _new_group(view: View, change: CreateTable) -> tuple[View, Group]:
    slots = change.slots or (1 if change.placement == "whole" else 2**view.slot_bits)
    group = Group(
        number=view.next_group,
        placement=change.placement,
        replicas=change.replicas,
        first=_numbers(view, slots),
        owners=np.full((slots, 1), -1, np.int16),
        terms=np.full(slots, view.epoch + 1, np.int64),
        weights=np.full(slots, change.weight if change.placement == "whole" else 1.0),
    )
    wider = replace(view, groups=(*view.groups, group), next_group=group.number + 1, next_slot=group.first + slots)
    desk = Desk(wider)
    whole = desk.whole()
    if change.placement == "whole":
        whole.fill(len(whole.rows) - 1, desk.copies(group), desk.sites.servers)
        desk.give(group, whole.rows[-1])
    else:
        desk.owners[group.number] = fresh(slots, desk.sites, desk.distances, desk.copies(group))
    return desk.done(), group


def drop(view: View, name: str) -> View:
    gone = named(view, name)
    tables = tuple(t for t in view.tables if t.name != name)
    used = {t.group for t in tables}
    return replace(
        view, tables=tables, groups=tuple(g for g in view.groups if g.number in used or g.number != gone.group)
    )


def named(view: View, name: str) -> Table:
    table = view.table(name)
    if table is None:
        known = ", ".join(sorted(t.name for t in view.tables)) or "none"
        raise PlanError(f"no table is named {name!r}; the tables are: {known}")
    return table


def swap_table(view: View, table: Table) -> tuple[Table, ...]:
    return tuple(table if t.name == table.name else t for t in view.tables)
