"""Two copies over real sockets: what is acknowledged is on both, and goes on when one of them dies."""

import threading
import time

import numpy as np
import pytest

import ps
from deploy.verify import Copies, lines
from hashring.planner import CreateTable, Fail, Reassign, Withdraw, plan
from ps.checkpoint.reach import Access
from ps.fabric.blocking import BlockingConnection
from ps.fabric.protocol import Hello
from ps.kernels.index import HIGH
from ps.replication import ADMISSION, COMPLAINT
from ps.share import PushShare, features_of
from ps.spec import SGD, Initializer, TableSpec
from ps.wire import push_message, view_message
from tests.ps.cluster_fixture import TOKEN, local_cluster

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


def whole_table(cluster, replicas):
    """A table of one slot; its owners, the primary first."""
    spec = TableSpec("item", 4, SGD(lr=1.0), Initializer(0, 0), placement="whole", replicas=replicas)
    cluster.change(CreateTable("item", spec.to_plain(), "whole", replicas))
    owners = cluster.view.owners()[cluster.view.group(cluster.view.table("item").group).first]
    return [cluster.members[cluster.view.servers[k].name] for k in owners if k >= 0]


def owed(member):
    """(requests in the server's queue, answers that its machine waits to give, answers that its shell does)."""
    service = member.service
    return service.listener.statistics().waiting, len(service.replication._primary.waits), len(service._undecided)


@pytest.mark.parametrize("through", ["the primary", "another owner"])
def test_pushes_that_wait_for_a_dead_owner_keep_no_place_and_do_not_keep_the_view_out(tmp_path, through, monkeypatch):
    """Two of them fill a queue. Those that are given up let go of it, and are applied once all the same."""
    monkeypatch.setattr("ps.peers.FORWARD_MS", 300)
    with local_cluster(tmp_path, queue_max=2) as cluster:
        first, second, third = whole_table(cluster, replicas=3)
        cluster.kill(third.server.name, known=False)
        asked = first if through == "the primary" else second
        features = features_of([cluster.view.table("item").number], [1])

        def push(sequence):
            connection = BlockingConnection.connect(asked.server.addresses[0], Hello(TOKEN), WAIT_S)
            share = PushShare(9, sequence, "push", features, np.array([7]), -np.ones(4, np.float32))
            return connection, connection.send("push", *push_message(share), WAIT_S)

        for sequence in (1, 2, 3):
            connection, _ = push(sequence)
            until(lambda: owed(asked)[0] == 1)
            connection.close()
            until(lambda: owed(first) == owed(second) == (0, 0, 0))
        monkeypatch.setattr("ps.peers.FORWARD_MS", 60_000)
        waiting = [push(sequence) for sequence in (2, 4)]
        until(lambda: owed(asked)[0] == 2 and first.service.statistics().store.pushes == 4)
        view = plan(cluster.view, Fail(third.server.name))
        for member in (first, second):
            connection = BlockingConnection.connect(member.server.addresses[0], Hello(TOKEN), WAIT_S)
            for op, (fields, arrays) in (("ping", ({}, {})), ("install", view_message(view))):
                connection.receive(connection.send(op, fields, arrays, WAIT_S), WAIT_S)
            connection.close()
        cluster.change(Fail(third.server.name))
        for connection, _ in waiting:
            connection.close()
        with cluster.client() as client:
            until(lambda: client.pull("item", [7])[0].tolist() == [4.0] * 4)
            client.push("item", [7], -np.ones((1, 4), np.float32))
            assert client.pull("item", [7])[0].tolist() == [5.0] * 4


def copies(cluster):
    return Copies(cluster.addresses, Access(TOKEN))


def unseen(slots):
    return lambda done: None


def corrupt(cluster, slot, backup=1):
    """Change one value in the copy that another owner has of a slot; that owner's name."""
    member = list(cluster.members.values())[cluster.view.owners()[slot, backup]]

    async def change():
        store = member.service.store
        one = np.array([slot])
        arena = store.held.registry.arenas[0]
        row = arena.collect(one, *store.held.slots.bounds(one)).rows[0]
        arena.values[row, 0] += 1

    member.thread.call(change(), WAIT_S)
    return member.server.name


def filled_slot(cluster):
    """A slot that holds rows."""
    member = next(iter(cluster.members.values()))
    store = member.service.store
    slots = np.flatnonzero(cluster.view.owners()[:, 1] == 0)
    return int(slots[store.held.registry.arenas[0].counts(slots) > 0][0])


@pytest.mark.parametrize("replicas", [2, 3])
def test_verify_names_the_slot_and_the_owner_of_a_copy_that_differs(tmp_path, replicas):
    with local_cluster(tmp_path, verify_slots_per_s=0.0) as cluster, cluster.client() as client:
        table(cluster, replicas)
        client.push("item", np.arange(500), -np.ones((500, 4), np.float32))
        total = cluster.view.slots_total
        seen = []
        found = copies(cluster).compare([], False, lambda slots: seen.append(-slots) or seen.append)
        assert (found.slots, found.compared, found.different) == (total, total * (replicas - 1), [])
        assert (found.not_compared, found.single, found.good) == ([], 0, True)
        assert sum(seen) == 0
        slot = filled_slot(cluster)
        name = corrupt(cluster, slot)
        found = copies(cluster).compare(["item"], False, unseen)
        assert found.different == [(slot, name)]
        assert not found.good
        assert f"slot {slot}: the copy of {name} differs" in lines(found, False)[0]
        figures = [m.service.statistics() for m in cluster.members.values()]
        assert sum(f.different for f in figures) == 1
        assert sum(f.compared for f in figures) == 2 * total * (replicas - 1)


