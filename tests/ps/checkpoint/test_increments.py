"""Chains of increments: equal to the full checkpoint, small, and never of another history."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hashring.planner import DropTable, Place, Reassign, Renew, TruncateTable
from hashring.tokens import tokens
from ps.checkpoint.files import chain, checkpoints, read_manifest
from ps.checkpoint.storage import CheckpointError, Storage
from ps.errors import SlotsLost
from ps.spec import SGD, Adagrad, Initializer, TableSpec
from ps.store import StoreLimits
from tests.ps.checkpoint.loopback import LoopCluster, _everyone, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")

ITEM = TableSpec("item", 2, SGD(lr=1.0), Initializer(0, 0), seed=3)
USER = TableSpec("user", 3, Adagrad(lr=0.5), seed=4)
WHOLE = TableSpec("whole", 2, SGD(lr=1.0), Initializer(0, 0), seed=5, placement="whole")
SPECS = {s.name: s for s in (ITEM, USER, WHOLE)}
_places = itertools.count()


def memory() -> Storage:
    return Storage(f"memory://chains/{next(_places)}")


def fill(cluster: LoopCluster, n: int = 400) -> None:
    for spec in SPECS.values():
        ids = list(range(-n // 2, n // 2))
        cluster.push(spec.name, ids, np.random.default_rng(spec.seed).normal(size=(n, spec.dim)))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_any_checkpoint_of_a_chain_brings_back_what_a_dictionary_remembers(data: st.DataObject) -> None:
    """Pushes, assignments, deletions, terms, truncations; the twin is a dictionary of rows."""
    storage, source = memory(), LoopCluster(data.draw(st.integers(1, 3)), cluster=7)
    source.create(*SPECS.values())
    twin: dict[str, dict[int, list[float]]] = {"item": {}, "whole": {}}
    kept: dict[str, Any] = {}
    for step in range(data.draw(st.integers(2, 12))):
        action = data.draw(
            st.sampled_from(["push", "push", "assign", "delete", "save", "save", "renew", "truncate", "place"])
        )
        name = data.draw(st.sampled_from(["item", "whole"]))
        if action == "save":
            saved = source.save(storage, f"c{step}", incremental=data.draw(st.booleans()))
            kept[saved.name] = ({t: dict(rows) for t, rows in twin.items()}, source.digests(), source.windows())
        elif action == "renew":
            slots = np.unique(data.draw(st.lists(st.integers(0, source.view.slots_total - 1), min_size=1, max_size=9)))
            source.change(Renew(slots.astype(np.int64)))
        elif action == "place":
            placement = data.draw(st.sampled_from(["sharded", "whole"]))
            source.change(Place({name: {**source.view.table(name).spec, "placement": placement}}, placement, 1))
        elif action == "truncate":
            source.change(TruncateTable(name))
            twin[name] = {}
        else:
            ids = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True))
            rows = np.array([[i + step, step] for i in ids], float)
            source.push(name, ids, rows, action)
            for i, row in zip(ids, rows.tolist(), strict=True):
                before = twin[name].pop(i, None)
                if action == "push":
                    twin[name][i] = np.subtract(before or [0.0, 0.0], row).tolist()
                elif action == "assign":
                    twin[name][i] = row
    for name, (rows, digests, windows) in kept.items():
        target = LoopCluster(data.draw(st.integers(1, 4)), cluster=8)
        done = target.restore(storage, name=name)
        assert done.chain == len(chain(storage, name))
        assert {t: target.rows(t) for t in rows} == rows
        if source.view.slots_total == target.view.slots_total and as_made(source):
            assert target.digests() == digests
            assert target.windows() == windows


def as_made(cluster: LoopCluster) -> bool:
    """Whether tables have the numbers and slots with which they were made: digests count those."""
    return [(t.number, t.group) for t in cluster.view.tables] == [(1, 1), (2, 1), (3, 2)]


def test_a_hundred_increments_are_the_full_one_bit_for_bit() -> None:
    storage, source = memory(), LoopCluster(3, cluster=1)
    source.create(*SPECS.values())
    fill(source)
    source.save(storage, "c000")
    rng = np.random.default_rng(0)
    for k in range(1, 101):
        for name, spec in SPECS.items():
            ids = rng.choice(np.arange(-250, 250), 7, replace=False).tolist()
            source.push(name, ids, rng.normal(size=(7, spec.dim)), client=k % 5 + 1)
        source.push("item", rng.choice(np.arange(-250, 250), 2, replace=False).tolist(), np.empty(0), "delete")
        assert source.save(storage, f"c{k:03}", incremental=True).parent == f"c{k - 1:03}"
    source.save(storage, "whole")
    one, other = LoopCluster(5, cluster=2), LoopCluster(2, cluster=3)
    assert one.restore(storage, name="c100").chain == 101
    assert other.restore(storage, name="whole").chain == 1
    assert one.digests() == other.digests() == source.digests()
    assert one.windows() == other.windows() == source.windows()
    assert one.rows("item") == source.rows("item")
    # Metadata too: versions are positions, and an increment to come must still find what changes.
    assert not any(m.full for m in checkpoints(storage)[1:101])


def test_an_increment_costs_some_ten_bytes_a_slot() -> None:
    """Nearly every slot is touched by one row each: what is not rows must stay small."""
    storage, source = memory(), LoopCluster(2, cluster=1)
    source.create(ITEM)
    source.push("item", list(range(20_000)), np.ones((20_000, 2)))
    source.save(storage, "full")
    source.push("item", list(range(0, 20_000, 100)), np.ones((200, 2)))
    saved = source.save(storage, "one", incremental=True)
    assert saved.rows == 200
    assert saved.slots > 55
    raw = saved.rows * (8 + 4 + 8 + 16)
    frames = 2 * 900  # headers, and what deflating anything costs
    assert saved.bytes - raw < saved.slots * 20 + frames


def test_an_increment_without_changes_holds_nothing() -> None:
    storage, source = memory(), LoopCluster(2, cluster=1)
    source.create(*SPECS.values())
    fill(source)
    source.save(storage, "full")
    saved = source.save(storage, "same", incremental=True)
    assert (saved.rows, saved.bytes, saved.slots, saved.parent) == (0, 0, 0, "full")
    target = LoopCluster(1, cluster=2)
    assert target.restore(storage).chain == 2
    assert target.digests() == source.digests()


def test_an_increment_follows_only_its_own_cluster() -> None:
    """The same name, the same slots, positions that look alike: but another history."""
    storage, source, other = memory(), LoopCluster(2, cluster=1), LoopCluster(2, cluster=2)
    for cluster in (source, other):
        cluster.create(*SPECS.values())
    fill(source)
    source.save(storage, "of-one")
    fill(other, 300)
    saved = other.save(storage, "of-two", incremental=True)
    assert saved.parent == ""
    again = other.save(storage, "of-two-again", incremental=True)
    assert again.parent == "of-two"
    assert source.save(storage, "of-one-again", incremental=True).parent == "of-one"


def test_an_increment_after_slots_came_back_from_another_clusters_chain_holds_all_of_them() -> None:
    """Made alike, two clusters count alike: a position of one's own checkpoint looks like one of what was restored."""
    theirs, mine = memory(), memory()
    other, own = LoopCluster(1, cluster=1), LoopCluster(1, cluster=2)
    for cluster in (other, own):
        cluster.create(ITEM)
    same = np.array(ids_of_a_slot(3))
    for _ in range(6):
        own.push("item", same[:1].tolist(), np.full((1, 2), -100.0))
    own.save(mine, "full")
    other.push("item", same[:2].tolist(), np.ones((2, 2)))
    other.save(theirs, "full")
    for k in (0, 0, 1, 1, 1, 1, 1, 1):  # the first row last changes before the sixth push, up to which `own` saved
        other.push("item", same[k : k + 1].tolist(), np.ones((1, 2)))
    other.save(theirs, "increment", incremental=True)
    own.kill("s0")
    own.restore(theirs)
    assert own.save(mine, "increment", incremental=True).parent == "full"
    third = LoopCluster(2, cluster=3)
    third.restore(mine)
    assert third.rows("item") == own.rows("item") == other.rows("item")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_checkpoint_of_two_clusters_that_restore_from_each_other_is_what_was_there(data: st.DataObject) -> None:
    """Made alike, with pushes to one slot, so that their positions meet; lost slots come back from either's chain."""
    clusters = [(LoopCluster(1, cluster=number), memory(), dict[str, Any]()) for number in (1, 2)]
    rng, rows_of_slot = np.random.default_rng(data.draw(st.integers(0, 2**32))), ids_of_a_slot(3)
    for cluster, _, _ in clusters:
        cluster.create(ITEM)
    for step in range(30):
        cluster, storage, kept = clusters[rng.integers(2)]
        action = rng.choice(["push"] * 6 + ["delete", "full", "save", "save", "save", "restore"])
        if action in ("push", "delete"):
            cluster.push("item", rng.choice(rows_of_slot, 1).tolist(), np.full((1, 2), float(step + 1)), action)
        elif action in ("full", "save"):
            saved = cluster.save(storage, f"c{step:02}", incremental=action == "save")
            kept[saved.name] = cluster.rows("item")
        else:
            _, place, there = clusters[rng.integers(2)]
            if there:
                cluster.kill("s0")
                cluster.restore(place, name=str(rng.choice(list(there))))
    for _, storage, kept in clusters:
        for checkpoint, rows in kept.items():
            target = LoopCluster(1, cluster=3)
            target.restore(storage, name=checkpoint)
            assert target.rows("item") == rows, checkpoint
    _everyone.clear()


