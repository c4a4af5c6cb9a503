"""Micro-batching: requests that wait for the same model travel together.

A batch leaves when nothing is on its way, when it is full, or when its oldest request has waited long enough; at most
`batches_max` are on their way at once. So a lone request waits for nobody, and under load batches fill by themselves.
What waits is bounded in rows: beyond, `Overloaded`, and nothing was queued.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ps.errors import NotApplied, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")

Run = Callable[[list[Item]], Awaitable[list[Result]]]
"""Answers a batch: one result for each item, in order."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    rows: int
    arrived: float
    answer: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Batches for one model. Lives on one event loop; every method is called there.

    Order of arrival is kept. A request of more than `rows_max` rows travels alone. A request whose caller gives up
    (cancels `submit`) leaves the queue at once.
    """

    def __init__(
        self, run: Run[Item, Result], *, rows_max: int, wait_s: float, queue_rows_max: int, batches_max: int
    ) -> None:
        self._run = run
        self._rows_max = rows_max
        self._wait_s = wait_s
        self._queue_rows_max = queue_rows_max
        self._batches_max = batches_max
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._queued_rows = 0
        self._batches: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._closed = False

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._queued_rows

    async def submit(self, item: Item, rows: int) -> Result:
        """The result of `item`, or what its batch raised. Overloaded, naming the limit, where the queue is full."""
        if self._closed:
            raise NotApplied("the router is closing")
        if self._queued_rows + rows > self._queue_rows_max:
            raise Overloaded(
                f"{self._queued_rows} rows are waiting; {rows} more would exceed the limit of {self._queue_rows_max}"
            )
        loop = asyncio.get_running_loop()
        waiting = _Waiting(item, rows, loop.time(), loop.create_future())
        self._queue.append(waiting)
        self._queued_rows += rows
        # Only after everything that is ready now has been submitted: requests that came together leave together.
        loop.call_soon(self._send_due)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._queued_rows -= rows
            raise

    async def close(self) -> None:
        """Refuse what waits and what comes, and wait for the batches on their way."""
        self._closed = True
        for waiting in self._queue:
            if not waiting.answer.done():
                waiting.answer.set_exception(NotApplied("the router is closing"))
        self._queue.clear()
        self._queued_rows = 0
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._batches)

    def _send_due(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and len(self._batches) < self._batches_max:
            due = self._queue[0].arrived + self._wait_s
            if self._batches and self._queued_rows < self._rows_max and loop.time() < due:
                self._timer = loop.call_at(due, self._send_due)
                return
            task = loop.create_task(self._answer(self._take()))
            self._batches.add(task)
            task.add_done_callback(self._done)

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch = [self._queue.popleft()]
        rows = batch[0].rows
        while self._queue and rows + self._queue[0].rows <= self._rows_max:
            batch.append(self._queue.popleft())
            rows += batch[-1].rows
        self._queued_rows -= rows
        return batch

    async def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        try:
            results = await self._run([waiting.item for waiting in batch])
        except Exception as error:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(result)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._send_due()
