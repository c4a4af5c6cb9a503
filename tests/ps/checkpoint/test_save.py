"""What a save says of itself: when it was made, by which the newest is chosen."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashring.view import View
from ps.checkpoint.files import chain, checkpoints, newest, read_manifest
from ps.checkpoint.reach import exported, newest_view
from ps.checkpoint.retention import prune
from ps.checkpoint.storage import Storage
from ps.errors import PerhapsApplied
from ps.rowblock import RowBlock
from ps.spec import SGD, TableSpec
from tests.ps.checkpoint.loopback import LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")


class Clock(datetime):
    """A clock that an operator sets."""

    at = datetime(2026, 1, 1, 12, tzinfo=UTC)

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return cls.at


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("names", [("first", "second", "third"), (None, None, None)])
def test_the_newest_is_the_last_one_saved_though_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str | None, ...], incremental: bool
) -> None:
    monkeypatch.setattr("ps.checkpoint.save.datetime", Clock)
    storage, cluster, noon = Storage(tmp_path), LoopCluster(2), Clock.at
    cluster.create(TableSpec("t", 3, SGD(lr=1.0)))
    saved = []
    for name, hours in zip(names, (0, -1, -1), strict=True):
        monkeypatch.setattr(Clock, "at", noon + timedelta(hours=hours))
        cluster.push("t", [1], np.ones((1, 3)))
        saved.append(cluster.save(storage, name, incremental=incremental).name)
        assert newest(storage).name == saved[-1]
    monkeypatch.setattr(Clock, "at", noon + timedelta(hours=1))
    saved.append(cluster.save(storage).name)
    assert [m.name for m in checkpoints(storage)] == saved
    assert newest(storage).created == Clock.at.isoformat()
    assert prune(storage, 1, cluster.view.cluster)
    assert [m.name for m in checkpoints(storage)] == saved[-1:]


@pytest.mark.parametrize("cut", [False, True])
def test_a_view_that_is_older_than_what_the_save_knows_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """cut: an export fails, and its lane asks for the view again; else only the manifest does."""
    cluster, heard, asked = LoopCluster(2), [newest_view], [exported]
    cluster.create(TableSpec("t", 3, SGD(lr=1.0)))
    older = cluster.view
    cluster.create(TableSpec("late", 3, SGD(lr=1.0), placement="whole"))
    cluster.push("late", [1, 2], np.ones((2, 3)))

    def view(servers: Any, access: Any) -> View:
        return heard.pop()(servers, access) if heard else older

    def export(*arguments: Any) -> Iterator[RowBlock]:
        if cut and asked:
            asked.clear()
            raise PerhapsApplied("the connection broke")
        yield from exported(*arguments)

    for name, stand_in in (("newest_view", view), ("exported", export), ("RETRY_S", 0.01)):
        monkeypatch.setattr(f"ps.checkpoint.save.{name}", stand_in)
    cluster.save(Storage(tmp_path), "a")
    assert [entry[1] for entry in read_manifest(Storage(tmp_path), "a").tables] == ["t", "late"]


def test_no_increment_stands_on_a_checkpoint_whose_files_are_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage, cluster = Storage(tmp_path), LoopCluster(2)
    cluster.create(TableSpec("t", 3, SGD(lr=1.0)))
    for name in ("a", "b", "c"):
        cluster.push("t", [1], np.ones((1, 3)))
        cluster.save(storage, name, incremental=name == "c")
    (tmp_path / "b" / "0000.blocks").unlink()
    assert cluster.save(storage, "d", incremental=True).parent == ""  # and not `a`, which is of an older chain than b
    assert f"{tmp_path}/b/0000.blocks is missing: No such file or directory; no increment stands on 'c'" in caplog.text
    assert cluster.save(storage, "e", incremental=True).parent == "d"
    assert [m.name for m in chain(storage, None)] == ["d", "e"]
    target = LoopCluster(1, cluster=5)
    target.restore(storage)
    assert target.rows("t") == cluster.rows("t")


def test_another_clusters_clock_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps.checkpoint.save.datetime", Clock)
    storage, noon = Storage(tmp_path), Clock.at
    LoopCluster(1, cluster=1).save(storage, "first")
    monkeypatch.setattr(Clock, "at", noon - timedelta(hours=1))
    LoopCluster(1, cluster=2).save(storage, "second")
    assert [m.created for m in checkpoints(storage)] == [Clock.at.isoformat(), noon.isoformat()]
