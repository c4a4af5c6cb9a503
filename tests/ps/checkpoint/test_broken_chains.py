"""Chains that lack a sound checkpoint: never committed anew, never counted as sound, never in the way of others."""

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from deploy.cli import app
from ps.checkpoint.files import MANIFEST, Saving, chain, checkpoints, newest
from ps.checkpoint.retention import Checked, prune, verify
from ps.checkpoint.storage import CheckpointError, Storage
from ps.spec import SGD, TableSpec
from tests.ps.checkpoint.loopback import ACCESS, LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")

ITEM = TableSpec("item", 2, SGD(lr=1.0), seed=3)


def source(storage: Storage, *names: str) -> LoopCluster:
    """A cluster that was saved under these names; "a0" is full, "a1", "a2", ... are increments."""
    cluster = LoopCluster(2, cluster=1)
    cluster.create(ITEM)
    for name in names:
        cluster.push("item", list(range(40)), np.ones((40, 2)))
        cluster.save(storage, name, incremental=not name.endswith("0"))
    return cluster


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def blocks(folder: Path) -> Path:
    return sorted(folder.glob("*.blocks"))[0]


def remove(storage: Storage, name: str) -> None:
    storage.withdraw(name, MANIFEST)
    storage.remove(name)


def listed(folder: Path) -> list[str]:
    return CliRunner().invoke(app, ["checkpoint", "list", str(folder)]).stdout.splitlines()


def unsound(storage: Storage, name: str | None = None) -> dict[str, Checked]:
    return {c.name: c for c in verify(storage, name) if c.problems}


def fails_at(monkeypatch: pytest.MonkeyPatch, folder: Path, error: OSError) -> None:
    """Whoever asks the disk for the manifest of this folder is answered by an error."""
    real = LocalFileSystem.info

    def info(filesystem: LocalFileSystem, path: str, **options: Any) -> Any:
        if str(path) == str(folder / MANIFEST):
            raise error
        return real(filesystem, path, **options)

    monkeypatch.setattr(LocalFileSystem, "info", info)


# -- the parent goes during the save


