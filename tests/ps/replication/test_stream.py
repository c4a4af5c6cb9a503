"""Cutting what a push changed into blocks, and taking them: backups are equal to their primary after every push."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashring.planner import Reassign, plan
from ps.errors import RequestError
from ps.replication.members import STREAM, Members
from ps.rowblock import RowBlock
from ps.spec import SGD, Adagrad, TableSpec
from ps.store import Store
from ps.wire import LIMITS, PREFIX, Message, assemble, decode_header, encode
from tests.ps.store_helpers import every_slot, push_share, store_of, view_of

SPECS = (
    TableSpec("a", 3, SGD(lr=0.5), replicas=3),
    TableSpec("b", 2, Adagrad(lr=0.5), replicas=3),
    TableSpec("w", 3, SGD(lr=0.5), placement="whole", replicas=3),
)


def trio() -> tuple[Store, list[Store], Members]:
    """A primary of every slot, two backups, and the members that stream to both."""
    view = view_of(SPECS, slot_bits=2, servers=(1, 2, 3))
    owners = np.tile(np.array([[0, 1, 2]], np.int16), (view.slots_total, 1))
    view = plan(view, Reassign(np.arange(view.slots_total), owners))
    primary, backups = store_of(view, 1), [store_of(view, 2), store_of(view, 3)]
    members = Members(view.slots_total, 2)
    members.peers[:, :2] = [0, 1]
    members.modes[:, :2] = STREAM
    slots = every_slot(primary)
    for backup in backups:
        assert backup.absorb(primary.opening(slots, np.zeros(len(slots), np.int64))).all()
    return primary, backups, members


def travelled(block: RowBlock) -> RowBlock:
    """The block, as it comes out of a frame."""
    fields, arrays = block.to_arrays()
    data = b"".join(bytes(part) for part in encode(Message("replicate", 1, fields, arrays)))
    _, _, _, header, size = PREFIX.unpack_from(data)
    body = bytearray(data[PREFIX.size + header :])
    message = assemble(*decode_header(data[PREFIX.size : PREFIX.size + header], size, LIMITS), body)
    return RowBlock.from_arrays(message.fields, message.arrays)


def equal(one: Store, other: Store) -> None:
    slots = every_slot(one)
    assert (one.watermark(slots) == other.watermark(slots)).all()
    assert (one.digest(slots) == other.digest(slots)).all()
    assert remembered(one) == remembered(other)


def remembered(store: Store) -> set[tuple[int, int, int, int]]:
    """(slot, client, last, mask) of every window. Their order within a slot says nothing: it is of who came first."""
    slots = every_slot(store)
    entries = store.held.clients.entries(slots)
    columns = (np.repeat(slots, np.diff(entries.offsets)), entries.clients, entries.last, entries.mask)
    return set(zip(*(column.tolist() for column in columns), strict=True))


IDS = st.lists(st.integers(0, 20), max_size=6)
PUSH = st.tuples(IDS, IDS, IDS, st.sampled_from(["push", "assign", "delete"]), st.integers(1, 2))


@settings(max_examples=60)
@given(st.lists(PUSH, min_size=1, max_size=6))
def test_backups_follow_push_by_push(pushes: list) -> None:
    primary, backups, members = trio()
    for n, (a, b, w, kind, client) in enumerate(pushes):
        floats = 0 if kind == "delete" else 3 * len(a) + 2 * len(b) + 3 * len(w)
        share = push_share(n + 1, [1, 2, 3], [a, b, w], np.arange(floats) % 7 - 3.0, kind, client)
        applied = primary.apply(share)
        for peer, backup in enumerate(backups):
            block = primary.cut([applied], members, peer)
            if block is not None:
                assert backup.absorb(travelled(block)).all()
            equal(primary, backup)


@settings(max_examples=100)
@given(st.lists(st.tuples(PUSH, st.booleans()), min_size=2, max_size=8), st.integers(0, 7))
def test_pushes_that_leave_together_are_one_change(pushes: list, some: int) -> None:
    """Blocks of any number of pushes, to two peers at different times; every third slot is streamed to one alone."""
    primary, backups, members = trio()
    members.modes[some % 4 :: 3, 1] = 0
    waiting: list[list] = [[], []]

    def send(peer: int) -> None:
        block = primary.cut(waiting[peer], members, peer) if waiting[peer] else None
        waiting[peer] = []
        if block is not None:
            assert len(np.unique(block.slots)) == len(block.slots)
            told = [(t, i) for s in block.sections for t, i in zip(s.tables.tolist(), s.ids.tolist(), strict=True)]
            assert len(set(told)) == len(told)
            assert backups[peer].absorb(travelled(block)).all()

    for n, ((a, b, w, kind, client), together) in enumerate(pushes):
        if kind == "delete":
            send(0), send(1)
        floats = 0 if kind == "delete" else 3 * len(a) + 2 * len(b) + 3 * len(w)
        share = push_share(n + 1, [1, 2, 3], [a, b, w], np.arange(floats) % 7 - 3.0, kind, client)
        applied = primary.apply(share)
        for peer in (0, 1):
            waiting[peer].append(applied)
            if kind == "delete" or not together or n % 3 == peer:
                send(peer)
    send(0), send(1)
    equal(primary, backups[0])
    both = every_slot(primary)[members.modes[every_slot(primary), 1] > 0]
    assert (primary.watermark(both) == backups[1].watermark(both)).all()
    assert (primary.digest(both) == backups[1].digest(both)).all()


def test_only_slots_that_are_streamed_to_a_peer_are_in_its_block() -> None:
    primary, _, members = trio()
    applied = primary.apply(push_share(1, [1], [list(range(40))], np.ones((40, 3))))
    members.modes[1, 0] = 0
    block, whole = primary.cut([applied], members, 0), primary.cut([applied], members, 1)
    assert block is not None
    assert whole is not None
    assert sorted(whole.slots.tolist()) == [0, 1, 2, 3]
    assert sorted(block.slots.tolist()) == [0, 2, 3]
    assert block.rows < whole.rows
    members.modes[:] = 0
    assert primary.cut([applied], members, 0) is None


def test_a_block_is_taken_once_and_only_at_its_base() -> None:
    primary, (backup, other), members = trio()
    first = primary.cut([primary.apply(push_share(1, [1], [[4]], np.ones((1, 3))))], members, 0)
    second = primary.cut([primary.apply(push_share(2, [1], [[4]], np.ones((1, 3))))], members, 0)
    assert first is not None
    assert second is not None
    assert not other.absorb(second).any()
    assert backup.absorb(first).all()
    assert not backup.absorb(first).any()
    assert backup.absorb(second).all()
    equal(primary, backup)


def test_forgetting_a_client_is_a_change_that_backups_take() -> None:
    primary, (backup, _), members = trio()
    for client in (5, 6):
        block = primary.cut([primary.apply(push_share(1, [1], [[4, 9]], np.ones((2, 3)), client=client))], members, 0)
        assert block is not None
        backup.absorb(block)
    told = primary.forget([5]).block
    assert told is not None
    assert backup.absorb(travelled(told)).all()
    equal(primary, backup)
    assert 5 not in primary.held.clients.entries(every_slot(primary)).clients.tolist()
    assert primary.forget([5]).block is None


def test_part_of_a_block_is_a_block() -> None:
    primary, (backup, other), members = trio()
    share = push_share(1, [1, 2], [list(range(20)), [3]], np.ones(62))
    block = primary.cut([primary.apply(share)], members, 0)
    assert block is not None
    keep = np.arange(len(block.slots)) % 2 == 0
    assert backup.absorb(block.select(keep)).all()
    assert backup.absorb(block.select(~keep)).all()
    equal(primary, backup)
    assert not other.absorb(block, allowed=np.zeros(len(block.slots), bool)).any()


def test_a_row_outside_its_slot_is_refused() -> None:
    primary, (backup, _), members = trio()
    block = primary.cut([primary.apply(push_share(1, [1], [list(range(20))], np.ones((20, 3))))], members, 0)
    assert block is not None
    block.sections[0].ids[0] = 10**6
    with pytest.raises(RequestError, match="does not belong to slot"):
        backup.absorb(block)
