"""A second thread for one call at a time: half of a large read, while the caller does the other half."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class SecondThread:
    """Runs `other` beside `mine`; calls must release the GIL for most of their time.

    Where no core is free, the caller does both: whether the second thread has begun is looked at when `mine` is done.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def both(self, mine: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, Any]:
        """What the two calls return; raises what they raise."""
        if self._pool is None or self._process != os.getpid():  # a forked child has no second thread
            self._pool, self._process = ThreadPoolExecutor(1, "embring-read"), os.getpid()
        task = self._pool.submit(other)
        first = mine()
        return first, other() if task.cancel() else task.result()
