"""Fair shares, and chains of changes over hosts and zones of any size."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hashring.placement import Sites, fresh
from hashring.planner import CreateTable, Fail, Join, Leave, PlanError, Rebalance, Recover, Return, plan
from hashring.ring import distances
from hashring.view import Server, View
from tests.hashring.balance import balance

SLOTS = 1 << 12


def sites_of(hosts: list[int], zones: int) -> Sites:
    return Sites(
        tuple(f"h{h}" for h in hosts),
        tuple(f"z{h % zones}" if zones else "" for h in hosts),
        np.ones(len(hosts), np.bool_),
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=16), st.integers(0, 4), st.integers(1, 4))
@example([0, 0, 1, 2, 3, 4, 4], 4, 4)  # hosts that are full by themselves crowd their zone together
def test_fair_shares_are_as_even_as_hosts_and_zones_allow(hosts: list[int], zones: int, copies: int) -> None:
    copies = min(copies, len(hosts))
    sites = sites_of(hosts, zones)
    fair, (host_max, zone_max) = sites.fair(SLOTS, copies), sites.limits(copies)
    assert abs(fair.sum() - SLOTS * copies) < 1e-3
    assert fair.max() <= SLOTS + 1e-3
    load = [Counter(), Counter()]  # by host, by zone
    for s, share in enumerate(fair):
        for kind in range(2):
            load[kind][sites.places[kind, s]] += share
    size = Counter(hosts)
    assert all(load[0][sites.places[0, s]] <= SLOTS * host_max + 1e-3 for s in range(len(hosts)))
    assert all(v <= SLOTS * zone_max + 1e-3 for v in load[1].values())
    for s, share in enumerate(fair):  # who has less than another has a full host, or a full zone
        full_host = load[0][sites.places[0, s]] >= SLOTS * min(host_max, size[hosts[s]]) - 1e-3
        full_zone = load[1][sites.places[1, s]] >= SLOTS * zone_max - 1e-3
        assert share >= fair.max() - 1e-3 or full_host or full_zone
    if len(set(hosts)) >= copies:
        assert host_max == 1
    if len(set(sites.places[1].tolist())) >= copies:
        assert zone_max == 1


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=16), st.integers(0, 4), st.integers(1, 4))
@example([0, 0, 0, 1, 1, 1, 2, 2, 3], 0, 3)
def test_a_fresh_group_has_every_server_at_its_fair_share(hosts: list[int], zones: int, copies: int) -> None:
    copies = min(copies, len(hosts))
    sites = sites_of(hosts, zones)
    owners = fresh(SLOTS, sites, distances([f"s{i}" for i in range(len(hosts))], SLOTS), copies)
    held = np.bincount(owners.ravel(), minlength=len(hosts))
    # Where hosts leave no choice (two of them in every slot, say), joins one by one may miss it by what a view allows.
    fair = sites.fair(SLOTS, copies)
    assert (np.abs(held - fair) <= np.maximum(1, 0.02 * fair)).all()
    first = np.bincount(owners[:, 0], minlength=len(hosts))
    assert np.abs(first - SLOTS / len(hosts)).max() <= 1
    for kind in range(2):
        there = sites.places[kind][owners]
        apart = (np.diff(np.sort(there, axis=1), axis=1) > 0).sum(axis=1) + 1
        if len(set(sites.places[kind].tolist())) >= copies:
            assert (apart == copies).all()


def held_by(view: View) -> np.ndarray:
    """bool[slots, incarnations up to 99]"""
    out = np.zeros((view.groups[0].slots, 100), np.bool_)
    for s, server in enumerate(view.servers):
        out[:, server.incarnation] = (view.groups[0].owners == s).any(axis=1)
    return out


def test_a_join_parts_owners_by_hosts_where_zones_would_let_it_do_less() -> None:
    def placed(number: int, host: int) -> Server:
        return Server(f"s{number}", number, f"h{host}", f"z{host % 2}")

    view = plan(View.empty(1, 8), Join(tuple(placed(i, host) for i, host in enumerate((0, 2, 2)))))
    view = plan(view, CreateTable("t", {}, replicas=3))
    for number, host in ((3, 0), (4, 1)):
        view = plan(view, Join((placed(number, host),)))
    hosts = np.array([s.host for s in view.servers])[view.groups[0].owners]
    assert (np.sort(hosts, axis=1) == ["h0", "h1", "h2"]).all()


@settings(max_examples=40)
@given(st.data())
def test_chains_over_uneven_hosts(data: st.DataObject) -> None:
    copies, zones = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(0, 4))
    hosts = st.integers(0, data.draw(st.integers(0, 11)))

    def server(number: int) -> Server:
        host = data.draw(hosts)
        return Server(f"s{number}", number, f"h{host}", f"z{host % zones}" if zones else "")

    start = data.draw(st.integers(copies, 12))
    view = plan(View.empty(1, 12), Join(tuple(server(i) for i in range(start))))
    view = plan(view, CreateTable("t", {}, replicas=copies))
    roomy = fair_of(view, copies)[1]
    for number in range(start, start + data.draw(st.integers(1, 6))):
        before = held_by(view)
        if len(view.servers) == copies or data.draw(st.booleans()):
            view = plan(view, Join((server(number),)))
            gained = held_by(view) & ~before
            assert gained.any(axis=0).nonzero()[0].tolist() in ([], [number])
        else:
            leaver = data.draw(st.sampled_from(view.servers))
            view = plan(view, Leave((leaver.name,)))
            unchanged = ~before[:, leaver.incarnation]
            assert (held_by(view)[unchanged] == before[unchanged]).all()
            assert ((held_by(view) & ~before).sum(axis=1) <= 1).all()
        view.check()
        assert (held_by(view).sum(axis=1) == copies).all()
        fair, room = fair_of(view, copies)
        roomy = roomy and room
        load = held_by(view).sum(axis=0)[[s.incarnation for s in view.servers]]
        assert not roomy or np.abs(load - fair).max() <= 1
        assert balance(view, view.groups[0]).primaries <= 1.02 + len(view.servers) / SLOTS
        for key in ("host", "zone"):
            names = [getattr(s, key) or s.host for s in view.servers]
            if len(set(names)) >= copies:
                assert all(len({names[s] for s in row}) == copies for row in np.unique(view.groups[0].owners, axis=0))
    after = plan(view, Rebalance())
    load = held_by(after).sum(axis=0)[[s.incarnation for s in after.servers]]
    assert np.maximum(np.abs(load - fair) - 1, 0).sum() <= 0.01 * copies * SLOTS


def fair_of(view: View, copies: int) -> tuple[np.ndarray, bool]:
    """Each server's fair share, and whether every host and zone has room: copies of at most 70 % of the slots."""
    k = len(view.servers)
    sites = Sites(tuple(s.host for s in view.servers), tuple(s.zone for s in view.servers), np.ones(k, np.bool_))
    sizes = [np.bincount(sites.places[kind]).max() / sites.limits(copies)[kind] for kind in range(2)]
    return sites.fair(SLOTS, copies), max(sizes) * copies / k <= 0.7