def ids_of_a_slot(n: int) -> list[int]:
    """So many ids of the table `item` that lie in one slot of 64."""
    ids = np.arange(1, 1000)
    slots = tokens(ids, ITEM.seed) >> np.uint64(58)
    found: list[int] = ids[slots == slots[0]][:n].tolist()
    return found


def test_a_parent_that_was_exchanged_is_refused() -> None:
    storage, source = memory(), LoopCluster(2, cluster=1)
    source.create(ITEM)
    source.push("item", [1, 2, 3], np.ones((3, 2)))
    source.save(storage, "full")
    source.push("item", [1], np.ones((1, 2)))
    source.save(storage, "one", incremental=True)
    storage.remove("full")
    with pytest.raises(CheckpointError, match=r"one is an increment to 'full', which is missing"):
        LoopCluster(1, cluster=2).restore(storage)
    assert source.save(storage, "two", incremental=True).parent == ""  # its chain is broken: a new one begins
    source.save(storage, "full")
    with pytest.raises(CheckpointError, match="an increment to another 'full' than the one here"):
        LoopCluster(1, cluster=3).restore(storage, name="one")


def test_deletions_that_are_no_longer_remembered_bring_the_whole_slot() -> None:
    storage, source = memory(), LoopCluster(1, cluster=1, limits=StoreLimits(2**26, slots_max=2**12, deletions_max=20))
    source.create(ITEM)
    source.push("item", list(range(600)), np.ones((600, 2)))
    source.save(storage, "full")
    source.push("item", list(range(0, 100)), np.empty(0), "delete")
    saved = source.save(storage, "one", incremental=True)
    assert read_manifest(storage, "one").full > 20
    assert saved.rows > 200
    target = LoopCluster(3, cluster=2)
    target.restore(storage)
    assert target.digests() == source.digests()
    assert target.rows("item") == source.rows("item")


