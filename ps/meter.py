"""What a server counts: requests by operation, with a histogram of how long they took, and all else as one record."""

from bisect import bisect_left
from dataclasses import dataclass

from ps.fabric.listen import ListenStatistics
from ps.store import StoreStatistics

BUCKETS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the latency histogram's buckets, in seconds; one more holds what took longer."""


@dataclass(frozen=True, slots=True)
class OpStatistics:
    """Of one operation: requests, those that met an error, seconds in all, and requests in each of BUCKETS_S + 1.

    Time counts from the request's arrival to its reply.
    """

    requests: int
    errors: int
    seconds: float
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """Counts since the start. absent_ids: ids of pulls that had no row.

    compared, different: copies of slots that were compared with their other owners', and those that differed.
    copied_rows, copied_bytes: what was copied to other servers, so that they own it. lag_changes, lag_s: how far other
    owners are behind this primary: changes of one slot, seconds that one has owed an answer.
    """

    epoch: int
    draining: bool
    absent_ids: int
    compared: int
    different: int
    copied_rows: int
    copied_bytes: int
    lag_changes: int
    lag_s: float
    operations: dict[str, OpStatistics]
    listener: ListenStatistics
    store: StoreStatistics

    @property
    def requests(self) -> int:
        """Requests of every kind."""
        return sum(op.requests for op in self.operations.values())

    @property
    def errors(self) -> int:
        """Those that were answered with an error."""
        return sum(op.errors for op in self.operations.values())


class Meter:
    """The counters behind OpStatistics."""

    __slots__ = ("buckets", "errors", "requests", "seconds")

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS_S) + 1)

    def add(self, seconds: float, failed: bool) -> None:
        """Count a request."""
        self.requests += 1
        self.errors += failed
        self.seconds += seconds
        self.buckets[bisect_left(BUCKETS_S, seconds)] += 1

    def statistics(self) -> OpStatistics:
        """What was counted so far."""
        return OpStatistics(self.requests, self.errors, self.seconds, tuple(self.buckets))
