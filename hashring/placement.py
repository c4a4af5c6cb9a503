"""Placing the slots of one group: bounded loads, distinct hosts, as few moved rows as the arithmetic allows.

Everything here works on one `Board`, a mutable copy of a group's owner lists, and is sequential and free of sets and
hashes whose order could differ: the same input gives the same owners in any process.

Two loads are kept apart: *copies* (all owners) and *primaries* (first in the list). Changing who is first moves no
rows, so `balance_primaries` may go far, while `hand_over` and `fill` move just what a change asks for.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


class Board:
    """Owner lists (`owners[slot]`, the primary first) over servers 0..n-1, and the loads that follow from them.

    places: (zone, host) of each server. usable: may be given slots. order: each slot's preference of servers.
    """

    def __init__(
        self,
        owners: list[list[int]],
        places: Sequence[tuple[str, str]],
        usable: Sequence[bool],
        order: NDArray[np.int16],
    ) -> None:
        self.owners = owners
        self.places = places
        self.usable = [i for i, up in enumerate(usable) if up]
        self.order = order
        self.copies = [0] * len(places)
        self.primaries = [0] * len(places)
        for listed in owners:
            for server in listed:
                self.copies[server] += 1
            if listed:
                self.primaries[listed[0]] += 1

    def clash(self, server: int, others: Sequence[int]) -> int:
        """How badly `server` sits beside `others`: 2 on the host of one, 1 in the zone of one, 0 apart from all."""
        zone, host = self.places[server]
        worst = 0
        for other in others:
            other_zone, other_host = self.places[other]
            if other_host == host:
                return 2
            if zone and other_zone == zone:
                worst = 1
        return worst

    def append(self, slot: int, server: int) -> None:
        """Make `server` the slot's last owner."""
        if not self.owners[slot]:
            self.primaries[server] += 1
        self.owners[slot].append(server)
        self.copies[server] += 1

    def remove(self, slot: int, server: int) -> None:
        """Take `server` off the slot's list; the next in line becomes primary."""
        listed = self.owners[slot]
        if listed[0] == server:
            self.primaries[server] -= 1
            if len(listed) > 1:
                self.primaries[listed[1]] += 1
        listed.remove(server)
        self.copies[server] -= 1

    def replace(self, slot: int, old: int, new: int) -> None:
        """Put `new` into `old`'s place on the slot's list."""
        listed = self.owners[slot]
        at = listed.index(old)
        listed[at] = new
        self.copies[old] -= 1
        self.copies[new] += 1
        if at == 0:
            self.primaries[old] -= 1
            self.primaries[new] += 1