def test_a_table_that_was_dropped_does_not_come_back() -> None:
    storage, source = memory(), LoopCluster(2, cluster=1)
    source.create(*SPECS.values())
    fill(source)
    source.save(storage, "full")
    source.change(DropTable("item"))
    source.push("user", [1], np.ones((1, 3)))
    source.save(storage, "one", incremental=True)
    target = LoopCluster(3, cluster=2)
    target.restore(storage)
    assert [t.name for t in target.view.tables] == ["user", "whole"]
    assert target.rows("user") == source.rows("user")
    target = LoopCluster(3, cluster=3)
    target.restore(storage, name="full")
    assert len(target.rows("item")) == 400


def test_an_increment_of_a_cluster_whose_tables_were_all_dropped_brings_back_none() -> None:
    storage, source = memory(), LoopCluster(2, cluster=1)
    source.create(ITEM)
    source.push("item", [1, 2], np.ones((2, 2)))
    source.save(storage, "full")
    source.change(DropTable("item"))
    assert source.save(storage, "empty", incremental=True).parent == "full"
    target = LoopCluster(2, cluster=2)
    assert target.restore(storage).tables == 0
    assert target.view.tables == ()


def test_lost_slots_return_from_a_chain() -> None:
    storage, source = memory(), LoopCluster(3, cluster=1)
    source.create(*SPECS.values())
    fill(source)
    source.save(storage, "full")
    source.push("user", list(range(50)), np.ones((50, 3)))
    source.push("item", list(range(20)), np.empty(0), "delete")
    source.save(storage, "one", incremental=True)
    before = source.digests()
    source.kill("s1")
    with pytest.raises(SlotsLost):
        source.save(storage, "two", incremental=True)
    assert not storage.has("two")
    source.restore(storage)
    assert source.digests() == before
    source.push("item", [1, 2, 3], np.ones((3, 2)))
    saved = source.save(storage, "three", incremental=True)  # the old positions are on the restored lineage
    assert saved.parent == "one"
    target = LoopCluster(2, cluster=2)
    target.restore(storage)
    assert target.digests() == source.digests()


