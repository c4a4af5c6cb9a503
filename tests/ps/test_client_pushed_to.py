"""To whom a client sends a push while the primary of some slots does not answer."""

import numpy as np

from hashring.planner import Fail, Reassign, plan
from ps.client.routing import Routing
from ps.spec import SGD, TableSpec
from tests.ps.store_helpers import view_of


def routing() -> Routing:
    view = view_of([TableSpec("t", 2, SGD(), replicas=2)], slot_bits=2, servers=(1, 2, 3))
    return Routing(plan(view, Reassign(np.arange(4), np.array([[0, 1], [1, 0], [2, 0], [1, -1]], np.int16))))


def test_primaries_take_pushes() -> None:
    assert routing().pushed_to(frozenset())[:, 0].tolist() == [0, 1, 2, 1]


def test_the_next_in_line_hands_on_what_the_primary_does_not_answer() -> None:
    assert routing().pushed_to(frozenset({0}))[:, 0].tolist() == [1, 1, 2, 1]
    assert routing().pushed_to(frozenset({1}))[:, 0].tolist() == [0, 0, 2, 1]  # the last slot has nobody else


def test_a_slot_without_a_living_owner_stays_lost() -> None:
    view = plan(plan(routing().view, Fail("s1")), Fail("s0"))
    assert Routing(view).pushed_to(frozenset({2}))[:, 0].tolist()[3] == -1