def fill(board: Board, copies: int) -> None:
    """Give every slot with fewer than `copies` owners more of them, up to the servers there are.

    Walks the slot's order of preference with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): the first server
    that is below the mean wins; distinct hosts come before zones, and both before the bound.
    """
    copies = min(copies, len(board.usable))
    if not copies:
        return
    usable = [False] * len(board.places)
    for server in board.usable:
        usable[server] = True
    kept = sum(board.copies[s] for s in board.usable)
    missing = sum(max(0, copies - len(listed)) for listed in board.owners)
    quota = -(-(kept + missing) // len(board.usable))
    given = []
    for slot, listed in enumerate(board.owners):
        while len(listed) < copies:
            candidates = [s for s in board.order[slot].tolist() if usable[s] and s not in listed]
            if not candidates:
                break
            # min() keeps the first of equals: the ring decides among servers below the quota.
            server = min(candidates, key=lambda s: (board.clash(s, listed), max(0, board.copies[s] - quota + 1)))
            board.append(slot, server)
            given.append((slot, server))
    _settle(board, given, quota)


def _settle(board: Board, given: list[tuple[int, int]], quota: int) -> None:
    """Pass on what `fill` gave to servers above the quota. Distinct hosts can leave the last slots no other choice,
    while slots given before them still have one; nothing that a server already held is touched."""
    for slot, server in given:
        if board.copies[server] <= quota:
            continue
        others = [s for s in board.owners[slot] if s != server]
        held = board.clash(server, others)
        for taker in board.order[slot].tolist():
            if (
                taker in board.usable
                and taker not in others
                and board.copies[taker] < quota
                and board.clash(taker, others) <= held
            ):
                board.replace(slot, server, taker)
                break


def hand_over(board: Board, newcomer: int) -> int:
    """Give the newcomer its share of the copies, taken from the most loaded owners; returns the pairs moved.

    Slots are offered in the order in which the ring prefers the newcomer, so that where slots lie depends on the ring
    and not on the history.
    """
    total = sum(board.copies[s] for s in board.usable)
    goal, ceiling = total // len(board.usable), -(-total // len(board.usable))
    by_rank = np.argsort(np.argmax(board.order == newcomer, axis=1), kind="stable").tolist()
    moved = 0
    for bound in (ceiling, goal):  # first from those above the mean, so that no surplus is left with one of them
        for slot in by_rank:
            if board.copies[newcomer] >= goal:
                return moved
            victim = _victim(board, slot, newcomer, bound)
            if victim >= 0:
                board.replace(slot, victim, newcomer)
                moved += 1
    return moved


def _victim(board: Board, slot: int, newcomer: int, bound: int) -> int:
    """The most loaded owner of the slot above `bound` that may give it to the newcomer, or -1."""
    listed = board.owners[slot]
    if newcomer in listed:
        return -1
    best = -1
    for server in listed:
        if board.copies[server] <= bound or (best >= 0 and board.copies[server] <= board.copies[best]):
            continue
        others = [s for s in listed if s != server]
        if board.clash(newcomer, others) <= board.clash(server, others):
            best = server
    return best


def balance_primaries(board: Board) -> None:
    """Even out who is first in the owner lists, by shortest chains of swaps; moves no rows.

    A swap makes another owner of a slot its primary. From a server above the mean a breadth-first search over
    "primary of a slot that the other one owns too" finds the nearest server below it (augmenting paths, as in
    bipartite matching).
    """
    bound = -(-sum(board.primaries[s] for s in board.usable) // max(1, len(board.usable)))
    shared = _shared(board)
    above = [s for s in board.usable if board.primaries[s] > bound]
    while above:
        start = max(above, key=lambda s: board.primaries[s])
        path = _path(board, shared, start, bound)
        for giver, taker in pairwise(path):
            _swap(board, shared, giver, taker)
        if not path or board.primaries[start] <= bound:  # without a path, nobody who shares its slots can take one
            above.remove(start)


def _shared(board: Board) -> dict[tuple[int, int], list[int]]:
    """(primary, other owner) -> slots; entries go stale as primaries change, and are looked through when used."""
    shared: dict[tuple[int, int], list[int]] = {}
    for slot, listed in enumerate(board.owners):
        for other in listed[1:]:
            shared.setdefault((listed[0], other), []).append(slot)
    return shared


def _fresh(board: Board, shared: dict[tuple[int, int], list[int]], giver: int, taker: int) -> list[int]:
    slots = shared.get((giver, taker), [])
    while slots and board.owners[slots[-1]][0] != giver:
        slots.pop()
    return slots


def _path(board: Board, shared: dict[tuple[int, int], list[int]], start: int, bound: int) -> list[int]:
    """Servers from `start` to the nearest one with fewer primaries than `bound`, or [] where there is none."""
    before = {start: start}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        if at != start and board.primaries[at] < bound:
            path = [at]
            while path[-1] != start:
                path.append(before[path[-1]])
            return path[::-1]
        for taker in board.usable:
            if taker not in before and _fresh(board, shared, at, taker):
                before[taker] = at
                queue.append(taker)
    return []


def _swap(board: Board, shared: dict[tuple[int, int], list[int]], giver: int, taker: int) -> None:
    slot = _fresh(board, shared, giver, taker).pop()
    listed = board.owners[slot]
    at = listed.index(taker)
    listed[0], listed[at] = taker, giver
    board.primaries[giver] -= 1
    board.primaries[taker] += 1
    for other in listed[1:]:
        shared.setdefault((taker, other), []).append(slot)
