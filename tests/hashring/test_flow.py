"""`settle` against trying every assignment; `gather` against its rule set by set; `offers` and `rooms` against counting
hosts and zones slot by slot."""

from collections import Counter
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hashring.flow import gather, offers, rooms, settle


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    servers = draw(st.integers(2, 4))
    items = draw(st.lists(st.lists(st.integers(0, servers - 1), min_size=1, max_size=3, unique=True), max_size=6))
    options = np.full((len(items), 3), -1, np.int16)
    for row, listed in zip(options, items, strict=True):
        row[: len(listed)] = listed
    costs = np.array([[draw(st.integers(-9, 9)) for _ in range(3)] for _ in items], np.int32).reshape(-1, 3)
    low = np.array([draw(st.integers(0, 3)) for _ in range(servers)])
    high = low + np.array([draw(st.integers(0, 2)) for _ in range(servers)])
    choice = np.array([draw(st.sampled_from(listed)) for listed in items], np.int64)
    return choice, options, costs, low, high


@given(problems())
def test_settle_meets_the_bounds_whenever_any_assignment_does(problem: tuple[np.ndarray, ...]) -> None:
    choice, options, costs, low, high = problem
    settled = choice.copy()
    settle(settled, options, costs, low, high)
    assert all(c in row for c, row in zip(settled, options, strict=True))

    def meets(chosen: np.ndarray) -> bool:
        counts = np.bincount(chosen, minlength=len(low))
        return bool((counts >= low).all() and (counts <= high).all())

    listed = [[s for s in row if s >= 0] for row in options.tolist()]
    possible = any(all(low[s] <= chosen.count(s) <= high[s] for s in range(len(low))) for chosen in product(*listed))
    assert meets(settled) is possible
    if meets(choice):
        assert (settled == choice).all()


def test_the_cheapest_items_are_the_ones_that_move() -> None:
    choice = np.zeros(4, np.int64)
    options = np.tile(np.array([0, 1], np.int16), (4, 1))
    costs = np.array([[0, 4], [0, 1], [0, 3], [0, 2]], np.int32)
    settle(choice, options, costs, np.array([2, 2]), np.array([2, 2]))
    assert choice.tolist() == [0, 1, 0, 1]


def test_what_cannot_be_within_bounds_is_at_least_even() -> None:
    choice = np.zeros(90, np.int64)
    options = np.tile(np.array([0, 1, 2], np.int16), (90, 1))
    bound = np.array([10, 10, 10])
    settle(choice, options, np.zeros((90, 3), np.int32), bound, bound)
    assert np.bincount(choice).max() <= 10 + 2 * 20


@given(
    st.lists(st.tuples(st.sampled_from([(1, 0), (2, 0), (2, 1), (3, 2, 1), (4,)]), st.integers(0, 2)), min_size=1),
    st.integers(0, 30),
)
def test_gathering_gives_items_with_the_same_options_to_one(
    items: list[tuple[tuple[int, ...], int]], share: int
) -> None:
    options = np.full((len(items), 3), -1, np.int16)
    for row, (listed, _) in zip(options, items, strict=True):
        row[: len(listed)] = listed
    choice = np.array([listed[at % len(listed)] for listed, at in items], np.int64)
    gathered = choice.copy()
    order = np.lexsort(options.T)
    gather(gathered, options, order, share)

    sets = list(dict.fromkeys(items[i][0] for i in order))
    here = {listed: np.array([other == listed for other, _ in items]) for listed in sets}
    most = {s: max(s, key=lambda t, s=s: (int((choice[here[s]] == t).sum()), -s.index(t))) for s in sets}
    load = Counter[int]()
    for listed in sorted(sets, key=lambda s: -int((choice[here[s]] == most[s]).sum())):
        size = int(here[listed].sum())
        taker = most[listed]
        if load[taker] + size > share:
            taker = min((taker, *listed), key=lambda t: load[t])
        load[taker] += size
        assert (gathered[here[listed]] == taker).all()


def excess(listed: list[int], places: np.ndarray, limits: np.ndarray) -> int:
    return sum(
        max(0, n - limit)
        for kind, limit in zip(places, limits, strict=True)
        for n in Counter(kind[s] for s in listed).values()
    )


@given(st.data())
def test_offers_and_rooms_keep_owners_apart(data: st.DataObject) -> None:
    k = data.draw(st.integers(3, 7))
    hosts = [data.draw(st.integers(0, 3)) for _ in range(k)]
    places = np.array([hosts, [h % 2 for h in hosts]], np.int64)
    limits = np.array([data.draw(st.integers(1, 2)) for _ in range(2)])
    listed = data.draw(st.permutations(range(k)))[: data.draw(st.integers(0, 3))]
    owners = np.full((1, 3), -1, np.int16)
    owners[0, : len(listed)] = listed
    newcomer = data.draw(st.integers(0, k - 1))

    options, must = np.full((1, 3), -1, np.int16), np.zeros(1, np.bool_)
    offers(owners, np.ones(1, np.bool_), newcomer, places, limits, options, must)
    now = excess(listed, places, limits)
    after = {d: excess([newcomer if s == d else s for s in listed], places, limits) for d in listed}
    if newcomer in listed:
        after = {}
    better = {d for d, value in after.items() if value == min(after.values()) < now}
    assert bool(must[0]) is bool(better)
    assert {s for s in options[0] if s >= 0} == (better or {d for d, value in after.items() if value == now})

    room = np.full((1, k), -1, np.int16)
    usable = np.array([data.draw(st.booleans()) for _ in range(k)])
    rooms(owners, usable, places, limits, room)
    worse = {s: excess([*listed, s], places, limits) for s in range(k) if usable[s] and s not in listed}
    assert {s for s in room[0] if s >= 0} == {s for s, value in worse.items() if value == min(worse.values())}
