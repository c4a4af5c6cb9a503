"""When checkpoints are saved and lost slots restored: by a clock of the test, without any process."""

import sys
from dataclasses import replace
from typing import Any

import pytest

from hashring.planner import CreateTable, Fail, Join, Return, plan
from hashring.view import Server, View
from ps.config import Config, annotated, load_config
from ps.config.checkpoint import CheckpointConfig
from ps.controller import keeper
from ps.controller.keeper import LOST_WAIT_S, RETRY_S, Keeper, run_job
from ps.controller.restore import prepare
from ps.errors import ConfigError
from ps.spec import TableSpec


class World:
    """A clock and a view to be changed."""

    def __init__(self, **settings: Any) -> None:
        self.now = 1000.0
        servers = tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(3))
        self.view = plan(View.empty(1, slot_bits=6), Join(servers))
        config = CheckpointConfig(**{"directory": "d", **settings})
        self.keeper = Keeper(config, lambda: self.view, lambda job: {"what": job}, lambda: self.now)

    def after(self, seconds: float) -> str | None:
        self.now += seconds
        return self.keeper.due()

    def table(self) -> None:
        self.view = plan(self.view, CreateTable("t", {"placement": "sharded", "replicas": 1}))


GOOD = {"name": "c", "rows": 3, "bytes": 30}


def test_saves_are_due_from_the_end_of_the_last_one_on() -> None:
    world = World(every_s=100.0)
    assert world.after(500) is None  # there is no table
    world.table()
    assert world.after(0) == "save"
    assert world.after(500) is None  # one at a time
    assert world.keeper.status()["doing"] == "save"
    world.keeper.ended("save", GOOD)
    assert world.after(99) is None
    assert world.after(1) == "save"
    world.keeper.ended("save", {"error": "the disk is full"})
    assert world.keeper.status()["error"] == "save: the disk is full"
    assert world.keeper.status()["last"]["save"]["name"] == "c"
    assert world.after(RETRY_S - 1) is None
    assert world.after(1) == "save"
    world.keeper.ended("save", GOOD)
    assert world.keeper.status()["error"] == ""


def test_a_prune_that_failed_is_told_and_the_save_beside_it_counts() -> None:
    world = World(every_s=100.0)
    world.table()
    assert world.after(100) == "save"
    world.keeper.ended("save", {**GOOD, "prune_error": "d cannot be pruned: Access Denied"})
    assert world.keeper.status()["error"] == "prune: d cannot be pruned: Access Denied"
    assert world.keeper.status()["last"]["save"]["name"] == "c"
    assert world.after(99) is None
    assert world.after(1) == "save"
    world.keeper.ended("save", {**GOOD, "prune_error": ""})
    assert world.keeper.status()["error"] == ""


def test_nothing_is_done_that_the_configuration_does_not_say() -> None:
    world = World()
    world.table()
    assert world.after(10_000) is None
    world.view = plan(world.view, Fail("s0"))
    assert world.after(10_000) is None


def test_what_was_restored_is_saved_soon() -> None:
    world = World(every_s=600.0)
    world.table()
    assert world.after(1) is None
    world.keeper.save_soon()
    assert world.after(1) == "save"
    world.keeper.ended("save", GOOD)
    assert world.after(599) is None
    assert World().after(10_000) is None


def test_lost_slots_are_restored_once_the_server_had_time_to_return() -> None:
    world = World(restore_lost=True)
    world.table()
    assert world.after(100) is None
    world.view = plan(world.view, Fail("s0"))
    assert world.after(0) is None
    assert world.after(LOST_WAIT_S - 1) is None
    back = plan(world.view, Return(Server("s0", 20, "h0")))
    world.view, gone = back, world.view  # it is back, and will be given its part
    assert world.after(0) == "restore"
    world.keeper.ended("restore", {"error": "it dies again"})
    world.view = gone
    assert world.after(RETRY_S) == "restore"
    world.keeper.ended("restore", {"error": "no table u in it"})
    assert world.after(RETRY_S - 1) is None
    assert world.after(1) == "restore"
    world.keeper.ended("restore", GOOD)
    whole = world.view
    world.view = replace(whole, servers=tuple(replace(s, alive=True) for s in whole.servers))
    assert world.after(1000) is None
    world.view = whole  # lost again: it waits again
    assert world.after(0) is None
    assert world.after(LOST_WAIT_S) == "restore"


def test_slots_that_somebody_is_restoring_are_left_to_him() -> None:
    world = World(restore_lost=True)
    world.table()
    saved = {
        "cluster": 9, "term_max": 5, "tables": [[1, "t", 1, TableSpec("t", 4).to_plain()]],
        "groups": [[1, "sharded", 1, 0, 64]],
    }  # fmt: skip
    restore = prepare(world.view, saved, replace_tables=True, accept_loss=False)
    world.view = restore.first
    assert world.view.lost()[64:].all()
    assert world.after(0) is None
    assert world.after(10_000) is None


def test_the_process_tells_its_error_in_one_sentence(tmp_path) -> None:
    order = {"what": "restore", "directory": str(tmp_path), "servers": [], "token": "t", "tls_ca": "", "cluster": 5}
    sentence = f"there is no checkpoint of this cluster in {tmp_path}"
    assert run_job(order) == {"error": sentence, "warnings": []}
    assert run_job({"what": "save"})["error"].startswith("its process ended with status 1: KeyError")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("os.kill(os.getpid(), 9)", "its process was ended by SIGKILL"),
        ("os.kill(os.getpid(), 35)", "its process was ended by signal 35"),
        ("os._exit(3)", "its process ended with status 3"),
        ("sys.exit('no room')", "its process ended with status 1: no room"),
        ("print('{')", "its process ended with status 0"),
    ],
)
def test_how_the_process_ended_is_told(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "COMMAND", [sys.executable, "-c", f"import os, sys; {code}"])
    assert run_job({}) == {"error": why}


def test_the_section_needs_a_place_and_keeps_urls(tmp_path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('[checkpoint]\ndirectory = "backups"\nevery_s = 60\n')
    config = load_config(path)
    assert config.checkpoint.directory == str(tmp_path / "backups")
    path.write_text('[checkpoint]\ndirectory = "memory://backups"\nrestore_lost = true\n')
    assert load_config(path).checkpoint.directory == "memory://backups"
    path.write_text(annotated(config))
    assert load_config(path) == config
    for wrong in ({"every_s": 5.0}, {"restore_lost": True}):
        with pytest.raises(ConfigError, match=r"checkpoint.every_s and checkpoint.restore_lost need"):
            Config().with_settings("checkpoint", **wrong)
