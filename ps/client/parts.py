"""The parts of a range pull for threads that wait: the next ones come while those before them are dealt with."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ps.client.core import Steps
from ps.client.flight import Flight
from ps.client.ranges import PullRange
from ps.client.verbs import RowRange
from ps.errors import EmbringError


class Parts(Iterator[RowRange]):
    """Whenever parts have come the next ones are asked for, before these are handed out.

    Whoever deals with a part for so long that the ones asked for are given up has them asked for again, within a
    time-out that begins with the call of `next()`.
    """

    def __init__(self, start: Callable[[Steps], Flight], finish: Callable[[Flight], Any], scan: PullRange) -> None:
        self._start, self._finish, self._scan = start, finish, scan
        self._here: deque[RowRange] = deque()
        self._coming: Flight | None = None

    def __next__(self) -> RowRange:
        if not self._here:
            self._here.extend(self._arrived(self._scan.until()))
            if not self._here:
                raise StopIteration
            self._coming = self._start(self._scan.next(self._scan.until()))
        return self._here.popleft()

    def _arrived(self, until: float) -> list[RowRange]:
        coming, self._coming = self._coming, None
        if coming is not None:
            try:
                return self._finish(coming)
            except EmbringError:
                if time.monotonic() >= until:
                    raise
        return self._finish(self._start(self._scan.next(until)))

    def close(self) -> None:
        """Have what was asked for dropped when it comes."""
        if self._coming is not None:
            self._coming.abandon()
            self._coming = None

    def __del__(self) -> None:
        self.close()
