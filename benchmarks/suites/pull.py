"""Pulling beside its peers: pooled pulls (S1 Redis, S2 torch), one round trip (S3 Ray, gRPC), many keys (S13).

S1 and S2 are the peer's seconds by embring's (above 1, embring is faster); S3 is embring's by the peer's (the smaller,
the better). Each is the median over the rounds of the ratio of the medians of a round. Servers and client are on one
host, so embring reads in place; what the same pulls take over the fabric stands under "fabric", from the same rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

import ps
from benchmarks.implementations import PEERS, EmbringBags, Pooler, same
from benchmarks.measure import Side, interleave, timed
from benchmarks.peers.grpc_echo import GrpcEcho
from benchmarks.peers.process import PeerMissing
from benchmarks.peers.ray_call import RayCall
from benchmarks.report import Findings, put
from benchmarks.suites.cluster import Report, benchmark_config, cluster
from benchmarks.workloads import SHAPES, Workload, zipf_ids
from ps.runtime import Runtime, read_token

P = TypeVar("P")

GOAL_OF_PEER = {"redis": "S1", "torch": "S2"}
GOALS = ("S1", "S2", "S3", "S13")

FABRIC = "fabric"
WAYS: Mapping[str, tuple[str, ...]] = {"embring": (), FABRIC: (FABRIC,)}
"""The two ways of embring, and under what their figures stand."""

Clients = Mapping[str, "ps.Client"]

ECHO_IDS, ECHO_DIM = 128, 2
"""A pull that carries 1 KiB each way: 128 ids of 8 bytes there, 128 rows of 2 floats back."""

KEYS, KEYS_ROWS, KEYS_DIM, KEYS_ZIPF = 2_000, 630_000, 16, 1.2
"""The published session that S13 is measured by."""

IDS_IN_TURN = 400_000
"""Ids of the different requests that one size is measured with, in turn, so that no cache holds all their rows."""


@dataclass(frozen=True)
class Settings:
    """What is measured; every list may be shortened. placement is that of the pooled tables."""

    goals: Sequence[str] = GOALS
    shapes: Sequence[str] = ("M", "O")
    batches: Sequence[int] = (32, 256, 2048)
    rows: int = 100_000
    zipf: float = 1.05
    rounds: int = 5
    seconds: float = 0.4
    servers: int = 3
    placement: Literal["sharded", "whole"] = "sharded"


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Start a cluster, measure, end it. The JSON-able result names every peer that is missing."""
    findings = Findings()
    with cluster(benchmark_config(settings.servers), report) as (runtime, client):
        token = read_token(runtime.token_path)
        with ps.connect(list(runtime.addresses), token, 60.0, in_place=False) as fabric:
            clients = {"embring": client, FABRIC: fabric}
            if {"S1", "S2"} & set(settings.goals):
                _pooled(settings, clients, findings, report)
            if "S3" in settings.goals:
                _round_trip(settings, runtime, clients, findings, report)
            if "S13" in settings.goals:
                _many_keys(settings, clients, findings, report)
    return findings.to_plain({"command": "embring bench pull", **asdict(settings)})


def _pooled(settings: Settings, clients: Clients, findings: Findings, report: Report) -> None:
    """S1 and S2, all sides in the same rounds. Both shapes ask the same tables, so each side loads them once."""
    workloads = {name: Workload(SHAPES[name], settings.rows, settings.zipf) for name in settings.shapes}
    tables = next(iter(workloads.values()))
    with ExitStack() as stack:
        report(f"loading {len(tables.tables)} tables of {settings.rows} rows")
        ours = {way: EmbringBags(tables, client, settings.placement) for way, client in clients.items()}
        poolers: dict[str, Pooler] = {**ours}
        for peer, goal in GOAL_OF_PEER.items():
            if goal in settings.goals:
                made = _peer(partial(PEERS[peer], tables), findings, report)
                if made is not None:
                    poolers[peer] = made
                    stack.callback(made.close)
        for shape, workload in workloads.items():
            for samples in settings.batches:
                _pooled_size(settings, poolers, workload, samples, findings)
                for peer in poolers.keys() - WAYS:
                    goal = GOAL_OF_PEER[peer]
                    found = [
                        figures[goal][shape][str(samples)] for figures in (findings.figures, findings.figures[FABRIC])
                    ]
                    report(f"{goal} {shape} B={samples}: {found[0]:.2f}x {peer}, over the fabric {found[1]:.2f}x")


