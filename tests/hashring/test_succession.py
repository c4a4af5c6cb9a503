"""Owner lists that are given: what failover and moves are made of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashring.goal import goal
from hashring.planner import CreateTable, Enlist, Fail, PlanError, Reassign, Renew, Withdraw, plan
from hashring.view import Server, View


def cluster(servers: int, replicas: int = 2, slot_bits: int = 4) -> View:
    view = plan(
        View.empty(cluster=3, slot_bits=slot_bits),
        Enlist(tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(servers))),
    )
    view = plan(view, CreateTable("t", {}, replicas=replicas))
    return plan(view, CreateTable("w", {}, placement="whole", replicas=replicas))


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_enlisted_servers_own_nothing() -> None:
    view = cluster(2)
    after = plan(view, Enlist((Server("new", 99, "h9"),)))
    assert (after.owners() == view.owners()).all()
    assert (after.terms() == view.terms()).all()
    with pytest.raises(PlanError, match="in the view already"):
        plan(after, Enlist((Server("new", 100, "h9"),)))


def test_a_withdrawn_server_leaves_only_the_slots_named_and_the_next_in_line_follows() -> None:
    view = cluster(3)
    slot = int(np.flatnonzero(view.owners()[:, 0] == 1)[0])
    heir = view.owners()[slot, 1]
    after = plan(view, Withdraw({"s1": slots(slot)}))
    assert after.owners()[slot].tolist() == [heir, -1]
    assert after.terms()[slot] == after.epoch == view.epoch + 1
    others = np.arange(view.slots_total) != slot
    assert (after.owners()[others] == view.owners()[others]).all()
    assert (after.terms()[others] == view.terms()[others]).all()
    assert after.servers == view.servers  # it is not called dead


@given(st.integers(2, 5), st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_a_slot_never_loses_its_last_owner(servers: int, replicas: int, leaving: list[int]) -> None:
    view = cluster(servers, min(replicas, servers))
    everything = np.arange(view.slots_total)
    for name in leaving:
        view = plan(view, Withdraw({f"s{name}": everything}))
    assert (view.owners()[:, 0] >= 0).all()


def test_several_servers_may_leave_at_once_and_one_stays() -> None:
    view = cluster(3, replicas=3)
    everything = np.arange(view.slots_total)
    after = plan(view, Withdraw({f"s{i}": everything for i in range(3)}))
    assert ((after.owners() >= 0).sum(axis=1) == 1).all()


def test_reassigned_slots_get_just_the_owners_given() -> None:
    view = cluster(3)
    given_owners = np.array([[2, 0, 1], [1, -1, -1]], np.int16)
    last = view.slots_total - 1  # the whole table's
    after = plan(view, Reassign(slots(5, last), given_owners))
    assert after.owners()[5].tolist() == [2, 0, 1]
    assert after.owners()[last].tolist() == [1, -1, -1]
    assert after.terms()[[5, last]].tolist() == [after.epoch] * 2
    assert after.owners()[4].tolist()[:2] == view.owners()[4].tolist()


def test_the_same_owners_again_are_no_new_term_but_renewed_are() -> None:
    view = cluster(2)
    same = plan(view, Reassign(slots(3), view.owners()[[3]]))
    assert same.terms()[3] == view.terms()[3]
    renewed = plan(view, Renew(slots(3)))
    assert renewed.terms()[3] == renewed.epoch
    assert (renewed.owners() == view.owners()).all()
    assert (np.delete(renewed.terms(), 3) == np.delete(view.terms(), 3)).all()


def test_missing_copies_go_to_usable_servers_that_have_none() -> None:
    view = plan(cluster(4), Withdraw({"s1": np.arange(17)}))
    wanted = goal(view, frozenset({"s2"}))
    stuck = view.owners()[:, 0] == 2  # s2 cannot give
    assert (wanted[stuck] == view.owners()[stuck]).all()
    assert ((wanted[~stuck] >= 0).sum(axis=1) == 2).all()
    given = (wanted[:, :, None] != view.owners()[:, None, :]).all(axis=2) & (wanted >= 0)
    assert given.any()
    assert not (wanted[given] == 2).any()


def test_nothing_is_missing_where_all_is_well_or_nobody_is_usable() -> None:
    view = cluster(3)
    assert (goal(view) == view.owners()).all()
    alone = plan(view, Fail("s0"))
    assert (goal(alone, frozenset({"s1", "s2"})) == alone.owners()).all()
