"""A real cluster on a real Ray: started, used, broken, recovered, ended; nothing is left behind."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ps
from ps.rayhead import marked
from ps.runtime import Runtime, read_runtime
from tests.certificates import certificate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
KERNELS = os.environ.get("NUMBA_CACHE_DIR") or str(Path.home() / ".cache" / "embring" / "kernels")
DEADLINE_S = 90.0


ASKER = """
import json, sys
from ps.cluster import controller, find
from ps.errors import EmbringError
with controller(find()) as ask:
    for _ in sys.stdin:
        try:
            print(json.dumps(ask("status")), flush=True)
        except EmbringError as error:
            print(json.dumps({"servers": [], "error": str(error)}), flush=True)
"""


class Machine:
    """A user with a home folder of his own, and the commands he runs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("EMBRING_", "RAY_", "XDG_"))}
        self.environment = {
            **inherited, "HOME": str(home), "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": KERNELS, "COLUMNS": "200",
        }  # fmt: skip
        self._asker: subprocess.Popen[str] | None = None

    def embring(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the command, stdin closed, and hold it to its exit status."""
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", *arguments], cwd=self.home, env=self.environment, timeout=200,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def python(self, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program as this user."""
        return subprocess.run(
            [sys.executable, "-c", program], cwd=self.home, env={**self.environment, **environment}, timeout=100,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """The status record, of a program that goes on asking: each `embring status` would join Ray anew."""
        if self._asker is None or self._asker.poll() is not None:
            self._asker = subprocess.Popen(
                [sys.executable, "-c", ASKER], cwd=self.home, env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self._asker.stdin is not None
        assert self._asker.stdout is not None
        print(file=self._asker.stdin, flush=True)
        told = next((line for line in self._asker.stdout if line.startswith("{")), '{"servers": []}')
        return json.loads(told)

    def close(self) -> None:
        """End the program that asks."""
        if self._asker is not None:
            self._asker.communicate()
            self._asker = None

    @property
    def runtime(self) -> Runtime:
        """What the runtime file says."""
        return read_runtime(self.home / ".cache" / "embring" / "cluster.json")

    def connect(self) -> Any:
        """A client over TCP, with nothing but addresses and a token."""
        addresses = [a for a in self.runtime.addresses if a.startswith("tcp:")]
        token, ca = Path(self.runtime.token_path).read_text(), self.runtime.tls_ca
        return ps.connect(",".join(addresses), token=token, timeout=120.0, tls=ca or None)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    here = Machine(tmp_path_factory.mktemp("home"))
    # A folder beside the user that is named like one of ours must not shadow it.
    (here.home / "ps").mkdir()
    (here.home / "router").mkdir()
    (here.home / "router" / "__init__.py").write_text("raise SystemError('shadowed')")
    # Over TLS, but for the Unix sockets; the last test has a cluster without it.
    tls = certificate(here.home / "tls", "127.0.0.1")
    (here.home / "cluster.toml").write_text(f"[tls]\ncertificate = {tls.certificate!r}\nkey = 'tls/key.pem'\n")
    told = here.embring("up", "--servers", "3", "--config", "cluster.toml").stderr.splitlines()
    assert told[:3] == ["starting Ray", "loading kernels", "starting the controller"] or "compiling" in told[2]
    yield here
    here.close()
    here.embring("down", "--yes")


def until(check: Callable[[], Any], what: str) -> Any:
    """Ask again until `check` gives something true, within the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if result := check():
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {DEADLINE_S:.0f} s")


def test_files_are_private_and_a_second_up_is_refused(machine):
    runtime = machine.runtime
    for path in (runtime.token_path, runtime.ray_token_path, machine.home / ".cache" / "embring" / "cluster.json"):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    for folder in (runtime.state, runtime.scratch):
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
    token = Path(runtime.token_path).read_text()
    for pid in marked(Path(runtime.scratch).name):
        assert token not in Path(f"/proc/{pid}/cmdline").read_text()
    assert "a cluster is already running" in machine.embring("up", status=1).stderr


def test_a_stranger_without_the_token_is_turned_away(machine, tmp_path):
    stranger = Machine(tmp_path)
    program = (
        f"import ray; ray.init(address={machine.runtime.ray_address!r}, log_to_driver=False, namespace='embring')\n"
        "print('JOINED', ray.get_actor('controller'))"
    )
    keys = ({}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    with ThreadPoolExecutor() as pool:  # each gives up after some seconds only
        tries = pool.map(lambda key: stranger.python(program, **key, RAY_NUM_REDIS_GET_RETRIES="2"), keys)
        for done in tries:
            assert done.returncode != 0
            assert "JOINED" not in done.stdout
    known = machine.python(program, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=machine.runtime.ray_token_path)
    assert "JOINED" in known.stdout, known.stderr[-2000:]
    addresses = [a for a in machine.runtime.addresses if a.startswith("tcp:")]
    with pytest.raises(ps.AuthError):
        ps.connect(addresses[0], token="wrong", timeout=5.0, tls=machine.runtime.tls_ca)
    with pytest.raises(ps.ConfigError, match="speaks TLS"):
        ps.connect(addresses[0], token="wrong", timeout=60.0)


def test_tables_rows_and_status(machine):
    ids = np.arange(5000, dtype=np.int64)
    with machine.connect() as client:
        client.create_table("item", dim=8, optimizer=ps.SGD(lr=1.0))
        client.assign("item", ids, np.repeat(ids[:, None], 8, axis=1).astype(np.float32))
        client.push("item", ids, np.ones((5000, 8), np.float32))
        np.testing.assert_array_equal(client.pull("item", ids)[:, 3], ids - 1)
        client.create_table("item", dim=8, optimizer=ps.SGD(lr=1.0))
        with pytest.raises(ps.RequestError, match="its dim is 8, asked was 9"):
            client.create_table("item", dim=9, optimizer=ps.SGD(lr=1.0))
        client.create_table("whole", dim=4, placement="whole")
        client.push("whole", ids[:10], np.ones((10, 4), np.float32))

    def counted() -> dict[str, Any] | None:
        record = machine.status()
        return record if sum(s.get("rows", 0) for s in record["servers"]) == 5010 else None

    record = until(counted, "5,010 rows in the status")
    assert [s["state"] for s in record["servers"]] == ["alive"] * 3
    assert record["slots_lost"] == 0
    assert sum(s["slots"] for s in record["servers"]) == 2**14 + 1
    assert all(s["rows"] > 1000 for s in record["servers"])
    text = machine.embring("status").stdout
    assert "server-2" in text
    assert "item" in text
    metrics = machine.python(
        f"import urllib.request as u; print(u.urlopen({record['metrics']!r}).read().decode())"
    ).stdout
    assert 'embring_server_up{server="server-0"} 1.0' in metrics
    assert "embring_slots_lost 0.0" in metrics


def test_logs_of_every_process(machine):
    assert "listens on" in machine.embring("logs", "server-0").stdout
    assert "epoch 1: 3 servers" in machine.embring("logs", "controller").stdout
    assert "there is no log of 'nobody'" in machine.embring("logs", "nobody", status=1).stderr


def test_a_stopped_server_is_called_silent_and_loses_nothing(machine):
    victim = machine.status()["servers"][0]
    os.kill(victim["pid"], signal.SIGSTOP)
    try:
        until(lambda: machine.status()["servers"][0]["state"] == "silent", "the silence of a stopped server")
        assert machine.status()["slots_lost"] == 0
    finally:
        os.kill(victim["pid"], signal.SIGCONT)
    until(lambda: machine.status()["servers"][0]["state"] == "alive", "the return of a stopped server")
    assert machine.status()["servers"][0]["incarnation"] == victim["incarnation"]


def test_a_killed_server_loses_its_slots_until_they_are_recovered(machine, tmp_path):
    """kill -9: the rows of its slots are gone, and nobody is given initial rows for what was trained."""
    ids = np.arange(5000, dtype=np.int64)
    saves = str(tmp_path / "saves")
    machine.embring("checkpoint", "save", saves, "--name", "before")
    victim = machine.status()["servers"][1]
    with machine.connect() as client:
        client.push("item", ids[:50], np.ones((50, 8), np.float32))
        machine.embring("checkpoint", "save", saves, "--incremental")
        assert "2 of 2 checkpoints are sound" in machine.embring("checkpoint", "verify", saves).stdout
        before = client.pull("item", ids)
        machine.embring("table", "export", "item", str(tmp_path / "item.parquet"))
        told = machine.embring("table", "import", "item", str(tmp_path / "item.parquet"), "--json").stdout
        assert json.loads(told)["rows"] == 5000
        np.testing.assert_array_equal(client.pull("item", ids), before)
        os.kill(victim["pid"], signal.SIGKILL)

        def restarted() -> bool:
            now = machine.status()["servers"][1]
            return now["state"] == "alive" and now["incarnation"] != victim["incarnation"] and now["slots"] == 0

        until(restarted, "the restart of the server, owning nothing")
        assert machine.status()["slots_lost"] == victim["slots"]
        with pytest.raises(ps.SlotsLost):
            client.pull("item", ids)
        with pytest.raises(ps.SlotsLost):
            client.push("item", ids, np.zeros((5000, 8), np.float32))
        kept = ids[[_answers(client, i) for i in ids[:200]].index(True)]
        np.testing.assert_array_equal(client.pull("item", np.array([kept])), before[[kept]])

        assert f"{victim['slots']} slots are lost" in machine.embring("recover", status=1).stderr
        assert "are lost" in machine.embring("status").stdout
        machine.embring("checkpoint", "restore", saves)
        assert machine.status()["slots_lost"] == 0
        np.testing.assert_array_equal(client.pull("item", ids), before)

        os.kill(machine.status()["servers"][2]["pid"], signal.SIGKILL)
        until(lambda: machine.status()["slots_lost"] > 0, "the loss of slots")
        machine.embring("recover", "--accept-loss")
        assert machine.status()["slots_lost"] == 0
        after = client.pull("item", ids)
        assert 1000 < client.last_absent < 3000
        assert (after == before).all(axis=1).sum() == 5000 - client.last_absent


def _answers(client: Any, number: int) -> bool:
    try:
        client.pull("item", np.array([number], np.int64))
    except ps.SlotsLost:
        return False
    return True


def test_the_controller_comes_back_and_finds_the_servers(machine):
    def all_there() -> dict[str, Any] | None:
        record = machine.status()
        return record if [s["state"] for s in record["servers"]] == ["alive"] * 3 else None

    before = until(all_there, "the start of every server")
    controller = machine.python(
        "import os; from pathlib import Path\n"
        f"from ps.rayhead import marked\n"
        f"for pid in marked({Path(machine.runtime.scratch).name!r}):\n"
        "    if 'ray::Controller' in Path(f'/proc/{pid}/cmdline').read_text(): print(pid)"
    )
    os.kill(int(controller.stdout), signal.SIGKILL)

    after = until(all_there, "the controller's return")
    assert [s["incarnation"] for s in after["servers"]] == [s["incarnation"] for s in before["servers"]]
    assert (after["cluster"], after["slots_lost"]) == (before["cluster"], 0)
    with machine.connect() as client:
        client.create_table("afterwards", dim=4)
        client.drop_table("afterwards")


class Load:
    """Pushes one after another and pulls beside them, until `end`. Every push takes 1 from each row."""

    def __init__(self, machine: Machine, table: str, ids: np.ndarray) -> None:
        self.acknowledged: list[float] = []
        self.pulls = 0
        self.failures: list[Exception] = []
        self._machine, self._table, self._ids = machine, table, ids
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in (self._push, self._pull)]
        for thread in self._threads:
            thread.start()

    def _run(self, work: Callable[[Any], None]) -> None:
        try:
            with self._machine.connect() as client:
                while not self._over.is_set():
                    work(client)
        except Exception as error:
            self.failures.append(error)

    def _push(self, client: Any) -> None:
        client.push(self._table, self._ids, np.ones((len(self._ids), 2), np.float32), timeout=60.0)
        self.acknowledged.append(time.monotonic())

    def _pull(self, client: Any) -> None:
        before = len(self.acknowledged)
        rows = client.pull(self._table, self._ids, timeout=8.0)
        assert rows.max() <= -before, "an acknowledged push is not seen"
        self.pulls += 1

    def end(self) -> None:
        """Let what is under way be decided."""
        self._over.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def test_a_killed_primary_costs_no_push_and_no_read(machine):
    """kill -9 under load, with two copies: all goes on, nothing acknowledged is lost, and the copies are made anew."""
    ids = np.arange(2000, dtype=np.int64)
    with machine.connect() as client:
        for table in client.tables():
            client.drop_table(table)
        client.create_table(
            "counted", dim=2, optimizer=ps.SGD(lr=1.0), initializer=ps.Initializer(0.0, 0.0), replicas=2
        )
    assert machine.status()["slots_under_replicated"] == 0
    load = Load(machine, "counted", ids)
    try:
        until(lambda: len(load.acknowledged) >= 20 or load.failures, "the first pushes")
        victim = max(machine.status()["servers"], key=lambda s: s["slots"])
        assert victim["slots"] > 4000
        killed = time.monotonic()
        os.kill(victim["pid"], signal.SIGKILL)
        until(lambda: load.acknowledged[-1] > killed + 0.5 or load.failures, "pushes after the kill")
        until(
            lambda: machine.status()["slots_under_replicated"] > 0 or load.failures, "the lack of copies in the status"
        )

        def mended() -> bool:
            now = machine.status()
            states = [s["state"] for s in now["servers"]]
            return bool(load.failures) or (states == ["alive"] * 3 and now["slots_under_replicated"] == 0)

        until(mended, "new copies")
    finally:
        load.end()
    assert load.failures == []
    assert load.pulls > 0
    gap = max(np.diff([t for t in load.acknowledged if t > killed - 1]))
    print(f"{len(load.acknowledged)} pushes, {load.pulls} pulls, longest wait for a push {gap:.2f} s")
    assert gap < 15
    assert machine.status()["slots_lost"] == 0
    with machine.connect() as client:
        np.testing.assert_array_equal(client.pull("counted", ids), -len(load.acknowledged))


def test_a_server_is_declared_dead(machine):
    ids = np.arange(2000, dtype=np.int64)
    with machine.connect() as client:
        before = client.pull("counted", ids)
        client.create_table("single", dim=2)
        victim = machine.status()["servers"][0]
        assert "say --yes" in machine.embring("failover", "server-0", status=1).stderr
        assert "say --force" in machine.embring("failover", "server-0", "--yes", status=1).stderr
        assert "no living server is named 'nobody'" in machine.embring("failover", "nobody", "-y", status=1).stderr
        client.drop_table("single")
        assert "server-0 is declared dead" in machine.embring("failover", "server-0", "--yes").stdout

        def another() -> dict[str, Any] | None:
            now = machine.status()["servers"][0]
            return now if now["state"] == "alive" and now["incarnation"] != victim["incarnation"] else None

        now = until(another, "another process of the name")
        assert machine.status()["slots_lost"] == 0
        np.testing.assert_array_equal(client.pull("counted", ids), before)
    # Who rested meanwhile finds it at the old port, and who begins, by the runtime file.
    assert now["addresses"][0] == victim["addresses"][0]
    until(lambda: set(now["addresses"]) <= set(machine.runtime.addresses), "its addresses in the runtime file")


def test_servers_join_and_leave_under_load(machine):
    """3 -> 4 -> 3 servers, two copies: nothing fails or is lost, and no more is copied than a join and a leave take."""
    rows = 200_000
    ids = np.arange(rows, dtype=np.int64)
    with machine.connect() as client:
        for table in client.tables():
            client.drop_table(table)
        client.create_table("moved", dim=2, optimizer=ps.SGD(lr=1.0), initializer=ps.Initializer(0, 0), replicas=2)
        for part in np.array_split(ids, 4):
            client.assign("moved", part, np.zeros((len(part), 2), np.float32))
    record = until(lambda: _whole(machine, rows * 2), "two copies of every row in the status")
    before = {s["name"]: s["bytes"] for s in record["servers"]}
    _refused_moves(machine)
    outlook = json.loads(machine.embring("add-server", "--dry-run", "--json").stdout)
    assert outlook["names"] == ["server-3"]
    assert abs(outlook["rows"] - rows / 2) < 0.02 * rows
    load = Load(machine, "moved", ids[::100])
    try:
        until(lambda: len(load.acknowledged) >= 10 or load.failures, "the first pushes")
        told = json.loads(machine.embring("add-server", "--max-bandwidth", "20", "--json").stdout)
        assert told["servers"] == [f"server-{i}" for i in range(4)]
        record = until(lambda: _whole(machine, rows * 2, before), "less memory of the old owners")
        newcomer = record["servers"][3]
        assert told["rows_copied"] <= 1.01 * newcomer["rows"]
        assert 0 < newcomer["rows"] <= 1.01 * rows * 2 / 4
        for key in ("slots", "copies"):
            assert max(s[key] for s in record["servers"]) <= 1.02 * sum(s[key] for s in record["servers"]) / 4
        compared = json.loads(machine.embring("verify", "--json").stdout)
        assert (compared["good"], compared["single"]) == (True, 0)
        told = json.loads(machine.embring("remove-server", "server-3", "--yes", "--json").stdout)
        assert told["servers"] == ["server-0", "server-1", "server-2"]
        assert told["rows_copied"] <= 1.01 * newcomer["rows"]
        assert not Path(f"/proc/{newcomer['pid']}").exists()
    finally:
        load.end()
    assert load.failures == []
    assert json.loads(machine.embring("verify", "--json").stdout)["good"]
    assert "replicas 3" in machine.embring("table", "alter", "moved", "--replicas", "3").stdout
    until(lambda: _whole(machine, rows * 3), "three copies of every row")
    placed = machine.embring("table", "alter", "moved", "--placement", "whole", "--replicas", "1").stdout
    assert "placement whole" in placed
    until(lambda: _whole(machine, rows), "one copy of every row")
    assert sorted(s["rows"] for s in machine.status()["servers"]) == [0, 0, rows]
    with machine.connect() as client:  # the runtime file names the servers that there are
        expected = np.where(ids % 100 == 0, -len(load.acknowledged), 0)
        for part in np.array_split(ids, 4):
            np.testing.assert_array_equal(client.pull("moved", part)[:, 1], expected[part])


def _whole(machine: Machine, rows: int, bytes_before: dict[str, int] | None = None) -> dict[str, Any] | None:
    """The status, once all servers told their figures, hold so many rows, and those of before a tenth less bytes."""
    record = machine.status()
    if not all("bytes" in s for s in record["servers"]):  # one that has just joined was not asked yet
        return None
    smaller = all(s["bytes"] < 0.9 * (bytes_before or {}).get(s["name"], 2**60) for s in record["servers"])
    return record if smaller and sum(s["rows"] for s in record["servers"]) == rows else None


def _refused_moves(machine: Machine) -> None:
    for arguments, sentence in (
        (("add-server", "server-1"), "server 'server-1' is in the view already"),
        (("remove-server", "nobody"), "no server is named 'nobody'; the servers are server-0, server-1, server-2"),
        (("remove-server", "server-0", "server-1"), "would leave 1 server, fewer than replicas = 2"),
    ):
        assert sentence in machine.embring(*arguments, status=1).stderr


def test_nothing_is_left_after_down(tmp_path):
    """Also with a head that was killed: servers answer without it, their rows can be saved, `down` ends what it left,
    and the next `up` knows that rows are lost until they are restored."""
    user = Machine(tmp_path)
    user.embring("up", "--servers", "1")
    runtime = user.runtime
    mark = Path(runtime.scratch).name
    with user.connect() as client:
        client.create_table("item", dim=4)
        client.push("item", [1, 2], np.ones((2, 4), np.float32))
        rows = client.pull("item", [1, 2])
    assert len(marked(mark)) >= 4
    assert "say --yes" in user.embring("down", status=1).stderr
    os.kill(runtime.head_pid, signal.SIGKILL)
    until(lambda: "has died" in _stderr(user, "status"), "the head's end")
    assert "has died" in user.embring("up", status=1).stderr
    (tmp_path / "models" / "ctr" / "4").mkdir(parents=True)
    user.embring("checkpoint", "save", str(tmp_path / "saved"), "--models", str(tmp_path / "models"))
    assert "ctr 4" in user.embring("checkpoint", "list", str(tmp_path / "saved")).stdout
    assert "say --yes" in user.embring("down", status=1).stderr  # servers live on, and have every row
    assert marked(mark)
    assert "ended what a dead cluster had left" in user.embring("down", "--yes").stdout
    assert marked(mark) == []
    assert not Path(runtime.scratch).exists()
    user.embring("up", "--servers", "1")
    record = json.loads(user.embring("status", "--json").stdout)
    assert (record["cluster"], record["slots_lost"]) == (runtime.cluster, 2**14)
    assert [t["name"] for t in record["tables"]] == ["item"]
    told = user.embring("checkpoint", "restore", str(tmp_path / "saved")).stdout
    assert "they go with the models ctr 4" in told
    with user.connect() as client:
        np.testing.assert_array_equal(client.pull("item", [1, 2]), rows)
    mark = Path(user.runtime.scratch).name
    user.embring("down", "--yes")
    assert marked(mark) == []
    assert not (tmp_path / ".cache" / "embring" / "cluster.json").exists()


def _stderr(user: Machine, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments], cwd=user.home, env=user.environment, timeout=100,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    ).stderr  # fmt: skip
