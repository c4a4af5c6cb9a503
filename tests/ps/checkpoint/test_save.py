"""What a save says of itself: when it was made, by which the newest is chosen."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from ps.checkpoint.files import checkpoints, newest
from ps.checkpoint.retention import prune
from ps.checkpoint.storage import Storage
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


def test_another_clusters_clock_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps.checkpoint.save.datetime", Clock)
    storage, noon = Storage(tmp_path), Clock.at
    LoopCluster(1, cluster=1).save(storage, "first")
    monkeypatch.setattr(Clock, "at", noon - timedelta(hours=1))
    LoopCluster(1, cluster=2).save(storage, "second")
    assert [m.created for m in checkpoints(storage)] == [Clock.at.isoformat(), noon.isoformat()]
