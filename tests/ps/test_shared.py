"""Reading servers' memory in place: the answers of a pull, or none; never half of a change, never a stray access."""

import multiprocessing
import os
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ps
from hashring.planner import CreateTable, DropTable, Fail, Join, Return, plan
from hashring.tokens import mix64, tokens
from hashring.view import Server, View
from ps.client.batch import bags_batch, modes_of, rows_batch
from ps.client.request import Places
from ps.client.routing import Routing
from ps.client.shared import SharedReader
from ps.kernels import index as ix
from ps.kernels import shared as kernels
from ps.share import PullShare, PushShare, features_of
from ps.shared import LEASE_NS, lease
from ps.spec import TableSpec
from ps.store import Store, StoreLimits
from ps.store.sharing import described

LIMITS = StoreLimits(memory_max=2**26, slots_max=2**16, shared=True)
HERE = "unix:" + os.path.dirname(__file__)
"""An address that exists on this host; nobody connects to it here."""


def view_of(servers: int) -> View:
    """Some servers of this host; tables "a" (dim 4), "b" (dim 4, whole, with a default) and "c" (dim 20)."""
    joined = tuple(Server(f"s{i}", i + 1, "h", addresses=(HERE,)) for i in range(servers))
    view = plan(View.empty(1, 8), Join(joined))
    for spec in (
        TableSpec("a", 4, ps.SGD(lr=1.0)),
        TableSpec("b", 4, ps.SGD(lr=1.0), placement="whole", absent="default", default=(1.0, 2.0, 3.0, 4.0)),
        TableSpec("c", 20, ps.Adagrad(), seed=7),
    ):
        view = plan(view, CreateTable(spec.name, spec.to_plain(), spec.placement, spec.replicas))
    return view


class Host:
    """Servers without sockets, and a reader of their memory."""

    def __init__(self, servers: int = 2) -> None:
        self.view = view_of(servers)
        self.routing = Routing(self.view)
        self.stores = [Store(i + 1, LIMITS) for i in range(servers)]
        self.reader = SharedReader()
        self.sequence = 0
        for store in self.stores:
            store.install(self.view)
            store.held.latch.beat(LEASE_NS * 1000)
        self.look_around()

    def look_around(self) -> None:
        """What a client does before the first pull by a view."""
        for i in self.reader.asked(self.routing):
            self.reader.learn(self.routing.servers[i], described(self.stores[i].held))
        self.reader.adopt(self.routing)

    def put(self, name: str, ids: list[int], kind: str = "assign") -> None:
        """Give rows to ids: row i is i, i + 1, ..."""
        table = self.routing.table(name)
        wanted = np.array(sorted(set(ids)), np.int64)
        owners = self.routing.primaries[:, 0]
        for s, store in enumerate(self.stores):
            mine = np.array([owners[slot_of(self.routing, name, i)] == s for i in wanted.tolist()], bool)
            rows = (wanted[mine, None] + np.arange(table.spec.dim)).astype(np.float32)
            self.sequence += 1
            lines = features_of([table.number], [int(mine.sum())])
            flat = np.empty(0, np.float32) if kind == "delete" else rows.reshape(-1)
            store.push(PushShare(9, self.sequence, kind, lines, wanted[mine], flat))

    def pull(self, batch: Any, mode: str = "sum", absent: int | None = None) -> tuple[int, NDArray[np.float32]]:
        """(absent ids or -1, all rows flat)."""
        features = self.routing.features(batch.names)
        modes = features.zeros if mode == "sum" else modes_of(batch, mode)
        places = Places.of(batch.starts, features.dims)
        out = np.full(places.total, np.nan, np.float32)
        return self.reader.pull(batch, features, modes, absent, places.places, out), out


def slot_of(routing: Routing, name: str, id_: int) -> int:
    """The slot of an id, by the plain definition."""
    table = routing.table(name)
    token = int(tokens(np.array([id_], np.int64), table.spec.seed)[0])
    return table.first + (token >> (64 - table.bits) if table.bits else 0)


@pytest.fixture(scope="module")
def host() -> Host:
    """Two servers with rows 0..299 of every table."""
    made = Host()
    for name in "abc":
        made.put(name, list(range(300)))
    return made


ids_of_bags = st.lists(st.lists(st.integers(-5, 400) | st.sampled_from([2**63 - 1, -(2**63)]), max_size=6), max_size=6)


