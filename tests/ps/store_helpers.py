"""Views, stores and shares in few words."""

from collections.abc import Sequence

import numpy as np

from hashring.planner import CreateTable, Join, plan
from hashring.view import Server, View
from ps.share import PullShare, PushShare, features_of
from ps.spec import ABSENT_CODES, TableSpec
from ps.store import Store, StoreLimits

ME = 77
LIMITS = StoreLimits(memory_max=2**28, slots_max=2**16, deletions_max=64)
INT64 = np.iinfo(np.int64)


def view_of(specs: Sequence[TableSpec], slot_bits: int = 4, servers: Sequence[int] = (ME,)) -> View:
    """A view of these tables in which servers of these incarnations share the slots."""
    view = View.empty(cluster=5, slot_bits=slot_bits)
    view = plan(view, Join(tuple(Server(f"s{i}", n, f"host{i}") for i, n in enumerate(servers))))
    for spec in specs:
        change = CreateTable(spec.name, spec.to_plain(), placement=spec.placement, replicas=spec.replicas)
        view = plan(view, change)
    return view


def store_of(view: View, incarnation: int = ME, limits: StoreLimits = LIMITS) -> Store:
    store = Store(incarnation, limits, clock=lambda: 1000.0)
    store.install(view)
    return store


def pull_share(
    tables: Sequence[int],
    ids: Sequence[Sequence[int]],
    absent: str = "initial",
    offsets: Sequence[int] | None = None,
    bags: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> PullShare:
    f = len(tables)
    return PullShare(
        features_of(tables, [len(i) for i in ids] if bags is None else bags, modes or [0] * f, ABSENT_CODES[absent]),
        np.array([i for part in ids for i in part], np.int64),
        None if offsets is None else np.array(offsets, np.int64),
        None if weights is None else np.array(weights, np.float32),
    )


def push_share(
    sequence: int,
    tables: Sequence[int],
    ids: Sequence[Sequence[int]],
    rows: np.ndarray,
    kind: str = "push",
    client: int = 1,
    lr_scale: float = 1.0,
) -> PushShare:
    return PushShare(
        client,
        sequence,
        kind,  # type: ignore[arg-type]
        features_of(tables, [len(i) for i in ids]),
        np.array([i for part in ids for i in part], np.int64),
        np.asarray(rows, np.float32).reshape(-1),
        lr_scale=lr_scale,
    )


def all_rows(store: Store, table: int, **kwargs: int) -> dict[int, np.ndarray]:
    """Every row of a table, by a range pull; fails where an id comes twice."""
    out: dict[int, np.ndarray] = {}
    for ids, rows in store.range(table, **kwargs):
        for id_, row in zip(ids.tolist(), rows, strict=True):
            assert id_ not in out
            out[id_] = row.copy()
    return out


def every_slot(store: Store) -> np.ndarray:
    assert store.view is not None
    return np.arange(store.view.slots_total)
