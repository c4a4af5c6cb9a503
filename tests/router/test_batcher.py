"""Micro-batching: what travels together, when it leaves, and what is refused."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import NotApplied, Overloaded
from router.batcher import Batcher

LIMIT_S = 20.0
"""Deadline of a whole test; none comes near it."""


class Line:
    """A runner that shows its batches and holds each until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gates: list[asyncio.Event] = []
        self.began = asyncio.Condition()

    async def run(self, items: list[int]) -> list[int]:
        gate = asyncio.Event()
        self.batches.append(items)
        self.gates.append(gate)
        async with self.began:
            self.began.notify_all()
        await gate.wait()
        return [item * 10 for item in items]

    async def batches_begun(self, n: int) -> None:
        async with self.began:
            await self.began.wait_for(lambda: len(self.batches) >= n)

    def release(self) -> None:
        for gate in self.gates:
            gate.set()


def make(
    line: Line, rows_max: int = 8, wait_s: float = 3600.0, queue: int = 100, batches: int = 2
) -> Batcher[int, int]:
    return Batcher(line.run, rows_max=rows_max, wait_s=wait_s, queue_rows_max=queue, batches_max=batches)


def within(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test()

    asyncio.run(limited())


def test_a_lone_request_waits_for_nobody_and_requests_that_come_together_leave_together() -> None:
    async def test() -> None:
        line = Line()
        batcher = make(line)
        tasks = [asyncio.create_task(batcher.submit(i, 1)) for i in range(3)]
        await line.batches_begun(1)
        assert line.batches == [[0, 1, 2]]
        line.release()
        assert await asyncio.gather(*tasks) == [0, 10, 20]

    within(test)


def test_while_a_batch_is_on_its_way_the_next_leaves_when_full() -> None:
    async def test() -> None:
        line = Line()
        batcher = make(line, rows_max=8)
        first = asyncio.create_task(batcher.submit(0, 1))
        await line.batches_begun(1)
        rest = [asyncio.create_task(batcher.submit(i, 3)) for i in (1, 2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(line.batches) == 1  # six rows wait for company: the wait is an hour
        rest.append(asyncio.create_task(batcher.submit(3, 3)))
        await line.batches_begun(2)
        assert line.batches == [[0], [1, 2]]  # nine rows would not fit
        assert batcher.queued_rows == 3
        line.release()
        await asyncio.gather(first, *rest[:2])
        await line.batches_begun(3)
        line.release()
        assert await rest[2] == 30

    within(test)


def test_the_oldest_request_waits_no_longer_than_the_maximum() -> None:
    async def test() -> None:
        line = Line()
        batcher = make(line, wait_s=0.02)
        tasks = [asyncio.create_task(batcher.submit(0, 1))]
        await line.batches_begun(1)
        tasks.append(asyncio.create_task(batcher.submit(1, 1)))
        await line.batches_begun(2)  # though the first is still on its way and the second is not full
        line.release()
        await asyncio.gather(*tasks)

    within(test)


def test_no_more_batches_than_allowed_are_on_their_way() -> None:
    async def test() -> None:
        line = Line()
        batcher = make(line, rows_max=1, batches=2)
        tasks = [asyncio.create_task(batcher.submit(i, 1)) for i in range(3)]
        await line.batches_begun(2)
        assert line.batches == [[0], [1]]
        line.gates[0].set()
        await line.batches_begun(3)
        line.release()
        await asyncio.gather(*tasks)

    within(test)


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    async def test() -> None:
        line = Line()
        batcher = make(line, rows_max=4, queue=4, batches=1)
        tasks = [asyncio.create_task(batcher.submit(0, 4))]
        await line.batches_begun(1)
        tasks.append(asyncio.create_task(batcher.submit(1, 3)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 rows are waiting; 2 more would exceed the limit of 4"):
            await batcher.submit(2, 2)
        line.release()
        await line.batches_begun(2)
        line.release()
        assert await asyncio.gather(*tasks) == [0, 10]

    within(test)


def test_who_gives_up_leaves_the_queue() -> None:
    async def test() -> None:
        line = Line()
        batcher = make(line, rows_max=4, batches=1)
        first = asyncio.create_task(batcher.submit(0, 4))
        await line.batches_begun(1)
        hurried, patient = (asyncio.create_task(batcher.submit(i, 2)) for i in (1, 2))
        await asyncio.sleep(0)
        hurried.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hurried
        assert batcher.queued_rows == 2
        line.release()
        await line.batches_begun(2)
        assert line.batches[1] == [2]
        line.release()
        assert await asyncio.gather(first, patient) == [0, 20]

    within(test)


def test_what_a_batch_raises_reaches_each_of_its_requests_and_no_other() -> None:
    async def test() -> None:
        async def run(items: list[int]) -> list[int]:
            if 1 in items:
                raise Overloaded("the servers are busy")
            return items

        batcher: Batcher[int, int] = Batcher(run, rows_max=2, wait_s=0.0, queue_rows_max=9, batches_max=1)
        answers = await asyncio.gather(*(batcher.submit(i, 1) for i in range(3)), return_exceptions=True)
        assert [type(a) for a in answers] == [Overloaded, Overloaded, int]

    within(test)


def test_closing_ends_what_waits_and_lets_finish_what_is_on_its_way() -> None:
    async def test() -> None:
        line = Line()
        batcher = make(line, rows_max=1, batches=1)
        going, waiting = (asyncio.create_task(batcher.submit(i, 1)) for i in range(2))
        await line.batches_begun(1)
        closing = asyncio.create_task(batcher.close())
        with pytest.raises(NotApplied, match="closing"):
            await waiting
        line.release()
        await closing
        assert await going == 0
        with pytest.raises(NotApplied, match="closing"):
            await batcher.submit(5, 1)

    within(test)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    rows_max=st.integers(1, 16),
    batches_max=st.integers(1, 3),
    pauses=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_every_request_is_answered_once_in_batches_within_the_limit(
    sizes: list[int], rows_max: int, batches_max: int, pauses: list[bool]
) -> None:
    seen: list[list[int]] = []
    going = [0, 0]

    async def run(items: list[int]) -> list[int]:
        going[0] += 1
        going[1] = max(going)
        seen.append(items)
        await asyncio.sleep(0)
        going[0] -= 1
        return [-item for item in items]

    async def test() -> None:
        batcher: Batcher[int, int] = Batcher(
            run, rows_max=rows_max, wait_s=0.001, queue_rows_max=10_000, batches_max=batches_max
        )
        tasks = []
        for i, size in enumerate(sizes):
            tasks.append(asyncio.create_task(batcher.submit(i, size)))
            if pauses[i]:
                await asyncio.sleep(0)
        assert await asyncio.gather(*tasks) == [-i for i in range(len(sizes))]
        assert batcher.queued_rows == 0

    within(test)
    assert [i for batch in seen for i in batch] == list(range(len(sizes)))  # in their order
    assert all(len(batch) == 1 or sum(sizes[i] for i in batch) <= rows_max for batch in seen)
    assert going[1] <= batches_max
