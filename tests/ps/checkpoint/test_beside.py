"""Some tables of a checkpoint into a cluster that runs: what is there goes on, and the last view puts them in place."""

import numpy as np
import pytest

from hashring.planner import DropTable
from hashring.view import View
from ps.checkpoint.storage import CheckpointError, Storage
from ps.controller.restore import conclude, prepare
from ps.errors import RequestError
from ps.spec import SGD, Adagrad, Initializer, TableSpec
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


def test_a_damaged_checkpoint_leaves_no_hidden_table(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cluster = Storage("memory://beside/three"), source()
    cluster.save(storage, "full")

    def damaged(work: object, link: object) -> None:
        raise CheckpointError("block 3 is damaged")

    monkeypatch.setattr("ps.checkpoint.restore._Work.absorb", damaged)
    with pytest.raises(CheckpointError, match="block 3 is damaged"):
        cluster.restore(storage, tables=["item"], replace_tables=True)
    assert sorted(t.name for t in cluster.view.tables) == ["item", "user", "whole"]
    assert not cluster.view.lost().any()
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
    assert after.epoch == 51
    assert [t.name for t in after.tables] == ["user", "whole", "item"]
    assert after.table("item").spec["name"] == "item"
    from hashring.planner import plan

    with pytest.raises(RequestError, match="restore again"):
        conclude(plan(restore.first, DropTable("item.restoring")), restore)
