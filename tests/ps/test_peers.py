"""The connections between servers: those of processes that no view names any more are let go."""

import time

import numpy as np

from hashring.planner import CreateTable, Rebalance, Return
from ps.spec import SGD, Initializer, TableSpec
from tests.ps.cluster_fixture import local_cluster

WAIT_S = 30.0


def test_of_a_server_that_was_started_again_and_again_one_connection_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("ps.peers.GONE_S", 0.05)
    with local_cluster(tmp_path, servers=2) as cluster, cluster.client() as client:
        spec = TableSpec("t", 4, SGD(lr=1.0), Initializer(0, 0), replicas=2)
        cluster.change(CreateTable("t", spec.to_plain(), replicas=2))
        client.push("t", np.arange(100), np.ones((100, 4)))
        for _ in range(3):
            cluster.kill("s1")
            cluster.change(Return(cluster.start("s1")))
            cluster.change(Rebalance())
            client.pull("t", np.arange(100))
        service = cluster.members["s0"].service
        there = {cluster.members["s1"].server.incarnation}
        end = time.monotonic() + WAIT_S
        while not service._peers._wires.keys() <= there:
            assert time.monotonic() < end, service._peers._wires
            time.sleep(0.01)
        assert len(service.replication._primary.by_index) == 1
        assert service.replication._primary.links.keys() == there
