"""A checkpoint's files: committed whole or absent, whatever the moment of a crash, and every damage named."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.checkpoint import files
from ps.checkpoint import storage as storing
from ps.checkpoint.files import (
    Saving,
    chain,
    check_files,
    checkpoints,
    read_blocks,
    read_manifest,
    survey,
)
from ps.checkpoint.retention import prune, verify
from ps.checkpoint.storage import CheckpointError, Storage
from ps.spec import SGD, TableSpec
from tests.ps.checkpoint.loopback import LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")

ITEM = TableSpec("item", 2, SGD(lr=1.0), seed=3)


def source(rows: int = 40) -> LoopCluster:
    cluster = LoopCluster(2, cluster=1)
    cluster.create(ITEM)
    cluster.push("item", list(range(rows)), np.ones((rows, 2)))
    return cluster


def problems(storage: Storage, name: str | None = None) -> list[str]:
    return [problem for checked in verify(storage, name) for problem in checked.problems]


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(tmp_path / "new" / "folder")
    else:
        storage = Storage(f"memory://files/{tmp_path.name}")
        yield storage
        if storage.names():
            storage._fs.rm(storage.root, recursive=True)


def test_what_was_saved_comes_back_from_any_place(place: Storage) -> None:
    cluster = source()
    saved = cluster.save(place, "first")
    manifest = read_manifest(place, "first")
    check_files(place, manifest)
    assert (manifest.rows, saved.rows, manifest.parent) == (40, 40, "")
    assert sum(len(list(read_blocks(place, manifest, name))) for name in manifest.files) == len(manifest.blocks)
    assert checkpoints(place)[0].checksum == manifest.checksum
    assert problems(place) == []
    with pytest.raises(CheckpointError, match="first exists already"):
        cluster.save(place, "first")
    for name in ("../x", ""):
        with pytest.raises(CheckpointError, match="must be 1 to 100 letters"):
            cluster.save(place, name)
    with pytest.raises(CheckpointError, match="it has no manifest"):
        read_manifest(place, "missing")


def test_places_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be reached"):
        Storage("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        source().save(Storage(tmp_path / "file" / "folder"))
    for name in (None, "first"):
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/missing is missing$"):
            chain(Storage(tmp_path / "missing"), name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        chain(Storage(tmp_path / "empty"), None)


def test_what_is_left_of_a_save_that_was_killed_is_named_as_such(place: Storage) -> None:
    with Saving(place, "first") as saving:
        saving.file().close()
        with pytest.raises(CheckpointError, match="first is being saved, or is left of a save that was killed"):
            source().save(place, "first")
        assert place.names("first")  # it is not ours to remove


def test_the_memory_of_one_process_is_no_place_for_what_is_to_last(tmp_path: Path) -> None:
    assert Storage(tmp_path).lasting().local
    with pytest.raises(CheckpointError, match=r"^memory:// is the memory of one process, and gone with it"):
        Storage("memory://files/gone").lasting()


def test_nothing_stays_of_a_save_that_fails(place: Storage) -> None:
    def give_up() -> None:
        with Saving(place, "first") as saving:
            saving.file().close()
            assert checkpoints(place) == []
            raise InterruptedError

    with pytest.raises(InterruptedError):
        give_up()
    assert place.names() == []


def test_what_nobody_could_restore_is_not_committed(place: Storage) -> None:
    with pytest.raises(CheckpointError, match="first/manifest cannot be restored: models must be text"):
        source().save(place, "first", models={"ctr": 7})
    assert place.names() == []


# -- crashes


class Killed(BaseException):
    """The process is no more: nothing that it had not asked of the disk happens."""


class Disk:
    """Counts what is asked of the disk, ends the process at one step, and then forgets what was not synced.

    until: the step at which the process ends (from 1). At a crash, files lose what was written after their last sync,
    and a name that was given by rename, in a folder that was not synced since, is the old one again, where `lazy`.
    """

    def __init__(self, until: int, lazy: bool) -> None:
        self.steps, self.until, self.lazy = 0, until, lazy
        self.unsynced: dict[str, int] = {}
        self.renamed: list[tuple[str, str]] = []

    def step(self) -> None:
        self.steps += 1
        if self.steps >= self.until:
            raise Killed

    def forget(self) -> None:
        for path, size in self.unsynced.items():
            if Path(path).exists():
                with open(path, "r+b") as file:
                    file.truncate(size)
        if self.lazy:
            for old, new in reversed(self.renamed):
                Path(new).rename(old)

    @contextmanager
    def watched(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        real_write, real_close = storing._LocalSink.write, storing._LocalSink.close
        real_rename, real_mkdir = storing.os.rename, storing.os.mkdir
        real_sync, disk = storing.sync_folder, self

        def write(sink: Any, data: Any) -> None:
            disk.step()
            disk.unsynced.setdefault(sink._file.name, sink._file.tell())
            real_write(sink, data)

        def close(sink: Any) -> None:
            disk.step()
            real_close(sink)
            disk.unsynced.pop(sink._file.name, None)

        def rename(old: str, new: str) -> None:
            disk.step()
            real_rename(old, new)
            disk.renamed.append((old, new))

        def mkdir(path: str, mode: int) -> None:
            disk.step()
            real_mkdir(path, mode)

        def sync(folder: Path) -> None:
            disk.step()
            real_sync(folder)
            disk.renamed = [(a, b) for a, b in disk.renamed if Path(b).parent != folder]

        def remove(*_: Any) -> None:
            raise Killed

        with patch.context() as patched:
            patched.setattr(storing._LocalSink, "write", write)
            patched.setattr(storing._LocalSink, "close", close)
            patched.setattr(storing.os, "rename", rename)
            patched.setattr(storing.os, "mkdir", mkdir)
            patched.setattr(storing, "sync_folder", sync)
            patched.setattr(Storage, "remove", remove)
            yield


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("incremental", [False, True])
def test_a_crash_at_any_step_restores_the_last_one_that_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incremental: bool, lazy: bool
) -> None:
    storage, cluster = Storage(tmp_path), source()
    cluster.save(storage, "older")
    older = cluster.digests()
    cluster.push("item", [1, 2, 3], np.ones((3, 2)))
    newer = cluster.digests()
    step, committed = 0, False
    seen = set()
    while not committed:
        step += 1
        disk = Disk(step, lazy)
        with suppress(Killed), disk.watched(monkeypatch):
            cluster.save(storage, f"newer{step}", incremental=incremental)
            committed = True
        if not committed:
            disk.forget()
        names = [m.name for m in checkpoints(storage)]
        assert names[0] == "older"
        assert not committed or names == ["older", f"newer{step}"]
        assert problems(storage) == []
        target = LoopCluster(3, cluster=2)
        target.restore(storage)
        seen.add(names[-1] != "older")
        assert target.digests() == (older if names == ["older"] else newer)
        if len(names) > 1 and not committed:  # it was whole before the save could say so
            storage.remove(names[1])
    assert step >= 12
    assert seen == {False, True}


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cluster = Storage(tmp_path), source()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write", "close"):
        with monkeypatch.context() as patched:
            patched.setattr(storing._LocalSink, name, full)
            with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
                cluster.save(storage, "first")
        assert storage.names() == []


# -- damage


def test_every_flipped_byte_is_named_by_verify_and_by_restore(tmp_path: Path) -> None:
    storage, cluster = Storage(tmp_path), source(12)
    cluster.save(storage, "full")
    cluster.push("item", [1, 2, 3], np.ones((3, 2)))
    cluster.push("item", [5], np.empty(0), "delete")
    cluster.save(storage, "one", incremental=True)
    tried = 0
    for path in sorted(p for name in ("full", "one") for p in (tmp_path / name).iterdir()):
        good = path.read_bytes()
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            found = problems(storage)
            assert found
            assert str(path) in found[0]
            if at % 61 == 0:
                tried += 1
                with pytest.raises(CheckpointError, match=str(path)):
                    LoopCluster(1, cluster=2).restore(storage, name="one")
        path.write_bytes(good)
    assert tried > 50
    assert problems(storage) == []
    target = LoopCluster(1, cluster=2)
    target.restore(storage)
    assert target.rows("item") == cluster.rows("item")


def test_every_truncation_and_missing_file_is_named(tmp_path: Path) -> None:
    storage, cluster = Storage(tmp_path), source(12)
    cluster.save(storage, "first")
    for path in (tmp_path / "first").iterdir():
        good = path.read_bytes()
        for size in (0, 1, 23, 24, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            assert str(path) in problems(storage)[0]
            with pytest.raises(CheckpointError, match=str(path)):
                LoopCluster(1, cluster=2).restore(storage, name="first")
        path.write_bytes(good + b"x")
        assert str(path) in problems(storage)[0]
        path.unlink()
        with pytest.raises(CheckpointError, match=r"is missing|has no manifest"):
            LoopCluster(1, cluster=2).restore(storage, name="first")
        path.write_bytes(good)
    assert problems(storage) == []


def test_a_later_format_is_refused_in_one_sentence(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    source().save(storage, "first")
    path = tmp_path / "first" / files.MANIFEST
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", 3) + data[12:])
    sentence = "manifest has format 3; this version of embring reads format 2"
    with pytest.raises(CheckpointError, match=sentence):
        read_manifest(storage, "first")
    assert sentence in problems(storage)[0]


def test_a_checkpoint_keeps_its_name(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    source().save(storage, "first")
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(CheckpointError, match="is of checkpoint 'first': a checkpoint keeps its name"):
        read_manifest(storage, "second")


# -- retention


def test_pruning_takes_whole_chains_only_and_leaves_other_clusters_alone(tmp_path: Path, place: Storage) -> None:
    cluster, other = source(), LoopCluster(1, cluster=9)
    other.save(place, "theirs")
    for name in ("a0", "a1", "b0", "b1", "b2", "c0"):
        cluster.push("item", [1], np.ones((1, 2)))
        cluster.save(place, name, incremental=not name.endswith("0"))
    assert prune(place, 3, 1) == []
    assert prune(place, 2, 1) == ["a1", "a0"]
    assert sorted(m.name for m in checkpoints(place)) == ["b0", "b1", "b2", "c0", "theirs"]
    assert problems(place) == []
    assert prune(place, 1, 1) == ["b2", "b1", "b0"]
    assert sorted(m.name for m in checkpoints(place)) == ["c0", "theirs"]


def test_a_crash_while_pruning_leaves_whole_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cluster = Storage(tmp_path), source()
    for name in ("a0", "a1", "a2", "b0"):
        cluster.push("item", [1], np.ones((1, 2)))
        cluster.save(storage, name, incremental=not name.endswith("0"))
    real = Storage.remove
    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(Storage, "remove", lambda *_: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                prune(storage, 1, 1)
        assert problems(storage) == []
    assert [m.name for m in checkpoints(storage)] == ["b0"]
    assert real is Storage.remove
    assert sorted(files.unfinished(storage)) == ["a0", "a1", "a2"]
    assert prune(storage, 1, 1) == []  # they may be of a save that goes on
    monkeypatch.setattr("ps.checkpoint.retention.UNFINISHED_S", -1.0)
    assert prune(storage, 1, 1) == ["a0", "a1", "a2"]
    assert storage.names() == ["b0"]


def test_what_a_killed_save_left_goes_by_the_age_of_its_files() -> None:
    """Object stores keep no times of folders; on a disk, a folder's is that of its first block."""
    storage = Storage("memory://files/killed")
    long_ago = datetime.now(UTC) - timedelta(days=30)
    for name in ("killed", "goes-on"):
        storage.make(name)
        for number in range(2):
            sink = storage.create(name, files.file_name(number))
            sink.write(b"rows")
            sink.close()
    for place, file in storage._fs.store.items():
        if place.startswith(storage.root) and not place.endswith("goes-on/0001.blocks"):
            file.modified = long_ago
    assert files.unfinished(storage) == ["goes-on", "killed"]
    assert prune(storage, 1, 1) == ["killed"]


