"""A process of the cluster: frames in and out, pauses, and what hangs on its connections."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ps.wire import LIMITS, PREFIX, Message, assemble, decode_header, decode_prefix, encode
from tests.sim.network import Connection

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


def frame(message: Message) -> bytes:
    """The bytes of a message, as they travel."""
    parts = encode(message)
    return parts[0] if len(parts) == 1 else b"".join(bytes(part) for part in parts)  # type: ignore[return-value]


def unframe(data: bytes) -> Message:
    """The message of a frame."""
    header, size = decode_prefix(data, 0, LIMITS)
    begin = PREFIX.size + header
    message, places = decode_header(data[PREFIX.size : begin], size, LIMITS)
    return assemble(message, places, bytearray(memoryview(data)[begin : begin + size]))


class Process(ABC):
    """An endpoint that can be paused and killed; while paused, what comes waits, and its timers stand still."""

    def __init__(self, cluster: "Cluster", name: str) -> None:
        self.cluster, self.world, self.name = cluster, cluster.world, name
        self.alive, self.paused = True, False
        self.offset = 0.0
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._stopped: list[tuple[Callable[[], None], float]] = []

    @property
    def clock(self) -> float:
        """This process's monotonic clock, which may have jumped."""
        return self.world.now + self.offset

    def received(self, connection: Connection, data: bytes) -> None:
        if self.paused:
            self._inbox.append((self.message, (connection, data)))
        else:
            self.message(connection, data)

    def broken(self, connection: Connection) -> None:
        if self.paused:
            self._inbox.append((self.disconnected, (connection,)))
        else:
            self.disconnected(connection)

    @abstractmethod
    def message(self, connection: Connection, data: bytes) -> None:
        """A frame came."""

    @abstractmethod
    def disconnected(self, connection: Connection) -> None:
        """A connection ended."""

    def every(self, seconds: float, what: Callable[[], None]) -> None:
        """Call `what` again and again; once, late, after a pause."""
        self.world.at(seconds * self.world.between(0.9, 1.1), self._due, seconds, what)

    def _due(self, seconds: float, what: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.paused:
            self._stopped.append((what, seconds))
            return
        what()
        self.every(seconds, what)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        if not self.paused or not self.alive:
            return
        self.paused = False
        stopped, self._stopped = self._stopped, []
        if self.world.chance(0.5):
            for what, seconds in stopped:
                self._due(seconds, what)
            stopped = []
        while self._inbox and not self.paused and self.alive:
            what, arguments = self._inbox.popleft()
            what(*arguments)
        for what, seconds in stopped:
            self._due(seconds, what)

    def kill(self) -> None:
        self.alive = False
        self._inbox.clear()
        self.cluster.network.forget(self)


def no_array() -> np.ndarray:
    return np.empty(0, np.int64)
