"""Starting a cluster, without one: what is tried again, what is waited for, what the user is told."""

import ctypes
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from ps import cluster, rayhead
from ps.checkpoint.storage import CheckpointError
from ps.config import Config, RayConfig
from ps.errors import ConfigError, EmbringError, NotApplied, PerhapsApplied
from ps.rayhead import Head, StartError, ray_environment, start_head

HEAD = Head(1, 2, "127.0.0.1:3")
TAKEN = -1
"""A port that somebody else listens on."""


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
        ({"ray": {"scratch": "/nonexistent"}}, "ray.scratch is '/nonexistent', where nothing can be made"),
        ({"server": {"host": "192.0.2.1"}}, "server.host: cannot listen on 192.0.2.1:0: Cannot assign requested"),
        ({"server": {"host": "a..b"}}, "server.host: cannot listen on a..b:0: no host can have that name"),
        ({"server": {"port": TAKEN}}, "server.port: cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ({"server": {"host": "node", "port": TAKEN}}, "server.port: cannot listen on 0.0.0.0:{taken}: Address already"),
        ({"ray": {"port": TAKEN}}, "ray.port: cannot listen on 0.0.0.0:{taken}: Address already in use"),
        ({"control": {"metrics_port": TAKEN}}, "control.metrics_port: cannot listen on 127.0.0.1:{taken}: Address"),
        ({"router": {"models": "m", "http_port": TAKEN}}, "router.http_port: cannot listen on 127.0.0.1:{taken}"),
        ({"checkpoint": {"directory": "/proc/x", "every_s": 60}}, "/proc/x cannot be written: No such file"),
        ({"checkpoint": {"directory": "nowhere://x"}}, "nowhere://x cannot be reached: Protocol not known"),
        ({"checkpoint": {"directory": "memory://x"}}, "memory:// is the memory of one process, and gone with it"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_started(monkeypatch, tmp_path, given, message):
    def nothing(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr(cluster, "_warm_up", nothing)
    config, options = Config().with_settings("ray", scratch=str(tmp_path)), {"state": tmp_path / "state"}
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for key, value in given.items():
            if isinstance(value, dict):
                config = config.with_settings(key, **{k: taken if v == TAKEN else v for k, v in value.items()})
            else:
                options[key] = value
        with pytest.raises((ConfigError, CheckpointError), match=re.escape(message.format(taken=taken))):
            cluster.start(config, runtime_file=tmp_path / "cluster.json", **options)


def test_what_is_free_or_not_asked_for_is_no_reason_to_refuse(monkeypatch, tmp_path):
    """A folder that is only restored from may be read-only; what other hosts of a Ray listen on is theirs."""
    monkeypatch.setattr(cluster, "_reach", lambda address: None)
    archive = Config().with_settings("checkpoint", directory="/proc/x")
    cluster._refuse_what_cannot_work(archive, None)
    elsewhere = archive.with_settings("server", host="192.0.2.1")
    cluster._refuse_what_cannot_work(elsewhere, "10.0.0.1:6379")
    folder = tmp_path / "new" / "backups"
    saving = Config().with_settings("checkpoint", directory=str(folder), every_s=60)
    cluster._refuse_what_cannot_work(saving, None)
    assert list(folder.iterdir()) == []


def test_each_server_that_is_up_is_told_of(monkeypatch):
    controller = Controller(3)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(wait=controller.wait, get=controller.get))
    said: list[str] = []
    began = time.monotonic()
    status = cluster._started(controller, 3, said.append)
    assert time.monotonic() - began < cluster.START_TIMEOUT_S
    assert [s["state"] for s in status["servers"]] == ["alive"] * 3
    assert said == [f"starting servers: {k} of 3 are up" for k in range(3)]


@pytest.mark.parametrize("taken", ["by Python", "beneath it"])
def test_sigterm_stays_with_the_command_whatever_ray_does_with_it(taken: str) -> None:
    """Ray's own code sets it as the kernel's default again, which Python does not know of."""
    met: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: met.append(number))
    try:
        with cluster._sigterm_kept():
            if taken == "by Python":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            else:
                libc = ctypes.CDLL(None)
                libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
                libc.signal(signal.SIGTERM, None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert met == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


class RayError(Exception):
    """Stands for Ray's."""


@pytest.mark.parametrize(
    ("verb", "failing", "raised"),
    [
        ("move", "admin", PerhapsApplied),
        ("move", "status", NotApplied),
        ("status", "admin", NotApplied),
        ("outlook", "admin", NotApplied),
    ],
)
def test_not_done_is_said_only_where_the_controller_did_not_hear_of_it(monkeypatch, verb, failing, raised):
    """A controller that does not answer may have logged what was asked for, and do it."""

    def get(reference, timeout):
        if reference == failing:
            raise RayError("the actor is unavailable")
        return {"ok": {}}

    actor = SimpleNamespace(
        status=SimpleNamespace(remote=lambda: "status"), admin=SimpleNamespace(remote=lambda verb, fields: "admin")
    )
    ray = SimpleNamespace(
        get_actor=lambda name, namespace: actor, get=get, exceptions=SimpleNamespace(RayError=RayError)
    )
    monkeypatch.setattr(cluster, "_driver", lambda runtime: nullcontext())
    importlib.import_module("ps.server")  # with the real Ray
    monkeypatch.setitem(sys.modules, "ray", ray)
    with cluster.controller(SimpleNamespace(namespace="n")) as ask:
        with pytest.raises(EmbringError, match="the actor is unavailable") as error:
            ask(verb)
        assert type(error.value) is raised
        failing = ""
        assert ask(verb) == {}
