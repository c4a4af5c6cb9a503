"""The service over a real store: every operation through a connection, and what each refuses."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest

from hashring.planner import CreateTable, DropTable, Enlist, Fail, Join, Recover, Renew, plan
from hashring.tokens import tokens
from hashring.view import Server, View
from ps.config import Config, ServerConfig
from ps.errors import ConfigError, EmbringError, NotApplied, RequestError, WrongView
from ps.exports import EXPORTS_MAX as EXPORTS
from ps.fabric.blocking import BlockingConnection
from ps.fabric.protocol import Hello
from ps.loop import LoopThread
from ps.meter import BUCKETS_S
from ps.service import Service, serve
from ps.share import PullShare, PushShare, features_of
from ps.spec import SGD, Initializer, TableSpec
from ps.store import Store, StoreLimits
from ps.wire import Message, pack_plain, pull_message, push_message, view_message, view_of

WAIT_S = 30.0
DIM = 4
SPEC = TableSpec("t", DIM, SGD(lr=1.0), Initializer(0.0, 0.0), seed=3)
ME, OTHER = 77, 78


def view_with(table: TableSpec = SPEC, names=(("a", ME),)) -> View:
    view = plan(View.empty(5, 4), Join(tuple(Server(name, number, name) for name, number in names)))
    return plan(view, CreateTable(table.name, table.to_plain(), table.placement, table.replicas))


class Running:
    """A service on its data thread, and a connection to it."""

    def __init__(self, view: View | None, config: Config | None = None) -> None:
        self.asked: list[tuple[str, dict]] = []
        self._loop = LoopThread("data")
        self.service = Service(Store(ME, StoreLimits(memory_max=2**30)), config or Config(), "secret", self._control)
        (self.address,) = self._loop.call(serve(self.service, ["127.0.0.1:0"]), WAIT_S)
        if view is not None:
            self.on_thread(lambda: self.service.install(view))
        self.connection = BlockingConnection.connect(self.address, Hello("secret"), WAIT_S)

    async def _control(self, verb, fields):
        self.asked.append((verb, fields))
        if verb == "refuse":
            raise RequestError("the controller says no")
        await asyncio.sleep(0)
        return {"done": verb}

    def on_thread(self, call):
        async def run():
            return call()

        return self._loop.call(run(), WAIT_S)

    def ask(self, op, fields=None, arrays=None) -> Message:
        return self.connection.receive(self.connection.send(op, fields or {}, arrays or {}, WAIT_S), WAIT_S)

    def pull(self, ids, **fields) -> Message:
        own, arrays = pull_message(pull_of(self.number, ids))
        return self.ask("pull", {**own, **fields}, arrays)

    def push(self, ids, grads, sequence, kind="push") -> Message:
        return self.ask("push", *push_message(push_of(self.number, ids, grads, sequence, kind)))

    @property
    def number(self) -> int:
        return self.service.view.table("t").number

    def close(self) -> None:
        self.connection.close()
        self._loop.call(self.service.end(), WAIT_S)
        self._loop.close()


def pull_of(table, ids):
    ids = np.asarray(ids, np.int64)
    return PullShare(features_of([table], [len(ids)]), ids)


def push_of(table, ids, rows, sequence, kind="push"):
    ids, rows = np.asarray(ids, np.int64), np.asarray(rows, np.float32).reshape(-1)
    return PushShare(9, sequence, kind, features_of([table], [len(ids)]), ids, rows)


@pytest.fixture
def server():
    running = Running(view_with())
    yield running
    running.close()


def test_pushes_are_seen_by_pulls_and_applied_once(server):
    ids = [1, -1, 2**62]
    first = server.push(ids, np.ones((3, DIM)), 1)
    assert (first.fields["seen"], first.fields["rows_new"]) == (0, 3)
    again = server.push(ids, np.ones((3, DIM)), 1)
    assert (again.fields["applied"], again.fields["rows_new"]) == (0, 0)
    assert again.fields["seen"] == first.fields["applied"]
    reply = server.pull([*ids, 5])
    np.testing.assert_array_equal(reply.arrays["rows"].reshape(4, DIM), [[-1] * DIM] * 3 + [[0] * DIM])
    assert reply.fields["absent"] == 1
    server.push(ids, np.full((3, DIM), 7.0), 2, "assign")
    server.push([1], [], 3, "delete")
    np.testing.assert_array_equal(server.pull(ids).arrays["rows"].reshape(3, DIM)[:, 0], [0, 7, 7])


@pytest.mark.parametrize("op", ["ping", "view", "pull", "statistics", "admin", "drain"])
def test_every_reply_carries_the_epoch(server, op):
    fields, arrays = pull_message(pull_of(server.number, [1]))
    reply = server.ask(op, {**fields, "verb": "x"}, arrays if op == "pull" else {})
    assert reply.fields["epoch"] == server.service.view.epoch == 2


def test_the_welcome_says_who_it_is(server):
    welcome = server.connection.welcome
    assert (welcome.cluster, welcome.epoch, welcome.incarnation) == (5, 2, ME)
    assert welcome.fingerprint == Config().fingerprint
    with pytest.raises(WrongView):
        BlockingConnection.connect(server.address, Hello("secret", incarnation=OTHER), WAIT_S)


@pytest.mark.parametrize(
    ("op", "fields", "arrays", "match"),
    [
        ("destroy", {}, {}, "operation 'destroy' is unknown; there are absorb, admin"),
        ("hello", {}, {}, "operation 'hello' is unknown"),
        ("ping", {"epoch": -1}, {}, "epoch is -1"),
        ("ping", {"epoch": "x"}, {}, "epoch is x"),
        ("pull", {}, {}, "array 'features' is missing"),
        ("push", {"kind": "push"}, {}, "array 'features' is missing"),
        ("range", {}, {}, "table is None"),
        ("range", {"table": 99, "start": 0}, {}, "table 99 is unknown"),
        ("range", {"table": 0, "start": -1}, {}, "start is -1"),
        ("range", {"table": 0, "start": 5, "stop": 4}, {}, "stop is 4"),
        ("export", {}, {}, "array 'slots' is missing"),
        ("export", {}, {"slots": np.array([16])}, "slots are 16 to 16; epoch 2 has 0 to 15"),
        ("drop", {}, {"slots": np.array([-1])}, "slots are -1 to -1"),
        ("digest", {}, {"slots": np.array([1, 1])}, "named twice"),
        ("watermark", {}, {"slots": np.array([[1]])}, "one-dimensional"),
        ("export", {"cluster": 5}, {"slots": np.array([1]), "positions": np.array([1, 2])}, "2 positions of 1 slots"),
        ("absorb", {}, {}, "must be a map"),
        ("absorb", {"block": {}}, {}, "not a row block"),
        ("absorb", {"block": {"sections": [[1]], "cluster": 5, "copy": 0}}, {}, "not a row block"),
        ("install", {}, {"view": np.arange(9, dtype=np.uint8)}, "MessagePack|malformed|not a view"),
        ("drain", {"on": 1}, {}, "on is 1"),
        ("admin", {}, {}, "verb must be text"),
        ("admin", {"verb": "refuse"}, {}, "the controller says no"),
        ("admin", {"verb": "x"}, {"fields": pack_plain(7)}, "fields are 7; they must be a map"),
    ],
)
def test_wrong_requests_are_named(server, op, fields, arrays, match):
    with pytest.raises(RequestError, match=match):
        server.ask(op, fields, arrays)
    server.ask("ping")


def test_unknown_tables_and_bad_gradients_are_refused_whole(server):
    with pytest.raises(RequestError):
        server.ask("pull", *pull_message(pull_of(99, [1])))
    with pytest.raises(RequestError, match="NaN"):
        server.push([1, 2], [[0] * DIM, [np.nan] * DIM], 1)
    assert server.pull([1, 2]).fields["absent"] == 2


def test_a_pull_that_no_frame_could_carry_is_refused_before_it_is_made():
    running = Running(view_with(), Config().with_settings("server", frame_max_mib=1))
    with pytest.raises(RequestError, match="have 1600000 bytes; one reply has at most 1048576"):
        running.pull(np.arange(100_000))
    assert running.service.store.statistics().pulls == 0
    assert running.pull(np.arange(60_000)).fields["absent"] == 60_000
    running.close()


# -- views


def test_slots_of_others_are_answered_with_the_epoch():
    running = Running(view_with(names=(("a", ME), ("b", OTHER))))
    with pytest.raises(WrongView) as caught:
        running.pull(np.arange(200))
    assert caught.value.epoch == 2
    running.close()


def test_only_newer_views_are_installed(server):
    old = server.service.view
    newer = plan(old, DropTable("t"))
    assert server.ask("install", *view_message(newer)).fields["epoch"] == newer.epoch
    assert server.ask("install", *view_message(old)).fields["epoch"] == newer.epoch
    reply = server.ask("view")
    assert view_of(reply.fields, reply.arrays).to_plain() == newer.to_plain()


def test_a_request_that_knows_a_newer_view_waits_for_it():
    running = Running(None)
    view = view_with()
    fields, arrays = pull_message(pull_of(view.table("t").number, [1]))
    number = running.connection.send("pull", {**fields, "epoch": view.epoch}, arrays, WAIT_S)
    running.on_thread(lambda: running.service.install(view))
    reply = running.connection.receive(number, WAIT_S)
    assert (reply.fields["epoch"], reply.fields["absent"]) == (2, 1)
    running.close()


def test_a_future_epoch_is_judged_by_the_present_view_in_the_end(server, monkeypatch):
    monkeypatch.setattr("ps.service.NEWER_S", 0.05)
    reply = server.pull([1], epoch=2**62)
    assert (reply.fields["epoch"], reply.fields["absent"]) == (2, 1)


def test_a_table_unknown_in_an_older_view_is_to_be_asked_for_again(server, monkeypatch):
    monkeypatch.setattr("ps.service.NEWER_S", 0.05)
    fields, arrays = pull_message(pull_of(server.number + 1, [1]))
    with pytest.raises(RequestError, match=f"table number {server.number + 1} is unknown"):
        server.ask("pull", {**fields, "epoch": 2}, arrays)
    with pytest.raises(NotApplied, match="epoch 2, where the request knows epoch 3"):
        server.ask("pull", {**fields, "epoch": 3}, arrays)


# -- ranges and blocks


def all_of_range(server, start, stop):
    parts, cursor = [], start
    while cursor is not None:
        reply = server.ask("range", {"table": server.number, "start": cursor, "stop": stop})
        parts.append(reply.arrays)
        assert reply.arrays["rows"].shape == (len(reply.arrays["ids"]), DIM)
        assert reply.fields["more"] == (reply.fields["cursor"] is not None)
        cursor = reply.fields["cursor"]
    return np.concatenate([p["ids"] for p in parts]), np.concatenate([p["rows"] for p in parts]), len(parts)


def test_ranges_in_parts_hold_every_row_once(server, monkeypatch):
    monkeypatch.setattr("ps.service.PART_BYTES", 4 * DIM * 40)
    ids = np.arange(-250, 250)
    server.push(ids, np.repeat(ids, DIM).reshape(-1, DIM), 1, "assign")
    places = tokens(ids, SPEC.seed)
    for start, stop in [(0, None), (0, 2**62), (2**62, None), (5, 5), (2**63 - 7, 2**63 + 2**62)]:
        found, rows, parts = all_of_range(server, start, stop)
        inside = [i for i, p in zip(ids, places, strict=True) if start <= int(p) and (stop is None or int(p) < stop)]
        assert sorted(found) == inside
        np.testing.assert_array_equal(rows[:, 0], found)
        assert parts >= len(inside) / 60


def export_all(server, slots, **fields):
    arrays = {"slots": slots}
    if "positions" in fields:
        arrays["positions"] = fields.pop("positions")
    reply = server.ask("export", fields, arrays)
    while reply.fields["more"]:
        yield reply
        reply = server.ask("export", {"cursor": reply.fields["cursor"], "part": reply.fields["part"]})


def test_exported_blocks_make_an_equal_server(server, monkeypatch):
    monkeypatch.setattr("ps.exports.EXPORT_ROWS", 64)
    ids = np.arange(500)
    server.push(ids, np.random.default_rng(1).normal(size=(500, DIM)), 1)
    slots = np.arange(16)
    lost = plan(plan(view_with(names=(("b", 99),)), Enlist((Server("a", ME, "a"),))), Fail("b"))
    begun = plan(lost, Renew(slots))
    copy = Running(begun)
    blocks = list(export_all(server, slots))
    assert len(blocks) > 4
    for reply in blocks:
        fields = {"block": reply.fields["block"], "term": begun.epoch}
        assert copy.ask("absorb", fields, reply.arrays).arrays["taken"].all()
    copy.on_thread(lambda: copy.service.install(plan(begun, Recover())))
    digests = server.ask("digest", {}, {"slots": slots}).arrays["digests"]
    np.testing.assert_array_equal(copy.ask("digest", {}, {"slots": slots}).arrays["digests"], digests)
    np.testing.assert_array_equal(copy.pull(ids).arrays["rows"], server.pull(ids).arrays["rows"])
    copy.close()

    positions = server.ask("watermark", {}, {"slots": slots}).arrays["positions"]
    assert positions.dtype == np.int64
    server.push([3], np.ones((1, DIM)), 2)
    later = list(export_all(server, slots, cluster=5, positions=positions))
    rows = sum(len(a) for r in later for name, a in r.arrays.items() if name.endswith(".ids"))
    assert rows == 1


def test_ranges_and_exports_keep_to_the_smallest_frame():
    """Rows of some bytes in one table, and slots of which more is said than of their rows."""
    server = Running(view_with(), Config(server=ServerConfig(frame_max_mib=1)))
    big = plan(server.service.view, CreateTable("one", replace(SPEC, name="one").to_plain(), "whole"))
    server.on_thread(lambda: server.service.install(big))
    number = big.table("one").number
    ids = np.arange(60_000)
    for sequence, some in enumerate(np.array_split(ids, 10), 1):
        for table in (server.number, number):
            server.ask("push", *push_message(push_of(table, some, np.ones((len(some), DIM)), sequence)))
    assert sorted(all_of_range(server, 0, None)[0]) == ids.tolist()
    slots = np.arange(big.slots_total)
    rows, changed = 0, False
    for reply in export_all(server, slots):
        rows += sum(len(a) for name, a in reply.arrays.items() if name.endswith(".ids"))
        if reply.fields["block"] and not reply.arrays["final"].all() and not changed:
            changed = True  # the last part of the one slot repeats all of it
            for sequence, some in enumerate(np.array_split(ids, 10), 11):
                server.ask("push", *push_message(push_of(number, some, np.ones((len(some), DIM)), sequence)))
    assert changed
    assert rows >= 3 * len(ids) - 10_000
    server.close()


def test_exports_are_bounded_and_stand_at_one_part(server):
    server.push(np.arange(50), np.ones((50, DIM)), 1)
    slots = np.arange(16)
    first = server.ask("export", {}, {"slots": slots}).fields
    with pytest.raises(NotApplied, match="begin it again"):
        server.ask("export", {"cursor": first["cursor"], "part": first["part"] + 1})
    second = server.ask("export", {}, {"slots": slots}).fields
    for _ in range(EXPORTS):
        server.ask("export", {}, {"slots": slots})
    with pytest.raises(NotApplied):
        server.ask("export", {"cursor": second["cursor"], "part": second["part"]})


def test_owned_slots_are_not_dropped(server):
    with pytest.raises(RequestError, match="owned here"):
        server.ask("drop", {}, {"slots": np.array([3])})


# -- the server itself


def test_draining_refuses_rows_and_nothing_else(server):
    server.ask("drain")
    for call in (lambda: server.pull([1]), lambda: server.push([1], np.ones(DIM), 1)):
        with pytest.raises(NotApplied, match="draining"):
            call()
    assert server.ask("statistics").fields["draining"] is True
    server.ask("drain", {"on": False})
    server.pull([1])


def test_administration_reaches_the_controller(server):
    reply = server.ask("admin", {"verb": "create_table", "spec": {"name": "x"}, "epoch": 1})
    assert reply.fields["done"] == "create_table"
    manifest = {"tables": [[n, "t" * 100, 1, {"default": [0.1] * 4096}] for n in range(40)]}
    server.ask("admin", {"verb": "restore", "epoch": 1}, {"fields": pack_plain({"manifest": manifest})})
    assert server.asked == [("create_table", {"spec": {"name": "x"}}), ("restore", {"manifest": manifest})]


def test_statistics_count_what_happened(server):
    server.pull([1, 2])
    server.push([1], np.ones(DIM), 1)
    with pytest.raises(RequestError):
        server.ask("push", {"kind": "x"}, {})
    server.ask("admin", {"verb": "x"})
    with pytest.raises(EmbringError):
        server.ask("admin", {"verb": "refuse"})
    plain = server.ask("statistics").fields
    assert plain["absent_ids"] == 2
    assert plain["requests"] == 5
    assert plain["errors"] == 2
    assert plain["store"]["rows"] == 1
    assert plain["listener"]["connections"] == 1
    for op, requests, errors in (("pull", 1, 0), ("push", 2, 1), ("admin", 2, 1), ("range", 0, 0)):
        counts = plain["operations"][op]
        assert (counts["requests"], counts["errors"]) == (requests, errors)
        assert sum(counts["buckets"]) == requests
        assert len(counts["buckets"]) == len(BUCKETS_S) + 1
        assert (counts["seconds"] > 0) == (requests > 0)
    record = server.on_thread(server.service.statistics)
    with pytest.raises(AttributeError):
        record.epoch = 5


def test_requests_are_handled_on_the_data_thread(server):
    names = set()
    pull = server.service.store.pull
    server.service.store.pull = lambda *given: (names.add(threading.current_thread().name), pull(*given))[1]
    server.pull([1])
    assert names == {"data"}


def test_another_machines_address_needs_a_token():
    async def main():
        await serve(Service(Store(ME, StoreLimits()), Config(), "", None), ["0.0.0.0:0"])

    with pytest.raises(ConfigError, match="needs a token"):
        asyncio.run(main())


def test_copies_are_told_how_long_requests_waited(server, monkeypatch):
    told = []
    monkeypatch.setattr(server.service.replication, "tick", lambda now, late: told.append(late))

    def wait():
        server.service._asked, server.service._waited = 0, 0.0
        for waited in (30.0, 50.0):
            server.service.handle(Message("shared", 1, {}, {}), waited)
        for _ in range(2):
            server.service._ticking.cancel()
            server.service.begin()

    server.on_thread(wait)
    assert told[-2] == pytest.approx(40.0)
    assert told[-1] == 0.0


@pytest.mark.parametrize("op", ["ping", "replicate"])
def test_copies_do_not_slow_down_for_what_servers_say_to_each_other(server, monkeypatch, op):
    told = []
    monkeypatch.setattr(server.service.replication, "tick", lambda now, late: told.append(late))
    monkeypatch.setitem(server.service._handlers, op, lambda request: ({}, {}))

    def wait():
        server.service._asked = 0
        server.service.handle(Message(op, 1, {}, {}), 30.0)
        server.service._due = 0.0  # the tick itself is late
        server.service._ticking.cancel()
        server.service.begin()

    server.on_thread(wait)
    assert told[-1] == 0.0


def test_freed_memory_goes_back_in_steps_until_there_is_no_more(server):
    left, done = [True, True, False], threading.Event()

    def compact() -> bool:
        more = left.pop(0)
        if not left:
            done.set()
        return more

    server.push([1, 2], np.ones((2, DIM), np.float32), 1)
    server.on_thread(lambda: setattr(server.service.store, "compact", compact))
    server.push([1], np.empty(0, np.float32), 2, kind="delete")
    assert done.wait(WAIT_S)
