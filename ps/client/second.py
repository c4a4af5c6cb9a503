"""A second thread for one call at a time: half of a large read, while the caller does the other half."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class _Task:
    """A call that is to be made once, by whoever comes first."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.claim = threading.Lock()
        self.done: SimpleQueue[Any] = SimpleQueue()


class SecondThread:
    """Runs `other` beside `mine`; calls must release the GIL for most of their time, and raise nothing.

    Where no core is free, the caller does both: whether the second thread has begun is looked at when `mine` is done.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._process = 0

    def both(self, mine: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, Any]:
        """What the two calls return."""
        if self._process != os.getpid():  # first use, in this process: a fork has no second thread
            self._tasks, self._process = SimpleQueue(), os.getpid()
            threading.Thread(target=_work, args=(self._tasks,), name="embring-read", daemon=True).start()
        task = _Task(other)
        self._tasks.put(task)
        first = mine()
        if task.claim.acquire(blocking=False):
            return first, other()
        return first, task.done.get()


def _work(tasks: "SimpleQueue[_Task]") -> None:
    while True:
        task = tasks.get()
        if task.claim.acquire(blocking=False):
            task.done.put(task.call())
