"""`Client`: for threads that wait. Training loops, tools, notebooks."""

import os
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ps.client.batch import Bag
from ps.client.core import CLOSED, PAUSE_FIRST, TIMEOUT_MAX, Steps, deadline
from ps.client.flight import Connections, Flight
from ps.client.parts import Parts
from ps.client.places import Seeds, prepare
from ps.client.ranges import PullRange
from ps.client.verbs import ADAGRAD, INITIALIZER, ClientStatistics, Modes, RowRange, Verbs
from ps.client.window import Window
from ps.errors import EmbringError, NotApplied, PerhapsApplied, RequestError
from ps.ragged import RaggedIds
from ps.share import Acks
from ps.spec import Absent, Initializer, Optimizer, Placement, TableSpec

_open: "weakref.WeakSet[Client]" = weakref.WeakSet()


class PushHandle:
    """A push that was sent and is not awaited yet; made by `push_nowait` and `push_bags_nowait`."""

    def __init__(self, client: "Client", flight: Flight) -> None:
        self._client = client
        self._flight = flight

    @property
    def done(self) -> bool:
        """Whether the push is known to be decided; it is looked at in `result`, `flush`, and by later pushes."""
        return self._flight.done

    def result(self) -> None:
        """Wait until the push is acknowledged, within the time-out it was made with; raises what `push` raises."""
        with self._client._turn:
            self._flight.finish()
            self._client._landed(self._flight)
        if self._flight.error is not None:
            raise self._flight.error


