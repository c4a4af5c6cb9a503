"""The store against its slow twin, and the bad input it must refuse."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashring.planner import AlterTable, DropTable, Join, Leave, TruncateTable, plan
from hashring.view import Server
from ps.errors import MemoryFull, Overloaded, RequestError, WrongView
from ps.share import MAX, SUM, PullShare, PushShare, features_of
from ps.spec import FTRL, SGD, Adagrad, Adam, Initializer, RowWiseAdagrad, TableSpec
from ps.store import StoreLimits
from tests.ps.naive_store import NaiveStore
from tests.ps.store_helpers import INT64, LIMITS, ME, all_rows, every_slot, pull_share, push_share, store_of, view_of

SPECS = (
    TableSpec("a", 3, SGD(lr=0.5), seed=1, default=(1.0, 2.0, 3.0)),
    TableSpec("b", 3, SGD(lr=0.25, weight_decay=0.1, clip=1.0), seed=2),
    TableSpec("c", 17, Adagrad(lr=0.1, initial_accumulator=0.1), seed=3, placement="whole"),
    TableSpec("d", 2, RowWiseAdagrad(lr=0.1), Initializer(-1.0, 0.5), seed=3),
    TableSpec("e", 2, Adam(lr=0.1, weight_decay=0.01), seed=5),
    TableSpec("f", 2, FTRL(alpha=0.3, l1=0.01, l2=0.1), seed=6),
    TableSpec("g", 17, Adagrad(lr=0.5), seed=7),
)
NUMBERS = tuple(range(1, len(SPECS) + 1))
IDS = st.one_of(st.integers(-3, 12), st.sampled_from([INT64.min, INT64.max, -1, 0]), st.integers(INT64.min, INT64.max))
FLOATS = st.floats(-2, 2, width=32)


@st.composite
def features(draw: st.DrawFn, bagged: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """tables, bags, ids, offsets."""
    tables = draw(st.lists(st.sampled_from(NUMBERS), max_size=4))
    counts, ids, ends = [], [], [0]
    for _ in tables:
        bags = draw(st.lists(st.lists(IDS, max_size=4 if bagged else 1, min_size=0 if bagged else 1), max_size=4))
        counts.append(len(bags))
        for bag in bags:
            ids += bag
            ends.append(len(ids))
    offsets = np.array(ends, np.int64) if bagged else None
    return tables, counts, np.array(ids, np.int64), offsets


@st.composite
def pushes(draw: st.DrawFn) -> PushShare:
    kind = draw(st.sampled_from(["push", "push", "push", "assign", "delete"]))
    bagged = kind == "push" and draw(st.booleans())
    tables, bags, ids, offsets = draw(features(bagged))
    floats = 0 if kind == "delete" else sum(SPECS[t - 1].dim * int(b) for t, b in zip(tables, bags, strict=True))
    rows = np.array(draw(st.lists(FLOATS, min_size=floats, max_size=floats)), np.float32)
    weights = None
    if offsets is not None and draw(st.booleans()):
        weights = np.array(draw(st.lists(FLOATS, min_size=len(ids), max_size=len(ids))), np.float32)
    sequence, scale = draw(st.integers(1, 20)), draw(st.sampled_from([1.0, 0.5]))
    lines = features_of(tables, bags)
    return PushShare(draw(st.integers(1, 2)), sequence, kind, lines, ids, rows, offsets, weights, scale)


@st.composite
def pulls(draw: st.DrawFn) -> PullShare:
    bagged = draw(st.booleans())
    tables, bags, ids, offsets = draw(features(bagged))
    weights = None
    modes = [draw(st.sampled_from([SUM, MAX])) if bagged else SUM for _ in tables]
    if bagged and not any(modes) and draw(st.booleans()):
        weights = np.array(draw(st.lists(FLOATS, min_size=len(ids), max_size=len(ids))), np.float32)
    absent = [draw(st.integers(0, 2)) for _ in tables]
    return PullShare(features_of(tables, bags, modes, absent), ids, offsets, weights)


@settings(max_examples=60)
@given(st.lists(st.one_of(pushes(), pulls()), min_size=1, max_size=12))
def test_store_equals_its_slow_twin(requests: list[PushShare | PullShare]) -> None:
    view = view_of(SPECS)
    store, twin = store_of(view), NaiveStore(view)
    for request in requests:
        if isinstance(request, PullShare):
            before = store.digest(every_slot(store))
            reply, (rows, absent) = store.pull(request), twin.pull(request)
            assert reply.absent == absent
            np.testing.assert_allclose(reply.rows, rows, rtol=2e-4, atol=2e-5)
            assert (store.digest(every_slot(store)) == before).all()
        else:
            reply = store.push(request)
            assert (reply.applied, reply.seen, reply.rows_new) == twin.push(request)
    for number in NUMBERS:
        mine, theirs = all_rows(store, number), twin.rows(number)
        assert mine.keys() == theirs.keys()
        for id_, row in mine.items():
            np.testing.assert_allclose(row, theirs[id_], rtol=2e-4, atol=2e-5)
    assert [twin.slots[s].position for s in range(view.slots_total)] == store.watermark(every_slot(store)).tolist()
    assert store.statistics().rows == sum(len(twin.rows(n)) for n in NUMBERS)


def test_initial_rows_are_bit_equal_to_the_formula() -> None:
    from tests.ps.naive_store import initial_row

    store = store_of(view_of(SPECS))
    ids = [0, 1, -1, INT64.min, INT64.max, 12345]
    rows = store.pull(pull_share([4], [ids])).rows.reshape(-1, 2)
    expected = np.array([initial_row(SPECS[3], i) for i in ids])
    assert rows.tobytes() == expected.tobytes()
    assert (rows >= -1.0).all()
    assert (rows < 0.5).all()


def test_a_push_meets_the_row_that_a_pull_promised() -> None:
    store = store_of(view_of(SPECS))
    promised = store.pull(pull_share([1], [[9]])).rows
    store.push(push_share(1, [1], [[9]], np.zeros(3)))
    reply = store.pull(pull_share([1], [[9]], absent="zeros"))
    assert reply.absent == 0
    assert (reply.rows == promised).all()


def test_sequences_in_any_order_apply_once_each() -> None:
    store = store_of(view_of([TableSpec("t", 1, SGD(lr=1.0), Initializer(0, 0))]))
    order = [5, 3, 64, 1, 3, 5, 64, 2, 66, 4, 66]
    for sequence in order:
        store.push(push_share(sequence, [1], [[8]], -(2.0 ** (sequence % 20)) * np.ones(1)))
    expected = sum(2.0 ** (s % 20) for s in {5, 3, 64, 1, 2, 66, 4})
    assert store.pull(pull_share([1], [[8]])).rows[0] == expected
    with pytest.raises(RequestError, match="64 or more behind"):
        store.push(push_share(2, [1], [[8]], np.ones(1)))
    assert store.pull(pull_share([1], [[8]])).rows[0] == expected


def test_a_share_is_decided_slot_by_slot() -> None:
    store = store_of(view_of([TableSpec("t", 1, SGD(lr=1.0), Initializer(0, 0))]))
    ids = list(range(40))
    first = store.push(push_share(1, [1], [ids[:1]], -np.ones(1)))
    assert first.applied == 1
    reply = store.push(push_share(1, [1], [ids], -np.ones(40)))
    assert reply.seen == 1
    assert reply.applied == len(set(np.flatnonzero(store.watermark(every_slot(store)) & 0xFF))) - 1
    assert store.pull(pull_share([1], [[0]])).rows[0] == 1.0


def test_duplicates_are_summed_before_the_optimizer() -> None:
    store = store_of(view_of([TableSpec("t", 1, Adagrad(lr=1.0), Initializer(0, 0))]))
    store.push(push_share(1, [1, 1], [[4, 4], [4]], np.array([1.0, 2.0, 3.0])))
    np.testing.assert_allclose(store.pull(pull_share([1], [[4]])).rows, [-1.0], rtol=1e-6)  # -6 / sqrt(36)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_push_that_is_not_finite_is_refused_whole_and_names_the_rows(bad: float) -> None:
    store = store_of(view_of(SPECS))
    rows = np.zeros((5, 3), np.float32)
    rows[3, 1] = bad
    with pytest.raises(RequestError, match=r"rows 1 of feature 1 \(table number 2\)"):
        store.push(push_share(1, [1, 2], [[1, 2], [3, 4, 5]], rows))
    assert store.statistics().rows == 0
    assert store.push(push_share(1, [1], [[1]], np.zeros(3))).applied == 1


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (pull_share([1, 1], [[1], []], bags=[1, -1]), "feature 1 has -1 bags"),
        (pull_share([1, 1], [[1], []], bags=[2**31 - 1, 2**31 - 1]), "its features count 4294967294"),
        (pull_share([1], [[1, 2]], bags=[3], offsets=[0, 1, 2]), "offsets has 3 entries; 3 bags need 4"),
        (pull_share([1], [[1, 2]], bags=[1], offsets=[0, 3]), "ends with 3"),
        (pull_share([1], [[1]], bags=[1], offsets=[0, 1], weights=[1.0, 2.0]), "one for each id"),
        (replace(pull_share([1], [[1]]), features=np.array([[1, 1, 0, 3]], np.int32)), "absent code 3"),
        (replace(pull_share([1], [[1]]), features=np.zeros(4, np.int32)), "a share has features int32"),
        (pull_share([99], [[1]]), "table number 99 is unknown"),
        (pull_share([1], [[1, 2]], bags=[1], offsets=[0, 1]), "ends with 1"),
        (pull_share([1], [[1, 2]], bags=[2], offsets=[0, 2, 1]), "falls from 2 to 1"),
        (pull_share([1], [[1, 2]], bags=[1], offsets=[1, 2]), "begins with 1"),
        (pull_share([1], [[1, 2]], bags=[3]), "its features count 3"),
        (pull_share([1], [[1]], modes=[2]), "feature 0 has mode 2"),
        (pull_share([1], [[1]], bags=[1], offsets=[0, 1], modes=[1], weights=[1.0]), "a maximum takes none"),
        (pull_share([1], [[1]], bags=[1], offsets=[0, 1], weights=[np.nan]), "weights must be finite"),
    ],
)
def test_malformed_pulls_are_refused_in_one_sentence(share: PullShare, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        store_of(view_of(SPECS)).pull(share)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (push_share(0, [1], [[1]], np.zeros(3)), "a sequence begins with 1"),
        (push_share(1, [1], [[1]], np.zeros(4)), "need 3"),
        (push_share(1, [1], [[1]], np.zeros(3), kind="delete"), "need 0"),
        (push_share(1, [1], [[1]], np.zeros(3), kind="other"), "kind is 'other'"),
        (push_share(1, [1], [[1]], np.zeros(3), lr_scale=float("nan")), "lr_scale"),
        (push_share(1, [1, 42], [[1], [2]], np.zeros(6)), "table number 42 is unknown"),
    ],
)
def test_malformed_pushes_change_nothing(share: PushShare, words: str) -> None:
    store = store_of(view_of(SPECS))
    before = store.watermark(every_slot(store))
    with pytest.raises(RequestError, match=words):
        store.push(share)
    assert (store.watermark(every_slot(store)) == before).all()
    assert store.statistics().rows == 0


def test_slots_of_others_are_refused_with_the_epoch() -> None:
    view = view_of(SPECS, servers=(ME, 78))
    store = store_of(view)
    with pytest.raises(WrongView, match="not an owner") as pulled:
        store.pull(pull_share([1], [list(range(100))]))
    with pytest.raises(WrongView, match="not primary") as pushed:
        store.push(push_share(1, [1], [list(range(100))], np.zeros(300)))
    assert pulled.value.epoch == pushed.value.epoch == view.epoch
    assert store.statistics().rows == 0
    stranger = store_of(view, incarnation=99)
    with pytest.raises(WrongView):
        stranger.pull(pull_share([1], [[1]]))


def test_a_slot_that_moves_away_is_freed_and_one_that_comes_opens_its_term() -> None:
    view = view_of([TableSpec("t", 2, SGD())])
    store = store_of(view)
    store.push(push_share(1, [1], [list(range(200))], np.ones(400)))
    joined = plan(view, Join((Server("new", 78, "h9"),)))
    store.install(joined)
    mine = np.flatnonzero(joined.owners()[:, 0] == 0)
    rows = store.statistics().rows
    assert 0 < rows < 200
    assert (np.flatnonzero(store.watermark(every_slot(store))) == mine).all()
    left = plan(joined, Leave(("new",)))
    store.install(left)
    back = np.setdiff1d(every_slot(store), mine)
    assert (store.watermark(back) == left.terms()[back] << 40).all()
    assert store.statistics().rows == rows
    store.install(view)  # older: ignored
    assert store.epoch == left.epoch


def test_tables_are_dropped_truncated_and_altered_by_views() -> None:
    view = view_of(SPECS)
    store = store_of(view)
    for number, spec in zip(NUMBERS, SPECS, strict=True):
        store.push(push_share(number, [number], [list(range(50))], np.ones(50 * spec.dim)))
    view = plan(view, DropTable("a"))
    store.install(view)
    with pytest.raises(RequestError, match="table number 1 is unknown"):
        store.pull(pull_share([1], [[1]]))
    view = plan(view, TruncateTable("c"))
    store.install(view)
    table = view.table("c")
    assert table is not None
    assert store.pull(pull_share([table.number], [list(range(50))])).absent == 50
    altered = TableSpec("b", 3, SGD(lr=0.0), seed=2)
    view = plan(view, AlterTable("b", altered.to_plain()))
    store.install(view)
    before = all_rows(store, 2)
    store.push(push_share(100, [2], [[1]], np.ones(3)))
    assert (all_rows(store, 2)[1] == before[1]).all()
    counts = store.statistics().rows_by_table
    assert counts == {"b": 50, "c": 0, "d": 50, "e": 50, "f": 50, "g": 50}
    assert store.statistics().rows == 250


def test_memory_max_refuses_new_rows_and_lets_updates_and_pulls_go_on() -> None:
    limits = StoreLimits(memory_max=100_000, slots_max=2**16)
    store = store_of(view_of([TableSpec("t", 64, Adagrad())]), limits=limits)
    held = 0

    def push_ten() -> None:
        store.push(push_share(held + 1, [1], [list(range(held, held + 10))], np.ones(640)))

    with contextlib.suppress(MemoryFull):
        while held < 1000:
            push_ten()
            held += 10
    with pytest.raises(MemoryFull, match=r"of 100000 \(memory_max\)"):
        push_ten()
    assert store.statistics().rows == held
    assert 50_000 < store.statistics().bytes_used <= 100_000
    digest = store.digest(every_slot(store))
    reply = store.push(push_share(2000, [1], [[0, 1]], np.ones(128)))
    assert reply.rows_new == 0
    assert (store.digest(every_slot(store)) != digest).any()
    store.push(push_share(2001, [1], [[0, 1, 2, 3, 4, 5]], np.empty(0), kind="delete"))
    assert store.push(push_share(2002, [1], [[5000]], np.ones(64))).rows_new == 1


def test_one_client_too_many_is_told_to_come_later() -> None:
    limits = StoreLimits(memory_max=2**26, slots_max=2**10, clients_max=2)
    store = store_of(view_of([TableSpec("t", 1, SGD())]), limits=limits)
    for client in (1, 2, 1):
        store.push(push_share(client, [1], [[1]], np.ones(1), client=client))
    with pytest.raises(Overloaded, match="remembers 2"):
        store.push(push_share(1, [1], [[1]], np.ones(1), client=2**64 - 1))


def test_read_only_inputs_are_taken_as_they_come() -> None:
    store = store_of(view_of(SPECS))
    share = push_share(1, [1], [[1, 2]], np.ones(6))
    for array in (share.features, share.ids, share.rows):
        array.flags.writeable = False
    assert store.push(share).rows_new == 2


def test_statistics_count() -> None:
    store = store_of(view_of(SPECS), limits=LIMITS)
    store.push(push_share(1, [1], [[1, 2]], np.ones(6)))
    store.push(push_share(1, [1], [[1, 2]], np.ones(6)))
    store.pull(pull_share([1], [[1, 3]]))
    s = store.statistics()
    assert (s.pushes, s.pushes_seen, s.rows_new, s.pulls, s.ids_pulled, s.ids_absent) == (1, 1, 2, 1, 2, 1)
    assert s.slots_primary == s.slots_owned == 17
    assert s.rows_by_table["a"] == 2
    assert s.clients == 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.optimizer.kind)
def test_a_push_leaves_the_gradients_of_the_caller_alone(spec: TableSpec) -> None:
    store = store_of(view_of([spec]))
    rows = np.full((2, spec.dim), 3.0, np.float32)
    store.push(push_share(1, [1], [[1, 2]], rows))
    assert (rows == 3.0).all()
