"""Connections: each direction keeps its order, is late, may be held up, and may break and lose its tail.

An endpoint is anything with `name`, `received(connection, data)` and `broken(connection)`. What was sent before a break
may arrive up to a random point, and (from the caller to the called) even later than what a new connection carries: the
called side still had it in its buffers.
"""

from collections import deque
from typing import Any, Protocol

from tests.sim.world import World


class Endpoint(Protocol):
    name: str
    alive: bool

    def received(self, connection: "Connection", data: bytes) -> None: ...

    def broken(self, connection: "Connection") -> None: ...


class Connection:
    """One connection, made by `caller` to `called`."""

    __slots__ = ("called", "caller", "context", "held", "network", "number", "open", "ready", "tail")

    def __init__(self, network: "Network", caller: Endpoint, called: Endpoint, number: int) -> None:
        self.network, self.caller, self.called, self.number = network, caller, called, number
        self.open = True
        self.ready = [network.world.now, network.world.now]
        self.tail: list[deque[bytes]] = [deque(), deque()]
        self.held: list[deque[bytes]] = [deque(), deque()]
        self.context: Any = None

    def send(self, sender: Endpoint, data: bytes) -> None:
        """Send to the other side; what is sent on a broken connection is lost."""
        if self.open:
            self.network.carry(self, int(sender is self.called), data)

    def close(self) -> None:
        self.network.cut(self)


class Network:
    """All connections, and who is cut off from whom."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.connections: list[Connection] = []
        self.blocked: set[tuple[str, str]] = set()
        self.delay = 0.0005
        self.slow: dict[str, float] = {}
        self.p_late = 0.0
        self.p_after_a_break = 0.3
        self.after_a_break_s: float | None = 0.3
        self._left: list[tuple[Connection, list[bytes]]] = []
        self._number = 0

    def connect(self, caller: Endpoint, called: Endpoint) -> Connection:
        self._number += 1
        connection = Connection(self, caller, called, self._number)
        self.connections.append(connection)
        return connection

    def carry(self, connection: Connection, way: int, data: bytes) -> None:
        world = self.world
        source, target = self._ends(connection, way)
        if (source.name, target.name) in self.blocked or connection.held[way]:
            connection.held[way].append(data)
            return
        late = world.between(0.2, 2.0) * self.delay
        if self.p_late and world.chance(self.p_late):
            late += world.between(0.01, 0.3)
            world.counts["late"] += 1
        late += self.slow.get(target.name, 0.0)
        when = max(connection.ready[way] + 1e-6, world.now + late)
        connection.ready[way] = when
        connection.tail[way].append(data)
        world.at(when - world.now, self._arrive, connection, way)

    def _ends(self, connection: Connection, way: int) -> tuple[Endpoint, Endpoint]:
        return (connection.called, connection.caller) if way else (connection.caller, connection.called)

    def _arrive(self, connection: Connection, way: int) -> None:
        if not connection.tail[way]:
            return  # the tail was lost
        data = connection.tail[way].popleft()
        target = self._ends(connection, way)[1]
        if target.alive:
            target.received(connection, data)

    def block(self, source: str, target: str) -> None:
        """Nothing arrives from source at target until `heal`: what is sent waits, as TCP sends it again and again."""
        self.blocked.add((source, target))

    def heal(self, source: str, target: str) -> None:
        self.blocked.discard((source, target))
        for connection in self.connections:
            for way in (0, 1):
                if connection.held[way] and connection.open:
                    a, b = self._ends(connection, way)
                    if (a.name, b.name) == (source, target):
                        waiting, connection.held[way] = connection.held[way], deque()
                        for data in waiting:
                            self.carry(connection, way, data)

    def cut(self, connection: Connection) -> None:
        """Break a connection: of what is on its way a beginning still arrives, or (rarely) arrives late."""
        if not connection.open:
            return
        world = self.world
        connection.open = False
        self.connections.remove(connection)
        for way in (0, 1):
            connection.held[way].clear()
            tail = connection.tail[way]
            if way == 0 and tail and connection.called.alive and world.chance(self.p_after_a_break):
                late = [tail.popleft() for _ in range(world.rng.randint(1, len(tail)))]
                tail.clear()
                if self.after_a_break_s is None:
                    self._left.append((connection, late))
                    continue
                when = world.between(0.0, self.after_a_break_s)
                for data in late:
                    when += 1e-5
                    world.at(when, self._late, connection, data)
                continue
            for _ in range(world.rng.randint(0, len(tail))):
                tail.pop()
        for end in (connection.caller, connection.called):
            world.at(world.between(0.0, 0.02), self._tell, connection, end)

    def deliver_late(self, connection: Connection) -> None:
        """What older connections of these two had left arrives now: of those whose time is not drawn."""
        waiting, self._left = self._left, []
        for old, late in waiting:
            if (old.caller, old.called) == (connection.caller, connection.called) and old is not connection:
                for data in late:
                    self._late(old, data)
            else:
                self._left.append((old, late))

    def _late(self, connection: Connection, data: bytes) -> None:
        if connection.called.alive:
            self.world.counts["after a break"] += 1
            connection.called.received(connection, data)

    def _tell(self, connection: Connection, end: Endpoint) -> None:
        if end.alive:
            end.broken(connection)

    def forget(self, end: Endpoint) -> None:
        """A process is gone: its connections break."""
        for connection in [c for c in self.connections if end in (c.caller, c.called)]:
            self.cut(connection)