def during_a_save(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Call `act` once, after the next save has chosen its parent and before it commits."""
    real = Saving.file

    def file(saving: Saving) -> Any:
        monkeypatch.setattr(Saving, "file", real)
        act()
        return real(saving)

    monkeypatch.setattr(Saving, "file", file)


def test_no_increment_is_committed_to_a_parent_that_prune_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    cluster = source(storage, "a0", "a1")

    def other() -> None:
        cluster.save(storage, "b0")
        assert prune(storage, 1, 1) == ["a1", "a0"]

    during_a_save(monkeypatch, other)
    sentence = r"^the checkpoint it is an increment to, 'a1', was removed meanwhile; save again$"
    with pytest.raises(CheckpointError, match=sentence):
        cluster.save(storage, "a2", incremental=True)
    assert storage.names() == ["b0"]
    assert cluster.save(storage, "b1", incremental=True).parent == "b0"


def test_no_increment_is_committed_to_a_parent_that_is_damaged_or_another_one_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    cluster = source(storage, "a0", "a1")

    def replaced() -> None:
        remove(storage, "a1")
        cluster.save(storage, "a1")

    for act, why in (
        (replaced, "is an increment to another 'a1' than the one here"),
        (lambda: damage(tmp_path / "a1" / MANIFEST), f"{tmp_path}/a1/manifest is damaged"),
    ):
        during_a_save(monkeypatch, act)
        sentence = rf"^the checkpoint it is an increment to, 'a1', is of no use any more; save again \(.*{why}"
        with pytest.raises(CheckpointError, match=sentence):
            cluster.save(storage, "a2", incremental=True)
        assert storage.names() == ["a0", "a1"]


# -- retention


def test_prune_removes_increments_whose_chain_lacks_a_checkpoint(tmp_path: Path) -> None:
    storage, other = Storage(tmp_path), LoopCluster(1, cluster=9)
    source(storage, "a0", "a1", "a2", "b0")
    other.save(storage, "theirs0")
    other.save(storage, "theirs1", incremental=True)
    for name in ("a0", "theirs0"):
        remove(storage, name)
    lacking = {
        line.split()[0] for line in listed(tmp_path) if "cannot be restored: its chain lacks a checkpoint" in line
    }
    assert lacking == {"a1", "a2", "theirs1"}
    assert prune(storage, 3, 1) == ["a2", "a1"]
    assert storage.names() == ["b0", "theirs1"]


def test_prune_keeps_increments_whose_parent_is_there_but_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that does not answer for a moment is no proof that a checkpoint is gone."""
    storage = Storage(tmp_path)
    source(storage, "a0", "a1", "b0")
    damage(tmp_path / "a0" / MANIFEST)
    assert prune(storage, 3, 1) == []
    fails_at(monkeypatch, tmp_path / "a0", OSError(5, "Input/output error"))
    assert prune(storage, 3, 1) == []
    assert storage.names() == ["a0", "a1", "b0"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_no_sound_checkpoint_is_removed_or_passed_over_unsaid_because_it_cannot_be_reached_now(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(tmp_path)
    source(storage, "a0", "b0")
    for path in (tmp_path / "b0").iterdir():
        os.utime(path, (0, 0))
    with monkeypatch.context() as patched:
        fails_at(patched, tmp_path / "b0", OSError(code, "Input/output error"))
        sentence = f"{tmp_path}/b0/manifest cannot be reached: Input/output error"
        assert prune(storage, 1, 1) == []
        assert chain(storage, None)[-1].name == "a0"
        assert f"{sentence}; it is passed over, and the newest of the others is 'a0'" in caplog.text
        assert unsound(storage)["b0"].problems == (sentence,)
        with pytest.raises(CheckpointError, match=sentence):
            unsound(storage, "b0")
    assert not unsound(storage)
    assert prune(storage, 1, 1) == ["a0"]


def test_a_cycle_of_names_is_no_chain(tmp_path: Path) -> None:
    """An increment is copied back from a backup, and what it stood on has been made anew, as an increment to it."""
    storage = Storage(tmp_path / "backups")
    cluster = source(storage, "x0", "y1")
    (tmp_path / "backups" / "y1").rename(tmp_path / "y1")
    storage.remove("x0")
    cluster.save(storage, "y1")
    cluster.save(storage, "x0", incremental=True)
    storage.remove("y1")
    (tmp_path / "y1").rename(tmp_path / "backups" / "y1")
    sentences = [f"{storage.path(name)} is an increment to another {of!r} than the one here" for name, of in
                 (("y1", "x0"), ("x0", "y1"))]  # fmt: skip
    assert {c.problems[0] for c in verify(storage)} == set(sentences)
    assert sum("cannot be restored" in line for line in listed(tmp_path / "backups")) == 2
    with pytest.raises(CheckpointError, match=sentences[1]):
        chain(storage, "x0")
    assert cluster.save(storage, "z0", incremental=True).parent == ""
    assert sorted(prune(storage, 1, 1)) == ["x0", "y1"]
    assert storage.names() == ["z0"]


def test_two_prunes_at_once_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    source(storage, "a0", "b0", "c0")
    real = Storage.withdraw

    def withdraw(mine: Storage, folder: str, name: str) -> None:
        monkeypatch.setattr(Storage, "withdraw", real)
        prune(Storage(tmp_path), 1, 1)
        real(mine, folder, name)

    monkeypatch.setattr(Storage, "withdraw", withdraw)
    assert prune(storage, 1, 1) == ["a0", "b0"]
    assert storage.names() == ["c0"]


# -- the newest


@pytest.mark.parametrize("name", ["a1", "c0"])
def test_the_newest_is_chosen_past_damaged_manifests_which_are_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(tmp_path)
    source(storage, "a0", "a1", "b0", "b1", "c0")
    damage(tmp_path / name / MANIFEST)
    newest = ["b0", "b1"] if name == "c0" else ["c0"]
    assert [m.name for m in chain(storage, None)] == newest
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"{tmp_path}/{name}/manifest is damaged: it fails its checksum; "
        f"it is passed over, and the newest of the others is {newest[-1]!r}"
    )
    with pytest.raises(CheckpointError, match="damaged"):
        chain(storage, name)
    assert [m.name for m in checkpoints(storage)] == [n for n in ("a0", "a1", "b0", "b1", "c0") if n != name]
    assert set(unsound(storage)) == {name}


def test_the_newest_of_the_cluster_goes_before_newer_ones_of_others(tmp_path: Path) -> None:
    """Tables of another may be named alike: lost slots would be filled with its rows."""
    storage = Storage(tmp_path)
    ours = source(storage, "a0", "a1")
    other = LoopCluster(2, cluster=2)
    other.create(ITEM)
    other.push("item", list(range(40)), 5 * np.ones((40, 2)))
    other.save(storage, "z0")
    assert [m.name for m in chain(storage, None, 1)] == ["a0", "a1"]
    assert [m.name for m in chain(storage, None, 2)] == ["z0"]
    assert [m.name for m in chain(storage, None, 3)] == ["z0"]
    before = ours.rows("item")
    ours.kill("s1")
    assert ours.restore(storage).name == "a1"
    assert ours.rows("item") == before


def test_of_another_cluster_no_slot_can_be_restored_by_itself(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    source(storage, "a0", "b0")
    assert newest(storage, 1, only=True).name == "b0"
    with pytest.raises(CheckpointError, match=f"^there is no checkpoint of this cluster in {tmp_path}$"):
        newest(storage, 2, only=True)


def test_damaged_manifests_alone_are_no_empty_folder(tmp_path: Path) -> None:
    """`embring up --restore latest` would begin with an empty cluster."""
    storage = Storage(tmp_path)
    source(storage, "a0")
    damage(tmp_path / "a0" / MANIFEST)
    for choose in (checkpoints, lambda storage: chain(storage, None)):
        with pytest.raises(CheckpointError, match="a0/manifest is damaged"):
            choose(storage)


@pytest.mark.parametrize("name", ["latest", "a0", "a1"])
def test_up_refuses_what_it_cannot_restore_before_it_starts_a_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(Storage(tmp_path), "a0")
    damage(tmp_path / "a0" / MANIFEST)
    config = tmp_path / "cluster.toml"
    config.write_text(f'[checkpoint]\ndirectory = "{tmp_path}"\n')
    monkeypatch.setattr("ps.cluster.start", lambda *_, **__: pytest.fail("a process was started"))
    done = CliRunner().invoke(app, ["up", "--config", str(config), "--restore", name])
    assert isinstance(done.exception, CheckpointError)


@pytest.mark.parametrize("command", ["restore", "up"])
def test_commands_restore_the_newest_past_an_old_damaged_manifest(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from deploy.cli_cluster import _restored

    cluster, target = source(Storage(tmp_path), "a0", "b0"), LoopCluster(1, cluster=2)
    damage(tmp_path / "a0" / MANIFEST)

    @contextmanager
    def controller(runtime: Any) -> Iterator[Any]:
        yield target.ask

    monkeypatch.setattr("ps.cluster.controller", controller)
    monkeypatch.setattr("deploy.cli_checkpoint.running", SimpleNamespace)
    monkeypatch.setattr("deploy.cli_checkpoint.access_to", lambda runtime: ACCESS)
    if command == "up":
        _restored(SimpleNamespace(), str(tmp_path), "latest")
    else:
        done = CliRunner().invoke(app, ["checkpoint", "restore", str(tmp_path), "--json"])
        assert json.loads(done.stdout)["name"] == "b0"
    assert f"{tmp_path}/a0/manifest is damaged" in caplog.text
    assert target.rows("item") == cluster.rows("item")


# -- verify


def test_an_increment_on_a_damaged_checkpoint_is_not_sound(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    source(storage, "a0", "a1", "a2", "b0")
    damage(blocks(tmp_path / "a0"))
    found = unsound(storage)
    assert list(found) == ["a0", "a1", "a2"]
    for name in ("a1", "a2"):
        told = (f"{tmp_path}/{name} cannot be restored: it stands on 'a0', which is not sound",)
        assert found[name].problems == unsound(storage, name)[name].problems == told
    told = CliRunner().invoke(app, ["checkpoint", "verify", str(tmp_path)])
    assert told.exit_code == 1
    assert "a2 cannot be restored: it stands on 'a0', which is not sound" in told.stdout
    assert "1 of 4 checkpoints are sound" in told.stdout


def test_verify_finds_the_damage_below_whatever_it_is(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "manifests")  # the folder's own name is not taken for the file's
    source(storage, "a0", "a1", "a2")
    damage(tmp_path / "manifests" / "a0" / MANIFEST)
    for name in (None, "a2"):
        found = unsound(storage, name)
        assert list(found) == ["a0", "a1", "a2"]
        assert "manifest is damaged" in found["a0"].problems[0]
        for above in ("a1", "a2"):
            (problem,) = found[above].problems
            assert problem.endswith(f"{above} cannot be restored: it stands on 'a0', which is not sound")
    with pytest.raises(CheckpointError, match="a0/manifest is damaged"):
        unsound(storage, "a0")
    storage.remove("a0")
    found = unsound(storage)
    assert list(found) == ["a1", "a2"]
    assert "a1 is an increment to 'a0', which is missing" in found["a1"].problems[0]
    assert "it stands on 'a1', which is not sound" in found["a2"].problems[0]
