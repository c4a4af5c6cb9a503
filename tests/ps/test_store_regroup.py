"""Tables that get other slots: rows, what clients were heard of, positions and deletions go with them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashring.planner import Place, plan
from hashring.view import View
from ps.rowblock import Watermark
from ps.spec import SGD, Adagrad, TableSpec
from ps.store import Store
from ps.store import regroup as regrouping
from tests.ps.store_helpers import all_rows, every_slot, pull_share, push_share, store_of, view_of

SPECS = (
    TableSpec("a", 3, SGD(lr=0.5)),
    TableSpec("b", 2, Adagrad(lr=0.5)),
    TableSpec("c", 3, SGD(lr=0.5)),
    TableSpec("w", 3, SGD(lr=0.5), placement="whole"),
)
NAMES = [spec.name for spec in SPECS]


def placed(view: View, names: Sequence[str], placement: str = "sharded") -> View:
    specs = {n: {**t.spec, "placement": placement} for n in names if (t := view.table(n)) is not None}
    return plan(view, Place(specs, placement, 1))  # type: ignore[arg-type]


def filled(view: View, ids: int = 40) -> Store:
    store = store_of(view)
    for table, spec in enumerate(SPECS, 1):
        store.push(push_share(table, [table], [list(range(ids))], np.arange(ids * spec.dim) % 5))
    return store


def contents(store: Store) -> list[dict[int, list[float]]]:
    return [{id_: row.tolist() for id_, row in all_rows(store, table).items()} for table in (1, 2, 3, 4)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sets(st.sampled_from(NAMES), min_size=1), st.sampled_from(["sharded", "whole"])), max_size=4),
    st.sets(st.integers(0, 39)),
    st.booleans(),
)
def test_rows_stay_as_they_are_whichever_slots_they_get(
    moves: list[tuple[set[str], str]], deleted: set[int], at_once: bool
) -> None:
    """In one view after another, or by the last of them alone, as a server that was paused meanwhile."""
    view = view_of(SPECS)
    store, before = filled(view), None
    if deleted:
        store.push(push_share(9, [1, 2, 3, 4], [sorted(deleted)] * 4, np.empty(0), "delete"))
    before = contents(store)
    for names, placement in moves:
        view = placed(view, sorted(names), placement)
        if not at_once:
            store.install(view)
    store.install(view)
    assert contents(store) == before
    assert sum(a.rows_live for a in store.held.registry.arenas) == sum(map(len, before))
    homes = {t.number: view.group(t.group) for t in view.tables}
    slots = every_slot(store)
    for arena in store.held.registry.arenas:
        found = arena.collect(slots, *store.held.slots.bounds(slots))
        where = np.repeat(slots, np.diff(found.offsets))
        for table, slot in zip(arena.numbers[found.codes].tolist(), where.tolist(), strict=True):
            assert homes[table].first <= slot < homes[table].first + homes[table].slots
    # Pushes go on, and those that were heard are not heard again.
    assert store.push(push_share(1, [1], [list(range(40))], np.ones(120))).applied == 0
    assert store.push(push_share(4, [4], [list(range(40))], np.ones(120))).applied == 0
    assert store.push(push_share(10, [1, 4], [[5], [5]], np.ones(6))).applied == 2


@pytest.mark.parametrize("rows_at_once", [3, 7, 2**18])
def test_many_rows_go_in_parts(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regrouping, "ROWS_AT_ONCE", rows_at_once)
    store = filled(view_of(SPECS), 200)
    before = contents(store)
    store.install(placed(placed(store.view, ["w"]), ["a"], "whole"))  # type: ignore[arg-type]
    assert contents(store) == before


def test_a_slot_stands_where_the_one_stood_that_its_tokens_come_from() -> None:
    view = view_of(SPECS)
    store = filled(view)
    old = view.group(view.table("b").group)  # type: ignore[union-attr]
    stood = store.watermark(np.arange(old.first, old.first + old.slots))
    after = placed(view, ["b"])
    store.install(after)
    new = after.group(after.table("b").group)  # type: ignore[union-attr]
    slots = np.arange(new.first, new.first + new.slots)
    lineage, offsets = store.held.slots.lineage(slots)
    assert lineage[offsets[:-1]].tolist() == stood.tolist()
    assert (store.watermark(slots) == after.epoch << 40).all()  # a new term, behind what the lineage ends with
    for group in after.groups:
        left = group.number == old.number
        assert (group.terms == (after.epoch if left or group is new else group.terms)).all()


def test_deletions_are_told_from_the_new_slots() -> None:
    view = view_of(SPECS)
    store = filled(view)
    slots = every_slot(store)
    mark = Watermark(store.held.cluster, slots, store.watermark(slots))
    store.push(push_share(9, [1], [[7, 8]], np.empty(0), "delete"))
    after = placed(view, ["a"])
    store.install(after)
    new = after.group(after.table("a").group)  # type: ignore[union-attr]
    own = np.arange(new.first, new.first + new.slots)
    old = mark.positions[: new.slots]  # slot by slot where the old one stood
    gone = [
        (t, i)
        for block in store.export(own, Watermark(mark.cluster, own, old))
        for s in block.sections
        for t, i in zip(s.gone_tables.tolist(), s.gone_ids.tolist(), strict=True)
    ]
    assert sorted(gone) == [(1, 7), (1, 8)]


def test_slots_that_are_being_copied_here_bring_nothing() -> None:
    view = view_of(SPECS)
    source, target = filled(view), store_of(replace(view, epoch=0), 78)
    slots = np.arange(16)
    first = next(iter(source.copy(slots[:1], 1, 2)))
    assert not first.final.any()
    assert target.absorb(first).all()
    target.install(placed(view, ["a"]))
    assert not all(target.held.slots.positions[16:])
    assert all(rows == {} for rows in [dict(all_rows_of(target, 1))])


def all_rows_of(store: Store, table: int) -> dict[int, None]:
    entry = store.held.registry.entries[table]
    arena, slots = store.held.registry.arenas[entry.arena], np.arange(entry.first, entry.first + entry.slots)
    return dict.fromkeys(arena.collect(slots, *store.held.slots.bounds(slots), entry.code).ids.tolist())


def test_pulls_by_an_older_view_go_on() -> None:
    view = view_of(SPECS)
    store = filled(view)
    asked = pull_share([1, 4], [[3, 4], [5]])
    before = store.pull(asked).rows.tolist()
    store.install(placed(view, ["a", "w"]))
    assert store.pull(asked).rows.tolist() == before
