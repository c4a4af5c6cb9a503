"""Both clients end to end: real sockets, real stores, three servers."""

import asyncio
import multiprocessing
import socket
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ps
from hashring.planner import CreateTable, Fail, Join
from hashring.tokens import tokens
from ps.client import AsyncClient, Client
from ps.client.flight import Connections
from ps.spec import SGD, Initializer, TableSpec
from tests.ps.cluster_fixture import TOKEN, LocalCluster, local_cluster

SGD1 = ps.SGD(lr=1.0)
ZEROS = ps.Initializer(0.0, 0.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with local_cluster(tmp_path_factory.mktemp("sockets")) as running:
        with running.client(timeout=60) as client:
            # The first calls compile the kernels of client and servers.
            client.create_table("warm", dim=4, optimizer=SGD1)
            client.push("warm", [1], np.ones((1, 4)))
            client.pull_bags({"warm": ([1, 2], [0, 2], [1.0, 2.0])})
            list(client.pull_range("warm"))
        yield running


@pytest.fixture
def client(cluster):
    with cluster.client() as connected:
        yield connected


_numbers = iter(range(10**6))


def new_table(client: Client, dim: int = 4, **settings) -> str:
    name = f"t{next(_numbers)}"
    client.create_table(name, dim=dim, **{"optimizer": SGD1, "initializer": ZEROS, **settings})
    return name


def test_rows_are_pushed_once_and_seen_by_the_next_pull(client, cluster):
    name = new_table(client)
    ids = np.array([5, -7, 5, 2**63 - 1, -(2**63), 0])
    assert (client.pull(name, ids) == 0).all()
    assert client.last_absent == 5  # the two 5s travel as one
    client.push(name, ids, np.arange(24).reshape(6, 4))
    rows = client.pull(name, ids)
    np.testing.assert_array_equal(rows[0], -(np.arange(4) + np.arange(8, 12)))
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[4], -np.arange(16, 20))
    assert client.last_absent == 0
    client.push(name, [0], np.ones((1, 4)), lr_scale=0.5)
    np.testing.assert_array_equal(client.pull(name, [0])[0], -np.arange(20, 24) - 0.5)
    assert sum(cluster.rows(name).values()) == 5


def test_unsigned_ids_keep_their_64_bits(client):
    name, ids = new_table(client), np.array([2**63, 2**64 - 1, 7], np.uint64)
    client.push(name, ids, -np.ones((3, 4)))
    assert (client.pull(name, ids.view(np.int64)) == 1).all()
    (part,) = client.pull_range(name)
    assert sorted(part.ids.view(np.uint64)) == [7, 2**63, 2**64 - 1]


def test_many_rows_lie_on_every_server_and_come_back_in_order(client, cluster):
    name = new_table(client)
    ids = np.random.default_rng(0).permutation(3000)
    rows = np.random.default_rng(1).random((3000, 4), np.float32)
    client.assign(name, ids, rows)
    np.testing.assert_array_equal(client.pull(name, ids), rows)
    assert min(cluster.rows(name).values()) > 700
    client.delete(name, ids[:1000])
    assert sum(cluster.rows(name).values()) == 2000
    client.delete(name, ids[:1000])
    client.assign(name, [1, 1], [[1] * 4, [2] * 4])
    np.testing.assert_array_equal(client.pull(name, [1]), [[2] * 4])


@pytest.fixture(scope="module")
def three_tables(cluster):
    with cluster.client(timeout=60) as client:
        names = [new_table(client, 3), new_table(client, 8, placement="whole"), new_table(client, 1)]
        for f, name in enumerate(names):
            client.assign(name, np.arange(30), np.random.default_rng(f).random((30, (3, 8, 1)[f]), np.float32))
        yield client, names


