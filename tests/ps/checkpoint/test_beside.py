"""Some tables of a checkpoint into a cluster that runs: what is there goes on, and the last view puts them in place."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hashring.planner import CreateTable, DropTable, Fail, plan
from hashring.view import View
from ps.checkpoint.files import read_manifest
from ps.checkpoint.reach import Absorber
from ps.checkpoint.restore import Translation, _Work
from ps.checkpoint.storage import CheckpointError, Storage
from ps.controller.keeper import lost_for_good
from ps.controller.restore import conclude, prepare
from ps.errors import EmbringError, NotApplied, PerhapsApplied, RequestError, SlotsLost, WrongView
from ps.spec import NAME_MAX, SGD, Adagrad, Initializer, TableSpec
from ps.store import StoreLimits
from tests.ps.checkpoint.loopback import LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")

ITEM = TableSpec("item", 2, Adagrad(lr=0.5), seed=3)
USER = TableSpec("user", 2, SGD(lr=1.0), Initializer(0, 0), seed=4)
WHOLE = TableSpec("whole", 2, SGD(lr=1.0), Initializer(0, 0), seed=5, placement="whole")
IDS = list(range(300))


def source() -> LoopCluster:
    cluster = LoopCluster(3, cluster=1)
    cluster.create(ITEM, USER, WHOLE)
    for name in ("item", "user", "whole"):
        cluster.push(name, IDS, np.ones((300, 2)), client=7)
    return cluster


def test_tables_return_into_the_very_cluster_and_the_others_go_on() -> None:
    storage, cluster = Storage("memory://beside/one"), source()
    cluster.save(storage, "full")
    cluster.push("item", IDS[:100], np.full((100, 2), 3.0))
    cluster.save(storage, "one", incremental=True)
    saved = {name: cluster.rows(name) for name in ("item", "user", "whole")}
    for name in saved:
        cluster.push(name, IDS, np.full((300, 2), 5.0))
    later = cluster.rows("user")
    with pytest.raises(RequestError, match="table 'item' exists: say --replace"):
        cluster.restore(storage, tables=["item"])
    done = cluster.restore(storage, tables=["item", "whole"], replace_tables=True)
    assert (done.tables, done.chain) == (2, 2)
    assert sorted(t.name for t in cluster.view.tables) == ["item", "user", "whole"]
    assert cluster.rows("item") == saved["item"]
    assert cluster.rows("whole") == saved["whole"]
    assert cluster.rows("user") == later
    assert not cluster.view.lost().any()
    # State came along: the same push has the same effect as it had before.
    cluster.push("item", IDS, np.full((300, 2), 5.0))
    again = LoopCluster(2, cluster=2)
    again.restore(storage, tables=["item"])
    again.push("item", IDS, np.full((300, 2), 5.0))
    assert again.rows("item") == cluster.rows("item")
    cluster.save(storage, "two", incremental=True)
    whole = LoopCluster(4, cluster=3)
    whole.restore(storage)
    assert whole.rows("item") == cluster.rows("item")
    assert whole.rows("user") == later


def test_the_old_table_serves_until_the_last_view(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cluster = Storage("memory://beside/two"), source()
    cluster.save(storage, "full")
    cluster.push("item", IDS, np.full((300, 2), 5.0))
    later = cluster.rows("item")
    asked = []

    def ask(verb: str, **fields: object) -> dict[str, object]:
        if verb == "restored":
            asked.append(cluster.rows("item") == later)
            cluster.push("user", IDS, np.full((300, 2), 5.0))
        return LoopCluster.ask(cluster, verb, **fields)

    monkeypatch.setattr(cluster, "ask", ask)
    cluster.restore(storage, tables=["item"], replace_tables=True)
    assert asked == [True]
    assert cluster.rows("item") != later


# -- restores that fail


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("block 3 is damaged"),
        NotApplied("the connection to s1 was closed"),
        PerhapsApplied("the connection to s1 broke"),
        WrongView("another process answers"),
        SystemExit(128 + 15),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_a_restore_its_hidden_table_does_not_stay(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    storage, cluster = Storage(f"memory://beside/ends/{type(error).__name__}"), source()
    cluster.save(storage, "full")

    def fails(absorber: object, block: object) -> None:
        raise error

    monkeypatch.setattr(Absorber, "send", fails)
    with pytest.raises(type(error)) as raised:
        cluster.restore(storage, tables=["item"], replace_tables=True)
    assert raised.value is error
    assert sorted(t.name for t in cluster.view.tables) == ["item", "user", "whole"]
    assert not cluster.view.lost().any()
    cluster.save(storage, "next")


def test_a_server_without_room_for_both_tables_leaves_no_hidden_one() -> None:
    storage = Storage("memory://beside/full")
    cluster = LoopCluster(2, limits=StoreLimits(memory_max=3_000_000, slots_max=2**12, deletions_max=256))
    cluster.create(TableSpec("wide", 64, SGD(lr=1.0)))
    for first in range(0, 16_000, 2000):
        cluster.push("wide", list(range(first, first + 2000)), np.ones((2000, 64)))
    cluster.save(storage, "full")
    with pytest.raises(RequestError, match="memory_max"):
        cluster.restore(storage, tables=["wide"], replace_tables=True)
    assert [t.name for t in cluster.view.tables] == ["wide"]
    cluster.save(storage, "next")


def asks(cluster: LoopCluster, monkeypatch: pytest.MonkeyPatch, **errors: BaseException) -> None:
    """Have verbs of the controller end with these errors."""

    def ask(verb: str, **fields: Any) -> dict[str, Any]:
        if verb in errors:
            raise errors[verb]
        return LoopCluster.ask(cluster, verb, **fields)

    monkeypatch.setattr(cluster, "ask", ask)


def test_a_restore_that_the_controller_does_not_end_leaves_no_hidden_table(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cluster = Storage("memory://beside/refused"), source()
    cluster.save(storage, "full")
    asks(cluster, monkeypatch, restored=RequestError("a server that rows were sent to has died"))
    with pytest.raises(RequestError, match="has died"):
        cluster.restore(storage, tables=["item"], replace_tables=True)
    assert sorted(t.name for t in cluster.view.tables) == ["item", "user", "whole"]


def test_a_restore_that_another_one_took_over_from_leaves_the_others_table_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, cluster = Storage("memory://beside/two restores"), source()
    cluster.save(storage, "full")
    real, restored = Absorber.send, []

    def meanwhile(absorber: Absorber, block: Any) -> None:
        monkeypatch.setattr(Absorber, "send", real)
        saved = manifest(cluster.view)
        restored.append(cluster.ask("restore", manifest=saved, replace_tables=True, accept_loss=False, tables=["item"]))
        raise NotApplied("the connection to s1 was closed")

    monkeypatch.setattr(Absorber, "send", meanwhile)
    with pytest.raises(EmbringError):
        cluster.restore(storage, tables=["item"], replace_tables=True)
    table = cluster.view.table("item.restoring")
    assert table is not None
    assert [here for _, here in restored[0]["tables"]] == [table.number]


def test_the_other_files_of_a_restore_that_fails_are_not_read_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for gigabytes after Ctrl-C."""
    storage, cluster = Storage("memory://beside/stop"), source()
    cluster.save(storage, "full")
    from ps.checkpoint.restore import read_blocks as real

    blocks_max, ended = 20_000, []

    def endless(storage: Storage, link: Any, file: str) -> Iterator[Any]:
        if file == "0000.blocks":
            raise KeyboardInterrupt
        (entry,) = list(real(storage, link, file))[:1]
        for _ in range(blocks_max):
            yield entry
        ended.append(file)

    monkeypatch.setattr("ps.checkpoint.restore.read_blocks", endless)
    monkeypatch.setattr(Translation, "split", lambda plan, block: iter(()))
    with pytest.raises(KeyboardInterrupt):
        cluster.restore(storage, tables=["item"], replace_tables=True)
    assert ended == []