def expected(host: Host, name: str, ids: list[int], absent: int | None) -> NDArray[np.float32]:
    """Rows of ids, one by one, by the store that owns each."""
    table = host.routing.table(name)
    rows = np.empty((len(ids), table.spec.dim), np.float32)
    code = host.routing.features((name,)).lines[0, 3] if absent is None else absent
    for i, id_ in enumerate(ids):
        store = host.stores[host.routing.primaries[slot_of(host.routing, name, id_), 0]]
        rows[i] = store.pull(PullShare(features_of([table.number], [1], 0, code), np.array([id_], np.int64))).rows
    return rows


@pytest.fixture(params=[4096, 0], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small reads by one thread, and every read by two, three ids at a time."""
    monkeypatch.setattr("ps.client.shared.ALONE_MAX", request.param)
    monkeypatch.setattr("ps.client.shared.PART", 3)
    monkeypatch.setattr("ps.client.shared.CORES", 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("threads")
@given(
    bags=st.dictionaries(st.sampled_from("abc"), ids_of_bags, min_size=1),
    mode=st.sampled_from(["sum", "mean", "max"]),
    absent=st.sampled_from([None, 0, 1, 2]),
)
def test_bags_as_the_servers_would_pool_them(
    host: Host, bags: dict[str, list[list[int]]], mode: str, absent: int | None
) -> None:
    """Sums, means and maxima of rows that are there and that are not, over servers and widths."""
    given_bags = {
        name: (
            np.array([i for bag in some for i in bag], np.int64),
            np.cumsum([0] + [len(bag) for bag in some]),
        )
        for name, some in bags.items()
    }
    batch = bags_batch(given_bags)
    without, flat = host.pull(batch, mode, absent)
    assert without == sum(not 0 <= i < 300 for some in bags.values() for bag in some for i in bag)
    at = 0
    for name, some in bags.items():
        dim = host.routing.table(name).spec.dim
        for bag in some:
            rows = expected(host, name, bag, absent).astype(np.float64)
            pooled = {"sum": rows.sum, "mean": rows.mean, "max": rows.max}[mode](axis=0) if len(bag) else np.zeros(dim)
            np.testing.assert_allclose(flat[at : at + dim], pooled, rtol=1e-5, atol=1e-5)
            at += dim
    assert at == len(flat)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("threads")
@given(ids=st.lists(st.integers(-5, 400), max_size=200), name=st.sampled_from("abc"))
def test_single_rows(host: Host, ids: list[int], name: str) -> None:
    """A pull of rows: bit for bit what the servers answer."""
    without, flat = host.pull(rows_batch(name, np.array(ids, np.int64)))
    assert without == sum(not 0 <= i < 300 for i in ids)
    assert np.array_equal(flat, expected(host, name, ids, None).reshape(-1))


@pytest.mark.usefixtures("threads")
def test_weights(host: Host) -> None:
    """Weights go with sums; with a maximum beside them the fabric is asked."""
    weights = np.array([0.5, 2.0, 1.0], np.float32)
    batch = bags_batch({"a": (np.array([3, 5, 7]), np.array([0, 2, 3]), weights)})
    without, flat = host.pull(batch)
    rows = expected(host, "a", [3, 5, 7], None) * weights[:, None]
    assert without == 0
    assert np.array_equal(flat.reshape(2, 4), [rows[0] + rows[1], rows[2]])
    mixed = bags_batch({"a": (np.array([3]), np.array([0, 1]), weights[:1]), "c": (np.array([3]), np.array([0, 1]))})
    assert host.pull(mixed, {"a": "sum", "c": "max"})[0] == -1  # type: ignore[arg-type]


# -- reads by two threads


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 9), max_size=20), size=st.integers(1, 20), ragged=st.booleans())
def test_parts_are_all_bags_in_order(counts: list[int], size: int, ragged: bool) -> None:
    """Each part but the last has at least `size` ids, and would not without its last bag."""
    offsets = np.cumsum([0, *counts]) if ragged else np.empty(0, np.int64)
    ids = np.cumsum([0, *counts]) if ragged else np.arange(len(counts) + 1)
    cuts = np.full(int(ids[-1]) // size + 2, -1, np.int64)
    parts = kernels.cut_parts(offsets, len(counts), size, cuts)
    assert cuts[0] == 0
    assert cuts[parts] == len(counts)
    bounds = cuts[: parts + 1].tolist()
    assert bounds == sorted(set(bounds))
    for low, high in pairwise(bounds[:-1]):
        assert ids[high - 1] - ids[low] < size <= ids[high] - ids[low]


@pytest.mark.parametrize("busy", [True, False])
def test_a_helper_that_does_not_come_is_not_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """All parts are read by the caller where the other thread has something else to do, and once it is free again."""
    monkeypatch.setattr("ps.client.shared.ALONE_MAX", 0)
    monkeypatch.setattr("ps.client.shared.CORES", 2)
    monkeypatch.setattr("ps.client.shared.PART", 10)
    ids = list(range(290, 310)) * 5
    free, begun = threading.Event(), threading.Event()
    if busy:
        assert host.pull(rows_batch("a", np.array([1])))[0] == 0
        assert host.reader._pool is not None
        host.reader._pool.submit(lambda: (begun.set(), free.wait(30)))
        assert begun.wait(30)
    for _ in range(3):
        without, flat = host.pull(rows_batch("a", np.array(ids, np.int64)))
        assert without == 50
        assert np.array_equal(flat, expected(host, "a", ids, None).reshape(-1))
    free.set()


def test_a_forked_child_has_a_helper_of_its_own(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's thread is not in the child."""
    monkeypatch.setattr("ps.client.shared.ALONE_MAX", 0)
    monkeypatch.setattr("ps.client.shared.CORES", 2)
    batch = rows_batch("a", np.arange(100))
    assert host.pull(batch)[0] == 0
    child = os.fork()
    if child == 0:
        before = host.reader._pool
        os._exit(0 if host.pull(batch)[0] == 0 and host.reader._pool is not before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- when not to read


def test_nothing_is_read_while_a_server_changes() -> None:
    """An odd sequence refuses; one that moved on is read anew."""
    host = Host()
    host.put("a", [1, 2, 3])
    batch = rows_batch("a", np.array([1, 2, 3]))
    with host.stores[0].held.latch, host.stores[1].held.latch:
        assert host.pull(batch)[0] == -1
    assert host.pull(batch)[0] == 0


def test_a_change_in_the_middle_of_a_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read while a push came is thrown away; the second attempt counts."""
    host = Host()
    host.put("a", [1, 2, 3])
    begin, pushes = kernels.begin, [3]

    def meddle(*arguments: Any) -> bool:
        known = begin(*arguments)
        if pushes[0]:
            pushes[0] -= 1
            host.put("a", [1, 2, 3])
        return known

    monkeypatch.setattr("ps.client.shared.begin", meddle)
    batch = rows_batch("a", np.array([1, 2, 3]))
    assert host.pull(batch)[0] == -1
    assert pushes[0] == 1
    assert host.pull(batch)[0] == 0


def test_a_silent_server_is_not_read() -> None:
    """From the end of its lease on a server's memory may be old."""
    host = Host()
    host.put("a", [1])
    batch = rows_batch("a", np.array([1]))
    store = host.stores[host.routing.primaries[slot_of(host.routing, "a", 1), 0]]
    store.held.latch.beat(0)
    assert host.pull(batch)[0] == -1
    store.held.latch.beat(LEASE_NS * 1000)
    assert host.pull(batch)[0] == 0


def test_leases_end_before_silence_is_noticed() -> None:
    """Never more than half of what it takes to leave a silent server out."""
    assert lease(1000) == LEASE_NS
    assert lease(100) == 50_000_000


def test_tables_that_come_and_go_are_learnt_anew() -> None:
    """Another generation: what was known of tables is void, and a new view is mapped."""
    host = Host()
    host.put("a", [1, 2])
    assert host.pull(rows_batch("a", np.array([1])))[0] == 0
    host.view = plan(host.view, DropTable("b"))
    spec = TableSpec("d", 4, ps.SGD(lr=1.0))
    host.view = plan(host.view, CreateTable(spec.name, spec.to_plain(), spec.placement, spec.replicas))
    for store in host.stores:
        store.install(host.view)
    assert host.pull(rows_batch("a", np.array([1])))[0] == -1
    assert not host.reader.ready(host.routing)
    host.routing = Routing(host.view)
    host.look_around()
    host.put("d", [1, 2])
    without, rows = host.pull(rows_batch("d", np.array([1, 2])))
    assert without == 0
    assert np.array_equal(rows.reshape(2, 4)[:, 0], [1, 2])


def test_a_slot_that_moved_is_not_read() -> None:
    """The server's own roles decide, whatever the reader's view says."""
    host = Host()
    host.put("a", [1])
    slot = slot_of(host.routing, "a", 1)
    store = host.stores[host.routing.primaries[slot, 0]]
    store.held.slots.roles[slot] = 0
    assert host.pull(rows_batch("a", np.array([1])))[0] == -1


def test_servers_of_other_hosts_are_not_looked_for() -> None:
    """Only a Unix socket that exists here makes a server one of this host."""
    view = plan(View.empty(1, 8), Join((Server("s", 1, "h", addresses=("tcp:10.0.0.1:1", "unix:/nowhere/s")),)))
    assert SharedReader().asked(Routing(view)) == []


def test_a_server_that_shares_nothing_is_asked_once(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    socket.touch()
    view = plan(View.empty(1, 8), Join((Server("s", 1, "h", addresses=(f"unix:{socket}",)),)))
    reader, routing = SharedReader(), Routing(view)
    assert reader.asked(routing) == [0]
    reader.learn(view.servers[0], {})
    assert reader.asked(routing) == []
    returned = Routing(plan(plan(view, Fail("s")), Return(replace(view.servers[0], incarnation=2))))
    assert [returned.servers[i].incarnation for i in reader.asked(returned)] == [2]


def test_a_private_store_shares_nothing() -> None:
    """Without the setting there is nothing to map, and the reader says so."""
    host = Host(1)
    private = Store(1, StoreLimits(memory_max=2**26, slots_max=2**16))
    assert described(private.held) == {}
    reader = SharedReader()
    reader.learn(host.routing.servers[0], described(private.held))
    reader.adopt(host.routing)
    assert host.reader.ready(host.routing)
    assert reader.ready(host.routing)  # it knows that there is nothing, for a while


@pytest.mark.parametrize("wrong", ["pid", "inode", "incarnation"])
def test_another_process_is_not_taken_for_the_server(wrong: str) -> None:
    """A process number of another name space, a descriptor that was taken anew, a server that was replaced."""
    host = Host(1)
    plain = described(host.stores[0].held)
    server = host.routing.servers[0]
    if wrong == "pid":
        plain["pid"] = 1
    elif wrong == "inode":
        plain["roles"][2] += 1
    else:
        server = Server("s0", 77, "h", addresses=(HERE,))
    reader = SharedReader()
    reader.learn(server, plain)
    routing = Routing(plan(View.empty(1, 8), Join((server,))))
    reader.adopt(routing)
    assert reader._mapped is None


# -- a writer in another process


def _writer(pipe: Any) -> None:
    """Push 1 to every column of random rows (tables grow, rows come and go), until told to stop."""
    store = Store(1, LIMITS)
    view = view_of(1)
    store.install(view)
    store.held.latch.beat(LEASE_NS * 1000)
    number = view.table("c").number  # type: ignore[union-attr]
    rng = np.random.default_rng(5)
    pipe.send(described(store.held))
    for sequence in count(1):
        ids = np.unique(rng.integers(0, 20_000, 400))
        rows = np.repeat(rng.random((len(ids), 1), np.float32), 20, axis=1)
        kind = "delete" if sequence % 7 == 0 else "assign"
        flat = np.empty(0, np.float32) if kind == "delete" else rows.reshape(-1)
        store.push(PushShare(3, sequence, kind, features_of([number], [len(ids)]), ids, flat))  # type: ignore[arg-type]
        if sequence % 50 == 0:
            while store.compact():
                pass
        if pipe.poll():
            break
    pipe.recv()


@contextmanager
def writing() -> Iterator[tuple[Any, Any]]:
    """(its process, what it shares)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_writer, args=(there,))
    process.start()
    try:
        assert here.poll(100)
        yield process, here.recv()
    finally:
        if process.is_alive():
            here.send(None)
        process.join(60)
        assert not process.is_alive()


def test_no_read_sees_half_of_a_change() -> None:
    """Every row that is read has equal columns, as every row that was written; and a killed writer is not read."""
    with writing() as (process, plain):
        routing = Routing(view_of(1))
        reader = SharedReader()
        reader.learn(routing.servers[0], plain)
        reader.adopt(routing)
        features = routing.features(("c",))
        rng = np.random.default_rng(6)
        good = attempts = 0
        while good < 300:
            batch = rows_batch("c", rng.integers(0, 20_000, 50))
            places = Places.of(batch.starts, features.dims)
            out = np.empty(places.total, np.float32)
            attempts += 1
            assert attempts < 10**6, f"only {good} reads came through"
            if reader.pull(batch, features, features.zeros, 0, places.places, out) >= 0:
                good += 1
                rows = out.reshape(-1, 20)
                assert (rows == rows[:, :1]).all()
        process.kill()
        process.join(60)
        assert reader.pull(batch, features, features.zeros, 0, places.places, out) == -1
        assert reader._mapped is None


# -- whatever stands in the memory, nothing is read from outside of it


class Bounded(np.ndarray):  # type: ignore[type-arg]
    """An array that refuses indexes which compiled code would follow out of it."""

    def __getitem__(self, key: Any) -> Any:
        for k, n in zip(key if isinstance(key, tuple) else (key,), self.shape, strict=False):
            assert not isinstance(k, int | np.integer) or 0 <= k < n, f"index {k} of {n}"
        return super().__getitem__(key)


words = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-(2**63), 2**63 - 1, *range(-8, 9)]) | st.integers(0, 2**28)


@settings(max_examples=200, deadline=None)
@given(
    directory=st.lists(words, min_size=4, max_size=4),
    nodes=st.lists(words, min_size=32, max_size=32),
    entries=st.lists(words, min_size=64, max_size=64),
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    bits=st.sampled_from([0, 1]),
)
def test_garbage_leads_nowhere(
    directory: list[int], nodes: list[int], entries: list[int], ids: list[int], bits: int
) -> None:
    """The kernel's search as plain Python, over memory that makes no sense: no index leaves its array."""
    plan_ = np.zeros((1, ix.PLAN_COLUMNS), np.int64)
    plan_[0, ix.P_BITS], plan_[0, ix.P_IDS_END] = bits, len(ids)
    sizes = np.array([2, 1, 16, 5], np.int64)
    bounded = {
        "directory": np.array(directory, np.int64),
        "nodes": np.array(nodes, np.int64).reshape(2, 16),
        "entries": np.array(entries, np.int64).reshape(32, 2),
    }
    arrays = {name: array.view(Bounded) for name, array in bounded.items()}
    rows = np.empty(len(ids), np.int64)
    with np.errstate(over="ignore"):
        found = _find_plainly(plan_, np.array(ids, np.int64), arrays, sizes, rows)
    assert found
    assert ((rows == -1) | ((rows >= 5) & (rows < 10))).all()


def _find_plainly(
    plan_: NDArray[np.int64],
    ids: NDArray[np.int64],
    arrays: dict[str, Any],
    sizes: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> bool:
    """`kernels._find` as Python, all that it calls included, for the second of two servers."""
    plain = {name: getattr(f, "py_func", f) for name, f in vars(kernels).items() if callable(f)}
    names = {**vars(kernels), **plain, "prefetch": lambda *_: None, "min": min}
    for name in ("probe", "place_of", "slot_of", "child_of", "token_of"):
        names[name] = _plain(getattr(ix, name), vars(ix))
    leaf = _plain(kernels._leaf, names)
    find = _plain(kernels._find, {**names, "_leaf": leaf})
    return bool(
        find(
            plan_, 0, ids, np.array([1, 1], np.int8), np.zeros((2, 1), np.int64), np.ones(4, np.uint8),
            arrays["directory"], arrays["nodes"], arrays["entries"], sizes, np.zeros(2, np.uint8),
            np.empty((4, 64), np.int64), rows,
        )
    )  # fmt: skip


def _plain(function: Any, names: dict[str, Any]) -> Any:
    """A kernel's Python function, calling other kernels' Python functions."""
    source = getattr(function, "py_func", function)
    known = {name: getattr(f, "py_func", f) for name, f in names.items()}
    known["mix64"] = getattr(mix64, "py_func", mix64)
    return types.FunctionType(source.__code__, known)