@settings(max_examples=40)
@given(st.data())
def test_pooling_equals_torch_over_tables_of_several_widths_and_placements(three_tables, data):
    client, names = three_tables
    if data.draw(st.booleans()):
        names = names[1:2]  # a whole table alone: one server answers the request as it is
    bags, modes = {}, {}
    for name in names:
        lists = data.draw(st.lists(st.lists(st.integers(-3, 32), max_size=7), max_size=9))
        ids = np.array([i for bag in lists for i in bag], np.int64)
        offsets = np.concatenate([[0], np.cumsum([len(bag) for bag in lists])]).astype(np.int64)
        modes[name] = data.draw(st.sampled_from(("sum", "mean", "max")))
        weights = np.linspace(-1, 2, len(ids), dtype=np.float32) if data.draw(st.booleans()) else None
        bags[name] = (ids, offsets) if weights is None or modes[name] != "sum" else (ids, offsets, weights)
    pooled = client.pull_bags(bags, mode=modes)
    for name, (ids, offsets, *weights) in bags.items():
        every = torch.from_numpy(client.pull(name, np.arange(-3, 33)))
        expected = torch.nn.functional.embedding_bag(
            torch.from_numpy(ids + 3),
            every,
            torch.from_numpy(offsets),
            mode=modes[name],
            include_last_offset=True,
            per_sample_weights=torch.from_numpy(weights[0]) if weights else None,
        )
        np.testing.assert_allclose(pooled[name], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_gradients_of_bags_equal_those_that_torch_sends_to_rows(client):
    name = new_table(client, 3)
    rng = np.random.default_rng(0)
    client.assign(name, np.arange(20), rng.random((20, 3), np.float32))
    before = client.pull(name, np.arange(20))
    ids, offsets = rng.integers(0, 20, 50), np.array([0, 10, 10, 25, 26, 50])
    grads = rng.random((5, 3), np.float32)
    for mode, weights in (("sum", None), ("mean", None), ("sum", rng.random(50, np.float32))):
        weight = torch.from_numpy(before.copy()).requires_grad_()
        torch.nn.functional.embedding_bag(
            torch.from_numpy(ids),
            weight,
            torch.from_numpy(offsets),
            mode=mode,
            include_last_offset=True,
            per_sample_weights=None if weights is None else torch.from_numpy(weights),
        ).backward(torch.from_numpy(grads))
        given_ = (ids, offsets) if weights is None else (ids, offsets, weights)
        client.push_bags({name: given_}, {name: grads}, mode=mode)
        after = client.pull(name, np.arange(20))
        np.testing.assert_allclose(before - after, weight.grad.numpy(), rtol=1e-4, atol=1e-5)
        before = after


def test_ragged_features_may_share_a_table(client):
    name = new_table(client, 2)
    ragged = ps.RaggedIds.of([1, 2, 3, 1], [0, 1, 2, 3, 4], features=2)
    client.push_ragged([name, name], ragged, [-np.ones((2, 2)), -np.ones((2, 2))])
    first, second = client.pull_ragged([name, name], ragged)
    np.testing.assert_array_equal(first, [[2, 2], [1, 1]])
    np.testing.assert_array_equal(second, [[1, 1], [2, 2]])


def test_nothing_asked_gives_nothing(client):
    name = new_table(client, 5)
    assert client.pull(name, []).shape == (0, 5)
    assert client.pull_bags({}) == {}
    assert client.pull_bags({name: ([], [0, 0, 0])})[name].tolist() == [[0] * 5] * 2
    assert client.pull_bags({name: ([], [0])})[name].shape == (0, 5)
    client.push(name, [], np.empty((0, 5)))
    client.flush()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, t: c.pull("nobody", [1]), "unknown table 'nobody'"),
        (lambda c, t: c.push(t, [1, 2], np.ones((2, 3))), r"has shape \(2, 3\); it must be \(2, 4\)"),
        (lambda c, t: c.push(t, [1, 2], np.ones((1, 4))), r"has shape \(1, 4\); it must be \(2, 4\)"),
        (lambda c, t: c.push(t, [1, 2], [[1] * 4, [1, 1, np.inf, 1]]), "has inf in row 1, column 2"),
        (lambda c, t: c.push(t, [1], np.ones((1, 4)), lr_scale=-1), "lr_scale is -1"),
        (lambda c, t: c.push_bags({t: ([1], [0, 1])}, {}), "must be in both bags and grads"),
        (lambda c, t: c.push_bags({t: ([1], [0, 1])}, {t: np.ones((1, 4))}, mode="max"), "'sum' or 'mean'"),
        (lambda c, t: c.push_bags({t: ([1], [0, 1])}, {t: np.full((1, 4), np.nan)}), "has nan in row 0, column 0"),
        (
            lambda c, t: c.push(t, [1], [[0, -1e300, 0, 0]]),
            "has -inf in row 0, column 1; every value must be a finite f",
        ),
        (lambda c, t: c.push_bags({t: ([1], [0, 1])}, {t: np.full((1, 4), 1e39)}), "has inf in row 0, column 0"),
        (lambda c, t: c.pull_bags({t: ([1], [0, 1], [1e39])}), r"weights\[0\] of table .* is inf; every weight"),
        (lambda c, t: ps.RaggedIds.of([1], [0, 1], weights=[1e39]), r"weights\[0\] is inf; every weight"),
        (lambda c, t: c.pull(t, ["x"]), "it must be a whole-number type"),
        (lambda c, t: c.pull(t, [1], timeout=0), "timeout is 0; it must be above 0"),
        (lambda c, t: c.pull(t, [1], timeout=601), "at most 600 seconds"),
        (lambda c, t: c.create_table("bad name", dim=4), "table name is 'bad name'"),
        (lambda c, t: c.create_table(t, dim=8), "exists with another specification: its dim is 4, asked was 8"),
        (lambda c, t: c.alter_table(t, dim=8), "dim of table .* cannot change"),
        (lambda c, t: c.alter_table(t, colour=8), "a table has no setting 'colour'"),
        (lambda c, t: c.drop_table("nobody"), "unknown table 'nobody'"),
        (lambda c, t: list(c.pull_range(t, 5, 4)), "0 <= start < stop"),
        (lambda c, t: c.ranges(t, 0), "n, the number of ranges, is 0; it must be a whole number from 1 on"),
        (lambda c, t: c.ranges(t, 2.5), r"n, the number of ranges, is 2\.5; it must be a whole number"),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_bad_calls_meet_one_clear_sentence_and_change_nothing(client, call, message):
    name = new_table(client, 4)
    with pytest.raises(ps.RequestError, match=message):
        call(client, name)
    assert (client.pull(name, [1, 2]) == 0).all()


