"""The controller's decisions, event by event."""

from dataclasses import replace

import numpy as np
import pytest

from hashring.planner import AlterTable, CreateTable, Enlist, Withdraw, plan
from hashring.view import Server, View
from ps.errors import RequestError
from ps.failover import Append, Changed, Deliver, Failover, FailoverLimits, Learn, Ping, Refused, Retire
from ps.failover.health import Disputes, Health, silent
from ps.replication import ADMISSION, COMPLAINT, HELD, LESSON, NOTHING, Standing

LIMITS = FailoverLimits(pings_max=5, wait_rounds=3, learn_rounds=1, dispute_rounds=20, learn_max=8)


def cluster(servers: int, replicas: int = 2) -> View:
    view = plan(View.empty(1, slot_bits=3), Enlist(tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(servers))))
    return plan(view, CreateTable("t", {}, replicas=replicas))


class Shell:
    """Carries out what the controller asks for: the log takes everything, servers answer unless they are down."""

    def __init__(self, view: View) -> None:
        self.mind = Failover(view, LIMITS)
        self.down: set[int] = set()
        self.standing: dict[int, Standing] = {}
        self.epochs: dict[int, int] = {}
        self.seen: list[object] = []
        self.take = True

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.mind.tick()
            self.perform()

    def perform(self) -> None:
        while actions := self.mind.actions():
            self.seen += actions
            for action in actions:
                if isinstance(action, Append) and self.take:
                    self.mind.logged(action.view)
                elif isinstance(action, Deliver) and action.incarnation not in self.down:
                    self.epochs[action.incarnation] = action.view.epoch
                elif isinstance(action, Ping) and action.incarnation not in self.down:
                    i = action.incarnation
                    self.mind.answered(i, self.epochs.get(i, self.mind.view.epoch), self.standing.get(i, NOTHING))

    def of(self, kind: type) -> list:
        return [a for a in self.seen if isinstance(a, kind)]


def says(view: View, kind: int, peer: int, slots: np.ndarray) -> Standing:
    k = len(slots)
    return Standing(np.full(k, kind, np.uint8), np.full(k, peer, np.uint64), slots, view.terms()[slots])


def owned(view: View, server: int) -> np.ndarray:
    return np.flatnonzero((view.owners() == server).any(axis=1))


def primary_of(view: View, server: int) -> np.ndarray:
    return np.flatnonzero(view.owners()[:, 0] == server)


def test_five_unanswered_pings_and_no_fewer_take_a_server_off_its_slots() -> None:
    shell = Shell(cluster(4))
    before = shell.mind.view
    shell.run(2)
    shell.down = {11}
    shell.run(5)
    assert shell.mind.view is before
    shell.run(1)
    view = shell.mind.view
    assert not len(owned(view, 1))
    assert (view.owners()[:, 0] >= 0).all()
    assert view.servers[1].alive  # it is not known dead


def test_a_pause_of_the_controller_is_one_missed_ping() -> None:
    shell = Shell(cluster(3))
    shell.run(2)
    shell.mind.tick()  # asked; the answers come only after the next round has begun
    shell.mind.tick()
    assert all(h.missed == 1 for h in shell.mind.servers.values())
    shell.perform()
    assert all(h.missed == 0 for h in shell.mind.servers.values())


def test_where_most_fall_silent_at_once_nobody_is_taken_off() -> None:
    shell = Shell(cluster(3))
    before = shell.mind.view
    shell.run(2)
    shell.down = {10, 11}
    shell.run(20)
    assert shell.mind.view is before
    shell.mind.died(11)  # but Ray's word counts
    shell.perform()
    assert not shell.mind.view.servers[1].alive


def test_silence_counts_pings_of_each() -> None:
    healths = {i: Health(i, missed=m) for i, m in enumerate((0, 5, 0, 4))}
    assert silent(healths, 5) == {1}
    healths[0].missed = 3
    assert silent(healths, 5) == set()


def test_a_dead_server_leaves_at_once_and_returns_as_another() -> None:
    shell = Shell(cluster(3))
    shell.run(1)
    shell.mind.died(11)
    shell.perform()
    assert not len(owned(shell.mind.view, 1))
    shell.mind.started(Server("s1", 99, "h1"))
    shell.perform()
    view = shell.mind.view
    assert [s.incarnation for s in view.servers if s.alive] == [10, 12, 99]
    assert not len(owned(view, view.server_index("s1") or 0))


