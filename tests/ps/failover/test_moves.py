"""Joins, leaves and other changes of owners, step by step, with crashes between any two."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashring.planner import Abort, Begin, CreateTable, Enlist, Withdraw, plan
from hashring.view import Move, Server, View
from ps.failover import Append, Changed, Deliver, Failover, FailoverLimits, Learn, Ping, Refused
from ps.failover.moves import course
from ps.replication import ADMISSION, HELD, LESSON, Standing
from tests.hashring.balance import balance

BITS = 5
SLOTS = 2**BITS
LIMITS = FailoverLimits(
    pings_max=3, wait_rounds=2, learn_rounds=1, turn_rounds=3, dispute_rounds=4, learn_max=6, turn_max=8
)
COPIED_AFTER = 2
ROUNDS = 150


def server(i: int) -> Server:
    return Server(f"s{i}", 10 + i, f"h{i}")


def cluster(servers: int, replicas: int | str = 2) -> View:
    view = plan(View.empty(1, slot_bits=BITS), Enlist(tuple(server(i) for i in range(servers))))
    return plan(view, CreateTable("t", {}, replicas=replicas))


class World:
    """A controller, its log, and servers that copy what they are told to: a copy takes some rounds."""

    def __init__(self, view: View) -> None:
        self.mind = Failover(view, LIMITS)
        self.down: set[int] = set()
        self.lessons: dict[tuple[int, int, int], list[int]] = {}  # (primary, learner, slot): [term, rounds so far]
        self.copies = 0
        self.told: list[object] = []
        self.slow: set[int] = set()

    @property
    def view(self) -> View:
        return self.mind.view

    def run(self, rounds: int = ROUNDS) -> None:
        for _ in range(rounds):
            self.mind.tick()
            self.perform()
            terms, known = self.view.terms(), {s.incarnation for s in self.view.servers}
            self.lessons = {
                key: [term, age + (key[1] not in self.slow)]
                for key, (term, age) in self.lessons.items()
                if terms[key[2]] == term and {key[0], key[1]} <= known - self.down
            }

    def perform(self) -> None:
        while actions := self.mind.actions():
            for action in actions:
                if isinstance(action, Append):
                    self.check(action.view)
                    self.mind.logged(action.view)
                elif isinstance(action, Ping) and action.incarnation not in self.down:
                    self.mind.answered(action.incarnation, self.view.epoch, self.standing(action.incarnation))
                elif isinstance(action, Learn) and action.primary not in self.down:
                    self.learn(action)
                elif not isinstance(action, Deliver):
                    self.told.append(action)

    def learn(self, action: Learn) -> None:
        for slot in action.slots.tolist():
            first = self.view.servers[self.view.owners()[slot, 0]].incarnation
            key = (action.primary, action.learner, slot)
            if first == action.primary and self.view.terms()[slot] <= action.epoch and key not in self.lessons:
                self.lessons[key] = [int(self.view.terms()[slot]), 0]
                self.copies += 1
        terms = self.view.terms()
        at_once = sum(p == action.primary and terms[s] == self.lessons[p, x, s][0] for p, x, s in self.lessons)
        assert at_once <= 2 * LIMITS.learn_max  # what was begun since the last ping is not known yet

    def standing(self, primary: int) -> Standing:
        mine = [(learner, slot, *state) for (first, learner, slot), state in self.lessons.items() if first == primary]
        return Standing(
            np.array([(LESSON, HELD, ADMISSION)[max(0, min(age, COPIED_AFTER))] for _, _, _, age in mine], np.uint8),
            np.array([learner for learner, *_ in mine], np.uint64),
            np.array([slot for _, slot, *_ in mine], np.int64),
            np.array([term for _, _, term, _ in mine], np.int64),
        )

    def check(self, after: View) -> None:
        """A view names only owners, and learners that were admitted in the present term; none is ever lost."""
        before, terms = self.view, self.view.terms()
        admitted = {
            (learner, slot)
            for (_, learner, slot), (term, age) in self.lessons.items()
            if age >= COPIED_AFTER and terms[slot] == term
        }
        assert (after.terms() != terms).sum() <= len(terms)
        for slot, (old, new) in enumerate(zip(before.owners().tolist(), after.owners().tolist(), strict=True)):
            had = {before.servers[s].incarnation for s in old if s >= 0}
            has = {after.servers[s].incarnation for s in new if s >= 0}
            assert has, f"slot {slot} has no owner"
            assert all(s in had or (s, slot) in admitted for s in has), f"slot {slot} goes from {had} to {has}"

    def crash(self, incarnation: int, returns: bool = True) -> None:
        self.down.add(incarnation)
        self.mind.died(incarnation)
        self.perform()
        name = next((s.name for s in self.view.servers if s.incarnation == incarnation), "")
        if returns and name:
            self.mind.started(Server(name, incarnation + 100, f"h{name}"))
            self.perform()

    def begin(self, change: object) -> None:
        self.mind.change("wish", change)  # type: ignore[arg-type]
        self.perform()

    def restart(self) -> None:
        """Another controller goes on from the log."""
        self.mind = Failover(self.view, LIMITS)

    def settled(self, names: set[str], replicas: int) -> None:
        assert self.view.move is None
        assert {s.name for s in self.view.servers} == names
        assert ((self.view.owners() >= 0).sum(axis=1) == replicas).all()
        assert not self.lessons
        found = balance(self.view, self.view.groups[0])
        assert max(found.primaries, found.copies) <= 1.02 + len(names) / SLOTS


def joining(*numbers: int) -> Begin:
    return Begin(Move("join", tuple(f"s{i}" for i in numbers)), tuple(server(i) for i in numbers))


def leaving(*numbers: int) -> Begin:
    return Begin(Move("leave", tuple(f"s{i}" for i in numbers)))


def names(*numbers: int) -> set[str]:
    return {f"s{i}" for i in numbers}


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_server_joins_and_no_more_is_copied_than_its_share(replicas: int) -> None:
    world = World(cluster(3, replicas))
    world.run(3)
    world.begin(joining(3))
    world.run()
    world.settled(names(0, 1, 2, 3), replicas)
    assert world.copies <= SLOTS * replicas / 4 + 1


def test_servers_join_and_leave_where_there_is_no_table_yet() -> None:
    world = World(plan(View.empty(1, slot_bits=BITS), Enlist(tuple(server(i) for i in range(3)))))
    world.run(3)
    for change, left in ((joining(3), names(0, 1, 2, 3)), (leaving(0, 2), names(1, 3))):
        world.begin(change)
        world.run()
        assert world.view.move is None
        assert {s.name for s in world.view.servers} == left


def test_several_join_and_leave_at_once() -> None:
    world = World(cluster(3))
    world.run(3)
    world.begin(joining(3, 4))
    world.run()
    world.settled(names(0, 1, 2, 3, 4), 2)
    assert world.copies <= SLOTS * 2 * 2 / 5 + 2
    world.begin(leaving(0, 2))
    world.run()
    world.settled(names(1, 3, 4), 2)


def test_all_owners_of_a_slot_leave_at_once_more_than_there_are_learners() -> None:
    world = World(cluster(6, 3))
    world.run(3)
    world.begin(leaving(0, 1, 2))
    world.run()
    world.settled(names(3, 4, 5), 3)


def test_a_dead_server_is_removed() -> None:
    world = World(cluster(4))
    world.run(3)
    world.crash(11, returns=False)
    world.begin(leaving(1))
    world.run()
    world.settled(names(0, 2, 3), 2)


def test_the_only_copies_of_a_leaver_are_moved() -> None:
    world = World(cluster(2, 1))
    world.run(3)
    world.begin(leaving(1))
    world.run()
    world.settled(names(0), 1)


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("who", ["source", "target", "other", "controller"])
@pytest.mark.parametrize("kind", ["join", "leave"])
def test_a_crash_at_any_step_ends_in_the_new_view(kind: str, who: str, after: int) -> None:
    world = World(cluster(4))
    world.run(3)
    world.begin(joining(4) if kind == "join" else leaving(3))
    world.run(after)
    victim = {"source": 13 if kind == "leave" else 10, "target": 14 if kind == "join" else 11, "other": 12}.get(who)
    if victim is None:
        world.restart()
    else:
        world.crash(victim)
    world.run()
    world.settled(names(0, 1, 2, 3, 4) if kind == "join" else names(0, 1, 2), 2)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 6, 7, 30])
@pytest.mark.parametrize("dead", [False, True])
def test_a_join_that_is_aborted_at_any_step_ends_in_the_old_view(after: int, dead: bool) -> None:
    world = World(cluster(3))
    world.run(3)
    world.begin(joining(3))
    world.run(after)
    if dead:
        world.crash(13, returns=False)
    if world.view.move is not None:
        world.begin(Abort("join", names(3)))
        world.run(1)
        world.restart()
        world.run()
        world.settled(names(0, 1, 2), 2)
    else:
        assert after == 30


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 6])
def test_a_leave_that_is_aborted_at_any_step_ends_as_it_was(after: int) -> None:
    world = World(cluster(4))
    world.run(3)
    world.begin(leaving(2))
    world.run(after)
    world.begin(Abort("leave", names(2)))
    world.run()
    world.settled(names(0, 1, 2, 3), 2)


def test_a_newcomer_that_stays_dead_does_not_join_and_keeps_the_move_open() -> None:
    world = World(cluster(3))
    world.run(3)
    world.begin(joining(3))
    world.run(4)
    world.crash(13, returns=False)
    world.run()
    assert world.view.move is not None
    assert ((world.view.owners() >= 0).sum(axis=1) == 2).all()
    world.begin(Abort("join", names(3)))
    world.run()
    world.settled(names(0, 1, 2), 2)


def test_a_learner_that_is_dropped_is_copied_to_again() -> None:
    world = World(cluster(3))
    world.run(3)
    world.begin(joining(3))
    world.slow = {13}
    world.run(4)
    assert world.lessons
    world.lessons.clear()
    world.slow = set()
    world.run()
    world.settled(names(0, 1, 2, 3), 2)


def test_a_silent_newcomer_is_given_nothing_meanwhile_and_the_join_waits() -> None:
    world = World(cluster(3))
    world.run(3)
    world.begin(joining(3))
    world.down = {13}
    world.run(20)
    assert world.view.move is not None
    assert not (world.view.owners() == 3).any()
    world.down = set()
    world.run()
    world.settled(names(0, 1, 2, 3), 2)


def test_first_places_are_evened_out_after_a_pause_and_not_before_the_wait() -> None:
    world = World(cluster(3))
    world.run(3)
    world.mind.limits = replace(LIMITS, wait_rounds=20)
    world.down = {11}
    world.run(2)
    world.begin(Withdraw({"s1": np.arange(SLOTS)}))
    short = (world.view.owners() >= 0).sum(axis=1) == 1
    assert short.any()
    world.run(10)
    assert (((world.view.owners() >= 0).sum(axis=1) == 1) == short).all()
    assert not world.lessons
    world.down = set()
    world.run()
    world.settled(names(0, 1, 2), 2)


def test_slots_change_owners_in_bounded_steps() -> None:
    world = World(cluster(3))
    world.run(3)
    world.begin(joining(3))
    seen = [world.view]
    for _ in range(ROUNDS):
        world.run(1)
        seen.append(world.view)
    for before, after in pairwise(seen):
        changed = (after.terms() != before.terms()).sum()
        assert changed <= LIMITS.turn_max * max(1, after.epoch - before.epoch)


def stagger(world: World) -> None:
    """Of the copies that have just begun one is there each round."""
    for n, state in enumerate(world.lessons.values()):
        state[1] = -n


def epochs_of(world: World) -> list[tuple[int, bool]]:
    """(round, whether slots lacked a copy before) of each view that gave slots other owners, until nothing moves."""
    out = []
    for n in range(ROUNDS):
        owners, replicas = world.view.owners(), world.view.groups[0].replicas
        world.run(1)
        if owners.shape != world.view.owners().shape or (owners != world.view.owners()).any():
            out.append((n, bool(((owners >= 0).sum(axis=1) < replicas).any())))
    return out


def test_slots_that_have_all_their_copies_change_owners_together() -> None:
    """Views are not for nothing: a move turns what is there now and then, and what is left at its end."""
    world = World(cluster(3))
    world.mind.limits = replace(LIMITS, learn_max=SLOTS, turn_rounds=5)
    world.begin(joining(3))
    world.run(2)
    stagger(world)
    copies, turns = len(world.lessons), [n for n, _ in epochs_of(world)]
    assert copies == SLOTS // 2
    assert len(turns) < copies / 2
    assert all(b - a >= 5 for a, b in pairwise(turns[: copies // 5]))
    world.settled({"s0", "s1", "s2", "s3"}, 2)


def test_slots_that_lack_a_copy_do_not_wait_for_others() -> None:
    world = World(cluster(4))
    world.mind.limits = replace(LIMITS, learn_max=SLOTS, turn_rounds=ROUNDS)
    world.crash(server(3).incarnation, returns=False)
    while not world.lessons:
        world.run(1)
    stagger(world)
    assert sum(lacking for _, lacking in epochs_of(world)) >= 5


def test_a_second_move_while_one_runs_is_refused() -> None:
    world = World(cluster(3))
    world.run(3)
    world.begin(joining(3))
    world.begin(leaving(0))
    assert [t.token for t in world.told if isinstance(t, Changed)] == ["wish"]
    (refused,) = [t for t in world.told if isinstance(t, Refused)]
    assert "a change is under way (s3 joining): wait until it is done, or abort it" in str(refused.error)


@pytest.mark.parametrize(("before", "now"), [(1, 3), (2, "all"), (3, 1)])
def test_tables_get_more_copies_or_fewer(before: int, now: int | str) -> None:
    world = World(cluster(4, before))
    world.run(3)
    world.begin(
        lambda view: replace(view, epoch=view.epoch + 1, groups=tuple(replace(g, replicas=now) for g in view.groups))
    )
    world.run()
    world.settled(names(0, 1, 2, 3), 4 if now == "all" else int(now))


def test_what_is_left_to_do_goes_down_to_nothing() -> None:
    world = World(cluster(3))
    world.run(3)
    assert world.mind.left == 0
    world.begin(joining(3))
    left = []
    while world.view.move is not None:
        world.run(1)
        left.append(world.mind.left)
    assert left[0] >= SLOTS // 2
    assert left[-1] == 0


def test_a_course_is_what_is_missing_and_what_is_ready() -> None:
    view = plan(cluster(3, 2), Withdraw({"s2": np.arange(SLOTS)}))
    wanted = view.owners().copy()
    wanted[:3] = [[0, 1], [1, 2], [2, 0]]
    wanted[3:] = view.owners()[3:]
    present = view.owners()[:3].tolist()
    fresh = np.ones(3, np.bool_)
    nothing = np.empty(0, np.int64)
    ahead = course(view, wanted, nothing, nothing, fresh)
    expected = {(s, w) for s in range(3) for w in wanted[s].tolist() if w not in present[s]}
    assert {(int(key) // 3, int(key) % 3) for key in ahead.missing} == expected
    assert not ahead.gaining
    there = np.sort(np.array([s * 3 + w for s, w in expected]))
    ahead = course(view, wanted, nothing, there, fresh)
    assert {s for s, _ in expected} <= set(ahead.ready.tolist())
    assert (ahead.owners == wanted[ahead.ready]).all()
    stray = course(view, view.owners(), nothing, there, fresh)
    assert sorted(stray.stray.tolist()) == sorted({s for s, _ in expected})
    assert course(view, wanted, nothing, there, np.zeros(3, np.bool_)).ready.size == 0


@given(st.data())
def test_a_course_against_sets_of_pairs(data: st.DataObject) -> None:
    view = cluster(4, 2)
    draw = data.draw
    wanted = view.owners().copy()
    for slot in draw(st.sets(st.integers(0, SLOTS - 1))):
        wanted[slot] = draw(st.permutations(range(4)))[:2]
    pair = st.integers(0, 4 * SLOTS - 1)
    lessons, admitted = draw(st.sets(pair)), draw(st.sets(pair))
    fresh = [draw(st.booleans()) or draw(st.booleans()) for _ in range(4)]
    arrays = (np.array(sorted(pairs), np.int64) for pairs in (lessons, admitted))
    ahead = course(view, wanted, *arrays, np.array(fresh))
    present = view.owners().tolist()
    missing = {4 * s + int(w) for s in range(SLOTS) for w in wanted[s] if w not in present[s]}
    assert ahead.missing.tolist() == sorted(missing)
    assert ahead.teach.tolist() == sorted(missing - lessons - admitted)
    gains, turns, some = [], [], []
    for s in range(SLOTS):
        if present[s] == wanted[s].tolist() or not fresh[present[s][0]] or not fresh[wanted[s][0]]:
            continue
        asked = {key for key in missing if key // 4 == s}
        there = {key for key in asked & admitted if fresh[key % 4]}
        if there == asked:
            (gains if asked else turns).append(s)
        elif there and not asked & lessons:
            some.append(s)
    assert ahead.ready.tolist() == gains + some + turns
    assert ahead.gaining == len(gains + some)
    whole = np.isin(ahead.ready, gains + turns)
    assert (ahead.owners[whole] == wanted[ahead.ready[whole]]).all()
    assert ahead.stray.tolist() == sorted(
        {key // 4 for key in (lessons | admitted) - missing} - set(ahead.ready.tolist())
    )