def test_tables_are_made_described_altered_emptied_and_dropped(client, cluster):
    name = new_table(client, 4, optimizer=ps.Adagrad(lr=0.5), seed=7)
    client.create_table(name, dim=4, optimizer=ps.Adagrad(lr=0.5), initializer=ZEROS, seed=7)
    client.create_table(name, dim=4, optimizer=ps.Adagrad(lr=0.5), initializer=ZEROS)
    with cluster.client() as other:
        assert other.describe(name) == client.describe(name) == TableSpec(name, 4, ps.Adagrad(lr=0.5), ZEROS, seed=7)
        assert name in other.tables()
        client.push(name, np.arange(50), np.ones((50, 4)))
        client.alter_table(name, optimizer=ps.Adagrad(lr=0.25))
        assert other.describe(name).optimizer == ps.Adagrad(lr=0.25)
        client.truncate(name)
        assert (other.pull(name, [1]) == 0).all()
        client.drop_table(name)
        with pytest.raises(ps.RequestError, match="unknown table"):
            other.pull(name, [1])


def test_a_table_without_a_number_of_replicas_has_the_clusters_or_what_it_was_given_since(tmp_path):
    with local_cluster(tmp_path, replicas=2) as cluster, cluster.client() as client:
        client.create_table("two", dim=4)
        client.create_table("one", dim=4, replicas=1)
        assert {name: spec.replicas for name, spec in client.tables().items()} == {"two": 2, "one": 1}
        client.alter_table("two", replicas=3)
        client.create_table("two", dim=4)
        with pytest.raises(ps.RequestError, match="its replicas is 3, asked was 1"):
            client.create_table("two", dim=4, replicas=1)