def test_a_new_process_under_a_name_means_that_the_old_one_is_dead() -> None:
    shell = Shell(cluster(3))
    shell.run(1)
    shell.mind.started(Server("s2", 77, "h2"))
    shell.perform()
    view = shell.mind.view
    assert 12 not in [s.incarnation for s in view.servers if s.alive]
    assert 77 in [s.incarnation for s in view.servers]


def test_a_view_is_told_to_nobody_before_it_is_logged() -> None:
    shell = Shell(cluster(3))
    shell.run(2)
    shell.take = False
    epoch = shell.mind.view.epoch
    shell.mind.died(11)
    shell.perform()
    assert len(shell.of(Append)) == 1
    shell.run(3)
    assert len(shell.of(Append)) == 1  # and nothing else is planned meanwhile
    assert all(d.view.epoch <= epoch for d in shell.of(Deliver))
    shell.mind.logged(shell.of(Append)[0].view)
    shell.perform()
    assert {d.incarnation for d in shell.of(Deliver) if d.view.epoch == epoch + 1} == {10, 12}


def test_who_cannot_log_the_next_view_is_controller_no_more() -> None:
    shell = Shell(cluster(3))
    shell.run(1)
    shell.take = False
    shell.mind.died(11)
    shell.mind.taken()
    assert [type(a) for a in shell.mind.actions()] == [Retire]
    shell.mind.tick()
    shell.mind.died(12)
    assert shell.mind.actions() == []


def test_who_meets_a_newer_epoch_is_controller_no_more() -> None:
    shell = Shell(cluster(3))
    shell.run(1)
    shell.mind.answered(10, shell.mind.view.epoch + 1, NOTHING)
    assert shell.mind.retired


def test_a_moved_primary_hears_of_the_view_after_the_old_one() -> None:
    view = cluster(3)
    shell = Shell(view)
    shell.run(2)
    shell.seen = []
    slots = primary_of(view, 0)
    shell.mind.change("flip", Withdraw({"s0": slots}))
    shell.mind.logged(shell.mind._logging[0])  # type: ignore[index]
    first = {a.incarnation for a in shell.mind.actions() if isinstance(a, Deliver)}
    heirs = {view.servers[o].incarnation for o in view.owners()[slots, 1]}
    assert 10 in first
    assert not first & heirs
    shell.mind.tick()
    assert heirs <= {a.incarnation for a in shell.mind.actions() if isinstance(a, Deliver)}


def test_an_owner_leaves_the_slots_that_its_primary_complains_of() -> None:
    view = cluster(4)
    shell = Shell(view)
    shell.run(1)
    slots = np.flatnonzero((view.owners()[:, 0] == 0) & (view.owners()[:, 1] == 1))
    shell.standing[10] = says(view, COMPLAINT, 11, slots)
    shell.run(1)
    shell.standing.clear()
    after = shell.mind.view
    assert not (after.owners()[slots] == 1).any()
    rest = np.setdiff1d(owned(view, 1), slots)
    assert (after.owners()[rest] == view.owners()[rest]).all()


def test_where_nobody_listens_any_more_two_pings_are_enough_even_for_most_servers() -> None:
    shell = Shell(cluster(4))
    shell.run(2)
    shell.down = {11, 12, 13}
    for gone in (11, 12):
        shell.mind.refused(gone)
    shell.run(1)
    assert len(owned(shell.mind.view, 1))  # once may be chance
    for gone in (11, 12):
        shell.mind.refused(gone)
        shell.perform()
    view = shell.mind.view
    both = np.flatnonzero(np.isin(view.owners(), (1, 2)).any(axis=1))
    assert (view.owners()[both] >= 0).sum(axis=1).max(initial=1) == 1  # the last owner stays
    assert not len(np.intersect1d(primary_of(view, 1), owned(view, 0)))
    shell.down = {13}
    shell.run(1)
    assert shell.mind.servers[11].refused == 0


def test_a_complaint_of_another_term_or_of_a_silent_primary_is_not_heeded() -> None:
    view = cluster(4)
    shell = Shell(view)
    slots = np.flatnonzero((view.owners()[:, 0] == 0) & (view.owners()[:, 1] == 1))
    stale = says(view, COMPLAINT, 11, slots)
    shell.standing[10] = Standing(stale.kinds, stale.peers, stale.slots, stale.terms - 1)
    shell.run(3)
    assert shell.mind.view is view
    shell.mind.servers[10].standing = says(view, COMPLAINT, 11, slots)
    shell.mind.servers[10].missed = 1
    shell.mind._decide()
    assert shell.mind.actions() == []


