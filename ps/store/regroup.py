"""Tables that a view has in other slots than before: each server carries over what it holds, without any message.

The new slots divide the same tokens as finely as the old ones, or more so. What an old slot stands for, each new one
inside it stands for too: its position and lineage, the clients that it remembers (they were heard, or not, by all ids
of the slot alike) and its deletions. The old slots begin a new term with the same view, so that no history mixes.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from hashring.view import Group, View
from ps.store.holdings import Holdings
from ps.store.registry import TableEntry

ROWS_AT_ONCE = 2**18
"""Rows of a table that are looked up at a time, about: bounds what that takes beside 12 bytes a row."""


def regroup(held: Holdings, view: View) -> NDArray[np.int64]:
    """Bring tables to the slots that the view has them in; those that they have left, int64[k]."""
    if view.slots_total > held.slots.slots_max:
        return np.empty(0, np.int64)  # the view will be refused
    inherited: set[tuple[int, int]] = set()
    left = [np.empty(0, np.int64)]
    for entry, group in held.registry.elsewhere(view):
        left.append(np.arange(entry.first, entry.first + entry.slots))
        if (entry.first, group.first) not in inherited:
            inherited.add((entry.first, group.first))
            _inherit(held, entry, group)
        _carry(held, entry, group)
        held.tombstones.move(entry.number, partial(held.registry.slots_of, entry.number))
    return np.unique(np.concatenate(left))


def _inherit(held: Holdings, entry: TableEntry, group: Group) -> None:
    """Positions and windows of new slots, but those whose old one is still being copied here: they begin empty."""
    slots = np.arange(group.first, group.first + group.slots)
    sources = entry.first + (slots - group.first) * entry.slots // group.slots
    whole = ~np.isin(sources, list(held.slots.filling))
    held.slots.inherit(sources[whole], slots[whole])
    held.clients.inherit(sources[whole], slots[whole])


def _carry(held: Holdings, entry: TableEntry, group: Group) -> None:
    """Bring a table's rows to its new slots, without touching the rows; those in slots that are still being copied
    here go."""
    arena = held.registry.arenas[entry.arena]
    parts = min(group.slots, -(-arena.rows_of(entry.code) // ROWS_AT_ONCE))
    filling = list(held.slots.filling)
    detached = []
    for part in range(parts):
        a, b = (group.slots * p // parts for p in (part, part + 1))
        old = np.arange(entry.first + a * entry.slots // group.slots, entry.first + -(-b * entry.slots // group.slots))
        low, last = (a << 64) // group.slots, (b << 64) // group.slots - 1
        detached.append(arena.detach(entry.code, old, low, last, ~np.isin(old, filling)))
    held.registry.relocate(entry, group)
    for ids, rows in detached:
        arena.attach(entry.code, ids, rows)
