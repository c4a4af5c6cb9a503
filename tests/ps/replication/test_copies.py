"""Copies to learners: they go on across views, at a limited rate, and hold up nobody."""

from dataclasses import replace

import numpy as np

from hashring.planner import Renew, plan
from hashring.view import Move
from ps.replication import ADMISSION, ReplicationLimits
from tests.ps.replication.test_machine import IDS, Trio

SOME = np.array([1, 2, 3])


def filled(limits: ReplicationLimits, rows: int = 200) -> Trio:
    trio = Trio(limits)
    trio.push(1, 1, list(range(rows)))
    trio.deliver()
    return trio


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