def test_who_disputes_with_most_others_leaves_altogether() -> None:
    view = cluster(4, replicas=4)
    shell = Shell(view)
    shell.run(1)
    mine = primary_of(view, 0)
    parts = [says(view, COMPLAINT, peer, mine) for peer in (11, 12, 13)]
    shell.standing[10] = Standing(*(np.concatenate([getattr(p, n) for p in parts]) for n in Standing.__slots__))
    shell.run(1)
    after = shell.mind.view
    assert not len(owned(after, 0))
    assert all(len(owned(after, i)) == after.slots_total for i in (1, 2, 3))


def test_who_complains_of_the_dead_is_not_sick() -> None:
    view = cluster(4, replicas=4)
    shell = Shell(view)
    shell.run(2)
    shell.down = {12, 13}
    shell.run(2)
    for primary, index in ((10, 0), (11, 1)):
        mine = primary_of(view, index)
        parts = [says(view, COMPLAINT, peer, mine) for peer in (12, 13)]
        shell.standing[primary] = Standing(
            *(np.concatenate([getattr(p, n) for p in parts]) for n in Standing.__slots__)
        )
    shell.run(2)
    after = shell.mind.view
    assert set(primary_of(view, 0)) <= set(owned(after, 0))
    assert set(primary_of(view, 1)) <= set(owned(after, 1))
    assert not (after.owners()[primary_of(view, 0)] >= 2).any()


def test_disputes_are_forgotten_after_their_rounds() -> None:
    disputes = Disputes(rounds=2)
    disputes.add(1, 2)
    assert disputes.between(2, 1)
    assert disputes.opponents(2) == {1}
    disputes.age()
    disputes.age()
    assert not disputes.between(1, 2)


def test_disputes_with_a_server_that_was_paused_end_when_it_answers_again() -> None:
    view = cluster(3)
    shell = Shell(view)
    shell.run(2)
    shell.down = {11}
    shell.standing[10] = says(view, COMPLAINT, 11, primary_of(view, 0))
    shell.run(3)
    assert shell.mind.disputes.between(10, 11)
    shell.down = set()
    shell.run(2)
    assert not shell.mind.disputes.between(10, 11)


def test_missing_copies_are_learnt_after_a_wait_and_learners_become_owners() -> None:
    shell = Shell(cluster(3))
    shell.run(2)
    shell.mind.died(11)
    shell.perform()
    shell.run(2)
    assert not shell.of(Learn)  # a paused process may come back meanwhile
    shell.run(3)
    view = shell.mind.view
    lessons = shell.of(Learn)
    short = np.flatnonzero((view.owners() >= 0).sum(axis=1) < 2)
    assert sorted(set(np.concatenate([a.slots for a in lessons]).tolist())) == short.tolist()
    for lesson in lessons:
        index = next(i for i, s in enumerate(view.servers) if s.incarnation == lesson.primary)
        assert (view.owners()[lesson.slots, 0] == index).all()
        assert lesson.learner != 11
    first = lessons[0]
    shell.standing[first.primary] = says(view, ADMISSION, first.learner, first.slots)
    shell.run(2)
    after = shell.mind.view
    learner = next(i for i, s in enumerate(after.servers) if s.incarnation == first.learner)
    assert (after.owners()[first.slots, 1] == learner).all()
    assert (after.owners()[first.slots, 0] == view.owners()[first.slots, 0]).all()


@pytest.mark.parametrize("dead", [True, False])
def test_copies_are_made_as_soon_as_nobody_is_missing(dead: bool) -> None:
    shell = Shell(cluster(3))
    shell.mind.limits = replace(LIMITS, wait_rounds=100)
    shell.run(2)
    shell.down = {11}
    if dead:
        shell.mind.died(11)
    shell.run(10)
    assert len(owned(shell.mind.view, 1)) == 0
    assert not shell.of(Learn)  # it may come back
    shell.down = set()
    if dead:
        shell.mind.started(Server("s1", 21, "h1"))
    shell.run(3)
    assert (21 if dead else 11) in {lesson.learner for lesson in shell.of(Learn)}


