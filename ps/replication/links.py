"""The ordered connection to one peer, as the machine sees it: what is on its way, how long an answer is owed."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ps.rowblock import RowBlock
from ps.store.changes import Applied

GATHER_S = 60.0
"""Seconds after which slots that were copied are brought up to date though other copies are not made yet."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A request on its way. slots and positions: where the peer stands once it has taken them; bytes of its arrays.

    bulk: a part of a copy. complete: whether its slots are whole then.
    """

    op: str
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    bytes: int = 0
    bulk: bool = False
    complete: bool = True
    token: object = None
    acks: str = "all"

    @property
    def streamed(self) -> bool:
        """Whether it is a block of changes."""
        return self.op == "replicate" and not self.bulk


@dataclass(slots=True)
class Link:
    """One peer. index: its number in `Members`. number: of the connection, which rises whenever one broke.

    streaming: blocks of changes on their way; unsent: pushes that wait behind them, about so many bytes.
    resting: nothing is sent before the next tick. untidy: some slot may be IDLE. copies: blocks of copies to be sent.
    copied_s: seconds for which slots that were copied rest until all are, None where none does. late_copies:
    copied slots, of learners that nobody waits for, which are to be brought up to date when those before them are.
    changed: how much of the last lot of them had changed. round: of bringing slots that rested up to date; 0 where
    none goes on.
    late: seconds for which requests wait there, as it said last. sources: how many copy to it.
    """

    incarnation: int
    index: int
    number: int = 1
    requests: int = 0
    flights: dict[int, Flight] = field(default_factory=dict)
    bytes: int = 0
    bulk_bytes: int = 0
    streaming: int = 0
    unsent: list[Applied] = field(default_factory=list)
    unsent_bytes: int = 0
    resting: bool = False
    untidy: bool = False
    silent: float = 0.0
    refusals: int = 0
    epoch: int = 0
    asked_for: int = 0
    late: float = 0.0
    sources: int = 1
    copies: list[Iterator[RowBlock]] = field(default_factory=list)
    copied_s: float | None = None
    late_copies: int = 0
    changed: float = 1.0
    round: int = 0

    @property
    def copying(self) -> bool:
        """Whether parts of copies, or what changed since, are to be sent."""
        return bool(self.copies or self.late_copies)

    @property
    def level(self) -> bool:
        """Whether nothing is left to be brought up to date."""
        return not (self.late_copies or self.untidy or self.mending)

    @property
    def mending(self) -> bool:
        """Whether a fork is being asked for, or a repair on its way."""
        return any(flight.op in ("fork", "repair") for flight in self.flights.values())

    @property
    def owed(self) -> int:
        """Bytes of changes that the peer has not confirmed."""
        return self.bytes + self.unsent_bytes

    def depart(self, flight: Flight) -> int:
        """Note a request as sent; its number."""
        self.requests += 1
        self.flights[self.requests] = flight
        if flight.bulk:
            self.bulk_bytes += flight.bytes
        else:
            self.bytes += flight.bytes
        self.streaming += flight.streamed
        return self.requests

    def arrive(self, number: int) -> Flight | None:
        """The request that is answered; None for one that nobody waits for."""
        flight = self.flights.pop(number, None)
        if flight is not None:
            self.silent = 0.0
            if flight.bulk:
                self.bulk_bytes -= flight.bytes
            else:
                self.bytes -= flight.bytes
            self.streaming -= flight.streamed
        return flight

    def cut(self) -> list[Flight]:
        """The connection is gone, with all that was on its way."""
        lost = list(self.flights.values())
        self.flights = {}
        self.number += 1
        self.bytes = self.bulk_bytes = self.streaming = self.unsent_bytes = 0
        self.unsent = []
        self.resting = self.untidy = True
        self.copies = []
        self.copied_s, self.late_copies, self.round = None, 0, 0
        self.asked_for = 0
        return lost
