"""`AsyncClient`: for coroutines of one event loop. The router uses it."""

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hashring.view import Server
from ps.client.batch import Bag
from ps.client.core import CLOSED, TIMEOUT_MAX, Ask, Command, Core, Full, Steps, Wait, deadline, given_up
from ps.client.places import Seeds, Tls, prepare, where
from ps.client.ranges import PullRange
from ps.client.request import Call
from ps.client.verbs import ADAGRAD, INITIALIZER, ClientStatistics, Modes, RowRange, Verbs
from ps.errors import EmbringError, NotApplied, PerhapsApplied, RequestError
from ps.fabric.address import pick
from ps.fabric.aio import AsyncConnection
from ps.fabric.protocol import Hello
from ps.ragged import RaggedIds
from ps.share import Acks
from ps.spec import Absent, Initializer, Optimizer, Placement, TableSpec


class _Connections:
    """One connection for each server, made when it is first needed, once for all tasks that wait for it."""

    def __init__(self, token: str, tls: ssl.SSLContext | None, core: Core) -> None:
        self._token = token
        self._tls = tls
        self._client = core.window.client
        self._traffic = core.counters.traffic
        core.on_adopt = self._keep
        self._open: dict[tuple[str, int], AsyncConnection] = {}
        self._making: dict[tuple[str, int], asyncio.Lock] = {}

    async def of(self, server: Server, until: float) -> AsyncConnection:
        """The connection to a server; NotApplied where none of its addresses answers in time."""
        key = (server.name, server.incarnation)
        found = self._open.get(key)
        if found is not None and not found.closed:
            return found
        async with self._alone(key, until):
            found = self._open.get(key)
            if found is None or found.closed:
                found = self._open[key] = await self._connect(server, until)
            return found

    @contextlib.asynccontextmanager
    async def _alone(self, key: tuple[str, int], until: float) -> AsyncIterator[None]:
        """One task connects to a server at a time. The others wait no longer than they have time themselves."""
        turn = self._making.setdefault(key, asyncio.Lock())
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await turn.acquire()
        except TimeoutError:
            raise NotApplied(f"server {key[0]!r} could not be reached in time") from None
        try:
            yield
        finally:
            turn.release()

    def _keep(self, servers: Sequence[Server]) -> None:
        """Close what leads to incarnations that the newest view does not name: those own nothing."""
        named = {(server.name, server.incarnation) for server in servers}
        for key in self._open.keys() - named:
            self._open.pop(key).close()
        for key in [key for key, turn in self._making.items() if key not in named and not turn.locked()]:
            del self._making[key]

    async def _connect(self, server: Server, until: float) -> AsyncConnection:
        hello = Hello(self._token, server.incarnation, client=self._client)
        failed: EmbringError = NotApplied(f"server {server.name!r} could not be reached in time")
        for address in pick(server.addresses):
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                return await AsyncConnection.connect(address, hello, left, self._tls, traffic=self._traffic)
            except NotApplied as error:
                failed = error
        raise failed

    def close(self) -> None:
        """Close all."""
        for connection in self._open.values():
            connection.close()
        self._open.clear()


