"""The server processes as Ray knows them: started, watched, ended.

Each has a file of its name in the state folder for as long as its process may run: a controller that is started again
ends those that are in no view, because they had not joined yet, or had left.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from hashring.view import Server
from ps.config import Config
from ps.server import ServerActor, Setup

log = logging.getLogger("embring.members")

START_TIMEOUT_S = 300.0
AGAIN_S = 1.0


async def result(reference: Any, timeout: float | None = None) -> Any:
    """What a Ray call gives, awaited on any event loop. TimeoutError after `timeout` seconds."""
    return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout)


@dataclass
class Member:
    """One server of the cluster. state: "starting", "alive", "dead" or "given up".

    reconnect_s: how long it outlives Ray's head. figures: what it said of itself last. statistics: the raw ones, and
    when they were had, by the loop's clock.
    """

    name: str
    handle: Any = None
    incarnation: int = 0
    host: str = ""
    addresses: tuple[str, ...] = ()
    pid: int = 0
    reconnect_s: float = float("inf")
    state: str = "starting"
    restarts: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    statistics: tuple[dict[str, Any] | None, float] = (None, 0.0)
    watch: asyncio.Task[None] | None = None

    @property
    def server(self) -> Server:
        """As it stands in a view."""
        return Server(self.name, self.incarnation, self.host, "", self.addresses)


class Members:
    """Starts servers and keeps an eye on them; tells `died(member)` of each death (Ray's word)."""

    def __init__(self, setup: Setup, config: Config, died: Callable[[Member], Awaitable[None]]) -> None:
        self.by_name: dict[str, Member] = {}
        self._setup = setup
        self._config = config
        self._died = died
        self._files = Path(setup.state) / "servers"
        self._files.mkdir(parents=True, exist_ok=True, mode=0o700)

    def alive(self) -> list[Member]:
        """The members that live."""
        return [m for m in self.by_name.values() if m.state == "alive"]

    async def launch(self, name: str) -> Member:
        """Start the server `name` as a new incarnation, or take over its running actor.

        Raises RayError or TimeoutError.
        """
        member = self.by_name.setdefault(name, Member(name))
        member.state = "starting"
        (self._files / name).touch()
        member.handle = await asyncio.to_thread(self._actor, name, member.addresses)
        told = await result(member.handle.ready.remote(), START_TIMEOUT_S)
        member.incarnation, member.host, member.pid = told["incarnation"], told["host"], told["pid"]
        member.addresses, member.reconnect_s = tuple(told["addresses"]), told["reconnect_s"]
        member.state = "alive"
        log.info("server %s runs: incarnation %d, pid %d on %s", name, member.incarnation, member.pid, member.host)
        member.watch = asyncio.create_task(self._watch(member))
        return member

    def _actor(self, name: str, addresses: tuple[str, ...]) -> Any:
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
        return ServerActor.options(**options).remote(self._setup, name, index, addresses)

    async def _watch(self, member: Member) -> None:
        """Wait for Ray's word of the member's death: a call that never returns fails when the process is gone."""
        while True:
            try:
                await result(member.handle.forever.remote())
                await asyncio.sleep(AGAIN_S)  # another controller asked after us: one of the two ends soon
            except ActorUnavailableError:  # Ray cannot reach it just now, and does not call it dead
                await asyncio.sleep(self._config.control.ping_interval_ms / 1000)
            except RayError as error:
                log.warning("server %s (incarnation %d) is dead: %s", member.name, member.incarnation, _line(error))
                break
        self._end(member, "dead")
        await self._died(member)

    def _end(self, member: Member, state: str) -> None:
        member.state = state
        member.figures, member.statistics = {}, (None, 0.0)
        if member.watch is not None and member.watch is not asyncio.current_task():
            member.watch.cancel()

    async def kill(self, incarnation: int) -> None:
        """End a process that was declared dead; where Ray reaches it, its death is then told as any other."""
        for member in self.alive():
            if member.incarnation == incarnation:
                with contextlib.suppress(RayError):
                    await asyncio.to_thread(ray.kill, member.handle)

    async def remove(self, name: str) -> None:
        """End a server for good, if it runs. Its name is known until it has ended: who started another under it
        meanwhile would be given the one that ends."""
        member = self.by_name.get(name)
        if member is not None:
            self._end(member, "removed")
        with contextlib.suppress(RayError, ValueError):  # ValueError: there is none of the name
            await asyncio.to_thread(self._kill, name)
        (self._files / name).unlink(missing_ok=True)
        self.by_name.pop(name, None)

    def _kill(self, name: str) -> None:
        ray.kill(ray.get_actor(name, self._setup.namespace))

    async def end_others(self, names: Collection[str]) -> None:
        """End what an earlier controller started and did not end, but these."""
        for file in sorted(self._files.iterdir()):
            if file.name not in names and file.name not in self.by_name:
                await self.remove(file.name)

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
