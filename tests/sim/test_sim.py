"""Some runs of the simulation: no invariant is broken, a run repeats itself exactly, and planted bugs are found.

`make sim` runs as many as one likes, and all the planted bugs.
"""

import inspect
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import pytest

from tests.sim.plants import PLANTS
from tests.sim.runner import hunt, run, run_block, runs, summary, workers

SEEDS = 120
BLOCK = 10
QUICK = {  # plants that the first few runs find
    "answered_before_replicas": 3,
    "window_not_shifted": 3,
    "last_sequence_only": 3,
    "slot_in_two_frames": 3,
    "former_primary_takes_pushes": 3,
    "checkpoint_cut_through_a_push": 3,
}
JOBS = max(1, min(4, os.cpu_count() or 1))


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with workers(JOBS) as processes:
        yield processes


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_invariant_is_broken(pool: Executor, first: int) -> None:
    told = summary(list(runs(pool, first, BLOCK, 2 * JOBS)), 1.0)
    assert told["failed"] == []  # python -m tests.sim --first SEED --seeds 1 --trace
    assert told["acknowledged_min"] >= 200  # type: ignore[operator]
    assert told["cells_hit"] > 25  # type: ignore[operator]


def test_a_seed_runs_the_same_again_in_any_process(pool: Executor) -> None:
    one, first = run(5, trace=True)
    two, second = run(5, trace=True)
    assert first == second
    assert one == two
    assert one.faults
    (three,) = pool.submit(run_block, [5]).result(timeout=300)
    assert three == one


def test_without_faults_every_push_is_acknowledged() -> None:
    report, _ = run(1, calm=True)
    assert not report.violation
    assert report.acked >= 200
    assert not any("given up" in what for what in report.faults)


def test_planted_bugs_are_found(pool: Executor) -> None:
    found = hunt(pool, list(QUICK), 0, max(QUICK.values()), JOBS)
    assert {name: runs for name, runs in found.items() if not 0 < runs <= QUICK[name]} == {}


@pytest.mark.parametrize("name", PLANTS)
def test_what_a_plant_patches_is_there_and_called_as_before(name: str) -> None:
    def patch(owner: Any, attribute: str, new: Any) -> None:
        old = owner.__dict__[attribute]
        if callable(old):
            needed = [p.name for p in inspect.signature(old).parameters.values() if p.default is p.empty]
            inspect.signature(new).bind(*needed)

    PLANTS[name](patch)


def test_there_are_plants_enough_and_each_is_undone() -> None:
    assert len(PLANTS) >= 50
    before = run(0)[0]
    assert run(0, "answered_before_replicas")[0] != before
    assert run(0)[0] == before
