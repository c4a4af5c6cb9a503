"""The asyncio shell: how long a task waits for another's attempt to connect, and which connections are kept."""

import asyncio
import socket
import time
from pathlib import Path

import pytest

import ps
from hashring.planner import Leave, plan
from hashring.view import Server
from ps.client import AsyncClient
from ps.client.aio import _Connections
from ps.client.verbs import Verbs
from tests.ps.cluster_fixture import local_cluster


def test_whoever_waits_for_anothers_attempt_to_connect_waits_no_longer_than_it_has_time(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        connections = _Connections("", None, Verbs([]))
        patient = asyncio.ensure_future(connections.of(server, time.monotonic() + 60))
        await asyncio.sleep(0)
        hurried = [asyncio.ensure_future(connections.of(server, time.monotonic() + left)) for left in (0.0, 0.05)]
        done, _ = await asyncio.wait(hurried, timeout=20)
        assert done == set(hurried)
        for task in hurried:
            assert type(task.exception()) is ps.NotApplied
            assert str(task.exception()) == "server 's0' could not be reached in time"
        assert not patient.done()
        patient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await patient
        with pytest.raises(ps.NotApplied, match="did not answer the handshake"):  # whose turn it is now
            await connections.of(server, time.monotonic() + 0.05)

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen(8)  # takes connections and never answers, as a stopped process does
        asyncio.run(test(Server("s0", 5, "h", addresses=(f"unix:{tmp_path}/silent",))))


def test_connections_to_whoever_no_view_names_any_more_are_closed(tmp_path: Path) -> None:
    with local_cluster(tmp_path) as cluster:

        async def test(client: AsyncClient) -> None:
            for server in client._verbs.routing.servers:
                await client._connections.of(server, time.monotonic() + 20)
            connections = client._connections
            before = {name: connection for (name, _), connection in connections._open.items()}
            gone = cluster.view.servers[1]
            client._verbs.adopt(plan(cluster.view, Leave((gone.name,))))
            assert {name for name, _ in connections._open} == {"s0", "s2"} == {name for name, _ in connections._making}
            assert [name for name, connection in before.items() if not connection.closed] == ["s0", "s2"]

        async def run() -> None:
            async with await cluster.async_client() as client:
                await test(client)

        asyncio.run(run())
