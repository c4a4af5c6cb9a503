"""The view: what it answers, what it refuses, and that it survives being sent."""

from dataclasses import replace

import numpy as np
import pytest

from hashring.planner import CreateTable, Fail, Join, plan
from hashring.view import Group, Server, Table, View


def small() -> View:
    group = Group(1, "sharded", 2, 0, np.array([[0, 1], [1, -1]]), np.array([1, 2]), np.ones(2))
    servers = (Server("a", 11, "h1", "z", ("tcp:127.0.0.1:1",)), Server("b", 12, "h2", alive=False))
    return View(5, 2, 1, servers, (group,), (Table(1, "t", 1, {"dim": 4}),), 2, 2, 2)


def test_plain_round_trip() -> None:
    view = small().check()
    again = View.from_plain(view.to_plain())
    assert again.to_plain() == view.to_plain()
    assert again.servers == view.servers
    assert again.tables == view.tables
    assert (again.owners() == view.owners()).all()


def test_arrays_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        small().groups[0].owners[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        small().owners()[0, 0] = 1


def test_lost_slots_are_those_whose_every_owner_is_dead() -> None:
    assert small().lost().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"owners": np.array([[0, 7], [1, -1]])}, "does not have"),
        ({"owners": np.array([[0, 0], [1, -1]])}, "twice"),
        ({"owners": np.array([[-1, 0], [1, -1]])}, "gap"),
        ({"terms": np.array([1, 9])}, "above the view's epoch"),
        ({"first": 1}, "overlap another group's or pass"),
        ({"weights": np.ones(3)}, "different lengths"),
    ],
)
def test_a_broken_group_is_named(change: dict[str, object], says: str) -> None:
    view = small()
    with pytest.raises(ValueError, match=says):
        replace(view, groups=(replace(view.groups[0], **change),)).check()


def test_names_must_be_unique_and_groups_used() -> None:
    view = small()
    with pytest.raises(ValueError, match="server names"):
        replace(view, servers=(view.servers[0], view.servers[0])).check()
    with pytest.raises(ValueError, match="name each other"):
        replace(view, tables=()).check()


@pytest.mark.parametrize(
    "broken", [{}, {"cluster": 1}, {**small().to_plain(), "groups": [[1]]}, {**small().to_plain(), "servers": 3}]
)
def test_what_is_no_view_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"view|unpack"):
        View.from_plain(broken)


def test_owners_span_groups_of_different_copies() -> None:
    view = plan(View.empty(1, slot_bits=3), Join((Server("a", 1, "x"), Server("b", 2, "y"))))
    view = plan(view, CreateTable("one", {}))
    view = plan(view, CreateTable("both", {}, replicas=2))
    assert view.owners().shape == (16, 2)
    assert (view.owners()[:8, 1] == -1).all()
    assert (view.terms()[:8] == 2).all()
    assert (view.terms()[8:] == 3).all()
    assert plan(view, Fail("a")).lost().sum() == 4
