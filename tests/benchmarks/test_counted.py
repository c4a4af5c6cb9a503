"""The load whose pushes name themselves: it finds what was lost, doubled, unseen and late."""

import asyncio
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.counted import PROBED, TABLE, Counted, Trace, make_table
from benchmarks.suites.chaos import CHANGES, ROUNDS, STEPS
from ps.client import AsyncClient
from ps.errors import NotApplied

sys.path.append(str(Path(__file__).parents[1] / "ps"))
from tests.ps.cluster_fixture import local_cluster

ROWS, DIM = 3000, 2


def test_a_load_finds_nothing_wrong_and_then_what_is_planted(tmp_path: Path) -> None:
    with local_cluster(tmp_path, 2) as cluster, cluster.client() as client:
        make_table(client, ROWS, DIM, 2)
        load = Counted(cluster.view, ROWS, DIM)

        async def run() -> None:
            others = [await cluster.async_client() for _ in range(2)]
            stop = asyncio.Event()
            running = asyncio.create_task(load.run(others, 400.0, stop))
            while len(load.trace.due) < 200:
                await asyncio.sleep(0.01)
            stop.set()
            await running
            for other in others:
                await other.close()

        asyncio.run(asyncio.wait_for(run(), 90))
        found = load.check(client)
        assert (found["lost"], found["doubled"], found["unseen"]) == (0, 0, 0)
        assert found["pushes"] > found["pushed_to"] / 2 > 0
        assert set(load.trace.kinds) == {"pull", "push", "probe"}
        assert 0 < len(load.trace.longest(0.0, 1e12)) <= PROBED
        touched = np.flatnonzero(load.sent)
        client.push(TABLE, touched[:3], np.full((3, DIM), 1.0))  # takes three additions back
        client.push(TABLE, touched[3:5], np.full((2, DIM), -1.0))  # adds two more
        found = load.check(client)
        assert (found["lost"], found["doubled"]) == (3, 2)


def test_requests_that_fail_or_miss_a_push_are_counted(tmp_path: Path) -> None:
    with local_cluster(tmp_path, 1) as cluster, cluster.client() as client:
        make_table(client, ROWS, DIM, 1)
        load = Counted(cluster.view, ROWS, DIM)
        load.acknowledged += 1  # as if every row had been pushed to: each pull misses that

        class Deaf(AsyncClient):
            async def push(self, *args: object, **kwargs: object) -> None:
                raise NotApplied("as you wish")

        async def run() -> None:
            other = await Deaf.connect(cluster.addresses, "the-token-of-the-tests")
            for number in range(60):
                await load.request(other, number, time.perf_counter(), load.trace)
            await other.close()

        asyncio.run(run())
        pulls = load.trace.kinds.count("pull")
        assert load.unseen == pulls > 0
        assert load.trace.wrong.count(True) >= 60 - pulls
        assert load.trace.errors[0].endswith("NotApplied: as you wish")


def test_figures_are_of_the_requests_that_were_due_between_two_moments() -> None:
    trace = Trace(
        kinds=["pull", "push", "probe", "push", "pull"],
        due=[1.0, 2.0, 3.0, 4.0, 9.0],
        lag=[0.0, 0.0, 2.4, 0.0, 0.0],
        took=[0.1, 0.1, 2.5, 0.05, 9.0],
        wrong=[False, True, False, False, False],
        probed=[5, 5, 7, 5, 5],
    )
    found = trace.between(0.5, 4.5)
    assert (found["requests"], found["failed"], found["pushes_per_s"]) == (4, 2, 0.2)
    assert found["failed_once_begun"] == 1  # the probe was late by the load's own lag alone
    assert found["lag"]["p99_ms"] > 2000
    assert found["pull"]["p50_ms"] == 100.0
    assert trace.longest(5.0, 6.0) == {7: 2.5}  # begun before, and still under way
    assert trace.longest(5.6, 6.0) == trace.longest(2.0, 3.0) == {}


def test_every_round_of_chaos_names_a_step_that_a_status_can_be_at() -> None:
    calm = {"starting": (), "servers": [{"state": "alive"}], "slots_left": 0, "slots_learning": 0, "move": None}
    assert {one.step for one in ROUNDS} == {*STEPS, "saving"}
    assert {one.change for one in ROUNDS} == set(CHANGES)
    assert not STEPS["starting"](calm)
    assert not STEPS["copying"](calm)
    assert STEPS["copying"]({**calm, "slots_left": 3})
    assert STEPS["ending"]({**calm, "servers": [{"state": "ending"}]})
