"""Copies to learners: they go on across views, at a limited rate, and hold up nobody."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hashring.planner import Reassign, Renew, plan
from hashring.view import Move
from ps.kernels.replicate import COPIED, IDLE, JOINING, LEARNING
from ps.replication import ADMISSION, COMPLAINT, HELD, LESSON, ReplicationLimits, Send
from ps.replication.copies import row_bytes
from ps.replication.links import GATHER_S, Link
from tests.ps.replication.test_machine import IDS, Trio
from tests.ps.store_helpers import push_share

SOME = np.array([1, 2, 3])


def filled(limits: ReplicationLimits, rows: int = 200, owners: tuple[int, ...] = (0, 1), servers: int = 3) -> Trio:
    trio = Trio(limits, owners, servers)
    trio.push(1, 1, list(range(rows)))
    trio.deliver()
    return trio


def bounded(trio: Trio, block_max: int) -> None:
    """No frame carries more rows than so many bytes."""
    for machine in trio.machines.values():
        machine.store.held.block_max = block_max


def learned(trio: Trio, most: int, change: Callable[[int], None] = lambda turn: None) -> list[int]:
    """3 is admitted as a learner while things change; the bytes of what was sent to it with rows."""
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    for turn in range(most):
        carry(trio, 1)
        change(turn)
        trio.tick(1)
        trio.down = {3}
        trio.deliver()
        trio.down = set()
        if trio.kinds(1).get(ADMISSION) == {0, 1, 2, 3}:
            break
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    trio.equal(1, 2, 3)
    sends = [action for source, action in trio.sent if isinstance(action, Send) and action.peer == 3]
    return [sum(a.nbytes for a in action.arrays.values()) for action in sends if action.op in ("replicate", "repair")]


def test_a_copy_of_what_changes_all_the_time_keeps_to_what_a_frame_carries() -> None:
    trio = filled(ReplicationLimits(copy_bytes=1000, bulk_bytes_max=600, block_bytes_max=500), rows=400)
    bounded(trio, 3000)

    def change(turn: int) -> None:
        if turn < 12:
            for half in (0, 1):
                trio.push(1, 2 * turn + half + 2, list(range(200 * half, 200 * half + 200)))

    sizes = learned(trio, 400, change)
    assert max(sizes) <= 3300
    assert len(sizes) > 10


def test_a_copy_of_a_table_from_which_much_is_deleted_all_the_time_comes_to_its_end() -> None:
    trio = filled(ReplicationLimits(copy_bytes=640, bulk_bytes_max=600), rows=1200)
    left = list(range(1200))

    def change(turn: int) -> None:
        gone = [left.pop() for _ in range(min(len(left) - 100, 30))]  # of 64 that are remembered
        trio.push(1, turn + 2, IDS)
        if gone:
            share = push_share(1000 + turn, [1], [gone], np.empty(0), kind="delete", client=2)
            trio.machines[1].push(("delete", turn), share)

    learned(trio, 400, change)
    assert len(left) < 700


def test_a_learner_that_is_level_is_admitted_though_the_answer_to_its_repair_was_lost_and_nobody_pushes() -> None:
    """As blocks that were on their way when its fork was asked have made it so."""
    trio = filled(ReplicationLimits(copy_bytes=640, bulk_bytes_max=10**6))
    learned(trio, 100)
    primary = trio.machines[1]._primary
    (link,) = (link for link in primary.links.values() if link.incarnation == 3)
    slots, columns = primary.members.where(link.index)
    primary.members.ranks[slots, columns], primary.members.modes[slots, columns] = LEARNING, IDLE
    link.untidy = True
    assert ADMISSION not in trio.kinds(1)
    trio.tick(1)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}


def test_a_repair_that_no_frame_carries_is_sent_by_slots_and_a_slot_of_it_copied_in_parts() -> None:
    trio = filled(ReplicationLimits(copy_bytes=640, bulk_bytes_max=10**6), rows=400)
    learned(trio, 100)
    bounded(trio, 4500)
    link = trio.machines[1]._primary.links[2]
    trio.machines[1].broken(2, link.number)
    trio.down = {2}
    trio.push(1, 2, list(range(400)))
    trio.tick(1)
    trio.down = set()
    trio.deliver()
    repairs = [a for _, a in trio.sent if isinstance(a, Send) and a.op == "repair" and a.peer == 2]
    assert len(repairs) == 4
    assert all(sum(array.nbytes for array in a.arrays.values()) <= 4500 for a in repairs)
    trio.equal(1, 2)
    bounded(trio, 2000)
    trio.machines[1].broken(2, link.number)
    trio.down = {2}
    trio.push(1, 3, list(range(400)))
    trio.tick(1)
    trio.down = set()
    trio.deliver()
    assert trio.kinds(1)[COMPLAINT] == {0, 1, 2, 3}  # an owner leaves, and comes back by a copy


def rows_in(trio: Trio, slots: np.ndarray) -> int:
    return sum(int(arena.counts(slots).sum()) for arena in trio.machines[1].store.held.registry.arenas)


def carry(trio: Trio, requests: int) -> None:
    """Deliver so many requests from 1 to 3."""
    for _ in range(requests):
        trio.collect()
        queue = trio.wires.get((1, 3), [])
        if queue:
            trio._carry(1, 3, queue.pop(0))


def test_a_copy_goes_on_across_views_that_leave_its_slots_alone() -> None:
    trio = filled(ReplicationLimits(copy_bytes=64, bulk_bytes_max=600))
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    for _ in range(5):
        carry(trio, 3)
        trio.install(plan(trio.view, Renew(np.array([0]))), 1, 2, 3)
    assert ADMISSION not in trio.kinds(1) or trio.kinds(1)[ADMISSION] < {1, 2, 3}
    trio.deliver()
    trio.tick(1)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {1, 2, 3}}
    assert trio.machines[1].copied[0] == rows_in(trio, SOME)  # each row once


def test_a_copy_whose_slot_begins_a_new_term_ends_there_and_the_others_arrive() -> None:
    trio = filled(ReplicationLimits(copy_bytes=64, bulk_bytes_max=600))
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    carry(trio, 3)
    trio.install(plan(trio.view, Renew(np.array([3]))), 1, 2, 3)
    for _ in range(5):
        trio.deliver()
        trio.tick(1)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {1, 2}}


def moving(limits: ReplicationLimits, rows: int = 200, owners: tuple[int, ...] = (0, 1), servers: int = 3) -> Trio:
    """While servers join or leave."""
    trio = filled(limits, rows, owners, servers)
    trio.install(replace(trio.view, epoch=trio.view.epoch + 1, move=Move("join", ("s9",), 0)), *trio.machines)
    trio.deliver()
    return trio


def slot_of(trio: Trio, number: int) -> int:
    """Where an id of the table lies."""
    share = push_share(1, [1], [[number]], np.empty(0), kind="delete")
    return int(trio.machines[1].store.slots_of(share)[0])


def sent_to_learner(trio: Trio) -> list[Send]:
    """Rows that were sent to 3."""
    return [a for _, a in trio.sent if isinstance(a, Send) and a.peer == 3 and "0.ids" in a.arrays]


def test_a_learner_is_told_what_changed_once_all_its_slots_are_there_and_not_push_by_push() -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1))
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    pushes = 0
    while trio.machines[1].copied[0] < rows_in(trio, SOME):
        carry(trio, 1)
        pushes += 1
        trio.push(1, pushes + 1, IDS)
    assert pushes > 2
    copy, rows = sent_to_learner(trio), trio.machines[1].copied[0]
    assert sum(len(a.arrays["0.ids"]) for a in copy) == rows  # each row once, though all of IDS changed with every push
    trio.deliver()
    catch_up = sent_to_learner(trio)[len(copy) :]
    assert [a.op for a in catch_up] == ["repair"] * len(SOME)  # of no more than one slot, as a part of a copy is
    assert trio.kinds(1) == {ADMISSION: {1, 2, 3}}
    token = trio.push(1, pushes + 2, IDS)
    trio.deliver()
    assert token in trio.answers
    assert sent_to_learner(trio)[-1].op == "replicate"


def rested(trio: Trio, change: Callable[[int], None] = lambda turn: None) -> None:
    """3 is told of all slots, and stays away before it has taken the last part of the copy."""
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    for turn in range(100):
        carry(trio, 1)
        change(turn)
        if trio.machines[1].copied[0] == rows_in(trio, np.arange(4)):
            break
    trio.down = {3}
    trio.deliver()
    trio.down = set()
    assert (trio.machines[1].members.modes == COPIED).sum() == 4


def admitted(trio: Trio, most: int = 400) -> int:
    """Ticks until all slots are admitted at 3; nobody pushes."""
    ticks = 0
    trio.deliver()
    while trio.kinds(1).get(ADMISSION) != {0, 1, 2, 3} and ticks < most:
        trio.tick(1)
        trio.deliver()
        ticks += 1
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    trio.equal(1, 2, 3)
    return ticks


def at_rate(trio: Trio, limits: ReplicationLimits) -> None:
    """From now on."""
    machine = trio.machines[1]
    machine.limits = machine._primary.limits = machine._primary.copies.limits = limits


def dropped(trio: Trio) -> None:
    """And learned again: 3 still has what it was given."""
    trio.machines[1]._primary.drop_learner(trio.machines[1]._primary.links[3])
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)


def link_breaks(trio: Trio) -> None:
    """3 has taken what it was sent, and its answers are lost."""
    for action in trio.wires[1, 3]:
        trio.machines[3].request(action.op, action.fields, action.arrays)
    trio.machines[1].broken(3, trio.machines[1]._primary.links[3].number)
    trio.wires[1, 3] = []


@pytest.mark.parametrize("event", [lambda trio: None, dropped, link_breaks])
def test_what_changed_while_copies_rested_is_sent_a_lot_at_a_time_and_at_the_rate_of_copies(
    event: Callable[[Trio], None],
) -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1, copy_bytes_per_s=10**9))
    rested(trio)
    for sequence in range(2, 12):
        trio.push(1, sequence, list(range(200)))
    before = len(sent_to_learner(trio))
    at_rate(trio, ReplicationLimits(bulk_bytes_max=2000, copy_bytes_per_s=4000))
    event(trio)
    most = ticks = 0
    while trio.kinds(1).get(ADMISSION) != {0, 1, 2, 3} and ticks < 400:
        carry(trio, 1)
        trio.tick(1)
        ticks += 1
        link = trio.machines[1]._primary.links[3]
        most = max(most, link.owed)
        assert trio.machines[1].copying == (link.late_copies > 0)
    repairs = sent_to_learner(trio)[before:]
    size = sum(a.nbytes for action in repairs for a in action.arrays.values())
    assert {a.op for a in repairs} == {"repair"}
    assert most < size / 2
    assert size <= (ticks + 6) * 0.05 * 4000 + most
    assert admitted(trio) == 0


def test_slots_rest_on_while_what_changed_before_is_sent() -> None:
    """And are streamed to once only the changes of that time are left."""
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1))
    rested(trio)
    trio.push(1, 2, list(range(200)))
    before = len(sent_to_learner(trio))
    sequence = 2
    while trio.kinds(1).get(ADMISSION) != {0, 1, 2, 3} and sequence < 100:
        carry(trio, 2)
        sequence += 1
        trio.push(1, sequence, [0])
        trio.tick(1)
    changing = slot_of(trio, 0)
    sent = [(a.op, a.arrays["slots"].tolist(), len(a.arrays["0.ids"])) for a in sent_to_learner(trio)[before:]]
    first = next(i for i, (op, _, _) in enumerate(sent) if op == "replicate")
    once = [slots for _, slots, _ in sent[:first] if slots != [changing]]
    assert sorted(slot for slots in once for slot in slots) == sorted({0, 1, 2, 3} - {changing})
    again = [rows for _, slots, rows in sent[:first] if slots == [changing]]
    assert len(again) == 2
    assert again[0] > again[1] == 1
    trio.deliver()
    assert admitted(trio) < 20


def test_late_copies_go_no_faster_while_requests_wait_at_the_learner() -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1))
    copies, link = trio.machines[1]._primary.copies, Link(3, 0, late_copies=1)
    rates = []
    for link.late in (0.0, 0.1):
        for _ in range(20):
            copies.tick([link], 0.05, 0.0)
        rates.append(copies.pace.rate)
    assert rates[0] > 2 * rates[1]


@pytest.mark.parametrize("together", [True, False])
def test_while_servers_move_the_copies_of_one_learner_wait_for_those_of_another(together: bool) -> None:
    limits = ReplicationLimits(copy_bytes=200, copy_bytes_per_s=4000)
    trio = moving(limits, rows=800, servers=4) if together else filled(limits, rows=800, servers=4)
    trio.tick(1)
    trio.machines[1].learn(np.array([0]), 4, trio.view.epoch)
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    seen: list[set[int]] = []
    for sequence in range(2, 400):
        trio.deliver()
        seen.append(set(trio.kinds(1).get(ADMISSION, ())))
        if seen[-1] == {0, 1, 2, 3}:
            break
        trio.push(1, sequence, IDS)
        trio.tick(1)
    assert seen[-1] == {0, 1, 2, 3}
    first = next(i for i, slots in enumerate(seen) if 0 in slots)
    assert first > len(seen) * 0.9 if together else first < len(seen) * 0.85


def test_a_learner_that_does_not_answer_is_not_waited_for() -> None:
    trio = moving(ReplicationLimits(copy_bytes=200, bulk_bytes_max=1), rows=800, servers=4)
    trio.down = {4}
    trio.machines[1].learn(np.array([0]), 4, trio.view.epoch)
    trio.wires.setdefault((1, 4), [])
    trio.collect()
    trio._carry(1, 4, trio.wires[1, 4].pop(0))  # its fork: a copy is on its way to it then
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    trio.deliver()
    assert ADMISSION not in trio.kinds(1)
    assert trio.machines[1]._primary.links[4].bulk_bytes
    for _ in range(20):
        trio.tick(1)
        trio.deliver()
    assert trio.kinds(1)[ADMISSION] == {1, 2, 3}


def test_what_is_copied_elsewhere_is_waited_for_as_the_controller_says() -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1))
    machine = trio.machines[1]
    machine.learn(SOME, 3, trio.view.epoch)
    assert machine.pinged({"copying": True}).kinds.tolist() == [LESSON] * 3
    trio.deliver()
    trio.tick(1, times=10)
    trio.deliver()
    assert trio.kinds(1) == {HELD: {1, 2, 3}}
    machine.pinged({})  # a client's
    trio.tick(1)
    trio.deliver()
    assert trio.kinds(1) == {HELD: {1, 2, 3}}
    machine.pinged({"copying": False})
    trio.tick(1)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {1, 2, 3}}


def test_the_end_of_one_learners_rest_is_not_that_of_another() -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1), servers=4)
    machine = trio.machines[1]
    machine.pinged({"copying": True})
    machine.learn(SOME, 3, trio.view.epoch)
    trio.deliver()
    trio.tick(1, times=round(GATHER_S / 0.05 / 2))
    machine.learn(SOME, 4, trio.view.epoch)
    trio.deliver()
    trio.tick(1, times=round(GATHER_S / 0.05 / 2) + 4)
    trio.deliver()
    members, link = machine.members, machine._primary.links[4]
    assert trio.kinds(1) == {ADMISSION: {1, 2, 3}, HELD: {1, 2, 3}}
    assert ((members.modes == COPIED) & (members.peers == link.index)).sum() == 3


def test_who_is_waited_for_is_mended_at_once_and_at_nobodys_expense() -> None:
    """However much of the bandwidth for copies was spent."""
    trio = filled(ReplicationLimits(copy_bytes=640, bulk_bytes_max=10**6))
    learned(trio, 100)
    machine = trio.machines[1]
    for peer in (2, 3):
        machine.broken(peer, machine._primary.links[peer].number)
    trio.push(1, 2, list(range(200)))
    machine._primary.copies.pace.allowance = spent = -1e9
    machine.tick(0.0)
    trio.deliver()
    trio.equal(1, 2, 3)
    assert machine._primary.copies.pace.allowance == spent


def test_slots_that_are_deleted_from_do_not_rest_until_their_deletions_are_forgotten() -> None:
    trio = moving(ReplicationLimits(copy_bytes=200, bulk_bytes_max=1), rows=1200)
    copied = rows_in(trio, np.arange(4))

    def change(turn: int) -> None:
        gone = [3 * turn, 3 * turn + 1, 3 * turn + 2]  # of 64 deletions that are remembered
        trio.machines[1].push(("gone", turn), push_share(1000 + turn, [1], [gone], np.empty(0), kind="delete"))
        trio.push(1, turn + 2, gone)

    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    for turn in range(200):
        carry(trio, 4)
        change(turn)
        trio.down = {3}
        trio.tick(1)
        trio.deliver()
        trio.down = set()
        if trio.kinds(1).get(ADMISSION) == {0, 1, 2, 3}:
            break
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    assert trio.machines[1].copied[0] <= copied
    assert trio.machines[1]._primary.copies.made == 1


def test_a_lesson_more_does_not_end_the_rest_of_what_was_copied_before() -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1))
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    while not (trio.machines[1].members.modes == COPIED).any():
        carry(trio, 1)
    rests = np.argwhere(trio.machines[1].members.modes == COPIED)
    trio.push(1, 2, IDS)
    trio.machines[1].learn(np.array([0]), 3, trio.view.epoch)
    carry(trio, 1)
    assert (trio.machines[1].members.modes[tuple(rests.T)] == COPIED).all()
    assert admitted(trio) < 20


def move_ends(trio: Trio) -> None:
    trio.install(replace(trio.view, epoch=trio.view.epoch + 1, move=None), 1, 2, 3)


@pytest.mark.parametrize("event", [move_ends, link_breaks, dropped])
def test_copies_that_rest_are_brought_up_to_date_whatever_happens_meanwhile(event: Callable[[Trio], None]) -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1))
    rested(trio)
    trio.push(1, 2, IDS)
    event(trio)
    assert admitted(trio) < 20
    if event is move_ends:
        assert trio.machines[1].copied[0] == rows_in(trio, np.arange(4))


def test_slots_that_were_copied_do_not_wait_for_the_others_for_ever() -> None:
    trio = moving(ReplicationLimits(copy_bytes=64, copy_bytes_per_s=100))
    trio.tick(1)
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    trio.deliver()
    for ticks in range(4000):
        trio.tick(1)
        trio.push(1, ticks + 2, IDS)
        trio.deliver()
        if ADMISSION in trio.kinds(1):
            break
    assert ticks >= GATHER_S / 0.05
    assert trio.kinds(1)[ADMISSION] < {1, 2, 3}


def test_slots_that_lack_a_copy_do_not_wait_for_others_while_servers_join() -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1), owners=(0,))
    trio.machines[1].learn(SOME, 3, trio.view.epoch)
    for _ in range(10):
        carry(trio, 1)
        if ADMISSION in trio.kinds(1):
            break
    assert trio.kinds(1)[ADMISSION] < {1, 2, 3}


def test_copies_keep_to_the_rate_of_the_settings_and_of_the_move() -> None:
    for rate, move in ((4000, None), (10**9, Move("join", ("s9",), 4000))):
        trio = filled(ReplicationLimits(copy_bytes=64, copy_bytes_per_s=rate))
        if move is not None:
            trio.install(replace(trio.view, epoch=trio.view.epoch + 1, move=move), 1, 2, 3)
            trio.deliver()
        trio.tick(1)
        trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
        block = 0
        for ticks in range(1, 400):
            trio.deliver()
            trio.tick(1)
            now = trio.machines[1].copied[1]
            block = max(block, now and 700)
            assert now <= (ticks + 4) * 0.05 * 4000 + block
            if trio.kinds(1).get(ADMISSION) == {0, 1, 2, 3}:
                break
        assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
        assert ticks > 10
        assert trio.machines[1].copied[0] == rows_in(trio, np.arange(4))


def test_a_learner_that_falls_behind_is_dropped_before_a_push_is_refused() -> None:
    trio = filled(ReplicationLimits(queue_bytes_max=1500), rows=20)
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    carry(trio, 1)  # the fork: then all of the copy is on its way, and changes follow it
    trio.collect()
    trio.down = {3}
    for sequence in range(2, 12):
        token = trio.push(1, sequence, IDS)
        trio.deliver()
        assert trio.answers[token] == {"applied": 4, "seen": 0, "rows_new": 0}
    assert trio.kinds(1) == {}
    trio.down = set()
    trio.deliver()
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    trio.equal(1, 2, 3)


@pytest.mark.parametrize(("changed", "lots"), [(IDS, [1, 3]), (list(range(200)), [1, 1, 1, 1])])
def test_lots_are_of_more_slots_where_few_of_their_rows_have_changed(changed: list[int], lots: list[int]) -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1, copy_bytes_per_s=10**9))
    rested(trio)
    trio.push(1, 2, changed)
    before = len(sent_to_learner(trio))
    one_slot = 60 * (row_bytes(trio.machines[1].store) + 8)
    at_rate(trio, ReplicationLimits(bulk_bytes_max=one_slot, copy_bytes_per_s=10**9))
    admitted(trio)
    assert [len(a.arrays["slots"]) for a in sent_to_learner(trio)[before:]] == lots


def test_a_learner_that_is_waited_for_is_mended_apart_from_lots_and_at_no_cost_to_copies() -> None:
    trio = moving(ReplicationLimits(copy_bytes=1500, bulk_bytes_max=1))
    rested(trio)
    trio.push(1, 2, list(range(200)))
    primary = trio.machines[1]._primary
    column = primary.members.column_of(np.array([0]), primary.links[3].index)[0]
    primary.members.ranks[0, column] = JOINING
    before, allowance = len(sent_to_learner(trio)), primary.copies.pace.allowance
    at_rate(trio, ReplicationLimits(bulk_bytes_max=10**6))
    trio.deliver()
    (mended, lot) = (a for a in sent_to_learner(trio)[before:] if a.op == "repair")
    assert mended.arrays["slots"].tolist() == [0]
    assert lot.arrays["slots"].tolist() == [1, 2, 3]
    assert allowance - primary.copies.pace.allowance == sum(a.nbytes for a in lot.arrays.values())


def test_a_learner_says_how_many_copy_to_it() -> None:
    trio = Trio(ReplicationLimits(copy_bytes=200, bulk_bytes_max=1), servers=4)
    apart = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.int16)  # of two slots 1 is primary, of two 2
    trio.install(plan(trio.view, Reassign(np.arange(4), apart)), *trio.machines)
    trio.deliver()
    for at in (1, 2):
        slots = np.flatnonzero(apart[:, 0] == at - 1)
        ids = [i for i in range(400) if slot_of(trio, i) in slots]
        trio.push(at, 1, ids[:100], token=("fill", at))
    trio.deliver()
    for at in (1, 2):
        trio.machines[at].learn(np.flatnonzero(apart[:, 0] == at - 1), 3, trio.view.epoch)
    trio.deliver()
    links = [trio.machines[at]._primary.links[3] for at in (1, 2)]
    assert max(link.sources for link in links) == 2
    trio.tick(3, times=100)
    none = np.empty(0, np.int64)
    asked = {"slots": none, "positions": none, "lineage": none, "offsets": np.zeros(1, np.int64)}
    assert trio.machines[3].request("fork", {"from": 1, "link": 99}, asked)[0]["sources"] == 0
