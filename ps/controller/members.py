"""The server processes as the controller knows them: started through Ray, watched, pinged, asked for figures."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from hashring.view import Server
from ps.config import Config
from ps.controller.figures import figures
from ps.controller.health import Silence
from ps.errors import EmbringError
from ps.fabric.aio import AsyncConnection
from ps.fabric.protocol import Hello
from ps.fabric.tls import trusting
from ps.server import ServerActor, Setup

log = logging.getLogger("embring.members")

START_TIMEOUT_S = 300.0
INSTALL_TIMEOUT_S = 30.0


async def result(reference: Any, timeout: float | None = None) -> Any:
    """What a Ray call gives, awaited on any event loop. TimeoutError after `timeout` seconds."""
    return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout)


@dataclass
class Member:
    """One server of the cluster. state: "starting", "alive", "dead" or "given up"."""

    name: str
    handle: Any = None
    incarnation: int = 0
    host: str = ""
    addresses: tuple[str, ...] = ()
    pid: int = 0
    state: str = "starting"
    restarts: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def server(self) -> Server:
        """As it stands in a view."""
        return Server(self.name, self.incarnation, self.host, "", self.addresses)


class Members:
    """Starts servers and keeps an eye on them; tells `died(member)` of each death (Ray's word)."""

    def __init__(self, setup: Setup, config: Config, died: Callable[[Member], Awaitable[None]]) -> None:
        self.by_name: dict[str, Member] = {}
        self.silence = Silence(config.control.pings_max)
        self._setup = setup
        self._config = config
        self._died = died
        self._tls = trusting(config.tls.trusted)

    def alive(self) -> list[Member]:
        """The members that live."""
        return [m for m in self.by_name.values() if m.state == "alive"]

    async def launch(self, name: str) -> Member:
        """Start the server `name` as a new incarnation, or take over its running actor.

        Raises RayError or TimeoutError.
        """
        member = self.by_name.setdefault(name, Member(name))
        member.state = "starting"
        member.handle = await asyncio.to_thread(self._actor, name)
        told = await result(member.handle.ready.remote(), START_TIMEOUT_S)
        member.incarnation, member.host, member.pid = told["incarnation"], told["host"], told["pid"]
        member.addresses = tuple(told["addresses"])
        member.state = "alive"
        self.silence.answered(name)
        member.tasks = [asyncio.create_task(self._watch(member)), asyncio.create_task(self._ping(member))]
        return member

    def _actor(self, name: str) -> Any:
        options = {
            "name": name,
            "namespace": self._setup.namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_concurrency": 16,
            "num_cpus": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": self._setup.environment},
        }
        index = int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdecimal() else 0
        return ServerActor.options(**options).remote(self._setup, name, index)

    async def _watch(self, member: Member) -> None:
        """Wait for Ray's word of the member's death: a call that never returns fails when the process is gone."""
        while True:
            try:
                await result(member.handle.forever.remote())
            except ActorUnavailableError:  # Ray cannot reach it just now, and does not call it dead
                await asyncio.sleep(self._config.control.ping_interval_ms / 1000)
            except RayError as error:
                log.warning("server %s (incarnation %d) is dead: %s", member.name, member.incarnation, _line(error))
                break
        self._end(member, "dead")
        await self._died(member)

    async def _ping(self, member: Member) -> None:
        """Ping without end, one at a time, each at its turn; fetch figures on the same connection."""
        interval = self._config.control.ping_interval_ms / 1000
        every = max(1, round(self._config.control.statistics_interval_ms / self._config.control.ping_interval_ms))
        loop = asyncio.get_running_loop()
        connection: AsyncConnection | None = None
        turn = 0
        before: dict[str, Any] | None = None
        asked = loop.time()
        while True:
            begun = loop.time()
            try:
                if connection is None:
                    hello = Hello(self._setup.token, member.incarnation, self._config.fingerprint)
                    connection = await AsyncConnection.connect(self._address(member), hello, interval, self._tls)
                await connection.request("ping", {}, {}, interval)
                self.silence.answered(member.name)
                if turn % every == 0:
                    reply = await connection.request("statistics", {}, {}, 5 * interval)
                    member.figures = figures(reply.fields, before, loop.time() - asked)
                    before, asked = reply.fields, loop.time()
                turn += 1
            except (EmbringError, OSError, TimeoutError):
                self.silence.missed(member.name)
                if connection is not None:
                    connection.close()
                    connection = None
            await asyncio.sleep(max(0.0, begun + interval - loop.time()))

    def _address(self, member: Member) -> str:
        here = ray.util.get_node_ip_address()
        # A Unix socket of another host is none here.
        usable = [a for a in member.addresses if a.startswith("unix:") == (member.host == here)]
        return (usable or list(member.addresses))[0]

    def _end(self, member: Member, state: str) -> None:
        member.state = state
        member.figures = {}
        self.silence.forget(member.name)
        current = asyncio.current_task()
        for task in member.tasks:
            if task is not current:
                task.cancel()

    async def install(self, packed: bytes) -> None:
        """Hand a packed view to every living member, and wait for each; one that does not answer is logged."""
        living = self.alive()
        calls = (result(m.handle.install.remote(packed), INSTALL_TIMEOUT_S) for m in living)
        for member, outcome in zip(living, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                log.warning("server %s did not take the view: %s", member.name, _line(outcome))

    async def stop(self) -> None:
        """End every server, without starting any again."""
        for member in self.by_name.values():
            self._end(member, "dead")
            if member.handle is not None:
                with contextlib.suppress(RayError):
                    await asyncio.to_thread(ray.kill, member.handle)


def _line(error: BaseException) -> str:
    """The first line of an error, with its class."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
