"""A checkpoint's files: committed whole or absent, and every damage named."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from ps.checkpoint import files
from ps.checkpoint.files import (
    BlockFile,
    CheckpointError,
    Manifest,
    Saving,
    check_files,
    checkpoints,
    choose,
    read_blocks,
    read_manifest,
)

BLOCKS = [[b"one", b"two"], [b""], [memoryview(b"three" * 1000)]]


def manifest(name: str = "first", created: str = "2026-01-01T00:00:00+00:00", **other: object) -> Manifest:
    plain = {
        "name": name, "created": created, "cluster": 1, "epoch": 2, "fingerprint": "f", "term_max": 2,
        "tables": [[1, "item", 1, {"dim": 4}]], "groups": [[1, "sharded", 1, 0, 64]],
        "watermark": {"slots": [0], "positions": [5]},
    }  # fmt: skip
    return Manifest(**{**plain, **other})


def save(folder: Path, name: str = "first", **other: object) -> Path:
    with Saving(folder, name) as saving:
        file = BlockFile(saving.path, "server-0.blocks")
        for number, block in enumerate(BLOCKS):
            file.append(block, rows=number)
        file.close()
        return saving.commit(manifest(name, blocks=file.blocks, **other))


def test_what_was_saved_comes_back(tmp_path):
    path = save(tmp_path / "new" / "folder")
    read = read_manifest(path)
    check_files(path, read)
    assert read.rows == 3
    assert [bytes(data) for _, data in read_blocks(path, read.blocks)] == [b"onetwo", b"", b"three" * 1000]
    assert read.bytes == 5006
    assert checkpoints(path.parent) == [read]


def test_nothing_is_seen_before_the_commit_and_nothing_stays_without(tmp_path):
    def give_up() -> None:
        with Saving(tmp_path, "first") as saving:
            BlockFile(saving.path, "server-0.blocks").close()
            assert checkpoints(tmp_path) == []
            raise InterruptedError

    with pytest.raises(InterruptedError):
        give_up()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "rename", "chmod"])
def test_a_crash_at_any_step_leaves_the_older_checkpoint(tmp_path, monkeypatch, step):
    save(tmp_path, "older")
    calls = 0

    def crash(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "chmod" else os, step, crash)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, "newer")
    assert calls == 1
    assert [m.name for m in checkpoints(tmp_path)] == ["older"]
    save(tmp_path, "newer", created="2026-01-02T00:00:00+00:00")
    assert [m.name for m in checkpoints(tmp_path)] == ["older", "newer"]


def test_the_newest_is_chosen_unless_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        choose(tmp_path, None)
    save(tmp_path, "b", created="2026-01-01T00:00:00+00:00")
    save(tmp_path, "a", created="2026-01-02T00:00:00+00:00")
    assert choose(tmp_path, None) == tmp_path / "a"
    assert choose(tmp_path, "b") == tmp_path / "b"


def test_every_truncation_and_every_flipped_bit_is_named(tmp_path):
    path = save(tmp_path)
    read = read_manifest(path)
    file = path / "server-0.blocks"
    good = file.read_bytes()
    for at in (0, 3, 5, 6, 1000, len(good) - 1):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        check_files(path, read)
        with pytest.raises(CheckpointError, match=r"server-0\.blocks is damaged: the block at byte"):
            list(read_blocks(path, read.blocks))
        file.write_bytes(good[:at])
        with pytest.raises(CheckpointError, match=f"has {at} bytes; the manifest counts 5006"):
            check_files(path, read)
    file.write_bytes(good + b"x")
    with pytest.raises(CheckpointError, match="has 5007 bytes"):
        check_files(path, read)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"server-0\.blocks is missing"):
        check_files(path, read)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: {**m, "format": 2}, "has format 2; this version reads format 1"),
        (lambda m: {**m, "colour": 1}, "its keys differ in colour"),
        (lambda m: {k: v for k, v in m.items() if k != "epoch"}, "its keys differ in epoch"),
        (lambda m: {**m, "blocks": [{"file": "x"}]}, "is damaged"),
        (lambda m: [], "has format None"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path, change, sentence):
    path = save(tmp_path)
    plain = asdict(read_manifest(path))
    (path / files.MANIFEST).write_text(json.dumps(change(plain)))
    with pytest.raises(CheckpointError, match=sentence):
        read_manifest(path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = save(tmp_path)
    read = read_manifest(path)
    plain = asdict(read)
    plain["blocks"][0]["file"] = "../secret"
    (path / files.MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="names a file outside"):
        check_files(path, read_manifest(path))


def test_names_and_places(tmp_path):
    save(tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path)
    with pytest.raises(CheckpointError, match="must be 1 to 100 letters"):
        save(tmp_path, "../x")
    with pytest.raises(CheckpointError, match="it has no manifest"):
        read_manifest(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "folder")
