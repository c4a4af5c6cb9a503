"""Requests without input or output: a batch becomes calls to servers, and their replies become the answer.

A request is split, its calls are sent by whoever drives it, replies are absorbed as they come. After a failure it is
split again: the ids that were answered are left out, so that every id is pooled, or pushed, exactly once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.client.batch import NO_WEIGHTS, Batch
from ps.client.routing import Features, Routing
from ps.errors import EmbringError, RequestError, SlotsLost
from ps.kernels.merge import MAX, SUM, finish, first_not_finite, gather, merge
from ps.kernels.split import ROWS, Split, split
from ps.share import PullShare, PushKind, PushShare
from ps.wire import Message, pull_message, push_message

NONE_DONE = np.empty(0, np.uint8)
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Call:
    """One message for one server (its index in the view). `key` names the call in what comes of it."""

    key: int
    server: int
    op: str
    fields: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the bags of each feature lie in a flat array of rows: from float places[f], `dims[f]` floats each."""

    places: NDArray[np.int64]
    total: int
    bags: int

    @classmethod
    def of(cls, starts: NDArray[np.int64], dims: Sequence[int]) -> "Places":
        """Feature behind feature, bag behind bag."""
        at = last = 0
        places = []
        for start, dim in zip(starts.tolist()[1:], dims, strict=True):
            places.append(at)
            at += (start - last) * dim
            last = start
        return cls(np.array(places, np.int64), at, last)


class _Request:
    """What pulls and pushes share: a batch split over servers, and which of its ids are done."""

    began = False

    def __init__(
        self,
        batch: Batch,
        features: Features,
        modes: NDArray[np.uint8],
        policy: NDArray[np.uint8],
        where: Places | None,
    ) -> None:
        self.batch = batch
        self.features = features
        self.modes = modes
        self.policy = policy
        self.where = where or Places.of(batch.starts, features.dim_list)
        self.done = NONE_DONE
        self.asked: list[int] = []
        self._split: Split | None = None

    def _plan(self, routing: Routing, readers: NDArray[np.int16], load: NDArray[np.float64]) -> Split:
        """Split what is not done over the servers that answer for it; SlotsLost where nobody does."""
        batch = self.batch
        features = self.features = self._same_tables(routing)
        plan = self._split = split(
            batch.ids,
            batch.starts,
            batch.offsets,
            batch.weights,
            self.done,
            features.seeds,
            features.firsts,
            features.shifts,
            readers,
            load,
            self.policy,
        )
        if plan.lost >= 0:
            raise SlotsLost(
                f"slot {plan.lost} has no living owner: its rows are gone until a restore or an explicit acceptance",
                [plan.lost],
            )
        starts = plan.id_start.tolist()
        self.asked = [s for s in range(len(starts) - 1) if starts[s + 1] > starts[s]]
        return plan

    def _same_tables(self, routing: Routing) -> Features:
        """The tables by their numbers in this view; a table made anew under the name must have the same width."""
        features = routing.features(self.batch.names)
        if features.dim_list != self.features.dim_list:
            raise RequestError(f"a table of {', '.join(self.batch.names[:5])} was made anew with another dim meanwhile")
        return features

    def answered(self, failed: Iterable[int]) -> None:
        """The calls are over, and those to the `failed` servers are to be made again."""
        plan = self._split
        assert plan is not None
        again = np.isin(plan.servers, list(failed))
        self.done = np.where(again, np.uint8(0), np.uint8(1))

    def _part(self, plan: Split, s: int, weighted: bool) -> tuple[slice, NDArray[np.int64] | None]:
        """Server s's ids, and its offsets unless every bag has one id and no weights."""
        span = slice(plan.id_start[s], plan.id_start[s + 1])
        low, high = plan.bag_start[s], plan.bag_start[s + 1]
        single = not weighted and high - low == span.stop - span.start
        return span, None if single else plan.offsets[low + s : high + s + 1]


