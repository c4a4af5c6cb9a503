"""What a client can do, as generators over `Core`: each verb once, for the blocking and the asynchronous client."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hashring.tokens import tokens
from ps.client.batch import Bag, Batch, absent_code, bags_batch, modes_of, ragged_batch, rows_batch, writable
from ps.client.core import PROBE_S, Ask, Core, Steps, deadline
from ps.client.request import NONE_DONE, Call, Places, PullRequest, PushRequest, check_finite
from ps.client.routing import Features, Routing
from ps.errors import RequestError
from ps.kernels.batch import cut
from ps.ragged import RaggedIds, as_rows
from ps.share import Acks, PushKind
from ps.spec import Absent, Adagrad, Initializer, Optimizer, Placement, TableSpec

CHUNK = 32 * 2**20
"""Bytes of rows, and of ids, that one request moves at most; a bigger call is cut. Far below what a frame may hold."""

PARTS_MAX = 256
"""Parts into which one push is cut at most: 8 GiB of rows."""

ADAGRAD, INITIALIZER = Adagrad(), Initializer()
"""What a table has unless it is told otherwise."""

Modes = str | Mapping[str, str]
Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RowRange:
    """Some rows of a table, as a range pull returns them: ids int64[k], rows float32[k, dim]."""

    ids: NDArray[np.int64]
    rows: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """What a client has done: pulls and pushes, the ids in them, ids without a row, retries, views learnt, pushes open.

    in_place: pulls that were read from the memory of servers on this host.
    calls: messages to servers that pulls and pushes took. rows: those that servers sent for pulls, each a partial sum
    of a bag or one distinct id's. frames_ and bytes_: of all connections, see `ps.fabric.protocol.Traffic`.
    """

    pulls: int
    pushes: int
    ids: int
    absent: int
    in_place: int
    retries: int
    views: int
    undecided: int
    epoch: int
    calls: int
    rows: int
    frames_sent: int
    bytes_sent: int
    frames_received: int
    bytes_received: int


class Verbs(Core):
    """Generators that return what the client's methods of the same names return; errors and shapes are told there."""

    default_timeout = 10.0
    acks: Acks = "all"
    in_place = True

    def configure(self, timeout: float, acks: Acks, in_place: bool) -> None:
        """What holds for every call: seconds that one without a timeout has, who acknowledges, reads in place."""
        if acks not in get_args(Acks):
            raise RequestError(f'acks is {acks!r}; it must be "all" or "primary"')
        self.default_timeout, self.acks, self.in_place = timeout, acks, in_place

    def statistics_now(self) -> ClientStatistics:
        """The counters, as one value."""
        c = self.counters
        return ClientStatistics(
            pulls=c.pulls,
            pushes=c.pushes,
            ids=c.ids,
            absent=c.absent,
            in_place=c.in_place,
            retries=c.retries,
            views=c.views,
            undecided=self.window.undecided,
            epoch=self.routing.epoch,
            calls=c.calls,
            rows=c.rows,
            **asdict(c.traffic),
        )

    # -- pulls

    def pull(self, name: str, ids: ArrayLike, absent: Absent | None, timeout: float | None) -> Steps:
        """float32[n, dim]."""
        until = deadline(timeout, self.default_timeout)
        batch = rows_batch(name, ids)
        features = yield from self.features(batch.names, until)
        flat = yield from self._pull(batch, features, features.zeros, absent, until)
        return flat.reshape(-1, features.dim_list[0])

    def pull_bags(self, bags: Mapping[str, Bag], mode: Modes, absent: Absent | None, timeout: float | None) -> Steps:
        """{name: float32[bags, dim]}."""
        batch = bags_batch(bags)
        pooled = yield from self._pull_pooled(batch, mode, absent, timeout)
        return dict(zip(batch.names, pooled, strict=True))

    def pull_ragged(
        self, tables: Sequence[str], ragged: RaggedIds, mode: Modes, absent: Absent | None, timeout: float | None
    ) -> Steps:
        """[float32[bags, dim]] of each feature."""
        return (yield from self._pull_pooled(ragged_batch(tables, ragged), mode, absent, timeout))

    def _pull_pooled(self, batch: Batch, mode: Modes, absent: Absent | None, timeout: float | None) -> Steps:
        until = deadline(timeout, self.default_timeout)
        features = yield from self.features(batch.names, until)
        modes = features.zeros if mode == "sum" else modes_of(batch, mode)
        flat = yield from self._pull(batch, features, modes, absent, until)
        return _by_feature(flat, batch, features)

    def _pull(
        self, batch: Batch, features: Features, modes: NDArray[np.uint8], absent: Absent | None, until: float
    ) -> Steps:
        """Rows of all features, flat. A big batch is cut by bags, whose rows stand one behind another in the answer."""
        code = absent_code(absent)
        where = Places.of(batch.starts, features.dims)
        flat = np.empty(where.total, np.float32)
        if where.total * 4 <= CHUNK and batch.ids.nbytes <= CHUNK:
            without = yield from self._pull_part(batch, features, modes, code, where, flat, until)
        else:
            at = without = 0
            for low, high in _chunks(batch, features):
                part = batch.part(low, high)
                there = Places.of(part.starts, features.dims)
                rows = flat[at : at + there.total]
                without += yield from self._pull_part(part, features, modes, code, there, rows, until)
                at += there.total
        self.absent = without
        self.counters.pulls += 1
        self.counters.ids += len(batch.ids)
        self.counters.absent += without
        return flat

    def _pull_part(
        self,
        batch: Batch,
        features: Features,
        modes: NDArray[np.uint8],
        absent: int | None,
        where: Places,
        out: Rows,
        until: float,
    ) -> Steps:
        """Fill `out`, in place where that can be, else with what servers answer; how many ids were absent."""
        if self.in_place:
            if not self.reader.ready(self.routing):
                yield from self._look_around(until)
            without = self.reader.pull(batch, features, modes, absent, where.places, out)
            if without >= 0:
                self.counters.in_place += 1
                return without
        request = PullRequest(batch, features, modes, absent, where, out)
        yield from self.exchange(request, until)
        request.finish()
        self.counters.rows += request.rows
        return request.absent

    def _look_around(self, until: float) -> Steps:
        """Ask the servers of this host what they share, and map it: before the first pull by a view."""
        routing, reader = self.routing, self.reader
        servers = routing.servers
        calls = [Call(s, s, "shared", {}, {}) for s in reader.asked(routing)]
        if calls:
            learn = lambda s, reply: reader.learn(servers[s], reply.fields)  # noqa: E731
            yield Ask(servers, calls, learn, min(self.attempt_until(until), time.monotonic() + PROBE_S))
        reader.adopt(routing)

    # -- pushes

    def push(
        self,
        name: str,
        ids: ArrayLike,
        rows: ArrayLike | None,
        kind: PushKind,
        lr_scale: float,
        timeout: float | None,
        within: tuple[int, int | None] | None = None,
    ) -> Steps:
        """A gradient or a value for each id, or none where the kind is "delete"."""
        until = deadline(timeout, self.default_timeout)
        batch = rows_batch(name, ids)
        features = yield from self.features(batch.names, until)
        if within is not None:
            _check_within(batch, self.routing, within)
        what = "rows" if kind == "assign" else "grads"
        flat = np.empty(0, np.float32)
        if rows is not None:
            checked = as_rows(rows, len(batch.ids), features.dim_list[0], f"{what} of table {name!r}")
            flat = writable(checked).reshape(-1)
            check_finite(flat, batch, features, what)
        yield from self._push(batch, features, features.zeros, kind, flat, lr_scale, until)

    def push_bags(
        self,
        bags: Mapping[str, Bag],
        grads: Mapping[str, ArrayLike],
        mode: Modes,
        lr_scale: float,
        timeout: float | None,
    ) -> Steps:
        """A gradient for each bag."""
        batch = bags_batch(bags)
        missing = [name for name in batch.names if name not in grads] + [n for n in grads if n not in batch.names]
        if missing:
            raise RequestError(f"table {missing[0]!r} must be in both bags and grads")
        yield from self._push_pooled(batch, [grads[name] for name in batch.names], mode, lr_scale, timeout)

    def push_ragged(
        self,
        tables: Sequence[str],
        ragged: RaggedIds,
        grads: Sequence[ArrayLike],
        mode: Modes,
        lr_scale: float,
        timeout: float | None,
    ) -> Steps:
        """A gradient for each bag of each feature."""
        batch = ragged_batch(tables, ragged)
        if len(grads) != len(batch.names):
            raise RequestError(f"{len(grads)} gradients were given for {len(batch.names)} features; one each is needed")
        yield from self._push_pooled(batch, grads, mode, lr_scale, timeout)

    def _push_pooled(
        self, batch: Batch, grads: Sequence[ArrayLike], mode: Modes, lr_scale: float, timeout: float | None
    ) -> Steps:
        until = deadline(timeout, self.default_timeout)
        modes = modes_of(batch, mode, allowed=("sum", "mean"))
        features = yield from self.features(batch.names, until)
        bags = np.diff(batch.starts).tolist()
        rows = [
            as_rows(g, n, dim, f"grads of table {name!r}").reshape(-1)
            for g, n, dim, name in zip(grads, bags, features.dim_list, batch.names, strict=True)
        ]
        flat = np.concatenate(rows) if rows else np.empty(0, np.float32)
        check_finite(flat, batch, features, "grads")
        yield from self._push(batch, features, modes, "push", flat, lr_scale, until)

    def _push(
        self,
        batch: Batch,
        features: Features,
        modes: NDArray[np.uint8],
        kind: PushKind,
        flat: Rows,
        lr_scale: float,
        until: float,
    ) -> Steps:
        """Send under one sequence; a push beyond what a frame should hold is cut by ids, a sequence for each part."""
        if not isinstance(lr_scale, int | float) or not 0.0 <= lr_scale < float("inf"):
            raise RequestError(f"lr_scale is {lr_scale!r}; it must be a finite number from 0 on")
        self.counters.pushes += 1
        self.counters.ids += len(batch.ids)
        if not len(batch.ids):
            return
        parts = -(-max(flat.nbytes, batch.ids.nbytes) // CHUNK)
        if parts > PARTS_MAX:
            raise RequestError(f"the push has {flat.nbytes} bytes of rows; at most {PARTS_MAX * CHUNK} go in one call")
        part_of = cut(batch.ids, batch.starts, batch.offsets, features.seeds, parts) if parts > 1 else None
        began = False
        for part in range(parts):
            done = NONE_DONE if part_of is None else (part_of != part).astype(np.uint8)
            request = PushRequest(batch, features, modes, kind, flat, float(lr_scale), done, self.acks)
            request.began = began
            yield from self._send_once(request, until)
            began = True

    def _send_once(self, request: PushRequest, until: float) -> Steps:
        """One sequence, from the first try to the last."""
        yield from self.room(request.began, until)
        window = self.window
        request.client, request.sequence = window.client, window.open()
        try:
            yield from self.exchange(request, until)
        finally:
            window.close(request.sequence)

    # -- ranges

    def ranges(self, name: str, n: int, timeout: float | None) -> Steps:
        """[(start, stop)], stop=None at the ring's end."""
        if not isinstance(n, int) or n < 1:
            raise RequestError(f"n, the number of ranges, is {n!r}; it must be a whole number from 1 on")
        yield from self.features((name,), deadline(timeout, self.default_timeout))
        bits = self.routing.table(name).bits
        n = min(n, 2**bits)
        edges = [(k * 2**bits // n) << (64 - bits) for k in range(n)]
        return list(zip(edges, [*edges[1:], None], strict=True))

    # -- tables

    def tables(self, timeout: float | None) -> Steps:
        """{name: TableSpec}."""
        yield from self.refresh(self.routing.epoch, deadline(timeout, self.default_timeout), {})
        return {name: info.spec for name, info in sorted(self.routing.tables.items())}

    def describe(self, name: str, timeout: float | None) -> Steps:
        """The table's TableSpec."""
        specs = yield from self.tables(timeout)
        if name not in specs:
            self.routing.table(name)
        return specs[name]

    def create_table(
        self,
        name: str,
        dim: int,
        optimizer: Optimizer,
        initializer: Initializer,
        placement: Placement,
        replicas: int | Literal["all"] | None,
        seed: int | None,
        absent: Absent,
        default: Sequence[float],
        timeout: float | None,
    ) -> Steps:
        """Make a table, or find that it is there already."""
        until = deadline(timeout, self.default_timeout)
        copies = 1 if replicas is None else replicas
        wanted = TableSpec(
            name, dim, optimizer, initializer, seed or 0, placement, copies, absent, tuple(map(float, default))
        ).check()
        left = [key for key, value in (("seed", seed), ("replicas", replicas)) if value is None]  # to the cluster
        present = (yield from self.tables(timeout)).get(name)
        if present is None:
            spec = {**wanted.to_plain(), **dict.fromkeys(left)}
            yield from self.admin("create_table", {"spec": spec}, until, lambda now: name in now.tables)
            present = self.routing.table(name).spec
        have, want = present.to_plain(), wanted.to_plain()
        different = [k for k in want if want[k] != have[k] and k not in left]
        if different:
            key = different[0]
            raise RequestError(
                f"table {name!r} exists with another specification: its {key} is {have[key]!r}, asked was {want[key]!r}"
            )

    def alter_table(self, name: str | Sequence[str], changes: Mapping[str, Any], timeout: float | None) -> Steps:
        """Give tables new settings."""
        until = deadline(timeout, self.default_timeout)
        names = [name] if isinstance(name, str) else list(name)
        wanted: dict[str, TableSpec] = {}
        for each in names:
            present = yield from self.describe(each, timeout)
            plain = present.to_plain()
            unknown = [k for k in changes if k not in plain]
            if unknown:
                raise RequestError(f"a table has no setting {unknown[0]!r}; it has {', '.join(plain)}")
            wanted[each] = TableSpec(**{**{k: getattr(present, k) for k in plain}, **changes}).check()
        if not wanted:
            raise RequestError("no table is named")
        plain_changes = {k: wanted[names[0]].to_plain()[k] for k in changes}
        yield from self.admin(
            "alter_table",
            {"names": names, "changes": plain_changes},
            until,
            lambda now: all(n not in now.tables or now.tables[n].spec == spec for n, spec in wanted.items()),
        )

    def truncate(self, name: str, timeout: float | None) -> Steps:
        """Forget every row."""
        yield from self._renumber("truncate", name, timeout)

    def drop_table(self, name: str, timeout: float | None) -> Steps:
        """Remove the table."""
        yield from self._renumber("drop_table", name, timeout)

    def _renumber(self, verb: str, name: str, timeout: float | None) -> Steps:
        until = deadline(timeout, self.default_timeout)
        yield from self.describe(name, timeout)
        number = self.routing.table(name).number

        def gone(now: Routing) -> bool:
            return name not in now.tables or now.tables[name].number != number

        yield from self.admin(verb, {"name": name}, until, gone)


def _by_feature(flat: Rows, batch: Batch, features: Features) -> list[Rows]:
    """float32[bags, dim] of each feature, as views of the flat answer."""
    starts, dims = batch.starts.tolist(), features.dim_list
    if len(set(dims)) == 1 and starts == [*range(0, starts[1] * len(dims) + 1, starts[1] or 1)]:
        return [*flat.reshape(len(dims), starts[1], dims[0])]
    out = []
    at = 0
    for f, dim in enumerate(features.dim_list):
        bags = starts[f + 1] - starts[f]
        out.append(flat[at : at + bags * dim].reshape(bags, dim))
        at += bags * dim
    return out


def _chunks(batch: Batch, features: Features) -> Iterator[tuple[int, int]]:
    """Bags low..high-1, each chunk of at most CHUNK bytes of rows and of ids (a single bag may have more)."""
    rows = np.repeat(features.dims * 4, np.diff(batch.starts))
    ids = np.diff(batch.offsets) * 8 if batch.offsets.size else np.full(batch.bags, 8)
    ends = np.cumsum(np.maximum(rows, ids))
    low = 0
    while low < batch.bags:
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
        yield low, high
        low = high


def _check_within(batch: Batch, routing: Routing, within: tuple[int, int | None]) -> None:
    """RequestError naming the first id whose token is outside the range."""
    start, stop = check_range(*within)
    places = tokens(batch.ids, routing.table(batch.names[0]).spec.seed)
    outside = places < np.uint64(start)
    if stop is not None:
        outside |= places >= np.uint64(stop)
    if outside.any():
        at = int(np.argmax(outside))
        raise RequestError(
            f"ids[{at}] is {batch.ids[at]}, whose token {int(places[at])} is outside the range from {start} to "
            f"{'the end of the ring' if stop is None else stop}"
        )


def check_range(start: int, stop: int | None) -> tuple[int, int | None]:
    """The range, or RequestError where it is none."""
    end = 2**64 if stop is None else stop
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= 2**64):
        raise RequestError(f"the range from {start!r} to {stop!r} is none; it needs 0 <= start < stop <= 2**64")
    return start, None if end == 2**64 else stop