# -- what a killed restore left


def killed(cluster: LoopCluster, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore of "item" that could tidy nothing up."""
    with monkeypatch.context() as patched:
        asks(cluster, patched, restored=KeyboardInterrupt(), drop_table=NotApplied("nobody is left to ask"))
        with pytest.raises(KeyboardInterrupt):
            cluster.restore(storage, tables=["item"], replace_tables=True)
    assert cluster.view.table("item.restoring") is not None
    assert int(cluster.view.lost().sum()) == 64


@pytest.mark.parametrize("incremental", [False, True])
def test_a_hidden_table_that_was_left_keeps_no_rows_from_being_saved(
    monkeypatch: pytest.MonkeyPatch, incremental: bool
) -> None:
    storage, cluster = Storage(f"memory://beside/left {incremental}"), source()
    cluster.save(storage, "full")
    killed(cluster, storage, monkeypatch)
    cluster.push("item", IDS, np.full((300, 2), 5.0))
    saved = cluster.save(storage, "next", incremental=incremental)
    assert (saved.tables, bool(saved.parent)) == (3, incremental)
    told = read_manifest(storage, "next")
    assert sorted(name for _, name, _, _ in told.tables) == ["item", "user", "whole"]
    assert {group for group, *_ in told.groups} == {group for _, _, group, _ in told.tables}
    whole = LoopCluster(2, cluster=2)
    whole.restore(storage)
    assert {name: whole.rows(name) for name in ("item", "user", "whole")} == {
        name: cluster.rows(name) for name in ("item", "user", "whole")
    }
    cluster.restore(storage, name="full", tables=["item"], replace_tables=True)  # as the killed one should have done
    assert sorted(t.name for t in cluster.view.tables) == ["item", "user", "whole"]
    assert not cluster.view.lost().any()


def test_lost_slots_return_though_a_hidden_table_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cluster = Storage("memory://beside/left and lost"), source()
    cluster.save(storage, "full")
    before = {name: cluster.rows(name) for name in ("item", "user", "whole")}
    killed(cluster, storage, monkeypatch)
    assert not lost_for_good(cluster.view)
    cluster.kill("s0")
    assert lost_for_good(cluster.view)
    with pytest.raises(SlotsLost):
        cluster.save(storage, "none")
    cluster.restore(storage, name="full")
    assert {name: cluster.rows(name) for name in before} == before
    assert int(cluster.view.lost().sum()) == 64  # of the hidden table, which nobody has rows of
    assert not lost_for_good(cluster.view)
    with pytest.raises(
        RequestError, match=r"none of this checkpoint's slots is lost.*item\.restoring is of a restore that has not"
    ):
        cluster.restore(storage, name="full")
    cluster.save(storage, "next")


def test_a_restore_beside_is_not_disturbed_by_one_of_lost_slots() -> None:
    view = source().view
    saved = manifest(view)
    beside = prepare(view, saved, replace_tables=True, accept_loss=False, tables=["item"])
    lost = prepare(plan(beside.first, Fail("s0")), saved, replace_tables=False, accept_loss=False)
    hidden = beside.first.group(beside.first.table("item.restoring").group)
    assert not np.isin(lost.wanted, np.arange(hidden.first, hidden.first + hidden.slots)).any()
    assert (lost.first.group(hidden.number).terms == hidden.terms).all()


def test_a_table_that_came_into_the_slots_of_a_hidden_one_is_not_left_out() -> None:
    storage, cluster = Storage("memory://beside/shared"), source()
    saved = manifest(cluster.view)
    view = prepare(cluster.view, saved, replace_tables=True, accept_loss=False, tables=["item"]).first
    shared = view.table("item.restoring").group
    view = plan(view, CreateTable("new", replace(USER, name="new").to_plain()))
    tables = (replace(t, group=shared) if t.name == "new" else t for t in view.tables)
    cluster.install(replace(view, tables=tuple(tables)).check())
    with pytest.raises(SlotsLost):
        cluster.save(storage, "next")


def manifest(view: View) -> dict:
    return {
        "cluster": view.cluster,
        "term_max": 50,
        "tables": [[t.number, t.name, t.group, dict(t.spec)] for t in view.tables],
        "groups": [[g.number, g.placement, g.replicas, g.first, g.slots] for g in view.groups],
    }


def test_what_cannot_be_is_said_and_what_was_left_is_swept() -> None:
    view = source().view
    saved = manifest(view)

    def begin(view: View, *names: str) -> View:
        first = prepare(view, saved, replace_tables=True, accept_loss=False, tables=names).first
        assert first is not None
        return first

    with pytest.raises(RequestError, match=r"the checkpoint has no table 'other'; it has item, user, whole"):
        begin(view, "other")
    once = begin(view, "item")
    again = begin(once, "item")
    assert [t.name for t in again.tables] == ["item", "user", "whole", "item.restoring"]
    assert int(again.lost().sum()) == 64
    restore = prepare(view, saved, replace_tables=True, accept_loss=False, tables=["item"])
    after = conclude(restore.first, restore)
    assert (restore.first.epoch, after.epoch) == (51, 52)
    assert [t.name for t in after.tables] == ["user", "whole", "item"]
    assert after.table("item").spec["name"] == "item"
    with pytest.raises(RequestError, match="restore again"):
        conclude(plan(restore.first, DropTable("item.restoring")), restore)


def test_a_table_that_somebody_made_under_a_hidden_name_is_not_dropped_though_its_slots_are_lost() -> None:
    storage, cluster = Storage("memory://beside/users"), source()
    cluster.create(replace(USER, name="item.restoring"))
    cluster.save(storage, "full")
    cluster.kill("s0")
    with pytest.raises(RequestError, match=r"table 'item\.restoring' is in the way: a restore uses that name"):
        cluster.restore(storage, tables=["item"], replace_tables=True)
    assert cluster.view.table("item.restoring") is not None


@pytest.mark.parametrize("letters", [118, 119, NAME_MAX])
def test_a_table_of_any_name_comes_back_beside(letters: int) -> None:
    storage, cluster, name = Storage(f"memory://beside/long{letters}"), LoopCluster(2), "x" * letters
    cluster.create(replace(USER, name=name))
    cluster.push(name, IDS, np.ones((300, 2)))
    rows = cluster.rows(name)
    cluster.save(storage, "full")
    cluster.push(name, IDS, np.ones((300, 2)))
    cluster.restore(storage, tables=[name], replace_tables=True)
    assert cluster.rows(name) == rows


def test_two_tables_with_one_hidden_name_do_not_come_back_at_once() -> None:
    cluster, names = LoopCluster(2), ["x" * 127 + end for end in "ab"]
    cluster.create(*(replace(USER, name=name) for name in names))
    saved = manifest(cluster.view)
    with pytest.raises(RequestError, match=r"xa, x+b begin alike for so long that they need one restore each$"):
        prepare(cluster.view, saved, replace_tables=True, accept_loss=False, tables=names)


def test_a_file_that_fails_ends_the_others_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def file(work: Any, link: Any, name: str) -> tuple[int, int]:
        if name == "1":
            raise CheckpointError("damaged")
        assert work._stopped.wait(60)
        raise NotApplied("another part of the restore failed")

    monkeypatch.setattr(_Work, "_file", file)
    work = _Work(None, SimpleNamespace(slots=np.empty(0, np.int64)), None, None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="damaged"):
        work.absorb(SimpleNamespace(files=("0", "1", "2")))  # type: ignore[arg-type]


def test_no_slot_of_a_checkpoint_goes_to_two_places() -> None:
    owners = zlib.compress(np.zeros(8, "<i2").tobytes())
    answer = {"slots": [[0, 0, 4], [0, 4, 4]], "tables": [], "owners": owners, "servers": [], "cluster": 1, "term": 1}
    manifest = SimpleNamespace(groups=[[1, "sharded", 1, 0, 4]], tables=[])
    with pytest.raises(CheckpointError, match="slots 0 to 3 of the checkpoint are wanted in two places"):
        Translation.of(answer, manifest)  # type: ignore[arg-type]
