"""Rows on their way: exports, absorption, parts, increments, and blocks that must be refused."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hashring.planner import Recover, plan
from hashring.tokens import tokens
from hashring.view import View
from ps.errors import MemoryFull, NotApplied, RequestError, WrongView
from ps.rowblock import RowBlock, Watermark
from ps.spec import SGD, Adagrad, Adam, Initializer, TableSpec
from ps.store import Store, StoreLimits
from tests.ps.store_helpers import LIMITS, ME, all_rows, every_slot, pull_share, push_share, store_of, view_of

SPECS = (
    TableSpec("a", 3, SGD(lr=1.0), Initializer(0, 0)),
    TableSpec("b", 2, Adam(), seed=4),
    TableSpec("w", 3, Adagrad(), seed=9, placement="whole"),
)


def through_the_wire(blocks: Iterator[RowBlock]) -> list[RowBlock]:
    return [RowBlock.from_arrays(*block.to_arrays()) for block in blocks]


def copy_of(source: Store, view: View, rows_max: int = 65_536) -> Store:
    """Another server that is given every slot of the source."""
    target = store_of(view, incarnation=1234)
    for block in through_the_wire(source.export(every_slot(source), rows_max=rows_max)):
        assert target.absorb(block).all()
    return target


def assert_equal_contents(a: Store, b: Store) -> None:
    slots = every_slot(a)
    assert (a.digest(slots) == b.digest(slots)).all()
    assert (a.watermark(slots) == b.watermark(slots)).all()
    assert a.statistics().rows_by_table == b.statistics().rows_by_table
    mine, theirs = a.held.clients.entries(slots), b.held.clients.entries(slots)
    assert windows(mine, slots) == windows(theirs, slots)


def windows(entries, slots) -> set[tuple[int, int, int, int]]:  # type: ignore[no-untyped-def]
    where = np.repeat(slots, np.diff(entries.offsets))
    columns = (where, entries.clients, entries.last, entries.mask)
    return set(zip(*(c.tolist() for c in columns), strict=True))


def mark(store: Store) -> Watermark:
    slots = every_slot(store)
    return Watermark(5, slots, store.watermark(slots).copy())


def filled(view: View, n: int = 500) -> Store:
    store = store_of(view)
    for number, spec in enumerate(SPECS, 1):
        ids = list(range(-n // 2, n // 2))
        store.push(push_share(number, [number], [ids], np.random.default_rng(number).normal(size=(n, spec.dim))))
    return store


@pytest.mark.parametrize("rows_max", [1, 7, 60, 65_536])
def test_an_export_absorbed_is_the_same_slots(rows_max: int) -> None:
    view = view_of(SPECS)
    source = filled(view, 100 if rows_max == 1 else 500)
    assert_equal_contents(source, copy_of(source, view, rows_max))


def test_blocks_keep_to_rows_max_but_for_what_changed_meanwhile() -> None:
    source = filled(view_of(SPECS))
    blocks = list(source.export(every_slot(source), rows_max=60))
    assert max(b.rows for b in blocks) < 60 * 2  # tokens are spread evenly, not exactly
    assert sum(b.rows for b in blocks) == 1500


def test_a_slot_in_parts_is_exact_though_it_changes_meanwhile() -> None:
    view = view_of(SPECS)
    source, target = filled(view), store_of(view, incarnation=1234)
    whole_slot = np.array([view.slots_total - 1])
    sequence = 100
    for block in source.export(whole_slot, rows_max=50):
        then, rows = source.digest(whole_slot), all_rows(source, 3)
        assert target.absorb(RowBlock.from_arrays(*block.to_arrays())).all()
        assert bool(target.held.slots.filling) != bool(block.final[0])
        sequence += 1
        source.push(push_share(sequence, [3], [[sequence % 37, 10_000 + sequence]], np.ones(6)))
        source.push(push_share(sequence, [3], [[-sequence % 200 - 150]], np.empty(0), kind="delete", client=2))
    assert sequence > 105
    assert (target.digest(whole_slot) == then).all()  # as the source stood when it cut the last part
    assert target.held.registry.arenas[2].counts(whole_slot)[0] == len(rows)
    since = Watermark(5, whole_slot, target.watermark(whole_slot).copy())
    (delta,) = source.export(whole_slot, since)
    assert not delta.full[0]
    assert target.absorb(delta).all()
    assert (target.digest(whole_slot) == source.digest(whole_slot)).all()


BIG = TableSpec("big", 3, SGD(lr=1.0), Initializer(0, 0), placement="whole")


def big(rows: int) -> tuple[View, Store, NDArray[np.int64]]:
    """A table of one slot."""
    view = view_of([BIG])
    source = store_of(view)
    source.push(push_share(1, [1], [list(range(rows))], np.ones((rows, 3))))
    return view, source, every_slot(source)


def delete(source: Store, sequence: int, ids: list[int]) -> None:
    source.push(push_share(sequence, [1], [ids], np.empty(0), kind="delete"))


@pytest.mark.parametrize("incremental", [False, True])
def test_a_slot_in_parts_is_exact_though_more_is_deleted_meanwhile_than_is_remembered(incremental: bool) -> None:
    view, source, slots = big(4000)
    target = store_of(view, incarnation=1234)
    if incremental:
        for block in source.export(slots):
            target.absorb(block)
    then, since = source.digest(slots), mark(target) if incremental else None
    for part, block in enumerate(source.export(slots, since, 100)):
        then = source.digest(slots)
        assert target.absorb(RowBlock.from_arrays(*block.to_arrays())).all()
        told = block.sections[0].ids.tolist() if block.sections else []
        gone = (told + list(range(part * 400, 4000)))[:50]  # of 64 that are remembered
        delete(source, part + 2, gone)
        source.push(push_share(part + 2, [1], [gone[:5]], np.ones((5, 3)), client=2))
    assert part > 5
    assert (target.digest(slots) == then).all()
    rows = sum(a.rows_live for a in target.held.registry.arenas)
    for block in source.export(slots, mark(target)):
        target.absorb(block)
    assert rows > sum(a.rows_live for a in target.held.registry.arenas) > 0
    assert_equal_contents(source, target)


def test_more_deletions_between_two_parts_than_are_remembered_have_the_slot_begun_anew() -> None:
    view, source, slots = big(2000)
    target = store_of(view, incarnation=1234)
    parts = source.export(slots, rows_max=500)
    first = next(parts)
    assert target.absorb(first).all()
    delete(source, 2, first.sections[0].ids[:200].tolist())
    with pytest.raises(NotApplied, match="sent anew"):
        next(parts)
    for block in source.export(slots, rows_max=500):
        assert target.absorb(block).all()
    assert_equal_contents(source, target)


@settings(max_examples=40)
@given(st.data())
def test_blocks_keep_to_what_a_frame_carries(data: st.DataObject) -> None:
    """Whatever was pushed and deleted between two of them: a copy of some slots, then changes since."""
    view = view_of(SPECS)
    source, target = store_of(view), store_of(view, incarnation=1234)
    source.held.block_max = 4000
    sequence, everything = 0, list(range(150))
    for _ in range(3):
        for _ in range(data.draw(st.integers(0, 6))):
            sequence += 1
            kind, table = data.draw(st.sampled_from(["push", "push", "delete"])), data.draw(st.integers(1, 3))
            low = data.draw(st.integers(0, 149))
            n = 0 if kind == "delete" else (150 - low) * SPECS[table - 1].dim
            source.push(push_share(sequence, [table], [everything[low:]], np.ones(n), kind=kind, client=sequence))
        for block in source.export(every_slot(source), mark(target), 1000):
            assert block.nbytes <= 4000 + 400 * len(source.held.clients)
            assert target.absorb(RowBlock.from_arrays(*block.to_arrays())).all()
        assert_equal_contents(source, target)


def test_a_last_part_that_repeats_more_than_a_frame_carries_comes_in_several_of_one_moment() -> None:
    view, source, slots = big(2000)
    target = store_of(view, incarnation=1234)
    source.held.block_max = 20_000
    blocks = []
    for block in source.export(slots, rows_max=300):
        assert block.nbytes <= 21_000
        blocks.append(block)
        if block.part[0] < 8:  # up to the last interval everything changes all the time
            source.push(push_share(len(blocks) + 1, [1], [list(range(2000))], np.ones((2000, 3))))
            then = source.digest(slots), source.watermark(slots)
    assert [int(b.part[0]) for b in blocks] == list(range(len(blocks)))
    assert [int(b.final[0]) for b in blocks] == [0] * (len(blocks) - 1) + [1]
    for block in blocks:
        assert target.absorb(RowBlock.from_arrays(*block.to_arrays())).all()
    assert (target.watermark(slots) == blocks[-1].last).all()
    assert blocks[-1].last == blocks[-2].last <= then[1]


@settings(max_examples=40)
@given(st.data())
def test_base_and_increments_equal_the_source(data: st.DataObject) -> None:
    view = view_of(SPECS)
    source, target = store_of(view), store_of(view, incarnation=1234)
    sequence = 0
    for _ in range(data.draw(st.integers(1, 4))):
        for _ in range(data.draw(st.integers(0, 4))):
            sequence += 1
            ids = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=20))
            kind = data.draw(st.sampled_from(["push", "assign", "delete"]))
            table = data.draw(st.integers(1, 3))
            n = 0 if kind == "delete" else len(ids) * SPECS[table - 1].dim
            source.push(push_share(sequence, [table], [ids], np.ones(n), kind=kind, client=sequence % 2))
        rows_max = data.draw(st.sampled_from([3, 10, 1000]))
        for block in through_the_wire(source.export(every_slot(source), mark(target), rows_max)):
            assert target.absorb(block).all()
        assert_equal_contents(source, target)


def test_increments_carry_only_what_changed() -> None:
    source = filled(view_of(SPECS))
    since = mark(source)
    source.push(push_share(50, [1], [[3]], np.ones(3)))
    source.push(push_share(51, [2], [[4, 5]], np.empty(0), kind="delete"))
    blocks = list(source.export(every_slot(source), since))
    assert sum(b.rows for b in blocks) == 1
    assert sorted(i for b in blocks for s in b.sections for i in s.gone_ids.tolist()) == [4, 5]
    assert not any(b.full.any() for b in blocks)


def test_a_watermark_older_than_the_deletions_kept_gets_the_whole_slot() -> None:
    source = filled(view_of(SPECS))
    target = copy_of(source, view_of(SPECS))
    since = mark(source)
    ids = list(range(-200, 200))  # more than deletions_max
    source.push(push_share(50, [1], [ids], np.empty(0), kind="delete"))
    blocks = list(source.export(every_slot(source), since))
    assert any(b.full.any() for b in blocks)
    for block in blocks:
        target.absorb(block)
    assert_equal_contents(source, target)


def test_watermarks_of_other_clusters_and_later_terms_are_refused() -> None:
    source = filled(view_of(SPECS))
    since = mark(source)
    with pytest.raises(RequestError, match="of cluster 6"):
        list(source.export(every_slot(source), replace(since, cluster=6)))
    later = replace(since, positions=since.positions + (50 << 40))
    with pytest.raises(RequestError, match="later than this server's"):
        list(source.export(every_slot(source), later))


def test_only_a_primary_exports() -> None:
    view = view_of(SPECS)
    with pytest.raises(WrongView):
        list(store_of(view, incarnation=9).export(np.array([0])))


def test_a_block_is_absorbed_only_at_its_base() -> None:
    view = view_of(SPECS)
    source = filled(view)
    target = copy_of(source, view)
    since = mark(source)
    source.push(push_share(50, [1], [[3]], np.ones(3)))
    (first,) = source.export(every_slot(source), since)
    then = mark(source)
    source.push(push_share(51, [1], [[3]], np.ones(3)))
    (second,) = source.export(every_slot(source), then)
    slot = int(np.flatnonzero(first.last != first.base)[0])
    digest = target.digest(every_slot(target))
    assert not target.absorb(second)[slot]
    assert (target.digest(every_slot(target)) == digest).all()
    assert target.absorb(first)[slot]
    assert not target.absorb(first)[slot]  # it came twice
    assert target.absorb(second)[slot]
    assert_equal_contents(source, target)


def test_overlapping_copies_do_not_mix() -> None:
    view = view_of(SPECS)
    source, target = filled(view), store_of(view, incarnation=1234)
    slot = np.array([view.slots_total - 1])
    one, two = (list(source.export(slot, rows_max=100)) for _ in range(2))
    assert target.absorb(one[0]).all()
    assert target.absorb(two[0]).all()  # a new copy begins anew
    assert not target.absorb(one[1]).any()
    assert not target.absorb(two[2]).any()
    for block in two[1:]:
        assert target.absorb(block).all()
    assert (target.digest(slot) == source.digest(slot)).all()


def test_lost_slots_begin_empty_in_a_new_term() -> None:
    view = view_of(SPECS, servers=(ME, 78))
    dead = tuple(replace(s, alive=s.incarnation != 78) for s in view.servers)
    view = plan(replace(view, servers=dead, epoch=view.epoch + 1), Recover())
    store = store_of(view)
    assert store.pull(pull_share([1], [list(range(100))])).absent == 100
    assert (store.watermark(every_slot(store)) == view.terms() << 40).all()


def test_dropped_copies_are_gone_and_owned_slots_are_not_dropped() -> None:
    view = view_of(SPECS)
    source = filled(view)
    learner = copy_of(source, view)
    learner.drop(every_slot(learner))
    assert learner.statistics().rows == 0
    assert not learner.watermark(every_slot(learner)).any()
    assert len(learner.held.clients.entries(every_slot(learner)).clients) == 0
    with pytest.raises(RequestError, match="is owned here"):
        source.drop(np.array([0]))


def test_a_block_that_does_not_fit_is_refused_whole() -> None:
    view = view_of(SPECS)
    source = filled(view)
    target = store_of(view, 1234, StoreLimits(memory_max=20_000, slots_max=2**16))
    (block,) = source.export(every_slot(source))
    with pytest.raises(MemoryFull):
        target.absorb(block)
    assert target.statistics().rows == 0


def test_malformed_blocks_are_refused_in_one_sentence() -> None:
    view = view_of(SPECS)
    source, target = filled(view), store_of(view, 1234, LIMITS)
    (block,) = source.export(every_slot(source))
    plain, arrays = block.to_arrays()

    def refused(words: str, plain_too: dict[str, object] | None = None, **changed: np.ndarray) -> None:
        names = {name.replace("__", "."): array for name, array in changed.items()}
        names = {(n[1:] if n[1:2].isdigit() else n): a for n, a in names.items()}
        with pytest.raises(RequestError, match=words):
            target.absorb(RowBlock.from_arrays({**plain, **(plain_too or {})}, {**arrays, **names}))

    refused("distinct", slots=np.zeros_like(block.slots))
    refused("must not lead back", last=block.base - 1)
    refused("has shape", full=block.full[:-1])
    refused("dtype", base=block.base.astype(np.float64))
    refused("not a row block", {"sections": [[3]]})
    refused("not a row block", {"sections": [[3, "sgd"]] * 9})
    refused("names rows of 0 values", {"sections": [[0, "sgd"], *plain["sections"][1:]]})
    section = block.sections[0]
    refused("begins with 500", _0__offsets=section.offsets[::-1].copy())
    refused("has shape", _0__values=section.values[:-1])
    refused("does not belong to slot", _0__ids=section.ids + 1)
    refused("is unknown", _0__tables=section.tables + 90)
    refused("of another width", _0__tables=section.tables * 0 + 2)
    assert target.statistics().rows == 0
    assert not target.watermark(every_slot(target)).any()


@pytest.mark.parametrize("number", [1, 3])
def test_random_ranges_hold_every_row_once_and_only_theirs(number: int) -> None:
    store = filled(view_of(SPECS))
    cuts = [0, *sorted(int(x) for x in np.random.default_rng(0).integers(0, 2**63, 6)), 2**63 + 5, None]
    seen: dict[int, np.ndarray] = {}
    seed, reached = SPECS[number - 1].seed, -1
    store_rows = all_rows(store, number)
    for low, high in pairwise(cuts):
        for ids, rows in store.range(number, low, high, rows_max=23):
            assert not seen.keys() & set(ids.tolist())
            seen |= dict(zip(ids.tolist(), rows, strict=True))
            places = tokens(ids, seed)
            assert low <= places.min()
            assert reached < int(places.max()) < (high or 2**64)
            assert reached < 0 or reached < int(places.min())
            reached = int(places.max())
    assert seen.keys() == set(range(-250, 250))
    assert all((rows == store_rows[i]).all() for i, rows in seen.items())
    with pytest.raises(RequestError, match="not an interval"):
        next(store.range(number, 5, 4))
    assert list(store.range(number, 5, 5)) == []


def slots_of(store: Store, number: int) -> NDArray[np.int64]:
    entry = store.held.registry.entry(number)
    return np.arange(entry.first, entry.first + entry.slots)


@pytest.mark.parametrize("number", [1, 3])
def test_ranges_of_some_slots_hold_their_rows_alone(number: int) -> None:
    store = filled(view_of(SPECS))
    slots = slots_of(store, number)
    whole = all_rows(store, number)
    parts = [all_rows(store, number, slots=slots[k::3]) for k in range(3)]  # type: ignore[arg-type]
    assert sum(map(len, parts)) == len(whole)
    assert {i for part in parts for i in part} == whole.keys()
    if number == 1:
        assert min(map(len, parts)) > 50
        (low,) = (p for p in [all_rows(store, number, slots=slots[:4], stop=2**62)])  # type: ignore[arg-type]
        assert low.keys() == all_rows(store, number, stop=2**62).keys()


def test_a_range_of_slots_that_are_not_the_tables_is_refused() -> None:
    """Those of a view in which the table had others: read as its own, they would pass for slots without rows."""
    store = filled(view_of(SPECS))
    foreign = slots_of(store, 3)
    with pytest.raises(WrongView, match=f"slot {foreign[0]} "):
        all_rows(store, 1, slots=foreign)  # type: ignore[arg-type]


def test_a_range_is_whole_though_pushes_come_in_between() -> None:
    store = filled(view_of(SPECS))
    seen: list[int] = []
    for k, (ids, _) in enumerate(store.range(3, rows_max=20)):
        seen += ids.tolist()
        store.push(push_share(100 + k, [3], [list(range(1000 + 500 * k, 1500 + 500 * k))], np.ones(1500)))
    old = [i for i in seen if i < 1000]
    assert sorted(old) == list(range(-250, 250))
    assert len(set(seen)) == len(seen)