def test_a_scheduled_learning_rate_holds_for_the_next_push(client):
    name = new_table(client)
    client.push(name, [1], np.ones((1, 4)))
    client.set_optimizer(name, ps.SGD(lr=0.5))
    client.push(name, [1], np.ones((1, 4)))
    np.testing.assert_array_equal(client.pull(name, [1]), [[-1.5] * 4])
    for wrong, message in ((ps.Adam(), "cannot become adam"), (0.1, "optimizer is 0.1; it must be one of")):
        with pytest.raises(ps.RequestError, match=message):
            client.set_optimizer(name, wrong)


def test_pipelined_pushes_are_all_applied_once_beyond_the_window(client):
    name = new_table(client)
    handles = [client.push_nowait(name, np.arange(20), -np.ones((20, 4))) for _ in range(150)]
    handles.append(client.push_bags_nowait({name: ([3], [0, 1])}, {name: -np.ones((1, 4))}))
    assert client.statistics().undecided <= 64
    handles[-1].result()
    client.flush()
    assert all(h.done for h in handles)
    assert client.statistics().undecided == 0
    rows = client.pull(name, np.arange(20))
    assert rows[3, 0] == 151
    assert (rows[np.arange(20) != 3] == 150).all()
    with pytest.raises(ps.RequestError):
        client.push_nowait(name, [1], np.ones((1, 3)))
    client.flush()


def test_a_flush_that_is_given_no_time_says_how_long_it_waited(client, monkeypatch):
    monkeypatch.setattr("ps.client.blocking.TIMEOUT_MAX", 1e-9)
    client.push_nowait(new_table(client), [1], np.ones((1, 4)))
    with pytest.raises(ps.PerhapsApplied, match=r"^1 pushes were still open after 1e-09 s$"):
        client.flush()
    client.flush(timeout=10)


