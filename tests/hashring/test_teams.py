"""Teams: each slot has an owner in each, so that one of them answers for all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashring.placement import Sites, fresh
from hashring.planner import CreateTable, Join, plan
from hashring.ring import distances
from hashring.teams import members, teams, untangle
from hashring.view import Server, View

BITS = 11
SLOTS = 1 << BITS


def placed(servers: int, copies: int, hosts: int | None = None) -> tuple[np.ndarray, Sites]:
    names = tuple(f"h{i % (hosts or servers)}" for i in range(servers))
    sites = Sites(names, ("",) * servers, np.ones(servers, np.bool_))
    return fresh(SLOTS, sites, distances([f"s{i}" for i in range(servers)], SLOTS), copies), sites


def team_of(owners: np.ndarray, servers: int, copies: int) -> np.ndarray:
    return teams(owners, np.ones(len(owners), np.bool_), np.ones(servers, np.bool_), copies)


@pytest.mark.parametrize(("servers", "copies"), [(4, 2), (6, 2), (8, 2), (12, 2), (6, 3), (9, 3), (12, 3), (3, 3)])
def test_every_team_answers_for_every_slot_where_servers_are_a_multiple_of_the_copies(
    servers: int, copies: int
) -> None:
    owners, _ = placed(servers, copies)
    team = team_of(owners, servers, copies)
    assert (np.bincount(team) == servers // copies).all()
    assert (members(owners, team) != 1).any(axis=1).mean() <= 0.01


@pytest.mark.parametrize("servers", [3, 5, 7, 9, 11])
def test_with_one_server_over_as_few_slots_have_two_owners_in_one_team_as_even_loads_allow(servers: int) -> None:
    owners, _ = placed(servers, 2)
    held = members(owners, team_of(owners, servers, 2))
    # The larger team holds 1 + 1 / servers copies of a slot, so the smaller has none of 1 / servers of them.
    assert abs((held > 1).any(axis=1).mean() - 1 / servers) <= 0.02
    assert (held == 0).mean(axis=0).min() <= 0.005  # the larger one answers for all


@pytest.mark.parametrize("copies", [2, 3])
def test_joins_keep_to_it_though_they_move_no_more_than_a_share(copies: int) -> None:
    view = plan(View.empty(1, BITS), Join(tuple(Server(f"s{i}", i, f"h{i}") for i in range(copies))))
    view = plan(view, CreateTable("t", {}, replicas=copies))
    for number in range(copies, 12):
        before = view.owners()
        view = plan(view, Join((Server(f"s{number}", number, f"h{number}"),)))
        moved = (np.sort(view.owners(), axis=1) != np.sort(before, axis=1)).any(axis=1).sum()
        assert moved <= copies * SLOTS / (number + 1) + 1
        if (number + 1) % copies == 0:
            held = members(view.owners(), team_of(view.owners(), number + 1, copies))
            assert (held > 1).any(axis=1).mean() <= 0.12


def test_servers_of_one_host_are_in_one_team() -> None:
    owners, sites = placed(6, 2, hosts=2)
    team = team_of(owners, 6, 2)
    for host in set(sites.hosts):
        assert len({int(team[s]) for s in range(6) if sites.hosts[s] == host}) == 1


def test_who_joins_comes_into_the_smallest_team_wherever_it_stands_in_the_view() -> None:
    owners = np.array([[1, 2], [1, 3], [2, 1]], np.int16)
    team = team_of(owners, 4, 2)
    assert team[1] != team[2] == team[3]
    owners = owners[:2]
    assert team_of(owners, 4, 2).tolist() == [0, 0, 1, 1]  # server 0 has none


@settings(max_examples=60)
@given(st.integers(2, 3), st.integers(3, 9), st.integers(0, 2**32 - 1))
def test_exchanges_change_no_load_and_never_for_the_worse(copies: int, servers: int, seed: int) -> None:
    servers = max(servers, copies)
    rng = np.random.default_rng(seed)
    owners = np.array([rng.permutation(servers)[:copies] for _ in range(64)], np.int16)
    team = rng.integers(0, copies, servers).astype(np.int8)
    hosts = rng.integers(0, 4, servers)

    def over(rows: np.ndarray) -> np.ndarray:
        return np.array([copies - len(set(hosts[row].tolist())) for row in rows], np.int64)

    after = untangle(owners, team, over)
    assert (np.bincount(after.ravel(), minlength=servers) == np.bincount(owners.ravel(), minlength=servers)).all()
    assert all(len(set(row)) == copies for row in after.tolist())
    assert (over(after) <= over(owners)).all()
    twice = [(members(o, team) > 1).sum() for o in (after, owners)]
    assert twice[0] <= twice[1]
    again = untangle(after, team, lambda rows: np.zeros(len(rows), np.int64))
    held = members(again, team)
    for t in range(held.shape[1]):
        for u in range(t):
            lacks = [((held[:, x] > 1) & (held[:, y] == 0)).any() for x, y in ((t, u), (u, t))]
            assert copies > 2 or not all(lacks)


@given(st.integers(0, 2**32 - 1))
def test_members_against_a_count_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    owners, team = rng.integers(-1, 5, (20, 3)).astype(np.int16), rng.integers(0, 3, 5).astype(np.int8)
    found = members(owners, team)
    for row, counts in zip(owners.tolist(), found.tolist(), strict=True):
        assert counts == [sum(s >= 0 and team[s] == t for s in row) for t in range(len(counts))]