class AsyncClient:
    """`ps.Client` for coroutines: the same verbs, arguments, answers and errors, awaited; make it with `connect`.

        client = await ps.AsyncClient.connect()
        rows = await client.pull("item", ids)

    It belongs to one event loop; any number of its coroutines may call it at once. Arrays that were handed in must be
    left alone until the call returns. Not for use after a fork.
    """

    def __init__(
        self,
        addresses: Seeds,
        token: str = "",
        timeout: float = 10.0,
        tls: ssl.SSLContext | None = None,
        acks: Acks = "all",
        in_place: bool = True,
    ) -> None:
        """A client that has not looked for its cluster yet: `connect` is what users call."""
        self._verbs = Verbs(addresses)
        self._verbs.configure(timeout, acks, in_place)
        self._connections = _Connections(token, tls, self._verbs)
        self._pushes: set[asyncio.Task[None]] = set()
        self._line: deque[asyncio.Future[None]] = deque()
        self._views = asyncio.Event()
        self._closed = False
        self._verbs.window.on_close = self._next_in_line
        self._verbs.on_views = self._viewed

    @classmethod
    async def connect(
        cls,
        addresses: str | Sequence[str] | None = None,
        token: str | None = None,
        timeout: float = 10.0,
        tls: Tls = None,
        acks: Acks = "all",
        in_place: bool = True,
    ) -> "AsyncClient":
        """A client of a running cluster; all arguments are as those of `ps.connect`."""
        found, secret, trust = where(addresses, token, tls)
        client = cls(found, secret, timeout, trust, acks, in_place)
        prepare()
        try:
            await client._run(client._verbs.begin(deadline(None, timeout)))
        except BaseException:
            client._connections.close()
            raise
        return client

    # -- driving

    async def _run(self, steps: Steps) -> Any:
        if self._closed:
            raise RequestError(CLOSED)
        outcome: Any = None
        begun, waited = time.monotonic(), False
        try:
            while True:
                command: Command = steps.send(outcome)
                outcome = None
                if waited and not isinstance(command, Full):
                    waited = False
                    self._next_in_line()
                if isinstance(command, Ask):
                    outcome = await self._ask(command)
                elif isinstance(command, Wait):
                    await self._pause(command)
                elif isinstance(command, Full):
                    first, waited = waited, True
                    await self._in_line(command.until, first)
        except StopIteration as stop:
            return stop.value
        except EmbringError as error:
            given_up(error, begun)
            raise
        finally:
            steps.close()
            if waited:
                self._next_in_line()

    async def _ask(self, ask: Ask) -> dict[int, EmbringError]:
        if len(ask.calls) == 1:
            errors = [await self._call(ask, ask.calls[0])]
        else:
            errors = await asyncio.gather(*(self._call(ask, call) for call in ask.calls))
        return {call.key: error for call, error in zip(ask.calls, errors, strict=True) if error is not None}

    async def _call(self, ask: Ask, call: Call) -> EmbringError | None:
        try:
            connection = await self._connections.of(ask.servers[call.server], ask.until)
            left = max(0.001, ask.until - time.monotonic())
            ask.absorb(call.key, await connection.request(call.op, call.fields, call.arrays, left))
        except EmbringError as error:
            return error
        return None

    async def _pause(self, wait: Wait) -> None:
        if wait.views_until is None:
            await asyncio.sleep(wait.seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, wait.views_until - time.monotonic())):
                await self._views.wait()

    def _viewed(self) -> None:
        """Wake who waits for views; whoever waits from now on waits for the next."""
        self._views.set()
        self._views = asyncio.Event()

    async def _in_line(self, until: float, first: bool) -> None:
        """Wait for room in the window, until then at the longest: whoever asked looks at the clock. first: before all
        others, since another took the place that was for this one."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.appendleft(turn) if first else self._line.append(turn)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await turn
        finally:
            with contextlib.suppress(ValueError):  # who was woken is in line no more
                self._line.remove(turn)

    def _next_in_line(self) -> None:
        """Where the window has room, whoever waits longest may begin, who then wakes the next. To wake all, of whom one
        finds room, would take a turn of each for every push."""
        while self._line and not self._verbs.window.full:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _launch(self, steps: Steps) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._run(steps))
        self._pushes.add(task)
        task.add_done_callback(self._landed)
        return task

    def _landed(self, task: "asyncio.Task[None]") -> None:
        # A failed push stays until `flush` has raised its error.
        if task.cancelled() or task.exception() is None:
            self._pushes.discard(task)

    # -- rows

    async def pull(
        self, name: str, ids: ArrayLike, absent: Absent | None = None, timeout: float | None = None
    ) -> NDArray[np.float32]:
        """As `Client.pull`."""
        return await self._run(self._verbs.pull(name, ids, absent, timeout))

    async def pull_bags(
        self,
        bags: Mapping[str, Bag],
        mode: Modes = "sum",
        absent: Absent | None = None,
        timeout: float | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """As `Client.pull_bags`."""
        return await self._run(self._verbs.pull_bags(bags, mode, absent, timeout))

    async def pull_ragged(
        self,
        tables: Sequence[str],
        ragged: RaggedIds,
        mode: Modes = "sum",
        absent: Absent | None = None,
        timeout: float | None = None,
    ) -> list[NDArray[np.float32]]:
        """As `Client.pull_ragged`."""
        return await self._run(self._verbs.pull_ragged(tables, ragged, mode, absent, timeout))

    async def push(
        self, name: str, ids: ArrayLike, grads: ArrayLike, lr_scale: float = 1.0, timeout: float | None = None
    ) -> None:
        """As `Client.push`."""
        await self._run(self._verbs.push(name, ids, grads, "push", lr_scale, timeout))

    async def push_bags(
        self,
        bags: Mapping[str, Bag],
        grads: Mapping[str, ArrayLike],
        mode: Modes = "sum",
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        """As `Client.push_bags`."""
        await self._run(self._verbs.push_bags(bags, grads, mode, lr_scale, timeout))

    async def push_ragged(
        self,
        tables: Sequence[str],
        ragged: RaggedIds,
        grads: Sequence[ArrayLike],
        mode: Modes = "sum",
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        """As `Client.push_ragged`."""
        await self._run(self._verbs.push_ragged(tables, ragged, grads, mode, lr_scale, timeout))

    def push_nowait(
        self, name: str, ids: ArrayLike, grads: ArrayLike, lr_scale: float = 1.0, timeout: float | None = None
    ) -> "asyncio.Task[None]":
        """A task that pushes as `push` does; await it, or `flush()`."""
        return self._launch(self._verbs.push(name, ids, grads, "push", lr_scale, timeout))

    def push_bags_nowait(
        self,
        bags: Mapping[str, Bag],
        grads: Mapping[str, ArrayLike],
        mode: Modes = "sum",
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> "asyncio.Task[None]":
        """A task that pushes as `push_bags` does; await it, or `flush()`."""
        return self._launch(self._verbs.push_bags(bags, grads, mode, lr_scale, timeout))

    async def flush(self, timeout: float | None = None) -> None:
        """As `Client.flush`."""
        until = deadline(timeout, TIMEOUT_MAX)
        tasks = list(self._pushes)
        if not tasks:
            return
        done, pending = await asyncio.wait(tasks, timeout=until - time.monotonic())
        self._pushes -= done
        for task in tasks:
            if task in done and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if pending:
            raise PerhapsApplied(f"{len(pending)} pushes were still open after {timeout or TIMEOUT_MAX:g} s")

    async def assign(self, name: str, ids: ArrayLike, rows: ArrayLike, timeout: float | None = None) -> None:
        """As `Client.assign`."""
        await self._run(self._verbs.push(name, ids, rows, "assign", 1.0, timeout))

    async def delete(self, name: str, ids: ArrayLike, timeout: float | None = None) -> None:
        """As `Client.delete`."""
        await self._run(self._verbs.push(name, ids, None, "delete", 1.0, timeout))

    # -- ranges

    async def ranges(self, name: str, n: int, timeout: float | None = None) -> list[tuple[int, int | None]]:
        """As `Client.ranges`."""
        return await self._run(self._verbs.ranges(name, n, timeout))

    async def pull_range(
        self, name: str, start: int = 0, stop: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[RowRange]:
        """As `Client.pull_range`, for `async for`; the next part is asked for when this one was dealt with."""
        scan = PullRange(self._verbs, name, start, stop, timeout)
        while parts := await self._run(scan.next(scan.until())):
            for part in parts:
                yield part

    async def push_range(
        self,
        name: str,
        start: int,
        stop: int | None,
        ids: ArrayLike,
        grads: ArrayLike,
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        """As `Client.push_range`."""
        await self._run(self._verbs.push(name, ids, grads, "push", lr_scale, timeout, within=(start, stop)))

    # -- tables

    async def create_table(
        self,
        name: str,
        dim: int,
        optimizer: Optimizer = ADAGRAD,
        initializer: Initializer = INITIALIZER,
        placement: Placement = "sharded",
        replicas: int | Literal["all"] | None = None,
        seed: int | None = None,
        absent: Absent = "initial",
        default: Sequence[float] = (),
        timeout: float | None = None,
    ) -> None:
        """As `Client.create_table`."""
        await self._run(
            self._verbs.create_table(
                name, dim, optimizer, initializer, placement, replicas, seed, absent, default, timeout
            )
        )

    async def tables(self, timeout: float | None = None) -> dict[str, TableSpec]:
        """As `Client.tables`."""
        return await self._run(self._verbs.tables(timeout))

    async def describe(self, name: str, timeout: float | None = None) -> TableSpec:
        """As `Client.describe`."""
        return await self._run(self._verbs.describe(name, timeout))

    async def alter_table(self, name: str | Sequence[str], timeout: float | None = None, **changes: Any) -> None:
        """As `Client.alter_table`."""
        await self._run(self._verbs.alter_table(name, changes, timeout))

    async def set_optimizer(self, name: str, optimizer: Optimizer, timeout: float | None = None) -> None:
        """As `Client.set_optimizer`."""
        await self.alter_table(name, timeout, optimizer=optimizer)

    async def truncate(self, name: str, timeout: float | None = None) -> None:
        """As `Client.truncate`."""
        await self._run(self._verbs.truncate(name, timeout))

    async def drop_table(self, name: str, timeout: float | None = None) -> None:
        """As `Client.drop_table`."""
        await self._run(self._verbs.drop_table(name, timeout))

    # -- the client itself

    @property
    def last_absent(self) -> int:
        """As `Client.last_absent`: of the pull that was awaited last. Read it before awaiting anything else."""
        return self._verbs.absent

    def statistics(self) -> ClientStatistics:
        """As `Client.statistics`."""
        return self._verbs.statistics_now()

    async def close(self) -> None:
        """As `Client.close`."""
        try:
            await self.flush()
        finally:
            self._end()

    def _end(self) -> None:
        self._closed = True
        self._connections.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        else:
            self._end()
