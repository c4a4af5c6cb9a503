"""Blocks of a checkpoint, at the server that is to own their slots."""

import numpy as np
import pytest

from hashring.planner import Enlist, Fail, Recover, Renew, plan
from hashring.view import Server, View
from ps.errors import RequestError
from ps.replication import Replication
from ps.rowblock import RowBlock, Watermark
from ps.slots import PRIMARY
from ps.spec import SGD, Initializer, TableSpec
from ps.store import Store
from ps.store.fork import tellable
from tests.ps.store_helpers import LIMITS, every_slot, push_share, store_of, view_of

SPEC = TableSpec("t", 2, SGD(lr=1.0), Initializer(0.0, 0.0))
IDS = list(range(40))
OLD, NEW = 1, 2


class Scene:
    """A server that saved all its slots and died, and another that is to own them."""

    def __init__(self) -> None:
        view = view_of([SPEC], slot_bits=2, servers=(OLD,))
        self.source = store_of(view, OLD)
        self.push(self.source)
        self.slots = every_slot(self.source)
        self.saved = list(self.source.export(self.slots))
        self.lost = plan(plan(view, Enlist((Server("new", NEW, "h"),))), Fail("s0"))
        self.begun = self.renewed(self.lost)
        self.machine = Replication(Store(NEW, LIMITS))
        self.machine.install(self.lost)

    def renewed(self, view: View) -> View:
        return plan(view, Renew(self.slots))

    def push(self, store: Store) -> int:
        return store.push(push_share(1, [1], [IDS], np.ones(2 * len(IDS)))).applied

    def bring(self, term: int, foreign: bool = False, blocks: list[RowBlock] | None = None) -> bool:
        taken = []
        for block in blocks or self.saved:
            fields, arrays = block.to_arrays()
            told = {"block": fields, "term": term, "foreign": foreign}
            taken.append(self.machine.restore(told, arrays)[1]["taken"])
        every = np.concatenate(taken)
        assert every.dtype == np.uint8
        assert every.all() or not every.any()
        return bool(every.all())


def test_restored_slots_hold_the_rows_and_what_was_seen_and_stand_in_the_term_of_their_end() -> None:
    scene = Scene()
    scene.machine.install(scene.begun)
    assert scene.bring(scene.begun.epoch)
    ended = plan(scene.begun, Recover())
    scene.machine.install(ended)
    store, slots = scene.machine.store, scene.slots
    assert (store.digest(slots) == scene.source.digest(slots)).all()
    assert (store.watermark(slots) >> 40 == ended.epoch).all()
    assert scene.push(store) == 0  # seen before it was saved
    mark = scene.source.watermark(slots)
    assert store.held.slots.on_lineage(slots, mark).all()
    assert sum(b.rows for b in store.export(slots, Watermark(5, slots, mark))) == 0


def test_nothing_is_told_from_a_position_that_only_looks_like_one_of_what_was_restored() -> None:
    """Neither an increment since an own checkpoint, nor what an own copy of before lacks: they begin anew."""
    scene = Scene()
    scene.machine.install(scene.begun)
    assert scene.bring(scene.begun.epoch, foreign=True)
    scene.machine.install(plan(scene.begun, Recover()))
    store, slots = scene.machine.store, scene.slots
    assert (store.digest(slots) == scene.source.digest(slots)).all()
    mark = scene.source.watermark(slots)
    assert sum(b.rows for b in store.export(slots, Watermark(5, slots, mark))) == len(IDS)
    assert not tellable(store.held, slots, mark).any()
    now = store.watermark(slots)
    assert tellable(store.held, slots, now).all()
    store.push(push_share(2, [1], [IDS[:3]], np.ones(6)))
    assert sum(b.rows for b in store.export(slots, Watermark(5, slots, now))) == 3


def test_slots_that_are_given_up_in_the_middle_of_a_restore_begin_empty() -> None:
    """Nobody sends the rest of them: they would be filled, and answer nobody, without end."""
    scene = Scene()
    scene.machine.install(scene.begun)
    blocks = list(scene.source.export(scene.slots, None, 4))
    assert not blocks[0].final.all()
    assert scene.bring(scene.begun.epoch, foreign=True, blocks=blocks[:1])
    ended = plan(scene.begun, Recover())
    scene.machine.install(ended)
    store, slots = scene.machine.store, scene.slots
    store.held.require(slots, PRIMARY)
    assert store.statistics().rows_by_table == {"t": 0}
    assert (store.watermark(slots) >> 40 == ended.epoch).all()
    assert scene.push(store) == len(slots)
    assert sum(b.rows for b in store.export(slots, None, 4)) == len(IDS)


def test_what_comes_late_meets_another_term_or_an_owner() -> None:
    scene = Scene()
    assert not scene.bring(scene.lost.epoch)
    assert not scene.bring(scene.begun.epoch)  # before this server knows of it
    scene.machine.install(scene.begun)
    assert scene.bring(scene.begun.epoch)
    again = scene.renewed(scene.begun)  # another restore
    scene.machine.install(again)
    assert not scene.bring(scene.begun.epoch)
    assert scene.bring(again.epoch)
    scene.machine.install(plan(again, Recover()))
    store = scene.machine.store
    store.push(push_share(2, [1], [IDS], np.ones(2 * len(IDS))))
    before = store.digest(scene.slots)
    assert not scene.bring(again.epoch)
    assert (store.digest(scene.slots) == before).all()


def test_what_is_no_restore_is_refused_in_one_sentence() -> None:
    scene = Scene()
    fields, arrays = scene.saved[0].to_arrays()
    for told, message in (({"block": fields}, "absorb names term None"), ({"term": 3}, "must be a map")):
        with pytest.raises(RequestError, match=message):
            scene.machine.restore(told, arrays)
