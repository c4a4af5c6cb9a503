"""The shell of `ps.failover`: what the controller decides, carried out on one event loop. No Ray.

Each server process of the view has a line to it: one ordered connection, made anew where it broke. Requests wait for
their answers as long as the process may take; whether it is silent is counted in rounds by `Failover` alone.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from numpy.typing import NDArray

from hashring.view import Server, View
from ps.errors import EmbringError, NobodyListens, NotApplied, PerhapsApplied, WrongView
from ps.failover import Action, Append, Changed, Deliver, Failover, FailoverLimits, Learn, Ping, Refused, Retire, Wish
from ps.replication import Standing
from ps.viewlog import EpochTakenError
from ps.wire import Message, vector, view_message, whole

PATIENCE_S = 5.0
"""After so long without an answer a connection is given up for another: what is on it may have gone astray."""

SPREAD_S = 10.0
"""How long an administrator waits for servers to take the view that was made for him."""

INSTALLS_MAX = 3
"""Views on their way to one server: one that is slow gets the newest later, not each of them."""

RETRY_S = 1.0
"""Between two attempts to write the log, where the disk refuses."""

log = logging.getLogger("embring.controller")


class Connection(Protocol):
    """What is needed of a connection (ps.fabric.aio.AsyncConnection)."""

    @property
    def closed(self) -> bool:
        """Whether another must be made."""

    async def request(self, op: str, fields: dict[str, Any], arrays: dict[str, Any], timeout: float) -> Message:
        """The reply; raises EmbringError."""

    def close(self) -> None:
        """Close it."""


class Log(Protocol):
    """What is needed of the view log (ps.viewlog.ViewLog)."""

    def append(self, view: View, after: int) -> None:
        """Make the view durable. Raises EpochTakenError, OSError."""

    def holds(self, epoch: int) -> bool:
        """Whether this epoch is in the log."""


Dial = Callable[[Server], Awaitable[Connection]]


class Line:
    """The way to one server process.

    epoch: of the newest view that it is known to have. asked: what is under way. trouble: what failed last, and why.
    """

    def __init__(self, server: Server, dial: Dial) -> None:
        self.server = server
        self.epoch = 0
        self.asked: set[str] = set()
        self.trouble = ("", "")
        self._dial = dial
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()

    async def ask(
        self, op: str, fields: dict[str, Any], arrays: dict[str, NDArray[Any]], timeout: float = PATIENCE_S
    ) -> Message:
        """The reply to a request; requests leave in the order of these calls. Raises EmbringError."""
        async with self._connecting:
            if self._connection is None or self._connection.closed:
                self._connection = await self._dial(self.server)
            connection = self._connection
        try:
            reply = await connection.request(op, fields, arrays, timeout)
        except (PerhapsApplied, NotApplied):
            connection.close()
            raise
        self.epoch = max(self.epoch, whole(reply.fields, "epoch"))
        return reply

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()


class Shell:
    """Drives one `Failover` from the newest view of the log on; everything runs on one loop.

    round_s: seconds between two rounds of pings. retire: what ends this process, where another controller took over.
    """

    def __init__(
        self, view: View, views: Log, dial: Dial, limits: FailoverLimits, round_s: float, retire: Callable[[], None]
    ) -> None:
        self.mind = Failover(view, limits)
        self.lines: dict[int, Line] = {}
        self._views = views
        self._dial = dial
        self._round_s = round_s
        self._retire = retire
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    @property
    def view(self) -> View:
        """The newest view in the log."""
        return self.mind.view

    async def run(self) -> None:
        """Rounds without end; a round that is late is not made up for."""
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            self.tick()
            await asyncio.sleep(max(0.0, begun + self._round_s - loop.time()))

    def tick(self) -> None:
        """One round. A controller that has outlived the one which logged a newer view ends: its successor reads it."""
        if not self.mind.appending and not self.mind.retired and self._views.holds(self.view.epoch + 1):
            log.error("epoch %d is another controller's: this one ends", self.view.epoch + 1)
            self.mind.taken()
        self.mind.tick()
        self._perform()
        self._tell()

    def died(self, incarnation: int) -> None:
        """A process is dead, by Ray's word."""
        self.mind.died(incarnation)
        self._perform()

    def started(self, *servers: Server) -> None:
        """Processes listen."""
        self.mind.started(*servers)
        self._perform()

    async def change(self, wish: Wish) -> int:
        """Make a change of the view; the epoch in which it holds, once that is in the log. Raises EmbringError."""
        granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.mind.change(granted, wish)
        self._perform()
        return await granted

    async def spread(self, epoch: int) -> bool:
        """Wait until every server that answers has a view; whether they have in good time."""

        def reached() -> bool:
            there = [i for i, h in self.mind.servers.items() if not h.missed]
            return all(i in self.lines and self.lines[i].epoch >= epoch for i in there)

        return await self.until(reached, SPREAD_S)

    async def until(self, check: Callable[[], bool], timeout: float) -> bool:
        """Wait until `check` holds; False where it does not within so many seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not check():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def ask(self, incarnation: int, op: str, timeout: float) -> Message:
        """A request of the controller's own, such as for figures. Raises EmbringError."""
        line = self._line(incarnation)
        if line is None:
            raise NotApplied(f"incarnation {incarnation} is not alive in epoch {self.view.epoch}")
        return await line.ask(op, {}, {}, timeout)

    def close(self) -> None:
        """End everything that is under way."""
        for task in self._tasks:
            task.cancel()
        for line in self.lines.values():
            line.close()

    # -- actions

    def _perform(self) -> None:
        while actions := self.mind.actions():
            for action in actions:
                self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Ping(incarnation, copying):
                self._send(incarnation, "ping", lambda line: self._ping(line, copying))
            case Deliver(incarnation, view):
                self._send(incarnation, f"install of epoch {view.epoch}", lambda line: self._install(line, view))
            case Learn():
                self._send(action.primary, f"learn of {action.learner}", lambda line: self._learn(line, action))
            case Append(view, after):
                self._spawn(self._append(view, after))
            case Changed(token, epoch):
                if isinstance(token, asyncio.Future) and not token.done():
                    token.set_result(epoch)
            case Refused(token, error):
                if isinstance(token, asyncio.Future) and not token.done():
                    token.set_exception(error)
            case Retire():
                self._retire()

    def _line(self, incarnation: int) -> Line | None:
        if incarnation not in self.lines:
            server = next((s for s in self.view.servers if s.incarnation == incarnation and s.alive), None)
            if server is None:
                return None
            self.lines[incarnation] = Line(server, self._dial)
        return self.lines[incarnation]

    def _send(self, incarnation: int, what: str, work: Callable[[Line], Coroutine[Any, Any, None]]) -> None:
        """Begin a request, unless the same is under way: a stopped process must not find hundreds of them."""
        line = self._line(incarnation)
        if line is not None and what not in line.asked:
            line.asked.add(what)
            self._spawn(self._asking(line, what, work))

    async def _asking(self, line: Line, what: str, work: Callable[[Line], Coroutine[Any, Any, None]]) -> None:
        try:
            await work(line)
        except EmbringError as error:
            if isinstance(error, NobodyListens | WrongView) and what == "ping":  # gone, or another process in its place
                self.mind.refused(line.server.incarnation)
                self._perform()
            if what != "ping" and (what, str(error)) != line.trouble:
                line.trouble = (what, str(error))
                log.warning("server %s: %s failed: %s", line.server.name, what, error)
        finally:
            line.asked.discard(what)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a step of the controller failed", exc_info=task.exception())

    async def _ping(self, line: Line, copying: bool) -> None:
        reply = await line.ask("ping", {"copying": copying}, {})
        kinds, peers = vector(reply.arrays, "kinds", "|u1"), vector(reply.arrays, "peers", "<u8")
        slots, terms = vector(reply.arrays, "slots", "<i8"), vector(reply.arrays, "terms", "<i8")
        epoch = whole(reply.fields, "epoch")
        self.mind.answered(line.server.incarnation, epoch, Standing(kinds, peers, slots, terms))
        self._perform()
        self._tell()

    async def _install(self, line: Line, view: View) -> None:
        under_way = sum(what.startswith("install") for what in line.asked)
        if line.epoch >= view.epoch or under_way > INSTALLS_MAX:
            return
        await line.ask("install", *view_message(view))
        self._tell()

    async def _learn(self, line: Line, lesson: Learn) -> None:
        fields = {"learner": lesson.learner, "term_epoch": lesson.epoch}
        await line.ask("learn", fields, {"slots": lesson.slots})

    async def _append(self, view: View, after: int) -> None:
        while True:
            try:
                await asyncio.to_thread(self._views.append, view, after)
                break
            except EpochTakenError as error:
                log.error("%s: another controller has taken over, this one ends", error)
                self.mind.taken()
                self._perform()
                return
            except OSError as error:  # a full disk, say: until it can be written, nothing changes
                log.error("epoch %d cannot be written to the view log: %s", view.epoch, error)
                await asyncio.sleep(RETRY_S)
        changed = len(view.terms()) - int((view.terms()[: self.view.slots_total] == self.view.terms()).sum())
        alive = {s.incarnation for s in view.servers if s.alive}
        log.info(
            "epoch %d: %d servers, %d slots in a new term, %d lost",
            *(view.epoch, len(alive), changed, int(view.lost().sum())),
        )
        self.mind.logged(view)
        for gone in self.lines.keys() - alive:
            self.lines.pop(gone).close()
        self._perform()
        self._tell()

    def _tell(self) -> None:
        self._news.set()
