"""A cluster inside the test's process: real stores behind real sockets, a thread each, and a small controller."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashring.planner import Fail, Join, plan
from hashring.view import Server, View
from ps.client import AsyncClient, Client
from ps.config import Config, ServerConfig, TlsConfig
from ps.controller.admin import change_of
from ps.fabric.tls import serving
from ps.loop import LoopThread
from ps.service import Service, serve
from ps.store import Store, StoreLimits

TOKEN = "the-token-of-the-tests"
PATIENCE_S = 60.0


@dataclass
class Member:
    """A server: its description in the view, its service, and the thread that it runs on."""

    server: Server
    service: Service
    thread: LoopThread
    killed: bool = False


class LocalCluster:
    """Servers s0, s1, ... and the newest view. `change` plans, and installs on every living server."""

    def __init__(self, folder: Path, servers: int = 3, limits: StoreLimits | None = None, **settings: Any) -> None:
        tls = settings.pop("tls", TlsConfig())
        self.folder = folder
        self.config = Config(server=ServerConfig(**settings), tls=tls)
        self.limits = limits or StoreLimits(memory_max=2**30)
        self.view = View.empty(secrets.randbits(63), self.config.cluster.slot_bits)
        self.members: dict[str, Member] = {}
        for k in range(servers):
            self.start(f"s{k}")
        self.change(Join(tuple(m.server for m in self.members.values())))

    @property
    def addresses(self) -> list[str]:
        """Where the living servers listen."""
        return [m.server.addresses[0] for m in self.members.values() if not m.killed]

    def start(self, name: str) -> Server:
        """A new process, so to speak: it owns nothing until a view says so."""
        thread = LoopThread(name)
        incarnation = secrets.randbits(63) | 1

        async def begin() -> tuple[Service, list[str]]:
            service = Service(Store(incarnation, self.limits), self.config, TOKEN, self._control, name)
            addresses = ["tcp:127.0.0.1:0"]
            if not self.config.tls.certificate:  # with TLS, TCP alone: clients prefer a Unix socket, which is plain
                addresses.append(f"unix:{self.folder}/{name}-{incarnation % 9999}")
            return service, await serve(service, addresses, serving(self.config.tls))

        service, addresses = thread.call(begin(), PATIENCE_S)
        server = Server(name, incarnation, "127.0.0.1", addresses=tuple(addresses))
        self.members[name] = Member(server, service, thread)
        return server

    async def _control(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        """On a server's thread: what the controller would do."""
        change = change_of(self.view, verb, fields, replicas=self.config.server.replicas)
        if change is not None:
            self.view = plan(self.view, change)
            for member in self.members.values():
                if not member.killed:
                    member.thread.loop.call_soon_threadsafe(member.service.install, self.view)
        return {"epoch": self.view.epoch, "changed": change is not None}

    def change(self, change: Any, tell: set[str] | None = None) -> View:
        """Plan a change and install it on the living servers (or on some of them)."""
        self.view = plan(self.view, change)
        self.install(tell)
        return self.view

    def install(self, tell: set[str] | None = None) -> None:
        """Install the newest view."""
        for name, member in self.members.items():
            if not member.killed and (tell is None or name in tell):
                member.thread.call(self._take(member, self.view), PATIENCE_S)

    async def _take(self, member: Member, view: View) -> None:
        member.service.install(view)

    def kill(self, name: str, known: bool = True) -> None:
        """End a server: its connections break and nobody answers any more. known: the view says so."""
        member = self.members[name]
        member.killed = True
        member.thread.call(member.service.end(), PATIENCE_S)
        member.thread.close()
        if known:
            self.change(Fail(name))

    def client(self, timeout: float = 20.0) -> Client:
        """A blocking client."""
        return Client(self.addresses, TOKEN, timeout)

    async def async_client(self, timeout: float = 20.0) -> AsyncClient:
        """An asynchronous client of the running loop."""
        return await AsyncClient.connect(self.addresses, TOKEN, timeout)

    def rows(self, table: str) -> dict[str, int]:
        """Rows of a table on each living server."""
        return {
            name: m.service.statistics().store.rows_by_table.get(table, 0)
            for name, m in self.members.items()
            if not m.killed
        }

    def close(self) -> None:
        """End every server."""
        for name, member in self.members.items():
            if not member.killed:
                self.kill(name, known=False)


@contextmanager
def local_cluster(folder: Path, servers: int = 3, **settings: Any) -> Iterator[LocalCluster]:
    """A cluster that is ended afterwards."""
    cluster = LocalCluster(folder, servers, **settings)
    try:
        yield cluster
    finally:
        cluster.close()