@pytest.mark.parametrize("held", [["0001.blocks"], ["0000.blocks", ".manifest"], [".manifest"]])
def test_whatever_a_kill_leaves_is_removed_and_nothing_of_others(tmp_path: Path, held: list[str]) -> None:
    """A prune may be killed behind its first file, and an object store may have taken the second one first."""
    for folder, names in (("killed", held), ("others", [*held, "notes.txt"]), ("empty", [])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b"rows")
            os.utime(tmp_path / folder / name, (0, 0))
    (tmp_path / "file").write_text("")
    assert prune(Storage(tmp_path), 1, 1) == ["killed"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "others"]


def test_a_save_that_goes_on_for_days_is_not_taken_for_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / "saving").mkdir()
    (tmp_path / "saving" / files.file_name(0)).write_bytes(b"rows")
    os.utime(tmp_path / "saving", (0, 0))
    assert prune(Storage(tmp_path), 1, 1) == []
    os.utime(tmp_path / "saving" / files.file_name(0), (0, 0))
    assert prune(Storage(tmp_path), 1, 1) == ["saving"]


def test_a_damaged_checkpoint_stops_no_further_save(tmp_path: Path) -> None:
    storage, cluster = Storage(tmp_path), source()
    cluster.save(storage, "a")
    cluster.save(storage, "b", incremental=True)
    path = tmp_path / "b" / files.MANIFEST
    path.write_bytes(path.read_bytes()[:-1])
    good, bad = survey(storage)
    assert [m.name for m in good] == ["a"]
    assert str(path) in str(bad[0])
    assert cluster.save(storage, "c", incremental=True).parent == "a"
    with pytest.raises(CheckpointError, match="damaged"):
        chain(storage, "b")
    for name in (None, "c"):
        assert [m.name for m in chain(storage, name)] == ["a", "c"]
