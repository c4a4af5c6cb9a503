"""Requests without input or output: a batch becomes calls to servers, and their replies become the answer.

A request is split, its calls are sent by whoever drives it, replies are absorbed as they come. After a failure it is
split again: the ids that were answered are left out, so that every id is pooled, or pushed, exactly once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.client.batch import NO_WEIGHTS, Batch
from ps.client.routing import Features, Routing
from ps.errors import EmbringError, RequestError, SlotsLost
from ps.kernels.merge import MAX, finish, first_not_finite, gather, merge, place_bags
from ps.kernels.split import ROWS, Split, split
from ps.share import ABSENT, BAGS, MODE, TABLE, Acks, PushKind, PushShare
from ps.wire import Message, push_message

NONE_DONE = np.empty(0, np.uint8)

UNDIVIDED_MAX = 512
"""Ids of a pull that is sent as it is where one server can answer it: up to here, to split costs more than it saves."""

_FLOAT32 = np.dtype(np.float32)


@dataclass(slots=True)
class Call:
    """One message for one server (its index in the view). `key` names the call in what comes of it."""

    key: int
    server: int
    op: str
    fields: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


@dataclass(slots=True)
class Places:
    """Where the bags of each feature lie in a flat array of rows: from float places[f], `dims[f]` floats each."""

    places: NDArray[np.int64]
    total: int

    @classmethod
    def of(cls, starts: NDArray[np.int64], dims: NDArray[np.int64]) -> "Places":
        """Feature behind feature, bag behind bag."""
        places = np.empty(len(dims), np.int64)
        return cls(places, place_bags(starts, dims, places))


class _Request:
    """What pulls and pushes share: a batch split over servers, and which of its ids are done."""

    began = False

    def __init__(
        self,
        batch: Batch,
        features: Features,
        modes: NDArray[np.uint8],
        policy: NDArray[np.uint8],
        lines: NDArray[np.int32],
        where: Places | None,
    ) -> None:
        self.batch = batch
        self.features = features
        self.modes = modes
        self.policy = policy
        self.where = where or Places.of(batch.starts, features.dims)
        self._lines = lines
        self.done = NONE_DONE
        self.asked: list[int] = []
        self._split: Split | None = None

    def _plan(self, routing: Routing, readers: NDArray[np.int16], load: NDArray[np.float64]) -> Split:
        """Split what is not done over the servers that answer for it; SlotsLost where nobody does."""
        batch = self.batch
        features = self._same_tables(routing)
        plan = self._split = split(
            batch.ids, batch.starts, batch.offsets, batch.weights, self.done,
            features.seeds, features.firsts, features.shifts, self._lines, readers, load, self.policy,
        )  # fmt: skip
        if plan.lost >= 0:
            raise SlotsLost(
                f"slot {plan.lost} has no living owner: its rows are gone until a restore or an explicit acceptance",
                [plan.lost],
            )
        self._cuts = plan.starts.tolist()
        starts = self._cuts[0]
        self.asked = [s for s in range(len(starts) - 1) if starts[s + 1] > starts[s]]
        return plan

    def _same_tables(self, routing: Routing) -> Features:
        """The tables by their numbers in this view; a table made anew under the name must have the same width."""
        features = routing.features(self.batch.names)
        if features is not self.features:
            if features.dim_list != self.features.dim_list:
                names = ", ".join(self.batch.names[:5])
                raise RequestError(f"a table of {names} was made anew with another dim meanwhile")
            self._lines = self._lines.copy()
            self._lines[:, TABLE] = features.lines[:, TABLE]
            self.features = features
        return features

    def answered(self, failed: Iterable[int]) -> None:
        """The calls are over, and those to the `failed` servers are to be made again."""
        plan = self._split
        assert plan is not None
        again = np.isin(plan.servers, list(failed))
        self.done = np.where(again, np.uint8(0), np.uint8(1))

    def _part(self, plan: Split, s: int, weighted: bool) -> dict[str, NDArray[Any]]:
        """The arrays of server s's share; offsets are left out where every bag has one id and no weight."""
        (low, high), (first, last) = self._cuts[0][s : s + 2], self._cuts[1][s : s + 2]
        arrays: dict[str, NDArray[Any]] = {"features": plan.features[s], "ids": plan.ids[low:high]}
        if weighted or last - first != high - low:
            arrays["offsets"] = plan.offsets[first + s : last + s + 1]
        if weighted:
            arrays["weights"] = plan.weights[low:high]
        return arrays

    def _edges(self, plan: Split, s: int) -> tuple[NDArray[Any], ...]:
        """Server s's lines, and its edges: how many of each feature, bags, rows, weights."""
        low, high = self._cuts[2][s : s + 2]
        weights = plan.edge_weight[low:high] if len(plan.edge_weight) else NO_WEIGHTS
        return plan.features[s], plan.edges[s], plan.edge_bag[low:high], plan.edge_row[low:high], weights


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
        lines = features.lines
        if any_max or absent is not None:
            lines = lines.copy()
            lines[:, MODE] = modes == MAX
            if absent is not None:
                lines[:, ABSENT] = absent
        super().__init__(batch, features, modes, policy, lines, where)
        self._mixed = mixed
        self._weights_travel = batch.weights.size > 0 and not mixed
        self.out = np.empty(self.where.total, np.float32) if out is None else out
        self._touched = np.zeros(batch.bags, np.uint8)
        self._undivided = False
        self.absent = 0
        self.rows = 0

    def split(self, routing: Routing, left_out: frozenset[int], load: NDArray[np.float64]) -> list[Call]:
        """The calls to make; servers in `left_out` are asked only for what nobody else has."""
        self._undivided = False
        if len(self.batch.ids) <= UNDIVIDED_MAX and not len(self.done) and not self._mixed:
            able = self._same_tables(routing).covering - left_out
            if able:
                return [self._whole(min(able, key=load.__getitem__), routing.epoch)]
        single = self._same_tables(routing).single  # then there is nothing to choose
        plan = self._plan(routing, routing.first_readers if single else routing.readers_without(left_out), load)
        weighted = self._weights_travel
        return [Call(s, s, "pull", {"epoch": routing.epoch}, self._part(plan, s, weighted)) for s in self.asked]

    def _whole(self, server: int, epoch: int) -> Call:
        """The call of a pull that one server answers alone."""
        self._undivided = True
        batch = self.batch
        lines = self._lines.copy()
        lines[:, BAGS] = batch.starts[1:] - batch.starts[:-1]
        arrays: dict[str, NDArray[Any]] = {"features": lines, "ids": batch.ids}
        if len(batch.offsets):
            arrays["offsets"] = batch.offsets
        if self._weights_travel:
            arrays["weights"] = batch.weights
        return Call(server, server, "pull", {"epoch": epoch}, arrays)

    def answered(self, failed: Iterable[int]) -> None:
        """The calls are over, and those to the `failed` servers are to be made again."""
        if not self._undivided:
            super().answered(failed)

    def absorb(self, server: int, reply: Message) -> None:
        """Merge a server's rows; EmbringError where they are not what was asked for."""
        rows = reply.arrays.get("rows")
        if rows is None or rows.dtype != _FLOAT32 or rows.ndim != 1:
            raise EmbringError(f"a server sent {'no' if rows is None else rows.dtype} rows; they must be flat float32")
        if self._undivided:
            if len(rows) != len(self.out):
                raise EmbringError(f"a server sent {len(rows)} floats; {len(self.out)} were asked for")
            self.out[:] = rows
            self._touched[:] = 1
            self.rows += self.batch.bags
            self.absent += int(reply.fields.get("absent", 0))
            return
        plan = self._split
        assert plan is not None
        merged = merge(
            rows, *self._edges(plan, server), self.batch.starts, self.where.places, self.features.dims, self.modes,
            self._touched, self.out,
        )  # fmt: skip
        if not merged:
            raise EmbringError(f"a server sent {rows.size} floats for {plan.features[server, :, BAGS].sum()} bags")
        self.rows += self._cuts[1][server + 1] - self._cuts[1][server]
        self.absent += int(reply.fields.get("absent", 0))

    def finish(self) -> NDArray[np.float32]:
        """All rows, flat: empty bags are zeros, means divided."""
        finish(
            self.batch.offsets, self.batch.starts, self.where.places, self.features.dims, self.modes, self._touched,
            self.out,
        )  # fmt: skip
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
        acks: Acks = "all",
    ) -> None:
        policy = np.full(len(modes), ROWS, np.uint8) if kind == "delete" else features.zeros
        super().__init__(batch, features, modes, policy, features.lines, None)
        self._kind: PushKind = kind
        self._rows = rows
        self._lr_scale = lr_scale
        self._acks = acks
        self.done = done
        self.client = 0
        self.sequence = 0
        self.rows_new = 0

    def split(self, routing: Routing, left_out: frozenset[int], load: NDArray[np.float64]) -> list[Call]:
        """The calls to make: to primaries, or to the next in line where those are in `left_out`."""
        plan = self._plan(routing, routing.pushed_to(left_out), load)
        calls = []
        for s in self.asked:
            part = self._part(plan, s, len(plan.weights) > 0)
            share = PushShare(
                self.client, self.sequence, self._kind, rows=self._rows_of(plan, s), lr_scale=self._lr_scale, **part
            )
            fields, arrays = push_message(share)
            if self._acks != "all":
                fields["acks"] = self._acks
            calls.append(Call(s, s, "push", {**fields, "epoch": routing.epoch}, arrays))
        return calls

    def _rows_of(self, plan: Split, s: int) -> NDArray[np.float32]:
        if self._kind == "delete":
            return NO_WEIGHTS
        rows = np.empty(int(plan.features[s, :, BAGS] @ self.features.dims), np.float32)
        gather(
            self._rows, *self._edges(plan, s), self.batch.offsets, self.batch.starts, self.where.places,
            self.features.dims, self.modes, self._kind == "assign", rows,
        )  # fmt: skip
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
    where = Places.of(batch.starts, features.dims)
    f = int(np.searchsorted(where.places, at, side="right")) - 1
    row, column = divmod(at - int(where.places[f]), features.dim_list[f])
    raise RequestError(
        f"{what} of table {batch.names[f]!r} has {values[at]} in row {row}, column {column}; "
        "every value must be a finite float32"
    )
