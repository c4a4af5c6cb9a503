"""The controller: one named, detached actor on the head host that changes the view, and nobody else does.

It logs each view before anybody hears of it (ps.viewlog), keeps the servers running (members), and answers
administrators through any server. Without it pulls and pushes go on; tables and membership do not change.

A server that dies leaves its slots *lost*: they answer SlotsLost until a restore, or until somebody accepts the loss.
It is started again as a new incarnation that owns nothing.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import ray
from ray.exceptions import RayError

from hashring.planner import Fail, Join, PlanError, Recover, Return, plan
from hashring.view import View
from ps.config import Config, config_from_plain
from ps.controller.admin import change_of
from ps.controller.members import Member, Members
from ps.controller.metrics import serve_metrics
from ps.controller.restore import prepare
from ps.errors import EmbringError, NotApplied, RequestError
from ps.loop import LoopThread
from ps.server import Setup, log_to
from ps.viewlog import EpochTakenError, ViewLog
from ps.wire import error_fields

NAME = "controller"
ADMIN_TIMEOUT_S = 60.0
START_TIMEOUT_S = 330.0

log = logging.getLogger("embring.controller")


class Control:
    """The controller's work, on one event loop."""

    def __init__(self, setup: Setup, config: Config) -> None:
        self.config = config
        self.members = Members(setup, config, self._died)
        self.log = ViewLog(Path(setup.state) / "views")
        self.view = self.log.newest() or self._first()
        self.metrics = ""
        self.begun = asyncio.Event()
        self._changing = asyncio.Lock()
        self._restoring: tuple[int, View] | None = None

    def _first(self) -> View:
        view = View.empty(secrets.randbits(63), self.config.cluster.slot_bits)
        self.log.append(view)
        return view

    async def begin(self) -> None:
        """Start (or, after a restart, find) the servers, and put them into the view."""
        self.metrics, _ = serve_metrics(self.status, self.config.control.metrics_port)
        names = [f"server-{i}" for i in range(self.config.server.servers)]
        names += [s.name for s in self.view.servers if s.alive and s.name not in names]
        outcomes = await asyncio.gather(*(self.members.launch(n) for n in names), return_exceptions=True)
        failed = [o for o in outcomes if isinstance(o, BaseException)]
        if failed:
            raise failed[0]
        running = {m.incarnation for m in self.members.alive()}
        for server in self.view.servers:
            if server.alive and server.incarnation not in running:
                await self._change(Fail(server.name))
        await self._admit([o for o in outcomes if isinstance(o, Member)])
        await self.members.install(packed(self.view))  # those that stayed while the controller was away
        self.begun.set()
        log.info("epoch %d: %d servers, %d slots lost", self.view.epoch, len(names), int(self.view.lost().sum()))

    async def _admit(self, members: list[Member]) -> None:
        """Put servers into the view, owning nothing yet where they or their names were there before."""
        known = {s.name for s in self.view.servers}
        present = {s.incarnation for s in self.view.servers}
        fresh = tuple(m.server for m in members if m.name not in known)
        if fresh:
            await self._change(Join(fresh))
        for member in members:
            if member.name in known and member.incarnation not in present:
                await self._change(Return(member.server))

    async def _change(self, change: Any) -> None:
        """Plan the next view, log it, then tell the servers. Raises RequestError where the plan refuses."""
        async with self._changing:
            try:
                view = await asyncio.to_thread(plan, self.view, change)
            except PlanError as error:
                raise RequestError(str(error)) from None
            await self._adopt(view, type(change).__name__)

    async def _adopt(self, view: View, why: str) -> None:
        """Log a view that was planned from the present one, then tell the servers; holds `_changing`."""
        try:
            await asyncio.to_thread(self.log.append, view, self.view.epoch)
        except EpochTakenError as error:
            log.error("%s: another controller has taken over, this one ends", error)
            os._exit(1)
        self.view = view
        log.info("epoch %d: %s", view.epoch, why)
        await self.members.install(packed(view))

    async def _restore(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a restore (see ps.controller.restore): what goes where, and the view that will own it."""
        async with self._changing:
            flags = {name: bool(fields.get(name)) for name in ("replace_tables", "accept_loss")}
            restore = await asyncio.to_thread(partial(prepare, self.view, fields["manifest"], **flags))
            if restore.first is not None:
                await self._adopt(restore.first, "restore begins")
            self._restoring = (self.view.epoch, restore.final)
        return {
            "view": packed(restore.final),
            "slots": restore.slots,
            "tables": restore.tables,
            "wanted": restore.wanted,
        }

    async def _restored(self) -> dict[str, Any]:
        """End a restore: its rows are where they belong."""
        async with self._changing:
            if self._restoring is None or self._restoring[0] != self.view.epoch:
                self._restoring = None
                raise RequestError("the cluster changed during the restore: its slots stay lost, restore again")
            final, self._restoring = self._restoring[1], None
            await self._adopt(final, "restore ends")
        return {"epoch": self.view.epoch}

    async def _died(self, member: Member) -> None:
        """A server is dead by Ray's word: its slots are lost, and it is started again as another incarnation."""
        if any(s.incarnation == member.incarnation and s.alive for s in self.view.servers):
            await self._change(Fail(member.name))
        control = self.config.control
        while control.restart and member.restarts < control.restarts_max:
            member.restarts += 1
            try:
                await self.members.launch(member.name)
                await self._admit([member])
                return
            except (RayError, TimeoutError, EmbringError) as error:
                log.warning("server %s did not start again: %s", member.name, error)
        member.state = "given up"

    async def admin(self, verb: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Answer an administrator. Raises EmbringError."""
        if verb == "status":
            return self.status()
        if not self.begun.is_set():
            raise NotApplied("the controller is still starting")
        if verb == "recover":
            lost = int(self.view.lost().sum())
            if lost:
                await self._change(Recover())
            return {"epoch": self.view.epoch, "slots": lost}
        if verb == "restore":
            return await self._restore(fields)
        if verb == "restored":
            return await self._restored()
        change = change_of(self.view, verb, fields, self.config.cluster.seed)
        if change is not None:
            await self._change(change)
        return {"epoch": self.view.epoch, "changed": change is not None}

    def status(self) -> dict[str, Any]:
        """Everything about the cluster, as plain data."""
        view = self.view
        lost = view.lost()
        owners = view.owners()
        silent = self.members.silence.silent()
        index = {s.incarnation: i for i, s in enumerate(view.servers)}
        primary = np.bincount(owners[owners[:, 0] >= 0, 0], minlength=len(view.servers))
        servers = []
        for member in sorted(self.members.by_name.values(), key=lambda m: m.name):
            place = index.get(member.incarnation, -1)
            servers.append(
                {
                    **member.figures,
                    "name": member.name,
                    "state": "silent" if member.name in silent else member.state,
                    "host": member.host,
                    "pid": member.pid,
                    "incarnation": member.incarnation,
                    "addresses": list(member.addresses),
                    "slots": int(primary[place]) if place >= 0 else 0,
                    "restarts": member.restarts,
                    "unanswered": self.members.silence.unanswered.get(member.name, 0),
                }
            )
        return {
            "cluster": view.cluster,
            "epoch": view.epoch,
            "fingerprint": self.config.fingerprint,
            "slots_lost": int(lost.sum()),
            "tables": [{"name": t.name, "number": t.number, **dict(t.spec)} for t in view.tables],
            "servers": servers,
            "metrics": self.metrics,
            "time": time.time(),
        }


def packed(view: View) -> bytes:
    """A view as it is handed to servers."""
    return msgpack.packb(view.to_plain())


class Controller:
    """The Ray actor around `Control`: its calls come on Ray's threads, the work is done on one loop of its own."""

    def __init__(self, setup: Setup) -> None:
        log_to(Path(setup.state) / "logs" / f"{NAME}.log")
        self._control = Control(setup, config_from_plain(setup.config))
        self._thread = LoopThread("control")
        self._beginning = self._thread.submit(self._control.begin())

    def start(self) -> dict[str, Any]:
        """Wait until every server is in the view; the status."""
        self._beginning.result(START_TIMEOUT_S)
        return self._control.status()

    def status(self) -> dict[str, Any]:
        """The status as plain data."""
        return self._run(self._control.admin, "status", {})["ok"]

    def admin(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        """{"ok": answer} or {"error": fields of the error}: errors keep their class on their way through Ray."""
        return self._run(self._control.admin, verb, fields)

    def stop_servers(self) -> None:
        """End every server, without starting any again."""
        self._thread.call(self._control.members.stop(), ADMIN_TIMEOUT_S)

    def _run(self, call: Callable[..., Awaitable[dict[str, Any]]], *arguments: Any) -> dict[str, Any]:
        async def answer() -> dict[str, Any]:
            try:
                return {"ok": await call(*arguments)}
            except EmbringError as error:
                return {"error": error_fields(error)}

        return self._thread.call(answer(), ADMIN_TIMEOUT_S)


ControllerActor = ray.remote(num_cpus=0)(Controller)