def test_verify_names_an_unknown_table(tmp_path):
    with local_cluster(tmp_path) as cluster:
        table(cluster)
        with pytest.raises(ps.RequestError, match="'other' is unknown; there are: item"):
            copies(cluster).compare(["other"], False, unseen)


def test_slots_with_one_copy_and_lost_ones_are_counted_apart(tmp_path):
    with local_cluster(tmp_path) as cluster:
        table(cluster, replicas=1)
        cluster.kill("s1")
        lost = np.flatnonzero(cluster.view.lost())
        found = copies(cluster).compare([], False, unseen)
        assert found.not_compared == lost.tolist()
        assert found.single == cluster.view.slots_total - len(lost)
        assert (found.compared, found.good) == (0, True)


def test_copies_are_equal_while_pushes_go_on(tmp_path):
    with local_cluster(tmp_path, verify_slots_per_s=200.0) as cluster, cluster.client() as client:
        table(cluster)
        done = threading.Event()
        pushed = [0]
        errors: list[BaseException] = []

        def push() -> None:
            try:
                while not done.is_set():
                    ids = np.arange(pushed[0], pushed[0] + 300)
                    client.push("item", ids, -np.ones((300, 4), np.float32))
                    pushed[0] += 1
            except BaseException as error:
                errors.append(error)

        pusher = threading.Thread(target=push)
        pusher.start()
        try:
            until(lambda: pushed[0] >= 10 or errors)
            before = pushed[0]
            found = copies(cluster).compare([], False, unseen)
            until(lambda: pushed[0] >= before + 10 or errors)
        finally:
            done.set()
            pusher.join()
        assert not errors
        assert (found.compared, found.different, found.not_compared) == (cluster.view.slots_total, [], [])
        figures = [m.service.statistics() for m in cluster.members.values()]
        assert sum(f.different for f in figures) == 0
        assert sum(f.compared for f in figures) > cluster.view.slots_total  # the sweep compared some, too


def test_a_repair_ends_with_a_full_copy(tmp_path):
    """The controller's part is played here: the owner leaves, and learns."""
    with local_cluster(tmp_path, verify_slots_per_s=0.0) as cluster, cluster.client() as client:
        table(cluster)
        client.push("item", np.arange(500), -np.ones((500, 4), np.float32))
        slot = filled_slot(cluster)
        name = corrupt(cluster, slot)
        before = cluster.view
        found = copies(cluster).compare([], True, unseen)
        assert found.different == [(slot, name)]
        primary = list(cluster.members.values())[before.owners()[slot, 0]]
        assert complaints(primary) == [slot]
        one = np.array([slot])
        cluster.change(Withdraw({name: one}))
        peer = cluster.members[name].server.incarnation
        primary.thread.call(asked(primary, one, peer, cluster.view.epoch), WAIT_S)
        until(lambda: primary.service.replication.standing().kinds.tolist() == [ADMISSION])
        cluster.change(Reassign(one, before.owners()[one]))
        copies(cluster).await_repair(found)
        assert found.mended == [(slot, name)]
        assert found.good


async def asked(primary, slots, learner, epoch):
    """As the controller would ask it."""
    primary.service.replication.learn(slots, learner, epoch)
    primary.service._perform()


def complaints(member):
    standing = member.service.replication.standing()
    return standing.slots[standing.kinds == COMPLAINT].tolist()


def test_a_pull_goes_to_the_other_owner_within_its_deadline_where_one_is_stopped(tmp_path):
    with local_cluster(tmp_path) as cluster, cluster.client() as client:
        table(cluster)
        ids = np.arange(200)
        client.push("item", ids, -np.ones((200, 4), np.float32))
        go_on = threading.Event()
        stopped = cluster.members["s1"].thread.loop
        stopped.call_soon_threadsafe(go_on.wait, WAIT_S)  # as SIGSTOP would: it neither answers nor closes
        try:
            assert (client.pull("item", ids, timeout=2.0) == 1).all()
            assert (client.pull("item", ids, timeout=0.5) == 1).all()
        finally:
            go_on.set()


def test_other_owners_give_memory_back_too_after_rows_were_deleted(tmp_path):
    with local_cluster(tmp_path, servers=2) as cluster, cluster.client() as client:
        whole_table(cluster, replicas=2)
        ids = np.arange(40_000)
        client.push("item", ids, np.ones((len(ids), 4), np.float32))
        until(lambda: all(member.service._tidying is None for member in cluster.members.values()))
        client.delete("item", ids[:35_000])

        def used(member):
            return sum(int(arena.index.heap[HIGH]) for arena in member.service.store.held.registry.arenas)

        until(lambda: all(used(member) < 20_000 for member in cluster.members.values()))
