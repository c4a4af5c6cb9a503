"""The parts of a range pull that are asked for ahead."""

import gc
import time
from typing import Any

import numpy as np
import pytest

from ps.client.parts import Parts
from ps.client.ranges import PullRange
from ps.client.verbs import RowRange
from ps.errors import EmbringError, PerhapsApplied
from tests.ps.test_client_core import World, push

PART = RowRange(np.zeros(1, np.int64), np.zeros((1, 1), np.float32))


class Asked:
    """A flight: what it ends with."""

    def __init__(self, log: list[str], outcome: list[RowRange] | EmbringError) -> None:
        self.log, self.outcome = log, outcome

    def abandon(self) -> None:
        self.log.append("abandoned")


class Scan:
    """A scan and the client that drives it. outcomes: of each asking in turn; seconds: those that each may take."""

    def __init__(self, *outcomes: list[RowRange] | EmbringError, seconds: float = 60.0) -> None:
        self.log: list[str] = []
        self._outcomes, self._seconds = list(outcomes), seconds

    def until(self) -> float:
        return time.monotonic() + self._seconds

    def next(self, until: float) -> Any:
        return until

    def _start(self, steps: Any) -> Any:
        self.log.append("asked")
        return Asked(self.log, self._outcomes.pop(0))

    def _finish(self, flight: Any) -> list[RowRange]:
        self.log.append("came")
        if isinstance(flight.outcome, EmbringError):
            raise flight.outcome
        return flight.outcome

    def parts(self) -> Parts:
        return Parts(self._start, self._finish, self)  # type: ignore[arg-type]


def test_the_next_parts_are_asked_for_before_those_that_came_are_handed_out() -> None:
    scan = Scan([PART, PART], [PART], [])
    parts = scan.parts()
    assert scan.log == []
    assert next(parts) is PART
    assert scan.log == ["asked", "came", "asked"]
    next(parts)
    assert scan.log == ["asked", "came", "asked"]
    next(parts)
    assert scan.log == ["asked", "came", "asked", "came", "asked"]
    assert list(parts) == []


def test_what_was_given_up_while_nobody_waited_is_asked_for_again() -> None:
    scan = Scan([PART], PerhapsApplied("too late"), [PART], [])
    assert list(scan.parts()) == [PART, PART]


@pytest.mark.parametrize(
    "outcomes", [([PART], PerhapsApplied("late"), PerhapsApplied("too")), (PerhapsApplied("too"),)]
)
def test_an_error_of_what_was_waited_for_is_raised(outcomes: Any) -> None:
    with pytest.raises(PerhapsApplied, match="too"):
        list(Scan(*outcomes).parts())


def test_no_more_time_is_spent_than_one_time_out() -> None:
    scan = Scan([PART], PerhapsApplied("too late"), [PART], seconds=0.0)
    parts = scan.parts()
    next(parts)
    with pytest.raises(PerhapsApplied, match="too late"):
        next(parts)


def test_rows_that_came_before_what_was_asked_ahead_failed_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """One server answers late, while others answered in time: their rows came, and count, with those of the retry."""
    monkeypatch.setattr("ps.client.ranges.BLOCK_BYTES", 256)
    world = World()
    verbs = world.verbs()
    push(world, verbs, "a", np.arange(200))
    flights: list[Any] = []
    scan = PullRange(verbs, "a", 0, None, 30.0)

    def finish(steps: Any) -> Any:
        flights.append(steps)
        return world.drive(steps)

    broken = EmbringError("broken off")  # of no class that is tried again: it ends every second flight half-way
    world.fault = lambda server, op: broken if server == "s1" and len(flights) % 2 == 0 else "ok"
    parts = Parts(lambda steps: steps, finish, scan)
    found = [i for part in parts for i in part.ids.tolist()]
    assert sorted(found) == list(range(200))
    assert len(flights) > 4


def test_parts_that_nobody_wants_are_dropped() -> None:
    scan = Scan([PART], [PART])
    parts = scan.parts()
    next(parts)
    parts.close()
    parts.close()
    assert scan.log == ["asked", "came", "asked", "abandoned"]
    scan = Scan([PART], [PART])
    parts = scan.parts()
    next(parts)
    del parts
    gc.collect()
    assert scan.log[-1] == "abandoned"