class PullRequest(_Request):
    """A pull of rows or bags. `out` is flat: see `Places`."""

    def __init__(
        self,
        batch: Batch,
        features: Features,
        modes: NDArray[np.uint8],
        absent: int | None,
        where: Places | None = None,
        out: NDArray[np.float32] | None = None,
    ) -> None:
        # A share cannot weigh one feature and take the maximum of another: then all pooling is done here.
        any_max = modes is not features.zeros and bool((modes == MAX).any())
        mixed = any_max and batch.weights.size > 0
        policy = np.full(len(modes), ROWS, np.uint8) if mixed else features.zeros
        super().__init__(batch, features, modes, policy, where)
        self._weights_travel = batch.weights.size > 0 and not mixed
        self._absent = features.absent if absent is None else np.full(len(modes), absent, np.uint8)
        self._share_modes = np.where(modes == MAX, np.uint8(MAX), np.uint8(SUM)) if any_max else features.zeros
        self.out = np.empty(self.where.total, np.float32) if out is None else out
        self._touched = np.zeros(self.where.bags, np.uint8)
        self.absent = 0

    def split(self, routing: Routing, left_out: frozenset[int], load: NDArray[np.float64]) -> list[Call]:
        """The calls to make; servers in `left_out` are asked only for what nobody else has."""
        plan = self._plan(routing, routing.readers_without(left_out), load)
        calls = []
        for s in self.asked:
            span, offsets = self._part(plan, s, self._weights_travel)
            share = PullShare(
                tables=self.features.numbers,
                bags=plan.bags[s],
                modes=self._share_modes,
                absent=self._absent,
                ids=plan.ids[span],
                offsets=offsets,
                weights=plan.weights[span] if self._weights_travel else None,
            )
            fields, arrays = pull_message(share)
            fields["epoch"] = routing.epoch
            calls.append(Call(s, s, "pull", fields, arrays))
        return calls

    def absorb(self, server: int, reply: Message) -> None:
        """Merge a server's rows; EmbringError where they are not what was asked for."""
        plan = self._split
        assert plan is not None
        rows = reply.arrays.get("rows")
        if rows is None or rows.dtype != _FLOAT32 or rows.ndim != 1:
            raise EmbringError(f"a server sent {'no' if rows is None else rows.dtype} rows; they must be flat float32")
        edges = slice(plan.edge_start[server], plan.edge_start[server + 1])
        merged = merge(
            rows,
            plan.bags[server],
            plan.edges[server],
            plan.edge_bag[edges],
            plan.edge_row[edges],
            plan.edge_weight[edges] if plan.edge_weight.size else NO_WEIGHTS,
            self.batch.starts,
            self.where.places,
            self.features.dims,
            self.modes,
            self._touched,
            self.out,
        )
        if not merged:
            raise EmbringError(f"a server sent {rows.size} floats for {plan.bags[server].sum()} bags")
        self.absent += int(reply.fields.get("absent", 0))

    def finish(self) -> NDArray[np.float32]:
        """All rows, flat: empty bags are zeros, means divided."""
        finish(
            self.batch.offsets,
            self.batch.starts,
            self.where.places,
            self.features.dims,
            self.modes,
            self._touched,
            self.out,
        )
        return self.out


class PushRequest(_Request):
    """A push, an assignment or a deletion: one value for each bag, flat in `rows` (empty for a deletion).

    One sequence: no slot is in two calls of one attempt, and a retry sends under the same.
    """

    def __init__(
        self,
        batch: Batch,
        features: Features,
        modes: NDArray[np.uint8],
        kind: PushKind,
        rows: NDArray[np.float32],
        lr_scale: float,
        done: NDArray[np.uint8] = NONE_DONE,
    ) -> None:
        policy = np.full(len(modes), ROWS, np.uint8) if kind == "delete" else features.zeros
        super().__init__(batch, features, modes, policy, None)
        self._kind: PushKind = kind
        self._rows = rows
        self._lr_scale = lr_scale
        self.done = done
        self.client = 0
        self.sequence = 0
        self.rows_new = 0

    def split(self, routing: Routing, left_out: frozenset[int], load: NDArray[np.float64]) -> list[Call]:
        """The calls to make: to primaries, or to the next in line where those are in `left_out`."""
        plan = self._plan(routing, routing.pushed_to(left_out), load)
        calls = []
        for s in self.asked:
            span, offsets = self._part(plan, s, plan.weights.size > 0)
            share = PushShare(
                client=self.client,
                sequence=self.sequence,
                kind=self._kind,
                tables=self.features.numbers,
                bags=plan.bags[s],
                ids=plan.ids[span],
                rows=self._rows_of(plan, s),
                offsets=offsets,
                weights=plan.weights[span] if plan.weights.size else None,
                lr_scale=self._lr_scale,
            )
            fields, arrays = push_message(share)
            fields["epoch"] = routing.epoch
            calls.append(Call(s, s, "push", fields, arrays))
        return calls

    def _rows_of(self, plan: Split, s: int) -> NDArray[np.float32]:
        if self._kind == "delete":
            return NO_WEIGHTS
        rows = np.empty(int(plan.bags[s] @ self.features.dims), np.float32)
        edges = slice(plan.edge_start[s], plan.edge_start[s + 1])
        gather(
            self._rows,
            plan.bags[s],
            plan.edges[s],
            plan.edge_bag[edges],
            plan.edge_row[edges],
            plan.edge_weight[edges] if plan.edge_weight.size else NO_WEIGHTS,
            self.batch.offsets,
            self.batch.starts,
            self.where.places,
            self.features.dims,
            self.modes,
            self._kind == "assign",
            rows,
        )
        return rows

    def absorb(self, server: int, reply: Message) -> None:
        """The server holds its part."""
        self.began = True
        self.rows_new += int(reply.fields.get("rows_new", 0))


def check_finite(values: NDArray[np.float32], batch: Batch, features: Features, what: str) -> None:
    """RequestError naming the table and row of the first NaN or infinity: a push is refused whole, before it is cut."""
    at = first_not_finite(values)
    if at < 0:
        return
    where = Places.of(batch.starts, features.dim_list)
    f = int(np.searchsorted(where.places, at, side="right")) - 1
    row, column = divmod(at - int(where.places[f]), features.dim_list[f])
    raise RequestError(
        f"{what} of table {batch.names[f]!r} has {values[at]} in row {row}, column {column}; every value must be finite"
    )