def lacking(shell: Shell, learn_rounds: int = 1) -> Learn:
    """One of two servers has lost its copies; the first lesson."""
    shell.mind.limits = FailoverLimits(wait_rounds=0, learn_rounds=1, learn_max=3)
    shell.run(1)
    shell.mind.change("x", Withdraw({"s1": np.arange(8)}))
    shell.perform()
    shell.seen = []
    shell.run(1)
    lesson = shell.of(Learn)[0]
    shell.mind.limits = replace(shell.mind.limits, learn_rounds=learn_rounds)
    return lesson


def test_what_is_being_copied_is_not_asked_for_again_and_some_at_a_time() -> None:
    shell = Shell(cluster(2))
    lesson = lacking(shell)
    assert len(shell.of(Learn)) == 1
    assert len(lesson.slots) == 3
    shell.standing[10] = says(shell.mind.view, LESSON, 11, lesson.slots)
    shell.run(1)
    shell.seen = []
    shell.run(2)
    assert not shell.of(Learn)  # as many as may be are under way


def test_who_has_its_copy_makes_room_for_others() -> None:
    shell = Shell(cluster(2))
    lesson = lacking(shell)
    shell.standing[10] = says(shell.mind.view, HELD, 11, lesson.slots)
    shell.run(1)
    shell.seen = []
    shell.run(1)
    (further,) = shell.of(Learn)
    assert not set(further.slots.tolist()) & set(lesson.slots.tolist())


def said(shell: Shell, rounds: int = 1) -> set[bool]:
    """What the pings of some rounds said of copies."""
    shell.seen = []
    shell.run(rounds)
    return {ping.copying for ping in shell.of(Ping)}


def test_pings_say_whether_anybody_copies() -> None:
    shell = Shell(cluster(2))
    assert said(shell) == {True}  # it may be: nobody was heard yet, of a controller that was started again
    assert said(shell) == {False}
    lesson = lacking(shell, learn_rounds=1000)
    shell.mind._untaught = False
    assert said(shell) == {True}  # though nobody has said so yet
    assert said(shell) == {False}  # it was not heeded, or is done
    for kind, copying in ((LESSON, True), (HELD, False), (LESSON, True), (ADMISSION, False)):
        shell.standing[10] = says(shell.mind.view, kind, 11, lesson.slots)
        shell.run(1)
        assert said(shell) == {copying}


def test_who_copies_and_answers_late_copies_all_the_same() -> None:
    shell = Shell(cluster(2))
    lesson = lacking(shell, learn_rounds=1000)
    shell.mind._untaught = False
    shell.standing[10] = says(shell.mind.view, LESSON, 11, lesson.slots)
    shell.run(3)
    shell.down = {10}
    assert said(shell, LIMITS.pings_max) == {True}
    assert False in said(shell, 3)  # it is taken for dead


def test_what_is_still_to_be_copied_is_waited_for() -> None:
    shell = Shell(cluster(2))
    lesson = lacking(shell)  # three of more
    shell.mind.limits = replace(shell.mind.limits, learn_rounds=4)
    shell.standing[10] = says(shell.mind.view, HELD, 11, lesson.slots)
    assert said(shell, 6) == {True}
    rest = np.setdiff1d(np.arange(8), lesson.slots)
    shell.standing[10] = says(shell.mind.view, HELD, 11, np.concatenate([lesson.slots, rest]))
    shell.run(6)
    assert said(shell, 6) == {False}


def test_one_answer_that_is_late_turns_nothing_early() -> None:
    shell = Shell(cluster(3))
    lesson = lacking(shell, learn_rounds=1000)
    for round_ in range(20):
        shell.standing[10] = says(shell.mind.view, ADMISSION, 11, lesson.slots[: 1 + round_ % 3])
        shell.standing[12] = says(shell.mind.view, HELD, 11, np.flatnonzero(shell.mind.view.owners()[:, 0] == 2))
        shell.down = {12} if round_ % 2 else set()
        shell.run(1)
    assert not len(owned(shell.mind.view, 1))
    slots = primary_of(shell.mind.view, 2)
    owners = shell.mind.view.owners()[slots]
    shell.standing[12] = says(shell.mind.view, HELD, 11, slots)
    shell.down = set()
    shell.run(2)
    shell.mind._turned_round = shell.mind._round
    for shell.down in ({12}, set()):
        shell.run(2)
        assert shell.mind._can_wait(slots, owners)
    shell.standing.clear()
    shell.run(2)
    assert not shell.mind._can_wait(slots, owners)


