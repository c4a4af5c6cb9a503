"""One store in this process, and every way to pool its rows that is measured: the registry of `bench kernels`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from hashring.planner import CreateTable, Join, plan
from hashring.view import Server, View
from ps.arena import Arena
from ps.kernels import index, pool, prefetch
from ps.share import PullShare, PushShare, features_of
from ps.slots import OWNER
from ps.spec import SGD, TableSpec
from ps.store import Store, StoreLimits

PUSH_ROWS = 16_384
"""Rows of one assign while a store is filled."""

AHEAD = 16
"""Rows that the gather has on their way. 8, 16 and 32 measured alike."""


def one_server_store(specs: list[TableSpec], memory_max: int = 0) -> Store:
    """A store that owns every slot of these tables, which are numbered as the view does."""
    view = plan(View.empty(1), Join((Server("s0", 1, "localhost"),)))
    for spec in specs:
        view = plan(view, CreateTable(spec.name, spec.to_plain(), spec.placement, spec.replicas))
    store = Store(1, StoreLimits(memory_max=memory_max))
    store.install(view)
    return store


def change(
    store: Store, name: str, ids: NDArray[np.int64], rows: NDArray[np.float32], sequence: int, kind: str = "assign"
) -> None:
    """Assign rows to ids (or push gradients) of one table."""
    lines = features_of([_number(store, name)], [len(ids)])
    store.push(PushShare(1, sequence, kind, lines, ids, rows.reshape(-1)))  # type: ignore[arg-type]


def pooled_share(store: Store, name: str, ids: NDArray[np.int64], offsets: NDArray[np.int64]) -> PullShare:
    """A request for the sums of bags of one table."""
    return PullShare(features_of([_number(store, name)], [len(offsets) - 1]), ids, offsets)


def _number(store: Store, name: str) -> int:
    table = store.view.table(name) if store.view else None
    assert table is not None, f"the store has no table {name}"
    return table.number


@njit(nogil=True, cache=True)
def gather(rows, values, out):  # type: ignore[no-untyped-def]  # int32[n], float32[r, d], float32[n, d]
    """out[i] = values[rows[i]], with the rows to come asked for ahead: the memory's limit for random rows."""
    n, d = out.shape
    for i in range(n):
        if i + AHEAD < n:
            for j in range(0, d, 16):
                prefetch(values, np.int64(rows[i + AHEAD]) * d + j)
        row = rows[i]
        for j in range(d):
            out[i, j] = values[row, j]


@dataclass(frozen=True)
class Question:
    """Bags of ids, the share that asks for their sums, and the rows where they are: what each side is given."""

    share: PullShare
    rows: NDArray[np.int32]
    out: NDArray[np.float32]


class KernelBench:
    """A table of `rows` rows of `dim` floats (multiples of 1/64: sums are exact), and requests for its bags."""

    name = "table"

    def __init__(self, rows: int, dim: int = 64) -> None:
        torch.set_num_threads(1)  # as many as a server's data thread has
        self.rows, self.dim = rows, dim
        self.store = one_server_store([TableSpec(self.name, dim, SGD())])
        self.values = np.empty((rows, dim), np.float32)
        rng = np.random.default_rng(14)
        for at in range(0, rows, PUSH_ROWS):
            ids = np.arange(at, min(at + PUSH_ROWS, rows))
            codes = rng.integers(-128, 128, (len(ids), dim), np.int8)
            self.values[ids] = np.multiply(codes, np.float32(1 / 64), dtype=np.float32)
            change(self.store, self.name, ids, self.values[ids], at // PUSH_ROWS + 1)

    @property
    def arena(self) -> Arena:
        """Where the rows are."""
        return self.store.held.registry.arenas[0]

    def question(self, bags: int, size: int, number: int = 0) -> Question:
        """Request `number` of bags of `size` ids each, drawn evenly from all ids."""
        rng = np.random.default_rng((14, number))
        ids = rng.integers(0, self.rows, bags * size)
        share = pooled_share(self.store, self.name, ids, np.arange(bags + 1, dtype=np.int64) * size)
        return Question(share, self.find_rows(share), np.empty((bags, self.dim), np.float32))

    def find_rows(self, share: PullShare) -> NDArray[np.int32]:
        """Rows of a share's ids: what the lookup alone does."""
        work = self.store.held.registry.plan(share)
        slots, rows = np.empty(len(work.ids), np.int32), np.empty(len(work.ids), np.int32)
        known = self.arena.index
        bad = index.find(
            work.plan, 0, work.ids, self.store.held.slots.roles, OWNER,
            known.directory, known.nodes, known.entries, slots, rows,
        )  # fmt: skip
        assert bad < 0
        return rows

    def by_store(self, asked: Question) -> NDArray[np.float32]:
        """A whole pull: checks, lookup, pooling."""
        return self.store.pull(asked.share).rows.reshape(-1, self.dim)

    def by_kernel(self, asked: Question) -> NDArray[np.float32]:
        """Pooling alone, from known rows."""
        work, arena = self.store.held.registry.plan(asked.share), self.arena
        rest = (arena.values, arena.initial, arena.defaults, asked.out.reshape(-1))
        pool.pool_bags(work.plan, 0, work.offsets, work.weights, work.ids, asked.rows, *rest)
        return asked.out

    def by_torch(self, asked: Question) -> NDArray[np.float32]:
        """Pooling alone by torch, over the same matrix without a copy, from known rows."""
        assert asked.share.offsets is not None
        used = torch.from_numpy(self.arena.values[: self.rows])
        with torch.inference_mode():
            return torch.nn.functional.embedding_bag(
                torch.from_numpy(asked.rows),
                used,
                torch.from_numpy(asked.share.offsets.astype(np.int32)),
                mode="sum",
                include_last_offset=True,
            ).numpy()

    def by_gather(self, asked: Question) -> NDArray[np.float32]:
        """Every row copied out one by one, from known rows; the test adds them up."""
        out = np.empty((len(asked.rows), self.dim), np.float32)
        gather(asked.rows, self.arena.values, out)
        return out


POOLING: Mapping[str, Callable[[KernelBench, Question], NDArray[np.float32]]] = {
    "store": KernelBench.by_store,
    "pool": KernelBench.by_kernel,
    "torch": KernelBench.by_torch,
}
"""Ways to pool; each must give the same bits."""