class Client:
    """A connection to a cluster; make it with `ps.connect()`.

    Threads may share a client: their calls take turns. A forked child may go on using it, under a new identity and
    over new connections; pushes that were open in the parent stay the parent's.

    Every method takes `timeout` in seconds (None: the client's), above 0 and at most 600, for all its attempts. Errors
    are of ps.errors: RequestError (the call is wrong), SlotsLost (rows are gone until a restore), NotApplied (nobody
    could be reached: nothing was done), PerhapsApplied (no answer in time: a push may or may not have been applied).
    WrongView is handled here.
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
        self._verbs = Verbs(addresses)
        self._verbs.configure(timeout, acks, in_place)
        self._token = token
        self._tls = tls
        self._turn = threading.RLock()
        self._flights: list[Flight] = []
        self._closed = False
        self._connections = Connections(token, tls, self._verbs)
        _open.add(self)
        prepare()
        try:
            self._run(self._verbs.begin(deadline(None, timeout)))
        except BaseException:
            self._connections.close()
            raise

    # -- driving

    def _run(self, steps: Steps) -> Any:
        with self._turn:
            return self._finish(self._begin(steps))

    def _begin(self, steps: Steps) -> Flight:
        if self._closed:
            raise RequestError(CLOSED)
        flight = Flight(self._connections, self._finish_oldest, steps)
        with self._turn:
            flight.start()
        return flight

    def _finish(self, flight: Flight) -> Any:
        if not flight.done and not flight.goes_by(self._connections):
            raise NotApplied("this was asked by the parent process")
        with self._turn:
            flight.finish()
        if flight.error is not None:
            raise flight.error
        return flight.value

    def _launch(self, steps: Steps) -> PushHandle:
        with self._turn:
            flight = self._begin(steps)
            if not flight.done or flight.error is not None:
                self._flights.append(flight)
        if isinstance(flight.error, RequestError):
            self._landed(flight)
            raise flight.error
        return PushHandle(self, flight)

    def _finish_oldest(self) -> None:
        """Decide one push. A failed one stays in the list, for `flush` to raise."""
        for flight in self._flights:
            if not flight.done and not flight.waits:
                flight.finish()
                if flight.error is None:
                    self._landed(flight)
                return
        time.sleep(PAUSE_FIRST)  # no push of ours can make room

    def _landed(self, flight: Flight) -> None:
        if flight in self._flights:
            self._flights.remove(flight)

    def _forked(self) -> None:
        """In a forked child: another identity, no connections, nothing under way."""
        self._turn = threading.RLock()
        self._verbs.window = Window()
        self._connections = Connections(self._token, self._tls, self._verbs)
        for flight in self._flights:
            flight.done, flight.error = True, EmbringError("this push belongs to the parent process")
        self._flights = []

    # -- rows

    def pull(
        self, name: str, ids: ArrayLike, absent: Absent | None = None, timeout: float | None = None
    ) -> NDArray[np.float32]:
        """The rows of ids: float32[n, dim], in the order of the ids.

        ids: int64[n], any value, duplicates allowed; of uint64 the 64 bits are kept, so that 2**63 and above come back
        negative from a range pull. absent: what an id without a row answers, "initial", "zeros" or "default"; None is
        what the table says. `last_absent` tells how many there were. A pull never makes a row.

            >>> client.pull("item", [3, 5, 3]).shape
            (3, 32)
        """
        return self._run(self._verbs.pull(name, ids, absent, timeout))

    def pull_bags(
        self,
        bags: Mapping[str, Bag],
        mode: Modes = "sum",
        absent: Absent | None = None,
        timeout: float | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Pooled rows: {table: (ids, offsets[, weights])} gives {table: float32[bags, dim]}, in one round trip.

        Bag b of a table holds ids[offsets[b] : offsets[b + 1]]; offsets has one more entry than there are bags. Modes
        are those of torch.nn.EmbeddingBag, "sum", "mean" or "max", one for all or {table: mode}; an empty bag gives
        zeros; weights (float32[n], with "sum" only) multiply rows; an absent id counts like any other. The arrays
        returned are views of one buffer.

            >>> client.pull_bags({"item": ([3, 5, 8], [0, 2, 3])}, mode="mean")["item"].shape
            (2, 32)
        """
        return self._run(self._verbs.pull_bags(bags, mode, absent, timeout))

    def pull_ragged(
        self,
        tables: Sequence[str],
        ragged: RaggedIds,
        mode: Modes = "sum",
        absent: Absent | None = None,
        timeout: float | None = None,
    ) -> list[NDArray[np.float32]]:
        """`pull_bags` of a `RaggedIds`: feature f is pooled from tables[f], which may be named more than once.

        Returns float32[bags, dim] of each feature.

            >>> two = ps.RaggedIds.of([3, 5, 8, 9], [0, 1, 2, 3, 4], features=2)
            >>> [rows.shape for rows in client.pull_ragged(["item", "item"], two)]
            [(2, 32), (2, 32)]
        """
        return self._run(self._verbs.pull_ragged(tables, ragged, mode, absent, timeout))

    def push(
        self, name: str, ids: ArrayLike, grads: ArrayLike, lr_scale: float = 1.0, timeout: float | None = None
    ) -> None:
        """Send gradients float32[n, dim], one for each id; the table's optimizer has run when this returns.

        Applied exactly once, however often it had to be retried, and seen by every later pull. Duplicate ids are summed
        first. lr_scale multiplies the learning rate of this push. A gradient that is not finite is refused before
        anything is sent. MemoryFull: a server makes no new rows; what others hold may have been applied.

            >>> client.push("item", [3, 5], np.ones((2, 32), np.float32))
        """
        self._run(self._verbs.push(name, ids, grads, "push", lr_scale, timeout))

    def push_bags(
        self,
        bags: Mapping[str, Bag],
        grads: Mapping[str, ArrayLike],
        mode: Modes = "sum",
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        """Send the gradients of pooled rows: {table: float32[bags, dim]} for the same bags as in `pull_bags`.

        Each id gets its bag's gradient: times its weight, divided by the bag's count for "mean". "max" cannot be
        pushed, since the gradient must know which row won: pull the rows, and push those. Otherwise as `push`.

            >>> client.push_bags({"item": ([3, 5, 8], [0, 2, 3])}, {"item": np.ones((2, 32), np.float32)}, mode="mean")
        """
        self._run(self._verbs.push_bags(bags, grads, mode, lr_scale, timeout))

    def push_ragged(
        self,
        tables: Sequence[str],
        ragged: RaggedIds,
        grads: Sequence[ArrayLike],
        mode: Modes = "sum",
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        """`push_bags` of a `RaggedIds`: grads[f] is float32[bags, dim] for feature f.

        >>> client.push_ragged(["item"], ps.RaggedIds.of([3, 5], [0, 2]), [np.ones((1, 32), np.float32)])
        """
        self._run(self._verbs.push_ragged(tables, ragged, grads, mode, lr_scale, timeout))

    def push_nowait(
        self, name: str, ids: ArrayLike, grads: ArrayLike, lr_scale: float = 1.0, timeout: float | None = None
    ) -> PushHandle:
        """`push` that returns once it is sent. Up to 64 may be open; then the oldest is waited for first.

        Nothing happens in the background: the answer is read, and a failed push is retried, in `result()` of the
        handle, in `flush()`, or when a later push needs its place. A wrong call raises here; everything else there.

            >>> handle = client.push_nowait("item", [3], np.ones((1, 32), np.float32))
            >>> handle.result()
        """
        return self._launch(self._verbs.push(name, ids, grads, "push", lr_scale, timeout))

    def push_bags_nowait(
        self,
        bags: Mapping[str, Bag],
        grads: Mapping[str, ArrayLike],
        mode: Modes = "sum",
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> PushHandle:
        """`push_bags` that returns once it is sent; see `push_nowait`.

        >>> client.push_bags_nowait({"item": ([3, 5], [0, 2])}, {"item": np.ones((1, 32), np.float32)}).result()
        """
        return self._launch(self._verbs.push_bags(bags, grads, mode, lr_scale, timeout))

    def flush(self, timeout: float | None = None) -> None:
        """Wait for every open push; raises the first error among them, after all are decided.

        timeout bounds the wait; a push that was not looked at by then stays open, and PerhapsApplied says so.

            >>> client.flush()
        """
        until = deadline(timeout, TIMEOUT_MAX)
        seconds = timeout or TIMEOUT_MAX
        with self._turn:
            flights = list(self._flights)
            for flight in flights:
                if not flight.done and time.monotonic() >= until:
                    raise PerhapsApplied(f"{len(self._flights)} pushes were still open after {seconds:g} s")
                flight.finish()
                self._landed(flight)
        error = next((flight.error for flight in flights if flight.error is not None), None)
        if error is not None:
            raise error

    def assign(self, name: str, ids: ArrayLike, rows: ArrayLike, timeout: float | None = None) -> None:
        """Overwrite rows with float32[n, dim] (bulk load, precomputed vectors); the last of duplicates wins.

        Optimizer state starts anew. The guarantees are those of `push`.

            >>> client.assign("item", [3, 5], np.zeros((2, 32), np.float32))
        """
        self._run(self._verbs.push(name, ids, rows, "assign", 1.0, timeout))

    def assign_nowait(self, name: str, ids: ArrayLike, rows: ArrayLike, timeout: float | None = None) -> PushHandle:
        """`assign` that returns once it is sent; see `push_nowait`.

        >>> client.assign_nowait("item", [3], np.zeros((1, 32), np.float32)).result()
        """
        return self._launch(self._verbs.push(name, ids, rows, "assign", 1.0, timeout))

    def delete(self, name: str, ids: ArrayLike, timeout: float | None = None) -> None:
        """Forget the rows of ids; an id without a row is no error. The guarantees are those of `push`.

        >>> client.delete("item", [3])
        """
        self._run(self._verbs.push(name, ids, None, "delete", 1.0, timeout))

    # -- ranges

    def ranges(self, name: str, n: int, timeout: float | None = None) -> list[tuple[int, int | None]]:
        """At most n half-open intervals of tokens that cover the ring, aligned to slots; stop=None is the ring's end.

        A table that was made with placement "whole" has one slot, and one range.

            >>> client.ranges("item", 2)
            [(0, 9223372036854775808), (9223372036854775808, None)]
        """
        return self._run(self._verbs.ranges(name, n, timeout))

    def pull_range(
        self, name: str, start: int = 0, stop: int | None = None, timeout: float | None = None
    ) -> Iterator[RowRange]:
        """Every row whose token is in [start, stop), in parts of about 1 MiB, asked of its owners alone.

        Rows that no push touches meanwhile come exactly once, also while slots move. While a part is dealt
        with the next one is on its way; timeout is for each.

            >>> sum(len(part.ids) for part in client.pull_range("item"))
            3
        """
        return Parts(self._begin, self._finish, PullRange(self._verbs, name, start, stop, timeout))

    def push_range(
        self,
        name: str,
        start: int,
        stop: int | None,
        ids: ArrayLike,
        grads: ArrayLike,
        lr_scale: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        """`push` of ids whose tokens are all in [start, stop): one message for each owner; refuses an id outside.

        >>> client.push_range("item", 0, None, [3], np.ones((1, 32), np.float32))
        """
        self._run(self._verbs.push(name, ids, grads, "push", lr_scale, timeout, within=(start, stop)))

    # -- tables

    def create_table(
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
        """Make a table. The same specification again is a no-op; another one under the name is a RequestError.

        The settings are those of `ps.TableSpec`; replicas and seed None take the cluster's.

            >>> client.create_table("item", dim=32, optimizer=ps.RowWiseAdagrad(lr=0.05))
        """
        self._run(
            self._verbs.create_table(
                name, dim, optimizer, initializer, placement, replicas, seed, absent, default, timeout
            )
        )

    def tables(self, timeout: float | None = None) -> dict[str, TableSpec]:
        """The tables of the newest view: {name: TableSpec}.

        >>> list(client.tables())
        ['item']
        """
        return self._run(self._verbs.tables(timeout))

    def describe(self, name: str, timeout: float | None = None) -> TableSpec:
        """The specification of a table; RequestError where there is none.

        >>> client.describe("item").dim
        32
        """
        return self._run(self._verbs.describe(name, timeout))

    def alter_table(self, name: str | Sequence[str], timeout: float | None = None, **changes: Any) -> None:
        """Change a table's optimizer settings, initializer, absent or default; or its placement and replicas.

        Its rows stay, and pulls and pushes go on. Rows move, and copies are made or given up, after this returns;
        `embring table alter` waits for that. Sharded tables that are named together go on sharing their slots.

            >>> client.alter_table("item", optimizer=ps.RowWiseAdagrad(lr=0.01))
            >>> client.alter_table(["item", "user"], replicas=2)
            >>> client.alter_table("country", placement="whole", replicas="all")
        """
        self._run(self._verbs.alter_table(name, changes, timeout))

    def set_optimizer(self, name: str, optimizer: Optimizer, timeout: float | None = None) -> None:
        """Give a table's optimizer other settings, as the next learning rate of a schedule; its kind and state stay.

        Every push that this client begins afterwards is made with them. A factor for one push alone is its lr_scale.

            >>> client.set_optimizer("item", ps.RowWiseAdagrad(lr=0.01))
        """
        self.alter_table(name, timeout, optimizer=optimizer)

    def truncate(self, name: str, timeout: float | None = None) -> None:
        """Forget every row of a table.

        >>> client.truncate("item")
        """
        self._run(self._verbs.truncate(name, timeout))

    def drop_table(self, name: str, timeout: float | None = None) -> None:
        """Remove a table and its rows.

        >>> client.drop_table("item")
        """
        self._run(self._verbs.drop_table(name, timeout))

    # -- the client itself

    @property
    def last_absent(self) -> int:
        """Ids of the last pull that had no row; duplicates that travelled as one are counted as one."""
        return self._verbs.absent

    def identify(self, client: int, sequence: int) -> None:
        """Push from now on as `client`, whose newest sequence so far was `sequence` (0: it has none).

        For a trainer that must not apply a batch twice after it was killed. It keeps a fixed client id, and writes
        down `last_sequence` after each acknowledged push. Begun again, it identifies itself with the two, and pushes
        the batches that follow anew, with the same ids and in the same order: slots that have one already skip it.
        Servers forget a client an hour after its last push.

        client: 1 to 2**64 - 1; two live clients under one id would take each other's pushes for repeats. A forked
        child gets a random id again. RequestError where pushes are open: `flush` first.

            >>> client.identify(17, 0)
            >>> client.push("item", [3], np.ones((1, 32), np.float32))
            >>> client.last_sequence
            1
        """
        with self._turn:
            self._verbs.window.resume(client, sequence)

    @property
    def last_sequence(self) -> int:
        """The sequence of the newest push, 0 before the first; see `identify`."""
        return self._verbs.window.last

    def statistics(self) -> ClientStatistics:
        """What this client has done since it began."""
        return self._verbs.statistics_now()

    def close(self) -> None:
        """Wait for open pushes, then close the connections; raises what `flush` raises, after closing.

        A client that is closed refuses further calls with RequestError.
        """
        try:
            self.flush()
        finally:
            self._end()

    def _end(self) -> None:
        self._closed = True
        self._connections.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._end()


def _after_fork() -> None:
    for client in list(_open):
        client._forked()


os.register_at_fork(after_in_child=_after_fork)
