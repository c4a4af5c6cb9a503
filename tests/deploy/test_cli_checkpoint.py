"""`embring checkpoint save --keep`: what was saved is told, whatever becomes of older ones."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from ps.checkpoint.storage import Storage
from ps.spec import SGD, TableSpec
from tests.ps.checkpoint.loopback import ACCESS, CONFIG, LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> LoopCluster:
    made = LoopCluster(2)
    made.create(TableSpec("t", 3, SGD(lr=1.0)))
    made.push("t", [1, 2], np.ones((2, 3)))
    runtime = SimpleNamespace(fingerprint=CONFIG.fingerprint, cluster=made.view.cluster)
    monkeypatch.setattr("deploy.cli_checkpoint.reachable", lambda: runtime)
    monkeypatch.setattr("deploy.cli_checkpoint.access_to", lambda runtime: ACCESS)
    monkeypatch.setattr("deploy.cli_checkpoint.servers_of", lambda runtime: made.view.servers)
    return made


@pytest.mark.parametrize("as_json", [False, True])
def test_a_save_is_told_though_older_ones_cannot_be_removed(
    cluster: LoopCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Access Denied")

    def run(name: str) -> tuple[int, str, str]:
        flags = ["--json"] if as_json else []
        done = CliRunner().invoke(app, ["checkpoint", "save", str(tmp_path), "--keep", "1", "--name", name, *flags])
        return done.exit_code, done.stdout, done.stderr

    assert run("a")[0] == 0
    error = f"{tmp_path} cannot be pruned: Access Denied"
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "withdraw", refuse)
        code, out, err = run("b")
    assert (code, err) == (1, f"error: {error}\n")
    if as_json:
        told = json.loads(out)
        assert (told["path"], told["pruned"], told["prune_error"]) == (f"{tmp_path}/b", [], error)
    else:
        assert out.startswith(f"{tmp_path}/b: 2 rows")
    code, out, err = run("c")
    assert (code, err) == (0, "")
    gone = json.loads(out)["pruned"] if as_json else out.splitlines()[1:]
    assert gone == (["a", "b"] if as_json else ["removed a", "removed b"])


@pytest.mark.usefixtures("cluster")
def test_a_save_into_the_memory_of_the_command_is_refused() -> None:
    done = CliRunner().invoke(app, ["checkpoint", "save", "memory://files/gone"])
    assert done.exit_code == 1
    assert str(done.exception).startswith("memory:// is the memory of one process")
