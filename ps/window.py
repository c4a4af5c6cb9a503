"""The client table of every slot: which pushes of which client a slot has seen.

Kept transposed, client by client: a trainer touches nearly every slot, so a client's windows are two arrays over slot
numbers (pages are taken as they are touched), and a push finds the window of a slot by its number, without hashing. A
slot's own table is a column across the clients, read only when the slot travels.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ps.errors import Overloaded
from ps.kernels import window as win
from ps.memory import reserve
from ps.ragged import kept

CLIENT_IDLE_S = 3600.0
"""Seconds without a push after which a client may be forgotten. Clients give a push up after ten minutes at the most,
so that none of its retries can still come and be taken for new."""


@dataclass(frozen=True, slots=True)
class ClientWindow:
    """One client: last int64[slots] (sequence; 0 = none), mask uint64[slots] (bit k: last - k was seen)."""

    last: NDArray[np.int64]
    mask: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class ClientEntries:
    """Windows of some slots: slot s holds entries offsets[s] to offsets[s + 1].

    clients uint64[c], last int64[c], mask uint64[c], offsets int64[s + 1].
    """

    clients: NDArray[np.uint64]
    last: NDArray[np.int64]
    mask: NDArray[np.uint64]
    offsets: NDArray[np.int64]

    def names(self) -> NDArray[np.uint64]:
        """The distinct clients. Blocks of one push have one, which is seen without sorting."""
        first = self.clients[:1]
        return first if (self.clients == first).all() else np.unique(self.clients)

    def select(self, keep: NDArray[np.bool_]) -> "ClientEntries":
        """The entries of some of the slots, bool[s]."""
        at, offsets = kept(self.offsets, keep)
        return ClientEntries(self.clients[at], self.last[at], self.mask[at], offsets)

    @staticmethod
    def none(slots: int) -> "ClientEntries":
        """No entry for any of so many slots."""
        return ClientEntries(
            np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.uint64), np.zeros(slots + 1, np.int64)
        )


class ClientTable:
    """The windows of every client that pushed here. `clock` gives seconds that never go back."""

    def __init__(self, slots_max: int, clients_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots_max, self._clients_max, self.clock = slots_max, clients_max, clock
        self._windows: dict[int, ClientWindow] = {}
        self._used: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._windows)

    def of(self, client: int) -> ClientWindow:
        """The windows of a client; Overloaded where `clients_max` others are remembered."""
        window = self._windows.get(client)
        if window is None:
            self._drop_empty()
            if len(self._windows) >= self._clients_max:
                raise Overloaded(
                    f"client {client} is one too many: a server remembers {self._clients_max} (clients_max)"
                )
            window = ClientWindow(
                reserve((self._slots_max,), np.int64, huge=False), reserve((self._slots_max,), np.uint64, huge=False)
            )
            self._windows[client] = window
        self._used[client] = self.clock()
        return window

    def has_room(self, client: int) -> bool:
        """Whether the client is known, or one more may be."""
        return client in self._windows or len(self._windows) < self._clients_max

    def idle(self) -> list[int]:
        """Clients that have not pushed for CLIENT_IDLE_S; restarted trainers come as new ones, and would add up."""
        oldest = self.clock() - CLIENT_IDLE_S
        return [client for client, used in self._used.items() if used <= oldest]

    def window(self, client: int) -> ClientWindow | None:
        """The windows of a client that is remembered."""
        return self._windows.get(client)

    def _drop_empty(self) -> None:
        """Give back the arrays of idle clients that no slot remembers any more."""
        for client in self.idle():
            if len(self._windows) >= self._clients_max and not self._windows[client].last.any():
                del self._windows[client], self._used[client]

    def entries(self, slots: NDArray[np.int64], names: Collection[int] | None = None) -> ClientEntries:
        """The windows of some slots; names: those of these clients alone."""
        where, clients, lasts, masks = [], [], [], []
        for client, window in self._windows.items():
            if names is not None and client not in names:
                continue
            last = window.last[slots]
            held = np.flatnonzero(last)
            where.append(held)
            clients.append(np.full(len(held), client, np.uint64))
            lasts.append(last[held])
            masks.append(window.mask[slots[held]])
        if not where:
            return ClientEntries.none(len(slots))
        at = np.concatenate(where)
        order = np.argsort(at, kind="stable")
        offsets = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(np.bincount(at, minlength=len(slots)), out=offsets[1:])
        return ClientEntries(
            np.concatenate(clients)[order], np.concatenate(lasts)[order], np.concatenate(masks)[order], offsets
        )

    def room_for(self, clients: NDArray[np.uint64]) -> bool:
        """Whether the windows of these clients can be taken."""
        if len(self._windows) + len(clients) <= self._clients_max:
            return True
        self._drop_empty()
        return len(self._windows.keys() | {int(c) for c in clients}) <= self._clients_max

    def put(self, slots: NDArray[np.int64], entries: ClientEntries) -> None:
        """Take the windows of slots as they stand at another owner (Overloaded where there are too many clients).

        An entry whose `last` is 0 says that the slot forgets the client.
        """
        for client in entries.names():
            window = self.of(int(client))
            win.put(
                slots, entries.offsets, entries.clients, client, entries.last, entries.mask, window.last, window.mask
            )

    def inherit(self, sources: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Slots have seen what others have."""
        for window in self._windows.values():
            window.last[slots], window.mask[slots] = window.last[sources], window.mask[sources]

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Forget what slots have seen."""
        for window in self._windows.values():
            window.last[slots], window.mask[slots] = 0, 0
