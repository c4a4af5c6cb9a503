"""Places: what cannot be told is not taken for a no, and whatever a filesystem raises is one sentence."""

import os
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ps.checkpoint.files import MANIFEST, check_files, read_blocks, read_manifest, survey
from ps.checkpoint.retention import prune
from ps.checkpoint.storage import CheckpointError, Storage
from ps.spec import SGD, TableSpec
from tests.ps.checkpoint.loopback import LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")

ITEM = TableSpec("item", 2, SGD(lr=1.0))


def refusing(error: Exception) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    return refuse


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (FileNotFoundError(2, "No such file"), False),
        (NotADirectoryError(20, "Not a directory"), False),
        (PermissionError(13, "Permission denied"), "x cannot be reached: Permission denied"),
        (OSError(116, "Stale file handle"), "x cannot be reached: Stale file handle"),
        (ValueError("no bucket"), "x cannot be reached: ValueError no bucket"),
    ],
)
def test_what_cannot_be_told_is_no_no(error: Exception, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage("memory://storage/x")
    monkeypatch.setattr(MemoryFileSystem, "info", refusing(error))
    if answer is False:
        assert not storage.has()
        with pytest.raises(CheckpointError, match=r"x is missing$"):
            storage.existing()
        return
    for ask in (storage.has, storage.existing):
        with pytest.raises(CheckpointError, match=f"{answer}$"):
            ask()


@pytest.mark.parametrize(("code", "why"), [(2, "is missing"), (13, "cannot be read")])
def test_files_that_may_not_be_read_are_not_called_missing(
    code: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage("memory://storage/size")
    monkeypatch.setattr(MemoryFileSystem, "size", refusing(OSError(code, "so it is")))
    with pytest.raises(CheckpointError, match=f"a/0000.blocks {why}: so it is$"):
        storage.size("a", "0000.blocks")


@pytest.mark.parametrize("error", [KeyError("bucket"), RuntimeError("no credentials"), NotImplementedError()])
@pytest.mark.parametrize("call", ["ls", "info", "makedirs", "open", "pipe_file", "cat_file", "rm", "rm_file", "size"])
def test_whatever_a_filesystem_raises_is_one_sentence(
    call: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, cluster = Storage(f"memory://storage/{tmp_path.name}"), LoopCluster(1)
    cluster.create(ITEM)
    for name in ("a", "b"):
        cluster.save(storage, name)
    told = []
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, call, refusing(error))
        for act in (
            lambda: cluster.save(storage, "c", incremental=True),
            lambda: check_files(storage, read_manifest(storage, "b")),
            lambda: prune(storage, 1, 1),
        ):
            try:
                act()
            except CheckpointError as failed:
                told.append(str(failed))
    storage._fs.store.clear()
    why = "this kind of place cannot do that" if isinstance(error, NotImplementedError) else type(error).__name__
    assert told
    assert all(why in sentence for sentence in told)


def test_a_file_that_fails_while_it_is_written_or_read_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cluster = Storage("memory://storage/files"), LoopCluster(1)
    cluster.create(ITEM)
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFile, "write", refusing(RuntimeError("the upload ended")), raising=False)
        with pytest.raises(CheckpointError, match=r"a cannot be written: RuntimeError the upload ended$"):
            cluster.save(storage, "a")
    cluster.save(storage, "a")
    manifest = read_manifest(storage, "a")
    monkeypatch.setattr(MemoryFile, "readinto", refusing(RuntimeError("the download ended")), raising=False)
    with pytest.raises(CheckpointError, match=r"blocks cannot be read: RuntimeError the download ended$"):
        list(read_blocks(storage, manifest, next(iter(manifest.files))))


@pytest.mark.parametrize("url", ["data:abc", "simplecache::memory://x", "simplecache::file:///x"])
def test_places_that_keep_nothing_are_refused(url: str) -> None:
    with pytest.raises(CheckpointError, match=r"^abc/.* cannot be reached: |a chain of URLs: name the place itself$"):
        LoopCluster(1).save(Storage(url).lasting())


def test_a_checkpoint_is_removed_from_within_and_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    storage, cluster = Storage(tmp_path / "in"), LoopCluster(1)
    for name in ("a", "b", "c"):
        cluster.save(storage, name)
    (tmp_path / "in" / "b").rename(tmp_path / "elsewhere")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "in" / "a")
    assert prune(storage, 1, 1) == ["a", "b"]
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == ["c"]
    assert [m.name for m in survey(storage)[0]] == ["c"]
    storage.remove("a")  # somebody else has done so
    storage.withdraw("a", MANIFEST)
