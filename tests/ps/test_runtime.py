"""The runtime file: private, whole, and refused where it is not."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from ps.errors import ConfigError
from ps.runtime import Runtime, read_runtime, read_token, readdress, runtime_path, write_private, write_runtime

RUNTIME = Runtime(addresses=("unix:/tmp/x", "tcp:127.0.0.1:4000"), token_path="/t", cluster=2**62, head_pid=7)


def test_it_lies_in_the_users_runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_path() == tmp_path / "embring" / "cluster.json"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert runtime_path() == tmp_path / "home" / ".cache" / "embring" / "cluster.json"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_path() == tmp_path / "home" / ".cache" / "embring" / "cluster.json"


def test_written_and_read_back_private(tmp_path):
    path = write_runtime(RUNTIME, tmp_path / "new" / "cluster.json")
    assert read_runtime(path) == RUNTIME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["cluster.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_runtime(RUNTIME, tmp_path / "cluster.json")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"{")
    assert read_runtime(path) == RUNTIME
    assert os.listdir(tmp_path) == ["cluster.json"]


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_file_that_others_can_open_is_refused(tmp_path, mode):
    path = write_runtime(RUNTIME, tmp_path / "cluster.json")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"it has mode {mode:04o}"):
        read_runtime(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is malformed"),
        ("[]", "is malformed"),
        ("{}", "is malformed"),
        (json.dumps({"addresses": []}), "is malformed"),
        (json.dumps({"addresses": [], "token_path": "", "colour": 1}), "unknown key 'colour'"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text, sentence):
    path = tmp_path / "cluster.json"
    write_private(path, text.encode())
    with pytest.raises(ConfigError, match=sentence):
        read_runtime(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="start one with `embring up`"):
        read_runtime(tmp_path / "cluster.json")


def test_addresses_are_kept_up_in_the_file_of_their_own_cluster_alone(tmp_path):
    path = tmp_path / "cluster.json"
    assert not readdress(path, RUNTIME.cluster, ("tcp:h:1",))
    assert not path.exists()
    write_runtime(RUNTIME, path)
    assert not readdress(path, 5, ("tcp:h:1",))
    assert read_runtime(path) == RUNTIME
    assert readdress(path, RUNTIME.cluster, ("tcp:h:1",))
    assert read_runtime(path) == replace(RUNTIME, addresses=("tcp:h:1",))


def test_tokens(tmp_path: Path):
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(path)
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        read_token(path)
    path.write_text("secret\n")
    assert read_token(path) == "secret"
