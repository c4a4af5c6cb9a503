"""The goal of a view: it is reached in any steps, asks for no more than a change takes, and stays where it is."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashring.goal import goal
from hashring.planner import (
    Abort,
    Begin,
    CreateTable,
    End,
    Enlist,
    Fail,
    Place,
    PlanError,
    Reassign,
    Recover,
    Return,
    Withdraw,
    plan,
)
from hashring.view import Move, Server, View
from tests.hashring.balance import balance

BITS = 10
SLOTS = 2**BITS


def server(number: int, host: str = "") -> Server:
    return Server(f"s{number}", 1000 + number, host or f"h{number}")


def cluster(servers: int, replicas: int | str = 2, bits: int = BITS, hosts: int = 99) -> View:
    view = plan(View.empty(1, bits), Enlist(tuple(server(i, f"h{i % hosts}") for i in range(servers))))
    return plan(view, CreateTable("t", {}, replicas=replicas))


def pairs(owners: np.ndarray) -> set[tuple[int, int]]:
    """(slot, server) of owner lists."""
    slots, columns = np.nonzero(owners >= 0)
    return set(zip(slots.tolist(), owners[slots, columns].tolist(), strict=True))


def step(view: View, slots: np.ndarray, unusable: frozenset[str] = frozenset()) -> View:
    """These slots go to the goal."""
    wanted = goal(view, unusable)
    return plan(view, Reassign(slots, wanted[slots]))


def arrive(view: View, rng: np.random.Generator, some: int) -> tuple[View, int]:
    """Go to the goal, `some` slots at a time; the view then, and copies made on the way."""
    made = 0
    for _ in range(10_000):
        wanted, present = goal(view), view.owners()
        wide = np.full((len(present), max(wanted.shape[1], present.shape[1])), -1, np.int16)
        wide[:, : present.shape[1]] = present
        apart = np.flatnonzero((wide[:, : wanted.shape[1]] != wanted).any(axis=1))
        if not len(apart):
            return view, made
        slots = rng.permutation(apart)[:some]
        made += len(pairs(wanted[slots] * 1) - pairs(present[slots] * 1))
        view = plan(view, Reassign(slots, wanted[slots]))
    raise AssertionError("it never arrives")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(60, 2000), st.integers(0, 99))
def test_a_join_in_steps_moves_what_a_join_must(n: int, replicas: int, joining: int, some: int, seed: int) -> None:
    n = max(n, replicas)
    before = cluster(n, replicas)
    names = tuple(f"s{n + i}" for i in range(joining))
    view = plan(before, Begin(Move("join", names), tuple(server(n + i) for i in range(joining))))
    view, made = arrive(view, np.random.default_rng(seed), some)
    gained = pairs(view.owners()) - pairs(before.owners())
    assert {s for _, s in gained} <= set(range(n, n + joining))
    assert made <= 1.01 * joining / (n + joining) * replicas * SLOTS + joining
    after = plan(view, End())
    assert after.move is None
    assert (goal(after)[:, :replicas] == after.owners()).all()
    found = balance(after, after.groups[0])
    assert max(found.primaries, found.copies) <= 1.02 + (n + joining) / SLOTS


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 3), st.integers(60, 2000), st.integers(0, 99))
def test_a_leave_in_steps_moves_what_the_leavers_had(n: int, replicas: int, leaving: int, some: int, seed: int) -> None:
    n = max(n, replicas + leaving)
    before = cluster(n, replicas)
    rng = np.random.default_rng(seed)
    gone = rng.choice(n, leaving, replace=False).tolist()
    view = plan(before, Begin(Move("leave", tuple(f"s{i}" for i in gone))))
    had = int(np.isin(before.owners(), gone).sum())
    view, made = arrive(view, rng, some)
    assert made == had
    assert not np.isin(view.owners(), gone).any()
    after = plan(view, End())
    assert [s.name for s in after.servers] == [f"s{i}" for i in range(n) if i not in gone]
    found = balance(after, after.groups[0])
    assert max(found.primaries, found.copies) <= 1.02 + n / SLOTS


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(2, 3), st.data())
def test_after_any_troubles_the_goal_is_even_and_reached(n: int, replicas: int, data: st.DataObject) -> None:
    n = max(n, replicas)
    view = cluster(n, replicas)
    for number in range(data.draw(st.integers(1, 4))):
        victim = data.draw(st.integers(0, n - 1))
        name, living = f"s{victim}", [s.name for s in view.servers if s.alive]
        if name in living and data.draw(st.booleans()):
            view = plan(view, Withdraw({name: np.arange(data.draw(st.integers(1, SLOTS)))}))
        elif name in living and len(living) > 1:
            view = plan(view, Fail(name))
            if data.draw(st.booleans()):
                view = plan(view, Return(Server(name, 5000 + number, f"h{victim}")))
        if data.draw(st.booleans()):
            view = step(view, np.arange(0, SLOTS, 2))
    lost = view.lost()
    after, _ = arrive(view, np.random.default_rng(0), 300)
    assert (after.lost() == lost).all()
    there = sum(s.alive for s in after.servers)
    assert ((after.owners()[~lost] >= 0).sum(axis=1) == min(replicas, there)).all()
    if not lost.any():
        found = balance(after, after.groups[0])
        assert max(found.primaries, found.copies) <= 1.02 + n / SLOTS


def test_where_a_server_returns_its_slots_are_given_back_to_it() -> None:
    view = cluster(3)
    had = pairs(view.owners())
    back = plan(plan(view, Fail("s1")), Return(Server("s1", 77, "h1")))
    after, made = arrive(back, np.random.default_rng(0), 400)
    at = after.server_index("s1")
    assert at is not None
    mine = {slot for slot, s in had if s == 1}
    assert made == len(mine)
    assert len({slot for slot, s in pairs(after.owners()) if s == at} ^ mine) <= 1  # 2,048 copies have no third


@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1), (2, "all"), ("all", 2), (3, 2)])
def test_the_goal_has_as_many_owners_as_tables_ask_for(before: int | str, now: int | str) -> None:
    view = cluster(4, before)
    view = replace(view, groups=tuple(replace(g, replicas=now) for g in view.groups))  # type: ignore[arg-type]
    after, made = arrive(view, np.random.default_rng(0), 400)
    count = {1: 1, 2: 2, 3: 3, "all": 4}
    assert ((after.owners() >= 0).sum(axis=1) == count[now]).all()
    assert made == max(0, count[now] - count[before]) * SLOTS
    found = balance(after, after.groups[0])
    assert max(found.primaries, found.copies) <= 1.03


def test_a_join_on_a_new_host_parts_owners_that_share_one() -> None:
    view = cluster(2, hosts=1)
    assert {s.host for s in view.servers} == {"h0"}
    view = plan(view, Begin(Move("join", ("s9",)), (server(9),)))
    after, _ = arrive(view, np.random.default_rng(0), 400)
    hosts = np.array([s.host for s in after.servers])[after.owners()]
    assert (hosts[:, 0] != hosts[:, 1]).all()


def test_whole_tables_join_leave_and_change_replicas() -> None:
    view = cluster(3, bits=4)
    for i in range(6):
        view = plan(view, CreateTable(f"w{i}", {}, "whole", 2))
    joined, _ = arrive(plan(view, Begin(Move("join", ("s3",)), (server(3),))), np.random.default_rng(0), 3)
    counts = np.bincount(joined.owners()[16:].ravel(), minlength=4)
    assert counts.tolist() == [3, 3, 3, 3]
    left, _ = arrive(plan(plan(joined, End()), Begin(Move("leave", ("s0",)))), np.random.default_rng(0), 3)
    counts = np.bincount(left.owners()[16:].ravel(), minlength=4)
    assert counts.tolist() == [0, 4, 4, 4]
    fewer = replace(left, move=None, groups=tuple(replace(g, replicas=1) for g in left.groups))
    after, made = arrive(fewer, np.random.default_rng(0), 3)
    assert np.bincount(after.owners()[16:, 0], minlength=4).max() <= 3
    assert made <= 16 // 4 + 1  # s0 is nobody's leaver any more, and takes its share


def test_slots_of_a_primary_that_cannot_copy_stay_as_they_are() -> None:
    view = plan(cluster(3), Begin(Move("leave", ("s2",))))
    wanted = goal(view, frozenset({"s1"}))
    stuck = view.owners()[:, 0] == 1
    assert (wanted[stuck] == view.owners()[stuck]).all()
    assert not (wanted[~stuck] == 2).any()


def test_while_slots_are_lost_whoever_returned_keeps_room_for_them() -> None:
    view = plan(plan(cluster(3, 1), Fail("s1")), Return(Server("s1", 77, "h1")))
    assert view.lost().any()
    assert (goal(view) == view.owners()).all()
    after, _ = arrive(plan(view, Recover()), np.random.default_rng(0), 400)
    assert balance(after, after.groups[0]).copies <= 1.02


def test_a_join_is_undone_by_a_leave_and_a_leave_by_staying() -> None:
    view = cluster(2)
    joining = step(plan(view, Begin(Move("join", ("s2",), 5), (server(2),))), np.arange(0, SLOTS, 3))
    assert (joining.owners() == 2).any()
    undone, _ = arrive(plan(joining, Abort("join", ("s2",))), np.random.default_rng(0), 500)
    after = plan(undone, End())
    assert [s.name for s in after.servers] == ["s0", "s1"]
    assert ((after.owners() >= 0).sum(axis=1) == 2).all()
    leaving = step(plan(cluster(3), Begin(Move("leave", ("s1",)))), np.arange(0, SLOTS, 3))
    stayed, _ = arrive(plan(leaving, Abort("leave", ("s1",))), np.random.default_rng(0), 500)
    assert stayed.move is None
    found = balance(stayed, stayed.groups[0])
    assert max(found.primaries, found.copies) <= 1.02


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Begin(Move("join", ("s1",)), (server(1),)), "'s1' is in the view already"),
        (Begin(Move("join", ("a", "a")), ()), "the servers are a, a; each must be named once"),
        (Begin(Move("leave", ())), "the servers are none"),
        (Begin(Move("leave", ("x",))), "no server is named 'x'; the servers are s0, s1, s2"),
        (Begin(Move("leave", ("s0", "s1"))), "would leave 1 server, fewer than replicas = 2"),
        (Begin(Move("leave", ("s0", "s1", "s2"))), "would leave no living server"),
        (Abort("join", ("s2",)), "no server is joining or leaving"),
        (End(), "no server is joining or leaving"),
    ],
)
def test_refusals(change: Begin | Abort | End, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        plan(cluster(3, bits=4), change)


def test_one_move_at_a_time_and_none_ends_early() -> None:
    view = plan(cluster(3, bits=4), Begin(Move("leave", ("s2",))))
    with pytest.raises(PlanError, match=r"\(s2 leaving\): wait until it is done, or abort it"):
        plan(view, Begin(Move("leave", ("s1",))))
    with pytest.raises(PlanError, match="s2 still own"):
        plan(view, End())


def test_an_abort_undoes_no_other_move_and_not_itself() -> None:
    joining = plan(cluster(2, bits=4), Begin(Move("join", ("s2",)), (server(2),)))
    undone = plan(joining, Abort("join", ("s2",)))
    assert undone.move == Move("leave", ("s2",), undoes=True)
    for view, abort, says in (
        (joining, Abort("join", ("s1",)), "the change that is under way is s2 joining, not s1 joining"),
        (joining, Abort("leave", ("s2",)), "the change that is under way is s2 joining, not s2 leaving"),
        (undone, Abort("join", ("s2",)), "the change that is under way is s2 going back, not s2 joining"),
        (undone, Abort("leave", ("s2",)), "the change that is under way is s2 going back, not s2 leaving"),
    ):
        with pytest.raises(PlanError, match=says):
            plan(view, abort)


@pytest.mark.parametrize("undone", [False, True])
def test_a_view_keeps_its_move_on_its_way_through_the_log(undone: bool) -> None:
    view = plan(cluster(2, bits=4), Begin(Move("join", ("s2",), 1024), (server(2),)))
    view = plan(view, Abort("join", ("s2",))) if undone else view
    assert View.from_plain(view.to_plain()).move == view.move
    plain = view.to_plain()
    plain["move"] = plain["move"][:3]  # as it was logged before it told what it undoes
    assert View.from_plain(plain).move == Move(view.move.kind, ("s2",), 1024)
    plain = cluster(2, bits=4).to_plain()
    del plain["move"]  # as views were logged before
    assert View.from_plain(plain).move is None


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.data(), st.integers(1, 300), st.integers(0, 99))
def test_tables_are_whole_or_sharded_at_any_time(n: int, data: st.DataObject, some: int, seed: int) -> None:
    """However often placements and copies change, the goal is reached: whole tables lie together, others evenly."""
    view, rng = cluster(n, 1, bits=8), np.random.default_rng(seed)
    for name in ("u", "v"):
        view = plan(view, CreateTable(name, {}, replicas=1))
    view = plan(view, CreateTable("w", {}, "whole"))
    for _ in range(data.draw(st.integers(1, 3))):
        names = data.draw(st.sets(st.sampled_from(["t", "u", "v", "w"]), min_size=1))
        placement, replicas = data.draw(st.sampled_from(["sharded", "whole"])), data.draw(st.integers(1, n))
        view = plan(view, Place({name: {} for name in sorted(names)}, placement, replicas))
        view, _ = arrive(view, rng, some)
        for name in names:
            group = view.group(view.table(name).group)
            assert (group.placement, group.replicas) == (placement, replicas)
            assert (group.owners >= 0).sum(axis=1).tolist() == [replicas] * group.slots
            if placement == "whole":
                assert (group.owners == group.owners[0]).all()
                assert sum(t.group == group.number for t in view.tables) == 1
            else:  # shares are whole slots: what they leave of a fraction each, one server may have
                found = balance(view, group)
                assert (found.copies - 1) * found.copies_mean <= n
