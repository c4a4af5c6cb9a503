"""Starting a cluster, without one: what is tried again, what is waited for, what the user is told."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ps import cluster, rayhead
from ps.config import Config, RayConfig
from ps.errors import ConfigError
from ps.rayhead import Head, StartError, ray_environment, start_head

HEAD = Head(1, 2, "127.0.0.1:3")


@pytest.mark.parametrize(("lasted_s", "tries"), [(rayhead.RAYS_OWN_S + 1, 2), (1.0, 1)])
def test_a_head_that_met_a_deadline_of_rays_own_is_started_once_more(monkeypatch, tmp_path, lasted_s, tries):
    clock = SimpleNamespace(now=0.0)
    begun: list[Path] = []

    def start(config, *, scratch, **_):
        begun.append(scratch)
        assert not (scratch / "ray").exists()
        if len(begun) < tries or tries == 1:
            (scratch / "ray").mkdir()
            clock.now += lasted_s
            raise StartError("the current node timed out during startup")
        return HEAD

    monkeypatch.setattr(rayhead, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(rayhead, "_start_head", start)
    places = {"token_path": tmp_path / "t", "scratch": tmp_path, "folder": tmp_path, "mark": "m"}
    if tries == 1:
        with pytest.raises(StartError, match="timed out during startup"):
            start_head(RayConfig(), **places)
    else:
        assert start_head(RayConfig(), **places) == HEAD
    assert len(begun) == tries


def test_rays_own_deadlines_are_no_shorter_than_ours():
    environment = ray_environment(RayConfig(), "/t")
    assert float(environment["RAY_worker_register_timeout_seconds"]) >= rayhead.START_TIMEOUT_S
    assert float(environment["RAY_agent_register_timeout_ms"]) >= 1000 * rayhead.START_TIMEOUT_S
    assert int(environment["RAY_worker_maximum_startup_concurrency"]) >= 2


def test_whoever_waits_for_another_waits_longer():
    from ps import server
    from ps.controller import actor, members

    assert server.OPEN_TIMEOUT_S < members.START_TIMEOUT_S < actor.START_TIMEOUT_S < cluster.START_TIMEOUT_S


def program(text: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE)


def test_kernels_that_are_not_loaded_soon_are_said_to_be_compiled(monkeypatch, tmp_path):
    said: list[str] = []
    cluster._finish_warm_up(program(""), tmp_path, said.append)
    assert said == []
    monkeypatch.setattr(cluster, "LOADING_S", 0.01)
    waits = program("input()")
    cluster._finish_warm_up(waits, tmp_path, lambda line: (said.append(line), waits.communicate(b"\n")))
    assert [line.split(":")[0] for line in said] == ["compiling kernels"]
    with pytest.raises(StartError, match=rf"did not compile \(status 3\); see {tmp_path}/kernels\.log"):
        cluster._finish_warm_up(program("raise SystemExit(3)"), tmp_path, said.append)
    monkeypatch.setattr(cluster, "KERNELS_TIMEOUT_S", 0.01)
    stuck = program("input()")
    with pytest.raises(StartError, match="did not compile within 0 s"):
        cluster._finish_warm_up(stuck, tmp_path, said.append)
    assert stuck.poll() is not None


class Controller:
    """A controller whose servers come up one at a look, in Ray's words."""

    def __init__(self, servers: int) -> None:
        self.states = ["starting"] * servers
        self.start = SimpleNamespace(remote=lambda: "start")
        self.status = SimpleNamespace(remote=lambda: "status")

    def wait(self, references, timeout):
        (one,) = references
        return ([], references) if one == "start" and "starting" in self.states else (references, [])

    def get(self, reference, timeout=None):
        status = {"servers": [{"state": s} for s in self.states]}
        if reference == "status" and "starting" in self.states:
            self.states[self.states.index("starting")] = "alive"
        return status


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"address": "nohost"}, "address 'nohost' is none"),
        ({"address": "unix:/ray"}, "address 'unix:/ray' is no Ray's; write HOST:PORT"),
        ({"address": "127.0.0.1:1"}, "no Ray answers at 127.0.0.1:1: Connection refused"),
        ({"state": Path("/proc/x")}, "state folder /proc/x cannot be made"),
        ({"scratch": "/nonexistent"}, "ray.scratch is '/nonexistent', where nothing can be made"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_started(monkeypatch, tmp_path, given, message):
    def nothing(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr(cluster, "_warm_up", nothing)
    config = Config().with_settings("ray", scratch=given.pop("scratch", str(tmp_path)))
    with pytest.raises(ConfigError, match=message):
        cluster.start(config, runtime_file=tmp_path / "cluster.json", **{"state": tmp_path / "state", **given})


def test_each_server_that_is_up_is_told_of(monkeypatch):
    controller = Controller(3)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(wait=controller.wait, get=controller.get))
    said: list[str] = []
    began = time.monotonic()
    status = cluster._started(controller, 3, said.append)
    assert time.monotonic() - began < cluster.START_TIMEOUT_S
    assert [s["state"] for s in status["servers"]] == ["alive"] * 3
    assert said == [f"starting servers: {k} of 3 are up" for k in range(3)]
