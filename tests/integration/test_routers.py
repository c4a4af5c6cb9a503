"""Routers beside a real cluster: started by `up`, shown by `status`, started again when killed, ended by `down`."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ps.rayhead import marked
from tests.integration.test_cluster import ROOT, Machine, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MAKE = "import sys; from pathlib import Path; from test_pipeline import publish; publish(Path('models'))"
PORTS = "[router]\nhttp_port = 0\ngrpc_port = 0\n"


def routers(user: Machine) -> list[dict[str, Any]]:
    return json.loads(user.embring("status", "--json").stdout)["routers"]


def serving(user: Machine, restarts: int) -> dict[str, Any] | None:
    """The first router's status once it serves in that life of it."""
    first = routers(user)[0]
    return first if (first["state"], first["restarts"]) == ("serving", restarts) else None


def test_a_killed_router_comes_back_and_all_end_with_the_cluster(tmp_path):
    user = Machine(tmp_path)
    helpers = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "router")])
    assert user.python(MAKE, PYTHONPATH=helpers).returncode == 0
    (tmp_path / "cluster.toml").write_text(PORTS)
    up = json.loads(
        user.embring(
            *("up", "--config", "cluster.toml", "--servers", "1", "--routers", "2", "--models", "models", "--json")
        ).stdout
    )
    mark = Path(user.runtime.scratch).name
    try:
        assert [r["name"] for r in up["routers"]] == ["router-0", "router-1"]
        assert all("unknown table 'user'" in r["waiting"] for r in up["routers"])
        with user.connect() as client:
            client.create_table("user", dim=4)
            client.create_table("words", dim=4)
        before = until(lambda: serving(user, 0), "the router to serve")
        (tmp_path / "rows.jsonl").write_text('{"user": 5, "words": "a b", "price": 2.5}\n')
        command = ("predict", "rows.jsonl", "--model", "ctr", "--router")
        score = user.embring(*command, before["http"]).stdout
        assert 0 < float(score) < 1
        os.kill(before["pid"], signal.SIGKILL)
        after = until(lambda: serving(user, 1), "the killed router to serve again")
        assert after["pid"] != before["pid"]
        assert routers(user)[1]["restarts"] == 0
        assert user.embring(*command, after["http"]).stdout == score
        shown = user.embring("status").stdout
        assert after["http"] in shown
        assert "router-1" in shown
        taken = user.embring("serve", "models", "--http-port", "0", "--grpc-port", "0", status=1).stderr
        assert "there is a router 'router-0' already" in taken
    finally:
        user.embring("down", "--yes")
    assert marked(mark) == []


def test_routers_that_cannot_be_had_are_refused_before_anything_starts(tmp_path):
    user = Machine(tmp_path)
    assert "routers need a models repository" in user.embring("up", "--routers", "1", status=2).stderr
    assert "there is no model repository" in user.embring("up", "--models", "nowhere", status=1).stderr
    assert "no cluster is running" in user.embring("status", status=1).stderr
