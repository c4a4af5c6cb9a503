"""What the controller's process does: a save stands, whatever becomes of what is done after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.checkpoint.files import MANIFEST, checkpoints
from ps.checkpoint.job import heard, work
from ps.checkpoint.storage import Storage
from ps.config.checkpoint import CheckpointConfig
from ps.controller.keeper import Keeper
from ps.spec import SGD, TableSpec
from tests.ps.checkpoint.loopback import CONFIG, LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")


def order(cluster: LoopCluster, folder: Path) -> dict[str, Any]:
    return {
        "what": "save", "directory": str(folder), "full_every": 1, "keep": 1, "token": "", "tls_ca": "", "models": "",
        "servers": [[s.name, s.incarnation, list(s.addresses)] for s in cluster.view.servers],
        "fingerprint": CONFIG.fingerprint, "cluster": cluster.view.cluster,
    }  # fmt: skip


def test_a_prune_that_fails_is_told_beside_the_save_and_nothing_is_saved_again_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a bucket whose key may write, and not remove."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Access Denied")

    cluster, now = LoopCluster(2), [0.0]
    cluster.create(TableSpec("t", 3, SGD(lr=1.0)))
    cluster.push("t", [1, 2, 3], np.ones((3, 3)))
    keeper = Keeper(
        CheckpointConfig(directory=str(tmp_path), every_s=3600.0, full_every=1, keep=1),
        lambda: cluster.view, lambda job: {}, lambda: now[0],
    )  # fmt: skip
    saves: list[dict[str, Any]] = []
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "withdraw", refuse)
        for now[0] in np.arange(0.0, 3 * 3600.0, 10.0):
            if keeper.due() is not None:
                saves.append(work(order(cluster, tmp_path)))
                keeper.ended("save", saves[-1])
    assert [m.name for m in checkpoints(Storage(tmp_path))] == [told["name"] for told in saves]
    assert [(told["pruned"], told["prune_error"]) for told in saves] == [
        ([], ""),
        ([], f"{tmp_path} cannot be pruned: Access Denied"),
    ]
    status = keeper.status()
    assert status["error"] == f"prune: {tmp_path} cannot be pruned: Access Denied"
    assert status["last"]["save"]["name"] == saves[-1]["name"]
    told = work(order(cluster, tmp_path))
    assert (len(told["pruned"]), told["prune_error"]) == (2, "")


def test_what_the_restore_of_lost_slots_passes_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = LoopCluster(2)
    cluster.create(TableSpec("t", 3, SGD(lr=1.0)))
    storage = Storage(tmp_path)
    for name in ("a", "b"):
        cluster.save(storage, name)
    path = tmp_path / "b" / MANIFEST
    path.write_bytes(path.read_bytes()[:-1])
    cluster.kill("s0")

    @contextmanager
    def controller(*_: object) -> Iterator[Any]:
        yield cluster.ask

    monkeypatch.setattr("ps.checkpoint.job.controller_through", controller)
    with heard() as warnings:
        told = work({**order(cluster, tmp_path), "what": "restore"})
    sentence = f"{path} is damaged: it fails its checksum; it is passed over, and the newest of the others is 'a'"
    assert (told["name"], warnings) == ("a", [sentence])
    keeper = Keeper(CheckpointConfig(directory=str(tmp_path), restore_lost=True), lambda: cluster.view, lambda job: {})
    keeper.ended("restore", {**told, "warnings": warnings})
    assert keeper.status()["error"] == f"restore: {sentence}"
    assert keeper.status()["last"]["restore"]["name"] == "a"
    keeper.ended("restore", {"error": "there is no table 'u'", "warnings": warnings})
    assert keeper.status()["error"] == f"restore: there is no table 'u'; restore: {sentence}"
