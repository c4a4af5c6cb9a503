"""All that a store holds, as one record: what pulls and pushes, exports and absorption work on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashring.view import View
from ps.errors import MemoryFull, WrongView
from ps.shared import Latch
from ps.slots import PRIMARY, SlotTable, Tombstones
from ps.store.registry import Registry
from ps.window import ClientTable

BLOCK_MAX = 2**27


@dataclass(slots=True)
class Holdings:
    """view: None before the first. latch: held while anything changes that readers of shared memory see.

    clock: seconds since 1970, for metadata only: no decision hangs on it. block_max: bytes of one block on its way out
    at most; whoever sends blocks sets it to what a frame carries. deleted: rows that were deleted since the start.
    """

    slots: SlotTable
    registry: Registry
    clients: ClientTable
    tombstones: Tombstones
    memory_max: int
    latch: Latch
    clock: Callable[[], float]
    view: View | None = None
    block_max: int = BLOCK_MAX
    deleted: int = 0

    @property
    def epoch(self) -> int:
        """Epoch of the installed view, 0 before the first."""
        return self.view.epoch if self.view else 0

    @property
    def cluster(self) -> int:
        """The cluster's id, 0 before the first view."""
        return self.view.cluster if self.view else 0

    def bytes_used(self) -> int:
        """Bytes that count against `memory_max`: rows and directories."""
        return sum(arena.bytes_used() for arena in self.registry.arenas)

    def check_memory(self, rows: int, needed: int) -> None:
        """Raise MemoryFull where so many new rows, of so many bytes, would pass `memory_max`."""
        if rows and (used := self.bytes_used()) + needed > self.memory_max:
            raise MemoryFull(
                f"{rows} new rows need {needed} bytes; this server holds {used} of {self.memory_max} (memory_max); "
                "updates of rows that exist go on"
            )

    def require(self, slots: NDArray[np.int64], role: int) -> None:
        """Raise WrongView unless this server has the role in every one of the slots."""
        bad = slots[self.slots.roles[slots] < role]
        if len(bad):
            raise self.wrong_view(int(bad[0]), role)

    def wrong_view(self, slot: int, role: int) -> WrongView:
        """The error for a slot in which this server has not the role."""
        what = "primary" if role == PRIMARY else "an owner"
        return WrongView(f"this server is not {what} of slot {slot} in epoch {self.epoch}", self.epoch)

    def free(self, slots: NDArray[np.int64]) -> None:
        """Free all rows of slots, and forget what they have seen and where they stood."""
        for arena in self.registry.arenas:
            arena.drop(slots)
        self.clients.clear(slots)
        self.slots.clear(slots)
