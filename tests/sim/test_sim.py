"""Some runs of the simulation: no invariant is broken, a run repeats itself exactly, and planted bugs are found.

`make sim` runs as many as one likes, and all the planted bugs.
"""

import pytest

from tests.sim.plants import PLANTS
from tests.sim.runner import run, summary

SEEDS = 24
BLOCK = 8
QUICK = {  # plants that the first few runs find
    "answered_before_replicas": 3,
    "window_not_shifted": 3,
    "last_sequence_only": 3,
    "slot_in_two_frames": 3,
    "windows_not_copied": 4,
}


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_invariant_is_broken(first: int) -> None:
    for seed in range(first, first + BLOCK):
        report, _ = run(seed)
        assert not report.violation, f"python -m tests.sim --first {seed} --seeds 1: {report.violation}"
        assert report.acked >= 200


def test_a_seed_runs_the_same_again() -> None:
    one, first = run(5, trace=True)
    two, second = run(5, trace=True)
    assert first == second
    assert one == two
    assert one.faults


def test_without_faults_every_push_is_acknowledged() -> None:
    report, _ = run(1, calm=True)
    assert not report.violation
    assert report.acked >= 200
    assert not any("given up" in what for what in report.faults)


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found(name: str) -> None:
    assert any(run(seed, name)[0].violation for seed in range(QUICK[name]))


def test_there_are_plants_enough_and_each_is_undone() -> None:
    assert len(PLANTS) >= 25
    assert not run(0)[0].violation


def test_a_summary_counts_faults_and_the_steps_that_they_fell_on() -> None:
    told = summary([run(seed)[0] for seed in (3, 4)], 1.0)
    assert told["acknowledged"] >= 400  # type: ignore[operator]
    assert told["failed"] == []
    assert told["cells_hit"] > 0  # type: ignore[operator]