def test_threads_take_turns(client):
    name = new_table(client)

    def work() -> None:
        for _ in range(20):
            client.push(name, np.arange(30), -np.ones((30, 4)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (client.pull(name, np.arange(30)) == 80).all()


def _in_child(client: Client, name: str, results) -> None:
    try:
        client.push(name, [1], -np.ones((1, 4)))
        results.put((client.pull(name, [1])[0, 0], client._verbs.window.client))
    except BaseException as error:
        results.put(error)


def test_a_forked_child_is_another_client_and_leaves_the_parents_alone(client):
    name = new_table(client)
    client.push(name, [1], -np.ones((1, 4)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(client, name, results))
    child.start()
    value, identity = results.get(timeout=60)
    child.join(60)
    assert value == 2
    assert identity != client._verbs.window.client
    client.push(name, [1], -np.ones((1, 4)))
    assert client.pull(name, [1])[0, 0] == 3
    assert client.statistics().retries == 0


# -- ranges


def test_seven_random_ranges_are_every_row_once_during_pushes(client, cluster):
    name = new_table(client, 16)
    ids = np.arange(5000)
    client.push(name, ids, -np.ones((5000, 16)))
    stop = threading.Event()

    def pushes() -> None:
        with cluster.client() as other:
            fresh = 5000
            while not stop.is_set():
                other.push(name, np.arange(5000), -np.ones((5000, 16)))
                other.push(name, np.arange(fresh, fresh + 50), -np.ones((50, 16)))
                fresh += 50

    pusher = threading.Thread(target=pushes)
    pusher.start()
    try:
        rng = np.random.default_rng(3)
        cuts = sorted(int(x) for x in rng.integers(1, 2**63, 6, dtype=np.uint64) * np.uint64(2))
        found = []
        for start, end in zip([0, *cuts], [*cuts, None], strict=True):
            for part in client.pull_range(name, start, end):
                assert part.rows.shape == (len(part.ids), 16)
                assert (part.rows >= 1).all()
                found += part.ids.tolist()
    finally:
        stop.set()
        pusher.join(60)
    assert len(found) == len(set(found))
    assert set(range(5000)) <= set(found)


def test_parts_of_a_range_that_are_left_leave_nothing_behind(client):
    name = new_table(client, dim=64)
    for part in np.array_split(np.arange(40_000), 8):
        client.assign(name, part, np.ones((len(part), 64), np.float32))
    parts = client.pull_range(name)
    next(parts)
    assert (client.pull(name, [1, 2]) == 1).all()  # replies that were asked for ahead lie in between
    parts.close()
    connections = list(client._connections._open.values())
    assert not any(c._session.pending or c._kept for c in connections)
    assert sum(len(part.ids) for part in client.pull_range(name)) == 40_000


def _rest_in_child(parts, results):
    try:
        results.put(sum(len(part.ids) for part in parts))
    except BaseException as error:
        results.put(error)


def test_a_forked_child_goes_on_with_a_range_and_so_does_its_parent(client):
    name = new_table(client, dim=64)
    for part in np.array_split(np.arange(40_000), 8):
        client.assign(name, part, np.ones((len(part), 64), np.float32))
    parts = client.pull_range(name)
    first = len(next(parts).ids)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_rest_in_child, args=(parts, results))
    child.start()
    rest = results.get(timeout=60)
    child.join(60)
    assert first + rest == 40_000
    assert first + sum(len(part.ids) for part in parts) == 40_000


def test_a_range_push_trains_an_interval_alone(client):
    name = new_table(client)
    client.push(name, np.arange(300), -np.ones((300, 4)))
    total = 0
    for start, stop in client.ranges(name, 4):
        for part in client.pull_range(name, start, stop):
            client.push_range(name, start, stop, part.ids, -part.rows)
            total += len(part.ids)
    assert total == 300
    assert (client.pull(name, np.arange(300)) == 2).all()
    start, stop = client.ranges(name, 4)[0]
    with pytest.raises(ps.RequestError, match="outside the range"):
        client.push_range(name, start, stop, np.arange(300), np.ones((300, 4)))
    whole = new_table(client, placement="whole")
    assert client.ranges(whole, 9) == [(0, None)]


# -- failures


def test_broken_connections_are_made_anew(client, cluster):
    name = new_table(client)
    client.push(name, np.arange(50), -np.ones((50, 4)))
    for connection in list(client._connections._open.values()):
        connection._socket.shutdown(socket.SHUT_RDWR)
    client.push(name, np.arange(50), -np.ones((50, 4)))
    assert (client.pull(name, np.arange(50)) == 2).all()


def test_nobody_there_a_silent_server_and_a_wrong_token(cluster):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        # The whole wait is named, not that of the last of some attempts.
        with pytest.raises(ps.NotApplied, match=r"^given up after 0\.[2-9]\d* s: .* did not answer the handshake"):
            ps.connect(f"127.0.0.1:{port}", token="x", timeout=0.3)
        address = [f"127.0.0.1:{port}", *cluster.addresses]
        with ps.connect(address, token=TOKEN, timeout=3.0) as found:
            assert "warm" in found.tables()
    with pytest.raises(ps.NotApplied):
        ps.connect(f"127.0.0.1:{port}", token="x", timeout=0.3)
    with pytest.raises(ps.AuthError):
        ps.connect(cluster.addresses, token="wrong")


def test_a_closed_client_refuses_further_calls(cluster):
    client, failed = cluster.client(), cluster.client()
    client.close()
    client.close()
    with pytest.raises(ValueError, match="mine"), failed:
        raise ValueError("mine")
    calls = (
        lambda client: client.tables(),
        lambda client: client.pull("warm", [1]),
        lambda client: client.push_nowait("warm", [1], [[0] * 4]),
    )
    for closed in (client, failed):
        for call in calls:
            with pytest.raises(ps.RequestError, match=r"this client is closed: ps\.connect\(\) makes another"):
                call(closed)
        assert closed.statistics().epoch > 0


def test_a_client_that_comes_back_under_its_id_repeats_nothing(cluster, client):
    """A trainer that was killed pushes its last batches anew: what was applied is skipped, the rest is applied."""
    name = new_table(client)
    ids, step = np.arange(300), -np.ones((300, 4))
    with cluster.client() as first:
        first.identify(71, 0)
        assert first.last_sequence == 0
        for _ in range(3):
            first.push(name, ids, step)
        assert first.last_sequence == 3
    with cluster.client() as again:
        again.identify(71, 1)  # it had written down only the first
        for expected in (3, 3, 4):
            again.push(name, ids, step)
            assert (client.pull(name, ids) == expected).all()
        assert again.last_sequence == 4
        handle = again.push_nowait(name, ids, step)
        with pytest.raises(ps.RequestError, match="1 pushes are open"):
            again.identify(72, 0)
        handle.result()
        for identity, sequence in ((0, 0), (2**64, 0), (-1, 0), (1.0, 0), (1, -1), (1, 2**62), (1, None)):
            with pytest.raises(ps.RequestError, match=r"(client|sequence) is .*; it must be"):
                again.identify(identity, sequence)
        assert again.last_sequence == 5


def test_a_server_that_has_no_view_yet_is_passed_over(tmp_path):
    with local_cluster(tmp_path) as cluster:
        fresh = cluster.start("s9").addresses[0]
        with pytest.raises(ps.NotApplied, match="no view yet"):
            Client([fresh], TOKEN, timeout=0.5)
        with Client([fresh, *cluster.addresses], TOKEN) as client:
            client.create_table("item", dim=2)
            assert client.pull("item", [1]).shape == (1, 2)


def test_a_dead_servers_slots_are_lost_and_the_others_go_on(tmp_path):
    with local_cluster(tmp_path) as cluster, cluster.client(timeout=20) as client:
        client.create_table("item", dim=4, optimizer=SGD1, initializer=ZEROS)
        ids = np.arange(300)
        client.push("item", ids, -np.ones((300, 4)))
        owner = client._verbs.routing.primaries[:, 0]
        slots = tokens(ids, client.describe("item").seed) >> np.uint64(50)
        alive = ids[owner[slots] != 1]
        cluster.kill("s1", known=False)
        with pytest.raises((ps.NotApplied, ps.PerhapsApplied)):
            client.pull("item", ids, timeout=0.5)
        assert (client.pull("item", alive) == 1).all()
        cluster.change(Fail("s1"))
        with pytest.raises(ps.SlotsLost):
            client.pull("item", ids)
        with pytest.raises(ps.SlotsLost):
            client.push("item", ids, np.ones((300, 4)))
        with pytest.raises(ps.SlotsLost):
            list(client.pull_range("item"))
        client.push("item", alive, -np.ones((len(alive), 4)))
        assert (client.pull("item", alive) == 2).all()


def test_a_pull_of_a_replicated_table_outlives_a_server_that_nobody_misses_yet(tmp_path):
    with local_cluster(tmp_path) as cluster:
        spec = TableSpec("item", 4, SGD(lr=1.0), Initializer(0.5, 0.5), replicas=2)
        cluster.change(CreateTable("item", spec.to_plain(), "sharded", 2))
        with cluster.client() as client:
            cluster.kill("s2", known=False)
            for _ in range(5):
                assert (client.pull("item", np.arange(100)) == 0.5).all()


def test_a_client_with_an_old_view_follows_a_join(tmp_path):
    with local_cluster(tmp_path, servers=2) as cluster, cluster.client() as client:
        client.create_table("item", dim=4, optimizer=SGD1, initializer=ZEROS)
        cluster.change(Join((cluster.start("s9"),)))
        client.push("item", np.arange(300), -np.ones((300, 4)))
        assert (client.pull("item", np.arange(300)) == 1).all()
        assert cluster.rows("item")["s9"] > 50
        assert client.statistics().epoch == cluster.view.epoch


# -- the asynchronous client


def test_the_asynchronous_client_does_the_same(cluster: LocalCluster):
    async def work() -> None:
        async with await cluster.async_client() as client:
            name = f"t{next(_numbers)}"
            await client.create_table(name, dim=4, optimizer=SGD1, initializer=ZEROS)
            assert (await client.describe(name)).dim == 4
            ids = np.arange(100)
            await asyncio.gather(*(client.push(name, ids, -np.ones((100, 4))) for _ in range(150)))
            assert client.statistics().undecided == 0
            for _ in range(100):
                client.push_nowait(name, ids, -np.ones((100, 4)))
            await client.flush()
            assert (await client.pull(name, ids) == 250).all()
            await client.push_bags({name: (ids, [0, 50, 100])}, {name: -np.ones((2, 4))})
            pooled = await client.pull_bags({name: (ids, [0, 50, 50, 100])}, mode="mean")
            np.testing.assert_array_equal(pooled[name], [[251] * 4, [0] * 4, [251] * 4])
            await client.pull(name, [1000, 1001, 1])
            assert client.last_absent == 2
            found = [len(part.ids) async for part in client.pull_range(name)]
            assert sum(found) == 100
            await client.push_range(name, *(await client.ranges(name, 1))[0], [1], np.ones((1, 4)))
            await client.assign(name, [1], np.ones((1, 4)))
            await client.delete(name, [2])
            ragged = ps.RaggedIds.of([1, 2], [0, 1, 2])
            await client.push_ragged([name], ragged, [-np.ones((2, 4))])
            np.testing.assert_array_equal((await client.pull_ragged([name], ragged))[0], [[2] * 4, [1] * 4])
            await client.alter_table(name, absent="initial")
            await client.set_optimizer(name, ps.SGD(lr=0.5))
            assert (await client.describe(name)).optimizer == ps.SGD(lr=0.5)
            await client.truncate(name)
            await client.drop_table(name)
            assert name not in await client.tables()
            with pytest.raises(ps.RequestError, match="unknown table"):
                await client.pull(name, [1])
            task = client.push_nowait("nobody", [1], np.ones((1, 4)))
            with pytest.raises(ps.RequestError, match="unknown table"):
                await client.flush()
            assert task.done()
        with pytest.raises(ps.RequestError, match="this client is closed"):
            await client.tables()
        with pytest.raises(ps.NotApplied, match=r"^given up after 0\.[12]\d* s: cannot connect"):
            await AsyncClient.connect("127.0.0.1:1", token="x", timeout=0.2)

    asyncio.run(asyncio.wait_for(work(), 100))


def test_statistics_count_what_pulls_and_pushes_took(tmp_path):
    """A bag of ids of three servers is three partial sums; a table on every server is asked of one."""
    with local_cluster(tmp_path, shared_reads=False) as cluster, cluster.client() as client:
        name, everywhere = new_table(client), new_table(client, replicas="all")
        before = client.statistics()
        ids = np.arange(1000)
        client.pull_bags({name: (ids, [0, 1000])})
        now = client.statistics()
        assert (now.calls - before.calls, now.rows - before.rows) == (3, 3)
        assert now.frames_sent - before.frames_sent >= 3
        assert now.bytes_received - before.bytes_received >= 3 * 16
        client.pull_bags({everywhere: (ids, [0, 500, 1000])})
        last = client.statistics()
        assert (last.calls - now.calls, last.rows - now.rows) == (1, 2)
        assert last.bytes_sent - now.bytes_sent > 8 * 1000
        client.pull_bags({everywhere: (ids[:10], [0, 5, 10])})
        assert client.statistics().rows - last.rows == 2


def test_a_push_that_the_primary_alone_acknowledges_is_asked_for_as_such(cluster, monkeypatch):
    with pytest.raises(ps.RequestError, match="acks is 'some'"):
        Client(cluster.addresses, TOKEN, acks="some")
    asked = []
    send = Connections.send
    monkeypatch.setattr(Connections, "send", lambda self, server, call, until: (
        asked.append(call), send(self, server, call, until)
    )[1])  # fmt: skip
    for acks in ("all", "primary"):
        with Client(cluster.addresses, TOKEN, acks=acks) as client:
            client.push(new_table(client, replicas=3), [1], np.ones((1, 4)))
        # A retry is no fault here: owners take the new table's view one after another.
        assert {call.fields.get("acks", "all") for call in asked if call.op == "push"} == {acks}
        asked.clear()