@pytest.mark.parametrize("servers", [4, 6, 12])
def test_a_newcomer_has_its_copies_from_all_the_others_alike(servers: int) -> None:
    """Each primary copies to it one slot after another: the busiest of them says how long a join takes."""
    view = plan(View.empty(1, 12), Join(tuple(Server(f"s{i}", i, f"h{i}") for i in range(servers))))
    view = plan(view, CreateTable("t", {}, replicas=2))
    for number in (50, 51):
        gained = held_by(plan(view, Join((Server(f"s{number}", number, f"h{number}"),))))[:, number]
        sources = np.bincount(view.groups[0].owners[gained, 0])
        assert sources.max() <= 1.3 * sources.mean()
        view = plan(plan(view, Join((Server("x", 60, "hx"),))), Leave(("x",)))


def pairs_of(view: View) -> int:
    """(primary, other owner) pairs of two copies that hold over 1 % of the slots."""
    _, counts = np.unique(view.groups[0].owners[:, :2], axis=0, return_counts=True)
    return int((counts > SLOTS / 100).sum())


def test_a_primary_has_its_other_copies_on_as_few_servers_as_can_be() -> None:
    """A push sends a message for each pair. Whole circles: 3 of 6 pairs, and 4 of 8 where two teams are of two."""
    view = plan(View.empty(1, 12), Join(tuple(Server(f"s{i}", i, f"h{i}") for i in range(3))))
    view = plan(view, CreateTable("t", {}, replicas=2))
    assert pairs_of(view) == 3
    for _ in range(3):
        view = plan(view, Join((Server("s9", 9, "h9"),)))
        assert pairs_of(view) == 4
        view = plan(view, Leave(("s9",)))
        assert pairs_of(view) == 3
    ring = view.groups[0].owners
    turned = plan(view, Rebalance()).groups[0].owners
    assert (turned == ring).all()