def _pooled_size(
    settings: Settings, poolers: dict[str, Pooler], workload: Workload, samples: int, findings: Findings
) -> None:
    ids = samples * sum(workload.shape.ids_per_sample)
    batches = workload.batches(samples, int(np.clip(IDS_IN_TURN // ids, 2, 64)))
    for batch in batches:
        expected = poolers["embring"].pool(batch)
        findings.equal &= all(same(expected, peer.pool(batch)) for peer in poolers.values())
    rounds = interleave(
        {name: timed(pooler.pool, batches) for name, pooler in poolers.items()}, settings.rounds, settings.seconds
    )
    for peer in poolers.keys() - WAYS:
        for way, path in WAYS.items():
            findings.ratio(rounds, peer, way, *path, GOAL_OF_PEER[peer], workload.shape.name, str(samples))


def _round_trip(settings: Settings, runtime: Runtime, clients: Clients, findings: Findings, report: Report) -> None:
    """S3: the public blocking client's pull of 1 KiB, beside an actor call and a gRPC call that carry as much."""
    client = clients["embring"]
    client.create_table("echo", ECHO_DIM, optimizer=ps.SGD(), placement="whole")
    ids = np.arange(ECHO_IDS, dtype=np.int64)
    rows = np.arange(ECHO_IDS * ECHO_DIM, dtype=np.float32).reshape(ECHO_IDS, ECHO_DIM)
    client.assign("echo", ids, rows)
    findings.equal &= all(np.array_equal(one.pull("echo", ids), rows) for one in clients.values())
    sides: dict[str, Side] = {way: timed(partial(one.pull, "echo"), [ids]) for way, one in clients.items()}
    with ExitStack() as stack:
        makers: dict[str, Callable[[], GrpcEcho | RayCall]] = {
            "ray": lambda: RayCall(runtime.ray_address, runtime.ray_token_path),
            "grpc": GrpcEcho,
        }
        for name, make in makers.items():
            peer = _peer(make, findings, report)
            if peer is not None:
                sides[name] = peer.calls
                stack.callback(peer.close)
        rounds = interleave(sides, settings.rounds, settings.seconds)
    for name in sides.keys() - WAYS:
        found = [findings.ratio(rounds, way, name, *path, "S3", name) for way, path in WAYS.items()]
        report(f"S3: {found[0]:.4f} of {name}, over the fabric {found[1]:.4f}")


def _many_keys(settings: Settings, clients: Clients, findings: Findings, report: Report) -> None:
    """S13: 2,000 keys of 16 floats out of 630,000 rows, one round trip each. A table of 40 MB is kept whole."""
    client = clients["embring"]
    client.create_table("keys", KEYS_DIM, optimizer=ps.SGD(), placement="whole")
    rng = np.random.default_rng(13)
    rows = rng.standard_normal((KEYS_ROWS, KEYS_DIM), np.float32)
    for at in range(0, KEYS_ROWS, 90_000):
        client.assign("keys", np.arange(at, at + 90_000), rows[at : at + 90_000], timeout=60.0)
    wanted = [zipf_ids(rng, KEYS, KEYS_ROWS, KEYS_ZIPF, (13,)) for _ in range(64)]
    for one in clients.values():
        findings.equal &= all(np.array_equal(one.pull("keys", ids), rows[ids]) for ids in wanted)
    sides = {way: timed(partial(one.pull, "keys"), wanted) for way, one in clients.items()}
    rounds = interleave(sides, settings.rounds, 1.0)
    for way, path in WAYS.items():
        p50, p99 = (rounds.percentile(way, q) * 1e3 for q in (50, 99))
        put(findings.figures, (*path, "S13"), {"p50_ms": round(p50, 4), "p99_ms": round(p99, 4)})
        report(f"S13 ({way}): p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    findings.samples(rounds, tuple(WAYS), "S13")


def _peer(make: Callable[[], P], findings: Findings, report: Report) -> P | None:
    try:
        return make()
    except PeerMissing as error:
        findings.missing.append(str(error))
        report(str(error))
        return None
