"""The controller's settings as the rounds of pings that `ps.failover` counts in. Pure."""

from ps.config import ControlConfig
from ps.failover import FailoverLimits

LEARN_S, TURN_S, DISPUTE_S = 0.5, 20.0, 10.0
"""Between two looks at missing copies; between two views of a move that goes on; how long servers that could not reach
each other are kept apart."""


def limits_of(control: ControlConfig) -> FailoverLimits:
    """The settings in rounds of pings."""

    def rounds(seconds: float) -> int:
        return max(1, round(seconds * 1000 / control.ping_interval_ms))

    return FailoverLimits(
        pings_max=control.pings_max,
        wait_rounds=rounds(control.copy_wait_ms / 1000),
        learn_rounds=rounds(LEARN_S),
        turn_rounds=rounds(TURN_S),
        dispute_rounds=rounds(DISPUTE_S),
        learn_max=control.copy_slots_max,
    )
