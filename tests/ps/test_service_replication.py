"""Two copies over real sockets: what is acknowledged is on both, and goes on when one of them dies."""

import threading
import time

import numpy as np
import pytest
from cluster_fixture import local_cluster

import ps
from hashring.planner import CreateTable, Fail
from ps.spec import SGD, Initializer, TableSpec

WAIT_S = 30.0


def table(cluster, replicas=2, dim=4):
    spec = TableSpec("item", dim, SGD(lr=1.0), Initializer(0, 0), replicas=replicas)
    cluster.change(CreateTable("item", spec.to_plain(), "sharded", replicas))


def until(holds):
    """Wait for something to become true."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)


def test_an_acknowledged_push_is_on_both_owners_of_each_slot(tmp_path):
    with local_cluster(tmp_path) as cluster, cluster.client() as client:
        table(cluster)
        ids = np.arange(500)
        for _ in range(3):
            client.push("item", ids, -np.ones((500, 4), np.float32))
        assert sum(cluster.rows("item").values()) == 1000
        owners = cluster.view.owners()
        slots = np.arange(cluster.view.slots_total)
        digests = {}
        for k, member in enumerate(m for m in cluster.members.values()):
            mine = slots[(owners == k).any(axis=1)]
            digests[k] = dict(zip(mine.tolist(), member.service.store.digest(mine).tolist(), strict=True))
        for slot in slots:
            a, b = owners[slot, :2]
            assert digests[a][slot] == digests[b][slot]


def test_what_was_acknowledged_survives_the_death_of_a_primary_under_load(tmp_path):
    with local_cluster(tmp_path) as cluster, cluster.client() as client:
        table(cluster)
        ids = np.arange(300)
        done = threading.Event()
        acknowledged = [0]
        errors: list[BaseException] = []

        def push() -> None:
            try:
                while not done.is_set():
                    client.push("item", ids, -np.ones((300, 4), np.float32))
                    acknowledged[0] += 1
            except BaseException as error:
                errors.append(error)

        pusher = threading.Thread(target=push)
        pusher.start()
        try:
            until(lambda: acknowledged[0] >= 20 or errors)
            cluster.kill("s1", known=False)
            cluster.change(Fail("s1"))
            before = acknowledged[0]
            until(lambda: acknowledged[0] >= before + 20 or errors)
        finally:
            done.set()
            pusher.join()
        assert not errors
        rows = client.pull("item", ids)
        assert (rows == acknowledged[0]).all()


def test_a_push_is_not_acknowledged_while_an_owner_of_the_view_does_not_hold_it(tmp_path):
    with local_cluster(tmp_path, servers=2) as cluster, cluster.client() as client:
        table(cluster)
        ids = np.arange(100)
        client.push("item", ids, -np.ones((100, 4), np.float32))
        cluster.kill("s1", known=False)
        with pytest.raises((ps.PerhapsApplied, ps.NotApplied)):
            client.push("item", ids, -np.ones((100, 4), np.float32), timeout=1.0)
        cluster.change(Fail("s1"))
        client.push("item", ids, -np.ones((100, 4), np.float32))
        rows = client.pull("item", ids)
        assert np.isin(rows, (2, 3)).all()
