"""Who follows whom in owner lists that are given: no ring, no balance. What failover and moves are made of."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hashring.desk import trimmed
from hashring.placement import Owners, without
from hashring.view import Group, View


def withdraw(view: View, slots: Mapping[str, NDArray[np.int64]]) -> View:
    """Servers (by name) leave the lists of these slots (global numbers), but those where they are last."""
    for name, left in slots.items():
        gone = np.array([s.name == name for s in view.servers] + [False])

        def leave(group: Group, mine: NDArray[np.int64], gone: NDArray[np.bool_] = gone) -> Group:
            where = np.zeros(group.slots, np.bool_)
            where[mine - group.first] = True
            where &= (group.owners >= 0).sum(axis=1) > 1
            return replace(group, owners=without(group.owners, gone, where))

        view = _each(view, left, leave)
    return view


def reassign(view: View, slots: NDArray[np.int64], owners: Owners) -> View:
    """These slots get these owner lists."""
    place = np.full(view.slots_total, -1)
    place[slots] = np.arange(len(slots))

    def give(group: Group, mine: NDArray[np.int64]) -> Group:
        wide = np.full((group.slots, max(group.owners.shape[1], owners.shape[1])), -1, np.int16)
        wide[:, : group.owners.shape[1]] = group.owners
        wide[mine - group.first] = -1
        wide[mine - group.first, : owners.shape[1]] = owners[place[mine]]
        return replace(group, owners=trimmed(wide))

    return _each(view, slots, give)


def renew(view: View, slots: NDArray[np.int64]) -> View:
    """These slots begin a term, under the owners they have."""

    def begin(group: Group, mine: NDArray[np.int64]) -> Group:
        terms = group.terms.copy()
        terms[mine - group.first] = view.epoch + 1
        return replace(group, terms=terms)

    return _each(view, slots, begin)


def _each(view: View, slots: NDArray[np.int64], change: Callable[[Group, NDArray[np.int64]], Group]) -> View:
    """The view with each group that has some of the slots changed; slots of no group are left out."""
    groups = []
    for group in view.groups:
        mine = slots[(slots >= group.first) & (slots < group.first + group.slots)]
        groups.append(change(group, mine) if len(mine) else group)
    return replace(view, groups=tuple(groups))
