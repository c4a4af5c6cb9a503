"""The fork exchange: two copies part, and one block makes the second equal to the first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hashring.planner import Reassign, plan
from hashring.view import View
from ps.kernels import replicate
from ps.rowblock import RowBlock
from ps.share import PushShare
from ps.spec import SGD, Initializer, TableSpec
from ps.store import Store
from tests.ps.store_helpers import LIMITS, push_share, store_of, view_of

SPEC = TableSpec("t", 2, SGD(lr=1.0), Initializer(0.0, 0.0), placement="whole", replicas=2)
WHOLE = np.array([0])


def pair() -> tuple[View, Store, Store]:
    """Two owners of one slot, both in the first term."""
    view = view_of([SPEC], servers=(1, 2))
    owners = np.tile(np.array([[0, 1]], np.int16), (view.slots_total, 1))
    view = plan(view, Reassign(np.arange(view.slots_total), owners))
    return view, store_of(view, 1), store_of(view, 2)


def change(sequence: int, id_: int, kind: str = "push", client: int = 1) -> PushShare:
    rows = np.empty(0) if kind == "delete" else np.full(2, -1.0)
    return push_share(sequence, [1], [[id_]], rows, kind, client)


def turn(view: View, *stores: Store) -> View:
    """The other server becomes primary of every slot."""
    view = plan(view, Reassign(np.arange(view.slots_total), view.owners()[:, ::-1].copy()))
    for store in stores:
        store.install(view)
    return view


def content(store: Store) -> tuple[dict[tuple[int, int], tuple[bytes, int]], list[tuple[int, int, int]]]:
    arena = store.held.registry.arenas[0]
    found = arena.collect(WHOLE, *store.held.slots.bounds(WHOLE))
    rows = {
        (int(t), i): (arena.values[r].tobytes(), int(arena.meta[r, 0]))
        for t, i, r in zip(arena.numbers[found.codes], found.ids.tolist(), found.rows.tolist(), strict=True)
    }
    entries = store.held.clients.entries(WHOLE)
    return rows, sorted(zip(entries.clients.tolist(), entries.last.tolist(), entries.mask.tolist(), strict=True))


def mend(primary: Store, other: Store) -> RowBlock:
    held = primary.held.slots
    told = other.forks(WHOLE, held.positions[WHOLE], *held.lineage(WHOLE))
    assert told.forks[0] >= 0
    block = primary.repair(WHOLE, told.positions, told.forks, told.undone)
    assert other.absorb(block, replace_clients=True).all()
    return block


STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["push", "push", "assign", "delete"])), max_size=6)


@given(STEPS, STEPS, STEPS, st.booleans())
def test_after_the_exchange_the_copies_are_equal(shared: list, undone: list, kept: list, back: bool) -> None:
    view, a, b = pair()
    held_before = b.held.slots.positions[WHOLE].copy()
    b.absorb(a.opening(WHOLE, np.zeros(1, np.int64)))
    sequence = 0
    for id_, kind in shared:  # both have these
        sequence += 1
        a.push(change(sequence, id_, kind))
    mend(a, b)
    assert content(a) == content(b)
    for id_, kind in undone:  # only the old primary has these
        sequence += 1
        a.push(change(sequence, id_, kind))
    turn(view, a, b)
    for id_, kind in kept:  # what the new primary does meanwhile
        sequence += 1
        b.push(change(sequence, id_, kind, client=2))
    mend(b, a)
    assert content(a) == content(b)
    assert a.watermark(WHOLE) == b.watermark(WHOLE)
    assert (a.digest(WHOLE) == b.digest(WHOLE)).all()
    if back:  # and once more the other way round: what was undone stays undone
        sequence += 1
        b.push(change(sequence, 3, "push", client=2))
        mend(b, a)
        assert content(a) == content(b)
    assert held_before[0] == 0


def test_a_copy_that_only_missed_changes_is_sent_just_those() -> None:
    _, a, b = pair()
    b.absorb(a.opening(WHOLE, np.zeros(1, np.int64)))
    for i in range(5):
        a.push(change(i + 1, i))
    mend(a, b)
    a.push(change(6, 3))
    assert mend(a, b).sections[0].ids.tolist() == [3]


def test_no_fork_where_deletions_since_are_forgotten() -> None:
    view, a, b = pair()
    b.absorb(a.opening(WHOLE, np.zeros(1, np.int64)))
    a.push(change(1, 1))
    mend(a, b)
    for i in range(LIMITS.deletions_max + 2):
        a.push(change(2 * i + 2, 5))
        a.push(change(2 * i + 3, 5, "delete"))
    turn(view, a, b)
    told = a.forks(WHOLE, b.held.slots.positions[WHOLE], *b.held.slots.lineage(WHOLE))
    assert told.forks.tolist() == [-1]


LINE = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=6, unique_by=lambda t: t[0])


@given(LINE, LINE)
def test_the_fork_is_the_newest_position_on_both_lineages(one: list, other: list) -> None:
    def arrays(line: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions = sorted((t << 40 | c for t, c in line), reverse=True)
        return np.array(positions[:1]), np.array(positions[1:], np.int64), np.array([0, len(positions) - 1])

    out = np.empty(1, np.int64)
    replicate.forks(*arrays(one), *arrays(other), out)
    both = [t << 40 | min(dict(one)[t], dict(other)[t]) for t in dict(one).keys() & dict(other).keys()]
    assert out[0] == max(both, default=-1)
