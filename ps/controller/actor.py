"""The controller: one named, detached actor on the head host that changes the view, and nobody else does.

`ps.failover` decides, and its shell carries that out: each view is logged before anybody hears of it. Here the servers
are kept running (members), and administrators answered, through any server. Without the controller pulls and pushes
go on, save pushes to slots of a dying server; tables and membership do not change.

A slot whose last owner dies is *lost*: it answers SlotsLost until a restore, or until somebody accepts the loss. The
server is started again as a new incarnation that owns nothing.
"""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from hashring.planner import Change
from hashring.view import Move, Server, View
from ps.config import Config, config_from_plain
from ps.controller.admin import change_of, last_owned
from ps.controller.figures import figures
from ps.controller.keeper import Job, Keeper
from ps.controller.limits import limits_of
from ps.controller.members import Member, Members
from ps.controller.metrics import on_loop, serve_metrics
from ps.controller.moves import Moves
from ps.controller.restore import Restore, conclude, prepare, receivers, recovered, told
from ps.controller.shell import Shell
from ps.controller.status import cluster_status
from ps.errors import EmbringError, NotApplied, RequestError
from ps.fabric.aio import AsyncConnection, dial
from ps.fabric.protocol import Hello
from ps.fabric.tls import trusting
from ps.failover import Wish
from ps.loop import LoopThread
from ps.runtime import readdress
from ps.server import Setup, log_to
from ps.viewlog import ViewLog
from ps.wire import error_fields

NAME = "controller"
ADMIN_TIMEOUT_S = 60.0
START_TIMEOUT_S = 330.0
CONNECT_S = 2.0
"""Seconds in which a server must answer the handshake."""

LEAVE_WAIT_S, DRAIN_S = 60.0, 1.0
"""Between two looks for servers that have left, where nothing tells; how long one that has is left to answer."""

LINGER_S = 10.0
"""How long a controller that could not begin is left to say so."""

AGAIN_S = 0.5
"""Between two attempts to start a server: Ray may not have heard yet that the last process of the name is dead."""

log = logging.getLogger("embring.controller")


