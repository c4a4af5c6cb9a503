"""The blocking shell: what interrupts and a full window leave behind, and which connections are kept."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ps
from hashring.planner import Leave, plan
from hashring.view import Server
from ps.client import Client
from ps.client.core import Ask
from ps.client.flight import Flight
from ps.client.request import Call
from ps.fabric.blocking import BlockingConnection
from tests.ps.cluster_fixture import LocalCluster, local_cluster

ONES = np.ones((1, 4), np.float32)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("sockets")) as running:
        with running.client(timeout=60) as client:
            client.create_table("t", dim=4, optimizer=ps.SGD(lr=1.0), initializer=ps.Initializer(0.0, 0.0))
            client.push("t", [0], ONES)  # the first compiles kernels
        yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with cluster.client() as connected:
        yield connected


def interrupt_once(monkeypatch: pytest.MonkeyPatch, target: str, before: Any = lambda *given: None) -> None:
    """The next call of the target is broken off by Control-C, after `before` was called as the target is."""

    def broken_off(*given: Any) -> Any:
        monkeypatch.undo()
        before(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(target, broken_off)


@pytest.mark.parametrize("where", ["ps.client.flight.Flight._receive", "ps.fabric.blocking.BlockingConnection._write"])
def test_an_interrupted_push_is_over_though_its_traceback_is_kept(
    client: Client, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As `sys.last_value` and Jupyter keep it."""
    interrupt_once(monkeypatch, where)
    with pytest.raises(KeyboardInterrupt) as kept:
        client.push("t", [1], ONES)
    assert client.statistics().undecided == 0
    for _ in range(70):
        client.push("t", [2], ONES)
    assert kept.value.__traceback__ is not None


def test_an_interrupted_wait_for_an_open_push_is_told_by_its_handle_and_leaves_the_others(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = client.pull("t", [4])[0, 0]
    handles = [client.push_nowait("t", [4], -ONES) for _ in range(3)]
    interrupt_once(monkeypatch, "ps.client.flight.Flight._receive")
    with pytest.raises(KeyboardInterrupt):
        handles[0].result()
    assert handles[0].done
    with pytest.raises(ps.PerhapsApplied, match="broken off by KeyboardInterrupt"):
        handles[0].result()
    handles[2].result()
    client.flush()
    assert client.pull("t", [4])[0, 0] - before in (2.0, 3.0)
    assert client.statistics().undecided == 0


def test_an_interrupted_wait_for_room_ends_the_push_that_waited_and_the_one_it_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = [client.push_nowait("t", [5], ONES) for _ in range(64)]
    interrupt_once(monkeypatch, "ps.client.flight.Flight._receive")
    with pytest.raises(KeyboardInterrupt) as kept:
        client.push("t", [6], ONES)
    with pytest.raises(ps.PerhapsApplied, match="broken off"):
        client.flush()
    assert all(handle.done for handle in handles)
    assert client.statistics().undecided == 0
    del kept


def test_half_a_frame_is_not_completed_by_the_next(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the next push would else be taken for the rest of this one."""
    ids = np.arange(100, 1000)
    client.push("t", ids, np.zeros((len(ids), 4), np.float32))

    def half(connection: BlockingConnection, buffers: Any, until: float) -> None:
        assert connection._socket is not None
        whole = b"".join(bytes(b) for b in buffers)
        assert connection._socket.send(whole[: len(whole) // 2]) == len(whole) // 2

    interrupt_once(monkeypatch, "ps.fabric.blocking.BlockingConnection._write", half)
    with pytest.raises(KeyboardInterrupt):
        client.push("t", ids, np.full((len(ids), 4), 7.0, np.float32))
    client.push("t", ids, np.full((len(ids), 4), -1.0, np.float32))
    assert (client.pull("t", ids) == 1.0).all()


def test_a_connection_on_which_a_reply_was_interrupted_is_not_read_any_further(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were taken from the socket and not looked at are missing in what comes next, whoever waits for it."""
    client.push("t", [7], ONES)
    broken: list[Any] = []
    interrupt_once(monkeypatch, "ps.fabric.protocol.ClientSession.received", lambda session, n: broken.append(session))
    known = list(client._connections._open.values())
    with pytest.raises(KeyboardInterrupt):
        client.push("t", [7], ONES)
    assert [c._session for c in known if c.closed] == broken
    client.push("t", [7], ONES)


def test_a_cut_push_that_waits_for_room_is_not_waited_for(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds no place in the window itself: those behind it are to be decided."""
    monkeypatch.setattr("ps.client.verbs.CHUNK", 512)
    before = client.pull("t", np.arange(100))
    client.push_nowait("t", np.arange(100), -np.ones((100, 4), np.float32))
    for _ in range(63):
        client.push_nowait("t", [9], np.zeros((1, 4), np.float32))
    client.flush()
    np.testing.assert_array_equal(client.pull("t", np.arange(100)), before + 1)


def test_whoever_hangs_while_it_is_connected_to_leaves_time_for_the_others(
    cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    """As a stopped process does, whose host takes connections for it."""

    def ask() -> Any:
        calls = [Call(s, s, "ping", {}, {}) for s in range(3)]
        return (yield Ask(servers, calls, lambda s, reply: answered.append(s), time.monotonic() + 3.0))

    answered: list[int] = []
    hung = Server("hung", 1, "h", addresses=(f"unix:{tmp_path}/hung",))
    servers = [hung, *client._verbs.routing.servers[:2]]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/hung")
        silent.listen(8)
        failed = client._run(ask())
    assert sorted(answered) == [1, 2]
    assert list(failed) == [0]


def test_connections_to_whoever_no_view_names_any_more_are_closed(cluster: LocalCluster, client: Client) -> None:
    for server in client._verbs.routing.servers:
        client._connections.of(server, time.monotonic() + 20)
    before = {name: connection for (name, _), connection in client._connections._open.items()}
    client._verbs.adopt(plan(cluster.view, Leave(("s1",))))
    assert {name for name, _ in client._connections._open} == {"s0", "s2"}
    assert [name for name, connection in before.items() if not connection.closed] == ["s0", "s2"]


def test_a_flight_that_was_done_before_a_fork_is_given_to_the_child() -> None:
    flight = Flight(None, lambda: None, (x for x in ()))  # type: ignore[arg-type]
    flight.start()
    assert flight.done
    client = object.__new__(Client)
    client._connections = object()  # type: ignore[assignment]
    client._turn = threading.RLock()
    assert client._finish(flight) is None