@pytest.mark.parametrize("servers", [12, 32])
def test_a_table_with_slots_of_its_own_leaves_those_of_others_as_they_are(servers: int) -> None:
    view = plan(View.empty(1, 12), Join(tuple(Server(f"s{i}", i, f"h{i}") for i in range(servers))))
    first = view = plan(view, CreateTable("t", {}, replicas=2))
    for number in range(4):
        view = plan(view, CreateTable(f"w{number}", {}, placement="whole", replicas=2))
        assert (view.groups[0].owners == first.groups[0].owners).all()
        assert (view.groups[0].terms == first.groups[0].terms).all()


def three(replicas: int, whole: bool = True) -> View:
    view = plan(View.empty(1, 6), Join(tuple(Server(f"s{i}", i, f"h{i}") for i in range(3))))
    view = plan(view, CreateTable("t", {}, replicas=replicas))
    for i in range(6 if whole else 0):
        view = plan(view, CreateTable(f"w{i}", {}, "whole", replicas))
    return view


def test_lost_slots_are_nobodys_until_they_are_recovered() -> None:
    view = plan(three(1), Fail("s1"))
    lost = view.lost()
    assert 0 < lost[:64].sum() < 64
    assert lost[64:].any()
    for change in (Join((Server("s7", 7, "h7"),)), Rebalance(), Return(Server("s1", 8, "h1")), Leave(("s0",))):
        view = plan(view, change)
        assert (view.lost() == lost).all()
        alive = np.array([s.alive for s in view.servers])
        assert not alive[view.owners()[lost, 0]].any()
    with pytest.raises(PlanError, match="s1 held the last copy of"):
        plan(plan(three(1), Fail("s1")), Leave(("s1",)))
    recovered = plan(view, Recover())
    assert not recovered.lost().any()
    assert (recovered.terms()[lost] == recovered.epoch).all()


def test_recovery_gives_no_copy_of_slots_that_are_not_lost() -> None:
    view = plan(three(2, whole=False), Join((Server("s3", 3, "h3"),)))
    view = plan(plan(view, Fail("s1")), Fail("s2"))
    lost = view.lost()
    assert 0 < lost.sum() < 64
    after = plan(view, Recover())
    assert (view.owners()[~lost, 1] < 0).any()
    assert (held_by(after)[~lost] == held_by(view)[~lost]).all()
    assert (held_by(after)[lost].sum(axis=1) == 2).all()


def test_rebalancing_mends_copies_that_a_failure_took() -> None:
    view = plan(plan(three(2), Fail("s1")), Return(Server("s1", 9, "h1")))
    assert (view.groups[0].owners >= 0).sum() < 128
    view = plan(view, Rebalance())
    assert all((group.owners >= 0).all() for group in view.groups)
    assert {s.incarnation for s in view.servers} == {0, 2, 9}
    assert balance(view, view.groups[0]).copies <= 43 / (128 / 3)
    assert plan(view, Rebalance()).to_plain()["groups"] == view.to_plain()["groups"]
