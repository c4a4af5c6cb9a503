"""How fast copies may be made: what is left by requests, within limits."""

import pytest

from ps.replication.pace import FASTEST, LATE_S, SLOWEST, START_LATE_S, TOGETHER, Pace

TICK_S, BURST_S = 0.05, 0.2


def after(
    pace: Pace,
    seconds: float,
    late: float,
    limit: float = 0.0,
    tick_s: float = TICK_S,
    there: float = 0.0,
    sources: int = 4,
) -> float:
    """What is spent in so many seconds in which requests wait so long, by who spends all there is."""
    spent = 0.0
    for _ in range(round(seconds / tick_s)):
        pace.tick(tick_s, late, there, limit, BURST_S, sources)
        spent += max(0.0, pace.allowance)
        pace.allowance = min(0.0, pace.allowance)
    return spent


def test_copies_take_all_of_an_idle_server_within_two_seconds() -> None:
    pace = Pace()
    after(pace, 2.0, 0.0)
    assert pace.rate == FASTEST
    assert after(pace, 1.0, 0.0) == pytest.approx(FASTEST)


def test_where_nobody_waits_copies_take_all_within_half_a_second() -> None:
    pace = Pace()
    after(pace, 0.5, START_LATE_S / 2)
    assert pace.rate == FASTEST
    pace = Pace()
    after(pace, 0.5, START_LATE_S * 2)
    assert pace.rate < FASTEST / 4


def test_copies_leave_a_busy_server_to_requests_within_two_seconds() -> None:
    pace = Pace(rate=FASTEST)
    after(pace, 2.0, 4 * LATE_S)
    assert pace.rate == SLOWEST
    assert after(pace, 1.0, 4 * LATE_S) == pytest.approx(SLOWEST)


@pytest.mark.parametrize(("sources", "least"), [(1, TOGETHER), (2, TOGETHER / 2), (3, TOGETHER / 3), (9, SLOWEST)])
def test_who_copies_alone_gets_what_several_have_together(sources: int, least: float) -> None:
    pace = Pace(rate=FASTEST)
    after(pace, 2.0, 4 * LATE_S, sources=sources)
    assert pace.rate == least
    after(pace, 2.0, 4 * LATE_S, limit=1000.0, sources=sources)
    assert pace.rate == 1000.0


def test_a_busy_taker_slows_copies_down_as_a_busy_server_does() -> None:
    pace = Pace(rate=FASTEST)
    after(pace, 2.0, 0.0, there=4 * LATE_S)
    assert pace.rate == SLOWEST
    assert pace.late == 0.0


def test_the_rate_changes_with_time_and_not_with_ticks() -> None:
    for late in (0.0, 1.5 * LATE_S):
        slow, fast = Pace(rate=FASTEST / 64), Pace(rate=FASTEST / 64)
        after(slow, 0.5, late)
        after(fast, 0.5, late, tick_s=TICK_S / 5)
        assert fast.rate == pytest.approx(slow.rate, rel=0.2)
        assert slow.rate != FASTEST / 64


def test_the_rate_stays_where_requests_wait_as_long_as_they_may() -> None:
    pace = Pace(rate=FASTEST / 8, late=LATE_S)
    after(pace, 10.0, LATE_S)
    assert pace.rate == pytest.approx(FASTEST / 8)


@pytest.mark.parametrize("late", [0.0, 10 * LATE_S])
@pytest.mark.parametrize("limit", [4000.0, 50e6])
def test_a_limit_holds_whatever_requests_leave(late: float, limit: float) -> None:
    pace = Pace()
    after(pace, 5.0, late, limit)
    assert after(pace, 5.0, late, limit) <= 5.0 * limit * 1.001
    assert after(pace, 5.0, late, limit) >= 5.0 * min(limit, SLOWEST) * 0.999


def test_what_was_not_spent_adds_up_for_a_moment_only() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.tick(TICK_S, 0.0, 0.0, 1000.0, BURST_S, 1)
    assert pace.allowance == 1000.0 * BURST_S


def test_after_a_rest_copies_begin_slowly() -> None:
    pace = Pace(rate=FASTEST)
    pace.rest()
    assert pace.rate == SLOWEST
    after(pace, 1.0, 0.0, 4000.0)
    pace.rest()
    assert pace.rate == 4000.0