def test_a_slot_in_parts_that_changes_owner_is_saved_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary that goes away in the middle of a big slot: its parts are of no use, the next one sends all."""
    monkeypatch.setattr("ps.exports.EXPORT_ROWS", 16)
    monkeypatch.setattr("ps.checkpoint.save.RETRY_S", 0.0)
    storage, source = memory(), LoopCluster(1, cluster=1)
    source.create(*SPECS.values())
    fill(source)
    source.save(storage, "full")
    for incremental in (False, True):
        source.push("whole", list(range(-200, 200, 2)), np.ones((200, 2)))
        service = next(iter(_everyone.values()))
        handle, parts = service.handle, itertools.count()

        def interrupt(request: Any, waited: float, handle: Any = handle, parts: Any = parts) -> Any:
            if request.op == "export" and request.fields.get("part") == 2 and next(parts) == 0:
                source.change(Renew(np.arange(source.view.slots_total)))
            return handle(request, waited)

        monkeypatch.setattr(service, "handle", interrupt)
        source.save(storage, f"one-{incremental}", incremental=incremental)
        assert next(parts) > 0
        target = LoopCluster(2, cluster=2)
        target.restore(storage, name=f"one-{incremental}")
        assert target.digests() == source.digests()


def test_a_save_that_a_table_moves_through_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows leave slots that are to be saved, for some that are not: the checkpoint would lack them."""
    storage, source = memory(), LoopCluster(1, cluster=1)
    source.create(*SPECS.values())
    fill(source)
    service = next(iter(_everyone.values()))
    handle, exports = service.handle, itertools.count()

    def interrupt(request: Any, waited: float) -> Any:
        if request.op == "export" and next(exports) == 0:
            source.change(Place({"item": replace(ITEM, placement="whole").to_plain()}, "whole", 1))
        return handle(request, waited)

    monkeypatch.setattr(service, "handle", interrupt)
    with pytest.raises(CheckpointError, match="table 'item' got other slots during the save: nothing was kept"):
        source.save(storage, "through")
    assert next(exports) > 0
    assert not checkpoints(storage)
    source.save(storage, "after")
    target = LoopCluster(2, cluster=2)
    target.restore(storage, name="after")
    assert sorted(target.digests()) == sorted(source.digests())


def test_a_server_that_has_not_heard_where_a_table_went_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would send the table's rows in the old slots, where no restore could take them."""
    monkeypatch.setattr("ps.checkpoint.save.RETRY_S", 0.0)
    storage, source = memory(), LoopCluster(2, cluster=1)
    source.create(*SPECS.values())
    fill(source)
    late = _everyone[source.view.servers[1].incarnation]
    install, handle, exports = late.install, late.handle, itertools.count()
    monkeypatch.setattr(late, "install", lambda view: 0)
    first = source.view.slots_total
    source.change(Place({"item": replace(ITEM, placement="whole").to_plain()}, "whole", 1))
    new = np.arange(first, source.view.slots_total)  # of these the other server answers for all
    source.change(Reassign(new, np.zeros((len(new), 1), np.int16)))

    def hears(request: Any, waited: float) -> Any:
        if request.op == "export" and "slots" in request.arrays and next(exports) == 1:
            install(source.view)
        return handle(request, waited)

    monkeypatch.setattr(late, "handle", hears)
    source.save(storage, "one")
    assert next(exports) > 1
    target = LoopCluster(1, cluster=2)
    target.restore(storage, name="one")
    assert sorted(target.digests()) == sorted(source.digests())
