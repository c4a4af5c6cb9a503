"""The controller's decisions, sans-IO: `Failover` is what a controller's shell drives."""

from ps.failover.machine import (
    Action,
    Append,
    Changed,
    Deliver,
    Failover,
    FailoverLimits,
    Learn,
    Ping,
    Refused,
    Retire,
    Wish,
)

__all__ = [
    "Action",
    "Append",
    "Changed",
    "Deliver",
    "Failover",
    "FailoverLimits",
    "Learn",
    "Ping",
    "Refused",
    "Retire",
    "Wish",
]
