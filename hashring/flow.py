"""Giving items to servers within bounds, changing as few choices as it takes: augmenting chains, in kernels.

Symbols: m items, k servers, p options an item. `options int16[m, p]` lists the servers that an item may go to (-1 =
no option), `costs int32[m, p]` how gladly (less is better), `choice int64[m]` where it is now.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(nogil=True, cache=True)
def settle(
    choice: NDArray[np.int64],
    options: NDArray[np.int16],
    costs: NDArray[np.int32],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
) -> None:
    """Change `choice` in place until each server has low[s] to high[s] items, or no change of choices gets nearer.

    An item can go from s to t if t is one of its options; that makes a graph of k servers, in which a shortest path
    from one with too many to one with too few is a chain of such moves (Ford and Fulkerson's augmenting paths, many
    items at once along one path). Of the items that could go the cheapest do. Nothing moves that need not.
    """
    counts, edges = _tally(choice, options, low.size)
    _flow(choice, options, costs, counts, edges, high, low)
    _flow(choice, options, costs, counts, edges, high, high)
    _flow(choice, options, costs, counts, edges, low, low)
    slack = (counts - high).max()
    while slack > 0:  # some cannot come down to `high`: then at least evenly, to within twice the least excess
        slack //= 2
        _flow(choice, options, costs, counts, edges, high + slack, high + slack)


@njit(nogil=True, cache=True)
def _flow(
    choice: NDArray[np.int64],
    options: NDArray[np.int16],
    costs: NDArray[np.int32],
    counts: NDArray[np.int64],
    edges: NDArray[np.int64],
    source_above: NDArray[np.int64],
    sink_below: NDArray[np.int64],
) -> None:
    """Pass items from servers with more than `source_above` to some with fewer than `sink_below`, while a path is."""
    before = np.empty(counts.size, np.int64)
    while True:
        end = _search(counts, edges, source_above, sink_below, before)
        if end < 0:
            return
        start, amount = end, sink_below[end] - counts[end]
        while before[start] != start:
            amount = min(amount, edges[before[start], start])
            start = before[start]
        amount = min(amount, counts[start] - source_above[start])
        at = end
        while at != start:
            _pass_on(choice, options, costs, counts, edges, before[at], at, amount)
            at = before[at]


@njit(nogil=True, cache=True)
def _tally(
    choice: NDArray[np.int64], options: NDArray[np.int16], k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    counts = np.zeros(k, np.int64)
    edges = np.zeros((k, k), np.int64)  # [s, t]: items at s that could be at t
    for i in range(choice.size):
        counts[choice[i]] += 1
        for j in range(options.shape[1]):
            if options[i, j] >= 0:
                edges[choice[i], options[i, j]] += 1
    return counts, edges


@njit(nogil=True, cache=True)
def _search(
    counts: NDArray[np.int64],
    edges: NDArray[np.int64],
    source_above: NDArray[np.int64],
    sink_below: NDArray[np.int64],
    before: NDArray[np.int64],
) -> int:
    """Breadth first from every server with too many: the first one found with too few, or -1; `before` is the way."""
    k = counts.size
    queue = np.empty(k, np.int64)
    filled = 0
    before[:] = -1
    for s in range(k):
        if counts[s] > source_above[s]:
            before[s] = s
            queue[filled] = s
            filled += 1
    done = 0
    while done < filled:
        s = queue[done]
        done += 1
        for t in range(k):
            if before[t] < 0 and edges[s, t] > 0:
                before[t] = s
                if counts[t] < sink_below[t]:
                    return t
                queue[filled] = t
                filled += 1
    return -1


@njit(nogil=True, cache=True)
def _pass_on(
    choice: NDArray[np.int64],
    options: NDArray[np.int16],
    costs: NDArray[np.int32],
    counts: NDArray[np.int64],
    edges: NDArray[np.int64],
    giver: int,
    taker: int,
    amount: int,
) -> None:
    m = choice.size
    keys = np.empty(edges[giver, taker], np.int64)  # cost first, then number: unique, so that the order is total
    found = 0
    for i in range(m):
        if choice[i] == giver:
            for j in range(options.shape[1]):
                if options[i, j] == taker:
                    keys[found] = np.int64(costs[i, j]) * m + i
                    found += 1
    keys.sort()
    for place in range(amount):
        i = keys[place] % m
        choice[i] = taker
        for j in range(options.shape[1]):
            if options[i, j] >= 0:
                edges[giver, options[i, j]] -= 1
                edges[taker, options[i, j]] += 1
    counts[giver] -= amount
    counts[taker] += amount


@njit(nogil=True, cache=True)
def gather(choice: NDArray[np.int64], options: NDArray[np.int16], order: NDArray[np.int64], share: float) -> None:
    """Give all items that have the same options to one server: to whom most of them are at already, where it has no
    more than its `share` then, else to whom of them has least. Changes `choice` in place; who has most decides first.

    order: the items, so that those with the same options (in one order) follow each other.
    """
    load, counts = np.zeros(options.max() + 1), np.zeros(options.max() + 1, np.int64)
    begins, most, held = [0], [options[0, 0]][:0], [0][:0]
    for end in range(1, order.size + 1):
        members = options[order[begins[-1]]]
        if end < order.size and (options[order[end]] == members).all():
            continue
        items = order[begins[-1] : end]
        for i in items:
            counts[choice[i]] += 1
        best = members[0]
        for s in members:
            if s >= 0 and counts[s] > counts[best]:
                best = s
        most.append(best)
        held.append(counts[best])
        for i in items:
            counts[choice[i]] = 0
        begins.append(end)
    for run in np.argsort(-np.array(held), kind="mergesort"):
        items = order[begins[run] : begins[run + 1]]
        taker = most[run]
        if load[taker] + items.size > share:
            for s in options[items[0]]:
                if s >= 0 and load[s] < load[taker]:
                    taker = s
        load[taker] += items.size
        choice[items] = taker


@njit(nogil=True, cache=True)
def offers(
    owners: NDArray[np.int16],
    live: NDArray[np.bool_],
    newcomer: int,
    places: NDArray[np.int64],
    limits: NDArray[np.int64],
    options: NDArray[np.int16],
    must: NDArray[np.bool_],
) -> None:
    """Who may give a slot to the newcomer: options int16[slots, copies], and `must` where that parts two owners.

    places int64[2, k]: number of each server's host, and of its zone. limits int64[2]: owners of one slot that may
    share a host, and a zone. A gift may not add to what is over the limits; where one lessens it, only those that
    lessen it most are offered.
    """
    counts = np.zeros((2, places.max() + 1), np.int64)
    after = np.empty(owners.shape[1], np.int64)
    for r in range(owners.shape[0]):
        options[r] = -1
        must[r] = False
        if not live[r]:
            continue
        over, held, present = 0, 0, False
        for c in range(owners.shape[1]):
            s = owners[r, c]
            if s < 0:
                break
            held += 1
            present |= s == newcomer
            for kind in range(2):
                over += counts[kind, places[kind, s]] >= limits[kind]
                counts[kind, places[kind, s]] += 1
        best = over
        for c in range(0 if present else held):
            after[c] = over
            for kind in range(2):
                mine, theirs = places[kind, newcomer], places[kind, owners[r, c]]
                after[c] -= counts[kind, theirs] > limits[kind]
                after[c] += counts[kind, mine] - (mine == theirs) >= limits[kind]
            must[r] |= after[c] < over
            best = min(best, after[c])
        for c in range(0 if present else held):
            if after[c] == best:
                options[r, c] = owners[r, c]
        for c in range(held):
            for kind in range(2):
                counts[kind, places[kind, owners[r, c]]] = 0


@njit(nogil=True, cache=True)
def rooms(
    owners: NDArray[np.int16],
    usable: NDArray[np.bool_],
    places: NDArray[np.int64],
    limits: NDArray[np.int64],
    options: NDArray[np.int16],
) -> None:
    """Who may become one more owner of each slot: options int16[slots, k], those that are least over the limits."""
    counts = np.zeros((2, places.max() + 1), np.int64)
    here = np.zeros(usable.size, np.bool_)
    for r in range(owners.shape[0]):
        for c in range(owners.shape[1]):
            s = owners[r, c]
            if s >= 0:
                here[s] = True
                for kind in range(2):
                    counts[kind, places[kind, s]] += 1
        least = 3
        for worse in range(3):
            for s in range(usable.size):
                if least == 3 or least == worse:
                    over = 0
                    for kind in range(2):
                        over += counts[kind, places[kind, s]] >= limits[kind]
                    if usable[s] and not here[s] and over == worse:
                        options[r, s] = s
                        least = worse
        for c in range(owners.shape[1]):
            s = owners[r, c]
            if s >= 0:
                here[s] = False
                for kind in range(2):
                    counts[kind, places[kind, s]] = 0
