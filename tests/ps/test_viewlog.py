"""The view log: an epoch is created once, whole, and damage is never passed over."""

import os
import threading
from dataclasses import replace

import pytest

from hashring.planner import CreateTable, Join, plan
from hashring.view import Server, View
from ps.viewlog import EpochTakenError, ViewLog, ViewLogError


def chain(count: int) -> list[View]:
    views = [View.empty(cluster=99, slot_bits=6)]
    views.append(plan(views[-1], Join(tuple(Server(f"s{i}", i + 1, "h") for i in range(3)))))
    while len(views) < count:
        views.append(plan(views[-1], CreateTable(f"t{len(views)}", {"dim": 4}, "sharded", 1)))
    return views


def test_views_come_back_as_they_were(tmp_path):
    log = ViewLog(tmp_path / "views")
    assert log.newest() is None
    views = chain(5)
    for view in views:
        log.append(view)
    assert log.epochs() == [0, 1, 2, 3, 4]
    for view in views:
        assert ViewLog(log.folder).read(view.epoch).to_plain() == view.to_plain()
    assert log.newest().to_plain() == views[-1].to_plain()


def test_an_epoch_is_taken_once(tmp_path):
    first, second = ViewLog(tmp_path), ViewLog(tmp_path)
    views = chain(3)
    for view in views:
        first.append(view)
    with pytest.raises(EpochTakenError):
        second.append(replace(views[-1], cluster=1))
    with pytest.raises(EpochTakenError):
        second.append(views[0])
    assert first.newest().cluster == 99
    assert second.holds(views[-1].epoch)
    assert not second.holds(views[-1].epoch + 1)


def test_of_two_at_once_one_wins(tmp_path):
    views = chain(2)
    logs = [ViewLog(tmp_path) for _ in range(8)]
    start = threading.Barrier(len(logs), timeout=30)
    outcomes: list[str] = []

    def write(log: ViewLog) -> None:
        start.wait()
        try:
            log.append(views[0])
            outcomes.append("won")
        except EpochTakenError:
            outcomes.append("taken")

    threads = [threading.Thread(target=write, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["taken"] * 7 + ["won"]
    assert logs[0].newest().to_plain() == views[0].to_plain()
    assert os.listdir(tmp_path) == ["000000000000.view"]


def test_every_truncation_and_flip_is_noticed(tmp_path):
    log = ViewLog(tmp_path)
    view = chain(1)[0]
    log.append(view)
    path = tmp_path / "000000000000.view"
    good = path.read_bytes()
    for cut in range(len(good)):
        path.write_bytes(good[:cut])
        with pytest.raises(ViewLogError, match=r"000000000000\.view"):
            log.newest()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(ViewLogError, match=r"000000000000\.view"):
            log.newest()


def test_a_failed_write_leaves_no_name(tmp_path, monkeypatch):
    log = ViewLog(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            log.append(chain(1)[0])
    assert os.listdir(tmp_path) == []
    log.append(chain(1)[0])


def test_a_jump_takes_the_next_epoch_too(tmp_path):
    log, rival = ViewLog(tmp_path), ViewLog(tmp_path)
    views = chain(3)
    for view in views:
        log.append(view)
    jumped = replace(views[-1], epoch=50)
    log.append(jumped, after=2)
    assert log.epochs() == [0, 1, 2, 3, 50]
    with pytest.raises(EpochTakenError):
        rival.append(replace(views[-1], epoch=3), after=2)
    assert log.newest().epoch == 50
    log.append(replace(jumped, epoch=51), after=50)
    assert log.newest().epoch == 51