def test_what_is_admitted_is_given_away_at_once_where_nothing_else_is_on_its_way() -> None:
    shell = Shell(cluster(2))
    lesson = lacking(shell, learn_rounds=1000)
    admission = says(shell.mind.view, ADMISSION, 11, lesson.slots[:2])
    held = says(shell.mind.view, HELD, 11, lesson.slots[2:])
    shell.standing[10] = Standing(
        *(np.concatenate([getattr(p, n) for p in (admission, held)]) for n in Standing.__slots__)
    )
    shell.run(5)
    assert not len(owned(shell.mind.view, 1))
    shell.standing[10] = says(shell.mind.view, ADMISSION, 11, lesson.slots)
    shell.run(2)
    assert set(lesson.slots.tolist()) <= set(owned(shell.mind.view, 1).tolist())


def test_an_unreachable_admitted_learner_is_released_by_a_new_term() -> None:
    view = cluster(3)
    shell = Shell(view)
    shell.run(1)
    slots = np.flatnonzero((view.owners()[:, 0] == 0) & ~(view.owners() == 2).any(axis=1))
    shell.standing[10] = says(view, COMPLAINT, 12, slots)
    shell.run(1)
    shell.standing.clear()
    after = shell.mind.view
    assert (after.terms()[slots] > view.terms()[slots]).all()
    assert (after.owners()[slots] == view.owners()[slots]).all()


def test_wishes_are_granted_in_turn_or_refused_in_a_sentence() -> None:
    shell = Shell(cluster(2))
    shell.mind.change("a", CreateTable("u", {}))
    shell.mind.change("b", AlterTable("nobody", {}))
    shell.perform()
    assert [(c.token, c.epoch) for c in shell.of(Changed)] == [("a", 3)]
    (refused,) = shell.of(Refused)
    assert refused.token == "b"
    assert "no table is named 'nobody'" in str(refused.error)


def test_a_wish_may_be_made_of_the_view_at_its_turn() -> None:
    shell = Shell(cluster(2))
    shell.take = False
    seen = []

    def ready(view: View) -> View:
        seen.append(view.epoch)
        return replace(view, epoch=view.epoch + 5)

    def wrong(view: View) -> None:
        raise RequestError("not so")

    shell.mind.change("first", CreateTable("u", {}))
    shell.mind.change("ready", ready)
    shell.mind.change("nothing", lambda view: None)
    shell.mind.change("wrong", wrong)
    shell.perform()
    assert seen == []  # its turn has not come
    shell.take = True
    shell.mind.logged(shell.of(Append)[0].view)
    shell.perform()
    assert seen == [3]
    assert [(a.view.epoch, a.after) for a in shell.of(Append)] == [(3, 2), (8, 3)]
    assert [(c.token, c.epoch) for c in shell.of(Changed)] == [("first", 3), ("ready", 8), ("nothing", 8)]
    assert [(r.token, str(r.error)) for r in shell.of(Refused)] == [("wrong", "not so")]


def test_servers_that_start_together_come_in_one_view() -> None:
    shell = Shell(View.empty(1, slot_bits=3))
    shell.mind.started(*(Server(f"s{i}", 10 + i, f"h{i}") for i in range(3)))
    shell.perform()
    assert shell.mind.view.epoch == 1
    assert [s.incarnation for s in shell.mind.view.servers] == [10, 11, 12]


def test_restarted_from_the_log_it_goes_on() -> None:
    shell = Shell(cluster(3))
    shell.run(2)
    shell.mind.died(11)
    shell.perform()
    again = Shell(shell.mind.view)
    again.run(10)
    assert again.mind.view.epoch >= shell.mind.view.epoch
    assert again.of(Learn)


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_last_owner_is_never_withdrawn(replicas: int) -> None:
    shell = Shell(cluster(3, replicas))
    shell.run(2)
    shell.down = {12}
    shell.run(30)
    assert (shell.mind.view.owners()[:, 0] >= 0).all()
    assert len(owned(shell.mind.view, 2)) == (len(owned(cluster(3, 1), 2)) if replicas == 1 else 0)