class Control:
    """The controller's work, on one event loop."""

    def __init__(self, setup: Setup, config: Config) -> None:
        self.config = config
        self.members = Members(setup, config, self._died)
        views = ViewLog(Path(setup.state) / "views")
        view = views.newest()
        if view is None:
            view = View.empty(secrets.randbits(63), config.cluster.slot_bits)
            views.append(view)
        interval = config.control.ping_interval_ms / 1000
        self.shell = Shell(view, views, self._dial, limits_of(config.control), interval, partial(os._exit, 1))
        self.metrics = ""
        self._setup = setup
        self._tls = trusting(config.tls.trusted)
        self._begun = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._restoring: tuple[int, Restore] | None = None
        self._restores = 0
        self.keeper = Keeper(config.checkpoint, lambda: self.shell.view, self._order)
        self._published: tuple[str, ...] = ()
        self._publishing = asyncio.Lock()
        self.moves = Moves(
            self.members, lambda: self.shell.view, lambda wish: self._change(wish), self._refuse, config.server.port
        )

    async def begin(self) -> None:
        """Start (or, after a restart, find) the servers, until they are in the view."""
        view = self.shell.view
        try:
            scraped = on_loop(self.status, asyncio.get_running_loop())
            self.metrics, _ = serve_metrics(scraped, self.config.control.metrics_port)
        except OSError as error:
            if not view.servers:
                raise
            log.error("there are no metrics: %s", error)  # whose servers run already: failover matters more
        self._keep(self.shell.run())
        self._keep(self._ask_figures())
        if view.servers:
            self._begun.set()
        names = [s.name for s in view.servers if "~" not in s.name]
        names = names or [f"server-{i}" for i in range(self.config.server.servers)]
        listened = {s.name: s.addresses for s in view.servers}
        self.members.by_name |= {name: Member(name, addresses=listened.get(name, ())) for name in names}
        await self.members.end_others(names)
        launches = (self._find(name) if view.servers else self._launch(name, tell=False) for name in names)
        outcomes = await asyncio.gather(*launches, return_exceptions=True)
        failed = [o for o in outcomes if isinstance(o, BaseException)]
        if failed:
            raise failed[0]
        self.shell.started(*(m.server for m in self.members.alive()))  # of a new cluster all at once: in one view
        await self.shell.until(self._all_in, START_TIMEOUT_S)
        await self.shell.spread(self.shell.view.epoch)
        self._begun.set()
        self._keep(self._end_superfluous())
        self._keep(self.keeper.run())
        gc.freeze()  # as servers do: pings do not wait for a collection that walks through Ray
        log.info("%d servers run", len(names))

    def _keep(self, work: Any) -> None:
        """Run something for good; where it fails, so does this process, and Ray starts another."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                log.error("the controller ends", exc_info=task.exception())
                os._exit(1)

        task.add_done_callback(ended)

    def _all_in(self) -> bool:
        known = {s.incarnation for s in self.shell.view.servers}
        return all(m.incarnation in known for m in self.members.alive())

    async def _dial(self, server: Server) -> AsyncConnection:
        hello = Hello(self._setup.token, server.incarnation, self.config.fingerprint)
        return await dial(server.addresses, hello, CONNECT_S, self._tls)

    async def _ask_figures(self) -> None:
        """Ask every server for its figures, and keep the runtime file up, without end."""
        interval = self.config.control.statistics_interval_ms / 1000
        while True:
            await self._publish()
            await self._ask_all(interval)
            await asyncio.sleep(interval)

    async def _publish(self) -> None:
        """Have the runtime file name the servers that live, for clients that begin or look for them anew."""
        file, cluster = self._setup.runtime_file, self.shell.view.cluster
        async with self._publishing:  # else an older list might be written last
            addresses = tuple(a for m in self.members.alive() if self._named(m.name) for a in m.addresses)
            if addresses and addresses != self._published:
                try:
                    if await asyncio.to_thread(readdress, file, cluster, addresses):
                        self._published = addresses
                except OSError as error:
                    log.warning("the runtime file %s cannot be written: %s", file, error)

    async def _ask_all(self, timeout: float) -> None:
        await asyncio.gather(*(self._ask_one(m, timeout) for m in self.members.alive()))

    async def _ask_one(self, member: Member, timeout: float) -> None:
        with contextlib.suppress(EmbringError):
            self._told(member, (await self.shell.ask(member.incarnation, "statistics", timeout)).fields)

    def _told(self, member: Member, statistics: dict[str, Any]) -> None:
        now = asyncio.get_running_loop().time()
        before, asked = member.statistics
        member.statistics = (statistics, now)
        member.figures = figures(statistics, before, now - asked)

    async def _launch(self, name: str, tell: bool = True) -> None:
        member = await self.members.launch(name)
        if tell and self._named(name):
            self.shell.started(member.server)

    def _named(self, name: str) -> bool:
        """Whether the view has a server of this name: it may have been removed while its process started."""
        return self.shell.view.server_index(name) is not None

    async def _died(self, member: Member) -> None:
        """A server is dead by Ray's word: others take over, and it is started again as another incarnation."""
        self.shell.died(member.incarnation)
        await self._start_again(member)

    async def _find(self, name: str) -> None:
        """The process of a server of the view, for a controller that was started again; another where it is dying."""
        try:
            await self._launch(name)
        except (RayError, TimeoutError, EmbringError) as error:
            log.warning("server %s was not found: %s", name, error)
            await self._start_again(self.members.by_name[name])

    async def _start_again(self, member: Member) -> None:
        control = self.config.control

        def wanted() -> bool:  # whoever is about to join is, too: its move would wait for it without end
            return self._named(member.name) or member.name in self.moves.starting

        while control.restart and member.restarts < control.restarts_max and wanted():
            member.restarts += 1
            try:
                await self._launch(member.name)
                return
            except (RayError, TimeoutError, EmbringError) as error:
                log.warning("server %s did not start again: %s", member.name, error)
                await asyncio.sleep(AGAIN_S)
        member.state = "given up"

    async def _change(self, wish: Wish) -> int:
        """Change the view, and wait until servers have it. Raises RequestError where the plan refuses."""
        epoch = await self.shell.change(wish)
        await self.shell.spread(epoch)
        return epoch

    # -- servers join and leave

    def _refuse(self, view: View, move: Move) -> None:
        """Raise RequestError where a server is to leave that rows of a restore are on their way to."""
        if self._restoring is None or move.kind != "leave":
            return
        if view.epoch < self._restoring[1].first.epoch:  # which is being logged: such a move is judged by it later
            return
        if taking := sorted(receivers(view, self._restoring[1]) & set(move.names)):
            raise RequestError(
                f"rows of a restore are on their way to {', '.join(taking)}: wait until it has ended, or, if it was "
                "killed, restore again first"
            )

    async def _end_superfluous(self) -> None:
        """End servers that have left the view, without end: drained first, and only once the others know."""
        while True:
            await self.shell.until(lambda: bool(self.moves.superfluous()), LEAVE_WAIT_S)
            for member in self.moves.superfluous():
                await self.shell.spread(self.shell.view.epoch)
                await self._publish()  # the file may name nobody but those who leave
                with contextlib.suppress(EmbringError):
                    connection = await self._dial(member.server)
                    with contextlib.suppress(EmbringError):
                        # What it has copied goes with it: the status tells until it has ended.
                        self._told(member, (await connection.request("statistics", {}, {}, CONNECT_S)).fields)
                    await connection.request("drain", {}, {}, CONNECT_S)
                    await asyncio.sleep(DRAIN_S)
                    connection.close()
                log.info("server %s has left, its process ends", member.name)
                await self.members.remove(member.name)

    async def _restore(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a restore (see ps.controller.restore): what goes where, and the view that will own it."""
        flags: dict[str, Any] = {
            name: bool(fields.get(name)) for name in ("replace_tables", "accept_loss", "same_tables")
        }
        flags["tables"] = [str(name) for name in fields.get("tables") or ()]
        before, begun = self._restoring, list[tuple[int, Restore]]()

        def wish(view: View) -> View | None:
            restore = prepare(view, fields["manifest"], **flags)
            self._restores += 1
            self._restoring = (self._restores, restore)  # at once: a leave may be asked for before the view has spread
            begun.append(self._restoring)
            return restore.first

        try:
            await self._change(wish)
        except BaseException:
            if begun and self._restoring is begun[0]:
                self._restoring = before
            raise
        number, restore = begun[0]
        return {**told(restore), "restore": number}

    async def _restored(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """End a restore: its rows are where they belong."""
        number, restore = self._restoring or (0, None)
        if restore is None or number != fields.get("restore"):
            raise RequestError("another restore has begun, or the controller was restarted: restore again")
        self._restoring = None
        epoch = await self._change(lambda view: conclude(view, restore))
        self.keeper.save_soon()
        return {"epoch": epoch}

    def _order(self, what: Job) -> dict[str, Any]:
        """What the process that saves or restores for the controller must know."""
        checkpoint, view = self.config.checkpoint, self.shell.view
        return {
            "what": what,
            "directory": checkpoint.directory,
            "full_every": checkpoint.full_every,
            "keep": checkpoint.keep,
            "models": self.config.router.models,
            "servers": [[s.name, s.incarnation, list(s.addresses)] for s in view.servers if s.alive],
            "token": self._setup.token,
            "tls_ca": self.config.tls.trusted,
            "fingerprint": self.config.fingerprint,
            "cluster": view.cluster,
        }

    async def _recover(self) -> dict[str, Any]:
        """Give lost slots to living servers, without their rows."""
        lost = [0]

        def wish(view: View) -> View | None:
            lost[0] = int(view.lost().sum())
            return recovered(view) if lost[0] else None

        return {"epoch": await self._change(wish), "slots": lost[0]}

    async def _fail_over(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Declare a server dead, by an administrator's word."""
        name = str(fields.get("name"))
        told = {"incarnation": 0, "slots_lost": 0}

        def wish(view: View) -> Change | None:
            change = change_of(view, "failover", fields)
            told["incarnation"] = view.servers[view.server_index(name) or 0].incarnation
            told["slots_lost"] = last_owned(view, name)
            return change

        epoch = await self._change(wish)
        await self.members.kill(told["incarnation"])
        return {"epoch": epoch, "slots_lost": told["slots_lost"]}

    async def admin(self, verb: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Answer an administrator. Raises EmbringError."""
        if verb == "status":
            if fields.get("fresh"):
                await self._ask_all(CONNECT_S)
            return self.status()
        if not self._begun.is_set():
            raise NotApplied("the controller is still starting")
        if verb == "recover":
            return await self._recover()
        if verb == "restore":
            return await self._restore(fields)
        if verb == "restored":
            return await self._restored(fields)
        if verb == "failover":
            return await self._fail_over(fields)
        if verb == "outlook":
            await self._ask_all(CONNECT_S)  # a controller that was just started again knows of no row
            return self.moves.outlook(fields, self.config.server.copy_max_mib_per_s << 20)
        if verb == "move":
            return await self.moves.begin(fields)
        if verb == "abort":
            return await self.moves.abort(fields)
        changed = [False]

        def wish(view: View) -> Change | None:
            change = change_of(view, verb, fields, self.config.cluster.seed, self.config.server.replicas)
            changed[0] = change is not None
            return change

        return {"epoch": await self._change(wish), "changed": changed[0]}

    def status(self) -> dict[str, Any]:
        """Everything about the cluster, as plain data."""
        told = cluster_status(self.shell.mind, list(self.members.by_name.values()))
        for server in told["servers"]:
            if self._begun.is_set() and not self._named(server["name"]) and server["name"] not in self.moves.starting:
                server["state"] = "ending"
        return {
            **told,
            "starting": list(self.moves.starting),
            "move_failed": self.moves.failed,
            "fingerprint": self.config.fingerprint,
            "checkpoint": self.keeper.status(),
            "metrics": self.metrics,
            "time": time.time(),
        }


class Controller:
    """The Ray actor around `Control`: its calls come on Ray's threads, the work is done on one loop of its own."""

    def __init__(self, setup: Setup) -> None:
        log_to(Path(setup.state) / "logs" / f"{NAME}.log")
        self._control = Control(setup, config_from_plain(setup.config))
        self._thread = LoopThread("control")
        self._beginning = self._thread.submit(self._begin())

    async def _begin(self) -> None:
        """Whoever started the cluster hears in `start` why it could not begin; where Ray started this process, nobody
        asks: it ends in any case, for a controller that has not begun would decide nothing."""
        try:
            await self._control.begin()
        except BaseException:
            log.exception("the controller could not begin, and ends")
            asyncio.get_running_loop().call_later(LINGER_S, os._exit, 1)
            raise

    def start(self) -> dict[str, Any]:
        """Wait until every server is in the view; the status."""
        self._beginning.result(START_TIMEOUT_S)
        return self.status()

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
