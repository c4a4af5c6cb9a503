"""What one lost server costs readers: it is killed while every placement is being read."""

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ps
from benchmarks.servers import Servers
from benchmarks.workloads import Batch
from ps.errors import EmbringError
from ps.runtime import Runtime, read_token

DEADLINE_S = 0.25
CONNECT_S = 10.0
EVERY_S = 0.05
BEFORE_S, AFTER_S, VIEW_S = 0.5, 2.0, 20.0


@dataclass
class _Reads:
    """When each read of one placement began, and whether it was answered in time."""

    read: list[tuple[float, bool]] = field(default_factory=list)

    def failed(self, begin: float, end: float) -> tuple[int, int]:
        """(failed, all) of the reads begun between two moments."""
        found = [ok for at, ok in self.read if begin <= at < end]
        return len(found) - sum(found), len(found)


async def lose_a_server(
    runtime: Runtime, servers: Servers, requests: Mapping[str, Sequence[Batch]]
) -> dict[str, dict[str, Any]]:
    """Kill the first server; of each placement: reads that failed until the next view, and the share after it.

    Every read has 250 ms. "until" ends when a server has a view that knows of the death.
    """
    reads = {name: _Reads() for name in requests}
    token = read_token(runtime.token_path)
    clients = [
        await ps.AsyncClient.connect(list(runtime.addresses), token, CONNECT_S, in_place=False) for _ in requests
    ]
    stop = asyncio.Event()
    tasks = [
        asyncio.create_task(_read(client, some, reads[name], stop, k * EVERY_S / len(requests)))
        for k, (client, (name, some)) in enumerate(zip(clients, requests.items(), strict=True))
    ]
    await asyncio.sleep(BEFORE_S)
    status = await asyncio.to_thread(servers.status)
    victim = next(s for s in status["servers"] if s["state"] == "alive")
    killed = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    while not await asyncio.to_thread(_knows, servers, victim["incarnation"]):
        if time.monotonic() - killed > VIEW_S:
            raise EmbringError(f"no view knew of the lost server after {VIEW_S:g} s")
    known = time.monotonic()
    await asyncio.sleep(AFTER_S)
    stop.set()
    await asyncio.gather(*tasks)
    for client in clients:
        await client.close()
    out = {}
    for name, found in reads.items():
        until, after = found.failed(killed, known), found.failed(known, time.monotonic())
        out[name] = {
            "loss_reads_failed_until_view": until[0],
            "loss_reads_until_view": until[1],
            "loss_view_s": round(known - killed, 3),
            "loss_share_failed_after": round(after[0] / max(after[1], 1), 4),
        }
    return out


def _knows(servers: Servers, incarnation: int) -> bool:
    """Whether a server has a view in which that process is dead; where one does not answer, nobody knows yet."""
    try:
        return not any(s.alive and s.incarnation == incarnation for s in servers.view().servers)
    except EmbringError:
        return False


async def _read(
    client: "ps.AsyncClient", requests: Sequence[Batch], found: _Reads, stop: asyncio.Event, first_s: float
) -> None:
    """A read every 50 ms, each begun in its turn, whether those before were answered or not."""
    due = time.monotonic() + first_s
    pending = []
    number = 0
    while not stop.is_set():
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        pending.append(asyncio.create_task(_one(client, requests[number % len(requests)], found)))
        number += 1
        due += EVERY_S
    await asyncio.gather(*pending)


async def _one(client: "ps.AsyncClient", request: Batch, found: _Reads) -> None:
    begun = time.monotonic()
    try:
        await client.pull_bags(request, timeout=DEADLINE_S)
        found.read.append((begun, True))
    except EmbringError:
        found.read.append((begun, False))
