"""Teams: as many groups of servers as a slot has copies, each slot with an owner in each as far as even loads allow.

A team alone then answers for every slot. So a request for many slots asks servers / copies of them, instead of
servers - copies + 1, which it takes where copies lie anywhere. Where the number of servers is no multiple of the copies
some slots have two owners in one team, or loads would not be even. Servers of one host or zone have no slot in common,
and so come into one team by themselves. Teams are read off the owners: no view tells them.

What it costs: the slots of a server that dies have their other owners, and get their new ones, in fewer servers.
Of two that die at once more pairs lose nothing. See copysets (Cidon et al., USENIX ATC 2013), and chained declustering
(Hsiao and DeWitt, ICDE 1990), where neighbours hold each other's copies.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Owners = NDArray[np.int16]

CLASH = 1 << 24
"""What a second owner in a team costs, beside a distance on the ring, which is below 2**18."""

NEVER = 1 << 30


def teams(owners: Owners, live: NDArray[np.bool_], usable: NDArray[np.bool_], copies: int) -> NDArray[np.int8]:
    """int8[k]: the team of each server: in turn the one with which it shares fewest slots, of equals the smallest.

    Those who share none yet come last: they go where servers are missing.
    """
    k = len(usable)
    wide = k + 1  # -1 is counted as k
    shared, listed = np.zeros(wide * wide, np.int64), owners[live].astype(np.int64) % wide
    for a in range(listed.shape[1]):
        for b in range(a):
            shared += np.bincount(listed[:, a] * wide + listed[:, b], minlength=wide * wide)
    both = shared.reshape(wide, wide) + shared.reshape(wide, wide).T
    found = np.zeros(k, np.int8)
    with_team, size = np.zeros((copies, wide), np.int64), np.zeros(copies, np.int64)
    for s in sorted(np.flatnonzero(usable).tolist(), key=lambda s: (not both[s, :k].any(), s)):
        team = min(range(copies), key=lambda t: (with_team[t, s], size[t], t))
        found[s] = team
        with_team[team] += both[s]
        size[team] += 1
    return found


def members(owners: Owners, team: NDArray[np.int8]) -> NDArray[np.int64]:
    """int64[slots, teams]: how many owners of each slot are in each team."""
    of = np.append(team, np.int8(-1))[owners]
    return np.stack([(of == t).sum(axis=1) for t in range(int(team.max(initial=0)) + 1)], axis=1)


def untangle(owners: Owners, team: NDArray[np.int8], over: Callable[[Owners], NDArray[np.int64]]) -> Owners:
    """Slots with two owners in one team and none in another exchange one of them with slots where it is the other way
    about: no load changes. over(owners): int64[slots], of owners that are too near to each other; none may rise."""
    owners = owners.copy()
    held = members(owners, team)
    for t in range(held.shape[1]):
        for u in range(t):
            some = [np.flatnonzero((held[:, x] > 1) & (held[:, y] == 0)) for x, y in ((t, u), (u, t))]
            n = min(map(len, some))
            a, b = (rows[:n] for rows in some)
            at, there = ((team[owners[rows]] == x).argmax(axis=1) for rows, x in ((a, t), (b, u)))
            mine, theirs = owners[a], owners[b]
            line = np.arange(n)
            mine[line, at], theirs[line, there] = owners[b, there], owners[a, at]
            good = (over(mine) <= over(owners[a])) & (over(theirs) <= over(owners[b]))
            owners[a[good]], owners[b[good]] = mine[good], theirs[good]
            held[a[good]], held[b[good]] = members(mine[good], team), members(theirs[good], team)
    return owners
