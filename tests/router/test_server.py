"""A router process without Ray: its doors, what it waits for, and what makes it give up."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import ps
from ps.errors import NotApplied
from router import server
from router.config import RouterSettings
from router.http_client import request_json
from router.server import RouterServer, RouterSetup
from tests.router.test_pipeline import DIM, FakeClient, columns, expected, publish

LIMIT_S = 60.0
STATUS = {"servers": [{"addresses": ["tcp:h:2"]}, {"addresses": ["tcp:h:3"]}]}
"""Of a cluster whose servers have begun again since the router was set up."""


class Cluster:
    """What routers connect to: a client's tables, and whether anybody answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dims: dict[str, int] = {"user": DIM, "words": DIM}
        self.refusals = 0
        self.asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr(ps.AsyncClient, "connect", self.connect)
        monkeypatch.setattr(server, "RETRY_S", 0.01)
        # grpc.aio serves one event loop of a process well, and a test has several.
        monkeypatch.setattr(server, "serve_grpc", self.serve)
        controller = SimpleNamespace(admin=SimpleNamespace(remote=lambda verb, fields: {"ok": STATUS}))
        ray = SimpleNamespace(get_actor=lambda name, namespace: controller, get=lambda answer, timeout: answer)
        monkeypatch.setattr(server, "ray", ray)

    async def serve(self, router: object, host: str, port: int) -> SimpleNamespace:
        return SimpleNamespace(port=1, stop=nothing)

    async def connect(self, addresses: tuple[str, ...], token: str, tls: str) -> FakeClient:
        self.asked.append((addresses, token, tls))
        if self.refusals:
            self.refusals -= 1
            raise NotApplied("nobody answers")
        client = FakeClient(self.dims)
        client.close = nothing  # type: ignore[attr-defined]
        return client


async def nothing() -> None:
    """Stop, or close, what needs neither."""


def started(setup: RouterSetup) -> RouterServer:
    """A router, as in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "REGISTRY", CollectorRegistry())
        return RouterServer(setup)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def setup(folder: Path, patient: bool = True, port: int = 0) -> RouterSetup:
    if not (folder / "models").exists():
        publish(folder / "models")
    return RouterSetup(
        name="router-0", actor="router:router-0", namespace="n", models_dir=str(folder / "models"),
        addresses=("tcp:h:1",), token="t", tls_ca="/ca", host="127.0.0.1", grpc_port=0, http_port=port,
        patient=patient, lives=str(folder / "lives"), log=str(folder / "log"),
        root=str(Path(server.__file__).parents[1]), settings=RouterSettings(),
    )  # fmt: skip


def until(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def get(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=LIMIT_S) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_patient_router_is_live_before_its_tables_are_made_and_ready_after(cluster, tmp_path):
    del cluster.dims["words"]
    router = started(setup(tmp_path))
    status = router.start()
    assert (status["state"], status["restarts"]) == ("waiting", 0)
    assert "table 'words' is unknown" in status["waiting"]
    assert get(status["http"], "/v2/health/live") == 200
    assert get(status["http"], "/v2/health/ready") == 503
    cluster.dims["words"] = DIM
    until(lambda: router.status()["state"] == "serving", "the router to serve")
    status = router.status()
    assert (status["waiting"], status["models"]) == ("", ["ctr"])
    assert get(status["http"], "/v2/health/ready") == 200
    rows = columns(3)
    body = json.dumps(request_json(rows)).encode()
    with urllib.request.urlopen(f"http://{status['http']}/v2/models/ctr/infer", body, timeout=LIMIT_S) as reply:
        scores = json.load(reply)["outputs"][0]["data"]
    assert scores == pytest.approx(expected(tmp_path / "models", rows).tolist(), abs=1e-5)
    assert cluster.asked == [(("tcp:h:1",), "t", "/ca")]


def test_one_that_is_not_says_why_it_cannot_serve(cluster, tmp_path):
    cluster.dims["user"] = DIM + 1
    status = started(setup(tmp_path, patient=False)).start()
    assert (status["state"], "table 'user' has dim 5" in status["waiting"]) == ("waiting", True)
    until(lambda: not open_at(status["http"]), "the doors to close")


def open_at(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), LIMIT_S).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_first_life_that_cannot_open_its_doors_gives_up_and_a_later_one_does_not(cluster, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        router = started(setup(tmp_path, port=port))
        status = router.start()
        assert (status["state"], status["http"], "address already in use" in status["waiting"]) == ("waiting", "", True)
        cluster.refusals = 2
        again = started(setup(tmp_path, port=port))
        assert again.start()["restarts"] == 1
        until(lambda: "address already in use" in again.status()["waiting"], "the third try")
    until(lambda: again.status()["state"] == "serving", "the port to be free")
    assert again.status()["http"] == f"127.0.0.1:{port}"
    first, *later = cluster.asked
    assert first[0] == ("tcp:h:1",)
    assert {addresses for addresses, *_ in later} == {("tcp:h:2", "tcp:h:3")}
    assert router.status()["state"] == "waiting"


def test_modules_from_elsewhere_are_refused(cluster, tmp_path):
    with pytest.raises(ps.ConfigError, match="a router found its modules in"):
        RouterServer(replace(setup(tmp_path), root=str(tmp_path)))
