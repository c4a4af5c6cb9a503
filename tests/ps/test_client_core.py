"""The client's decisions without a socket: its generators are driven against a plain cluster that fails at will."""

import asyncio
import itertools
import time
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashring.planner import AlterTable, CreateTable, Fail, Join, Leave, Recover, Renew, TruncateTable, plan
from hashring.tokens import tokens
from hashring.view import Server, View
from ps.client import AsyncClient
from ps.client.core import Ask, Full, Wait
from ps.client.ranges import PullRange
from ps.client.verbs import Verbs
from ps.client.window import WINDOW, Window
from ps.controller.admin import change_of
from ps.errors import (
    AuthError,
    EmbringError,
    MemoryFull,
    NotApplied,
    Overloaded,
    PerhapsApplied,
    RequestError,
    SlotsLost,
    WrongView,
)
from ps.share import BAGS, TABLE
from ps.spec import SGD, TableSpec
from ps.wire import Message, pull_share, push_share, view_message

DIM = 2


class World:
    """A cluster in dictionaries. `fault(server, op)` names what happens to each call."""

    def __init__(self, servers: int = 3, replicas: int = 1) -> None:
        self.view = View.empty(1, slot_bits=6)
        self.rows: dict = defaultdict(lambda: np.zeros(DIM, np.float32))
        self.seen: set = set()
        self.frames: list = []
        self.fault = lambda server, op: "ok"
        self.before_ask = lambda: None
        self.waits = 0
        self.part = 3
        self.change(Join(tuple(self.server(k) for k in range(servers))))
        for name in ("a", "b"):
            spec = TableSpec(name, DIM, SGD(lr=1.0), seed=ord(name), absent="zeros")
            self.change(CreateTable(name, spec.to_plain(), "sharded", replicas))

    @staticmethod
    def server(k: int) -> Server:
        return Server(f"s{k}", 100 + k, f"h{k}", addresses=(f"h{k}:1",))

    def change(self, change) -> None:
        self.view = plan(self.view, change)

    def drive(self, steps, full=None):
        """Run a generator to its end, as a shell would. full: what to do where the window has no room."""
        outcome = None
        while True:
            try:
                command = steps.send(outcome)
            except StopIteration as stop:
                return stop.value
            outcome = None
            if isinstance(command, Ask):
                self.before_ask()
                outcome = {}
                for call in command.calls:
                    try:
                        command.absorb(call.key, self.call(command.servers[call.server], call))
                    except EmbringError as error:
                        outcome[call.key] = error
            elif isinstance(command, Wait):
                self.waits += 1
            else:
                assert isinstance(command, Full)
                assert full is not None, "one push at a time cannot fill the window"
                full()

    def call(self, server, call) -> Message:
        what = self.fault(server.name, call.op)
        if what in ("refused", "overloaded"):
            raise (NotApplied if what == "refused" else Overloaded)("not now")
        if what == "request lost":
            raise PerhapsApplied("no answer")
        if isinstance(what, EmbringError):
            raise what
        reply = self.answer(server, call)
        if what == "twice":
            self.answer(server, call)
        if what == "reply lost":
            raise PerhapsApplied("no answer")
        return reply

    def answer(self, server, call) -> Message:
        if call.op == "ping":
            return Message("ok", 1, {"epoch": self.view.epoch})
        if call.op == "view":
            return Message("ok", 1, *view_message(self.view))
        fields, arrays = getattr(self, "_" + call.op)(server, call)
        return Message("ok", 1, {**fields, "epoch": self.view.epoch}, arrays)

    def _slots(self, server, table, ids, primary):
        """The slot of each id; WrongView unless this server may answer for all."""
        found = next((t for t in self.view.tables if t.number == table), None)
        if found is None:
            raise RequestError(f"unknown table {table}")
        group = self.view.group(found.group)
        slots = (tokens(ids, found.spec["seed"]) >> np.uint64(64 - 6)).astype(int)
        index = next((i for i, s in enumerate(self.view.servers) if s.incarnation == server.incarnation), -1)
        owners = group.owners[slots, :1] if primary else group.owners[slots]
        if not (owners == index).any(axis=1).all():
            raise WrongView("not mine", self.view.epoch)
        return slots + group.first

    def _bags(self, share):
        """(table, ids of the bag, weights) of each share bag."""
        offsets = np.arange(len(share.ids) + 1) if share.offsets is None else share.offsets
        weights = np.ones(len(share.ids)) if share.weights is None else share.weights
        tables = np.repeat(share.features[:, TABLE], share.features[:, BAGS])
        for b, table in enumerate(tables):
            span = slice(offsets[b], offsets[b + 1])
            yield int(table), share.ids[span], weights[span]

    def _pull(self, server, call):
        share = pull_share(call.fields, call.arrays)
        out, absent = [], 0
        for table, ids, weights in self._bags(share):
            self._slots(server, table, ids, primary=False)
            absent += sum((table, int(i)) not in self.rows for i in ids)
            rows = [self.rows.get((table, int(i)), np.zeros(DIM)) for i in ids]
            out.append(weights @ np.array(rows))
        return {"absent": absent}, {"rows": np.array(out, np.float32).reshape(-1)}

    def _push(self, server, call):
        share = push_share(call.fields, call.arrays)
        self.frames.append((server.name, share.sequence, share.ids.tolist()))
        changes = defaultdict(list)
        rows = share.rows.reshape(-1, DIM) if share.kind != "delete" else np.zeros((len(share.ids), DIM))
        for b, (table, ids, weights) in enumerate(self._bags(share)):
            slots = self._slots(server, table, ids, primary=True)
            for i, slot, weight in zip(ids.tolist(), slots.tolist(), weights, strict=True):
                changes[slot].append((table, i, weight * rows[b]))
        for slot, entries in changes.items():
            if (slot, share.client, share.sequence) in self.seen:
                continue
            self.seen.add((slot, share.client, share.sequence))
            for table, i, row in entries:
                if share.kind == "delete":
                    self.rows.pop((table, i), None)
                else:
                    self.rows[table, i] = row if share.kind == "assign" else self.rows[table, i] - row
        return {"rows_new": 0}, {}

    def _range(self, server, call):
        table, start, stop = call.fields["table"], call.fields["start"], call.fields["stop"]
        found = next(t for t in self.view.tables if t.number == table)
        group = self.view.group(found.group)
        slots = call.arrays["slots"] - group.first
        assert (slots[1:] > slots[:-1]).all()
        index = next((i for i, s in enumerate(self.view.servers) if s.incarnation == server.incarnation), -1)
        if not (group.owners[slots, 0] == index).all():
            raise WrongView("not mine", self.view.epoch)
        held = [i for t, i in self.rows if t == table]
        places = tokens(np.array(held, np.int64), found.spec["seed"]).tolist() if held else []
        inside = sorted((p, i) for p, i in zip(places, held, strict=True) if start <= p < (stop or 2**64))
        inside = [(p, i) for p, i in inside if p >> 58 in slots]
        cut = inside[: self.part]
        ids = np.array([i for _, i in cut], np.int64)
        rows = np.array([self.rows[table, i] for _, i in cut], np.float32).reshape(-1, DIM)
        cursor = cut[-1][0] + 1 if len(inside) > len(cut) else None
        return {"more": cursor is not None, "cursor": cursor}, {"ids": ids, "rows": rows}

    def _admin(self, server, call):
        self.change(change_of(self.view, call.fields["verb"], call.fields))
        return {}, {}

    def log(self) -> list:
        """(server, op) of every call from now on."""
        called, by_fault = [], self.fault

        def fault(server, op):
            called.append((server, op))
            return by_fault(server, op)

        self.fault = fault
        return called

    def verbs(self) -> Verbs:
        verbs = Verbs([])
        verbs.default_timeout = 30.0
        verbs.adopt(self.view)
        return verbs


def push(world: World, verbs: Verbs, name: str, ids, grads=None, timeout=None):
    grads = np.ones((len(ids), DIM), np.float32) if grads is None else grads
    return world.drive(verbs.push(name, ids, grads, "push", 1.0, timeout))


def pull(world: World, verbs: Verbs, name: str, ids, timeout=None):
    return world.drive(verbs.pull(name, ids, None, timeout))


FAULTS = st.sampled_from(["ok", "ok", "ok", "refused", "overloaded", "request lost", "reply lost", "twice"])


@settings(max_examples=120)
@given(st.data(), st.integers(0, 2**32))
def test_every_push_is_applied_exactly_once_whatever_fails_and_whoever_joins_or_leaves(data, seed):
    world = World()
    rng = np.random.default_rng(seed)
    script = iter(data.draw(st.lists(FAULTS, max_size=30)))
    world.fault = lambda server, op: next(script, "ok") if op in ("push", "pull") else "ok"
    joins = iter(range(3, 99))

    def shuffle() -> None:
        if rng.random() < 0.2:
            names = [s.name for s in world.view.servers]
            joining = len(names) < 3 or rng.random() < 0.5
            world.change(Join((world.server(next(joins)),)) if joining else Leave((str(rng.choice(names)),)))

    world.before_ask = shuffle
    verbs = world.verbs()
    expected: dict = defaultdict(lambda: np.zeros(DIM, np.float32))
    for step in range(data.draw(st.integers(1, 6))):
        name = "ab"[step % 2]
        ids = rng.integers(-20, 20, rng.integers(0, 30))
        grads = rng.integers(-3, 4, (len(ids), DIM)).astype(np.float32)
        push(world, verbs, name, ids, grads)
        for i, grad in zip(ids.tolist(), grads, strict=True):
            expected[name, i] -= grad
    world.before_ask = lambda: None
    for name in "ab":
        rows = pull(world, verbs, name, np.arange(-20, 20))
        np.testing.assert_array_equal(rows, [expected[name, i] for i in range(-20, 20)])
    assert verbs.window.undecided == 0


@settings(max_examples=60)
@given(st.data(), st.integers(0, 2**32))
def test_bags_are_pooled_once_whatever_fails(data, seed):
    world = World()
    verbs = world.verbs()
    push(world, verbs, "a", np.arange(10), -np.arange(20, dtype=np.float32).reshape(10, 2))
    script = iter(data.draw(st.lists(FAULTS, max_size=20)))
    world.fault = lambda server, op: next(script, "ok") if op == "pull" else "ok"
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, 8)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = rng.integers(0, 10, offsets[-1])
    got = world.drive(verbs.pull_bags({"a": (ids, offsets)}, "sum", None, None))["a"]
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    wanted = [table[ids[offsets[b] : offsets[b + 1]]].sum(0) for b in range(8)]
    np.testing.assert_array_equal(got, wanted)


def test_a_retry_keeps_its_sequence_and_sends_only_what_was_not_acknowledged():
    world = World()
    verbs = world.verbs()
    failed: set = set()

    def lose_first_reply(server, op):
        if op == "push" and server == "s1" and not failed:
            failed.add(server)
            return "reply lost"
        return "ok"

    world.fault = lose_first_reply
    push(world, verbs, "a", np.arange(60))
    assert {sequence for _, sequence, _ in world.frames} == {1}
    servers = [server for server, _, _ in world.frames]
    assert sorted(servers) == ["s0", "s1", "s1", "s2"]
    push(world, verbs, "a", np.arange(60))
    assert {sequence for _, sequence, _ in world.frames} == {1, 2}
    assert verbs.counters.retries == 1


def test_a_pull_goes_to_the_next_owner_and_avoids_the_failed_one_for_a_while():
    world = World(replicas=2)
    verbs = world.verbs()
    push(world, verbs, "a", np.arange(50))
    asked = []

    def s0_is_silent(server, op):
        asked.append((server, op))
        return "request lost" if server == "s0" and op == "pull" else "ok"

    world.fault = s0_is_silent
    for _ in range(3):
        np.testing.assert_array_equal(pull(world, verbs, "a", np.arange(50)), -np.ones((50, DIM)))
    assert asked.count(("s0", "pull")) <= 1


def test_a_fully_replicated_table_costs_one_server():
    world = World(replicas=3)
    verbs = world.verbs()
    asked = []
    world.fault = lambda server, op: asked.append(server) or "ok"
    pull(world, verbs, "a", np.arange(50))
    assert len(asked) == 1


def test_a_stale_client_learns_the_view_from_the_server_that_refused():
    world = World()
    verbs = world.verbs()
    world.change(Join((world.server(3),)))
    world.change(Leave(("s0",)))
    push(world, verbs, "a", np.arange(100))
    assert verbs.routing.epoch == world.view.epoch
    np.testing.assert_array_equal(pull(world, verbs, "a", np.arange(100)), -np.ones((100, DIM)))


@pytest.mark.parametrize("told", [True, False])
def test_a_client_that_rested_while_every_server_was_replaced_finds_those_there_are(told):
    """At addresses that it is told anew, or at those of its view, where others of the same names listen by now."""
    world = World(2)
    verbs = Verbs(lambda: ["h7:1"] if told else [])
    verbs.adopt(world.view)
    for name in ("s0", "s1"):
        world.change(Fail(name))
    world.change(Join((World.server(7),)))
    world.change(Recover())
    world.fault = lambda server, op: "ok" if server == ("h7:1" if told else "h1:1") or server == "s7" else "refused"
    assert pull(world, verbs, "a", [1, 2]).shape == (2, DIM)
    assert verbs.routing.epoch == world.view.epoch


def test_a_view_with_fewer_servers_that_another_request_learns_meanwhile_is_no_error():
    """The numbers of servers in a look for a newer view are those of the view that it began with."""
    world = World()
    verbs = world.verbs()
    stale = verbs.routing
    world.change(Leave(("s2",)))
    steps = verbs.refresh(stale.epoch, time.monotonic() + 5, {})
    asked = steps.send(None)
    for call in asked.calls:
        asked.absorb(call.key, Message("ok", 1, {"epoch": world.view.epoch}))
    verbs.adopt(world.view)
    with pytest.raises(StopIteration):
        steps.send({})


def test_of_many_requests_that_fail_together_one_looks_for_a_newer_view():
    verbs = World().verbs()
    told = []
    verbs.on_views = lambda: told.append(True)
    epoch, until = verbs.routing.epoch, time.monotonic() + 60
    first = verbs.refresh(epoch, until, {}, shared=True)
    asked = first.send(None)
    others = [verbs.refresh(epoch, until, {}, shared=True) for _ in range(3)]
    for steps in others:
        assert steps.send(None).views_until == until
    for call in asked.calls:
        asked.absorb(call.key, Message("ok", 1, {"epoch": epoch}))
    with pytest.raises(StopIteration):
        first.send({})
    assert told == [True]
    for steps in others:  # nobody knows more: they do not ask again
        with pytest.raises(StopIteration):
            steps.send(None)
    own = verbs.refresh(epoch, until, {})  # who must know by itself does
    assert own.send(None).calls
    own.close()
    assert told == [True, True]


def test_who_looks_for_a_newer_view_and_is_not_gone_on_with_holds_nobody_up(monkeypatch):
    """As the first of several imports that are under way, until its caller asks what came of it."""
    verbs = World().verbs()
    now = [1000.0]
    monkeypatch.setattr("ps.client.core.time", SimpleNamespace(monotonic=lambda: now[0]))
    until = now[0] + 60
    first = verbs.refresh(verbs.routing.epoch, until, {})
    assert first.send(None).calls
    other = verbs.refresh(verbs.routing.epoch, until, {})
    command = other.send(None)
    while isinstance(command, Wait):
        now[0] += command.seconds
        command = other.send(None)
    assert command.calls
    assert now[0] < until - 50


def test_the_asynchronous_shell_sleeps_until_the_one_that_looks_has_looked():
    async def work() -> list[str]:
        client = AsyncClient(["h0:1"])
        order: list[str] = []

        def steps(name):
            yield Wait(0.001, time.monotonic() + 60)
            order.append(name)

        waiting = [asyncio.ensure_future(client._run(steps(name))) for name in "ab"]
        for _ in range(20):
            await asyncio.sleep(0.001)
        order.append("looked")
        client._verbs.on_views()
        await asyncio.gather(*waiting)
        return order

    assert asyncio.run(work()) == ["looked", "a", "b"]


def test_who_waits_for_room_in_the_window_is_woken_in_turn_and_no_more_than_find_room():
    async def work() -> None:
        client = AsyncClient(["h0:1"])
        window, begun, woken = client._verbs.window, [], []

        def push(k: int, until: float):
            for command in client._verbs.room(False, until):
                yield command
                if time.monotonic() < until:
                    woken.append(k)
            begun.append((k, window.open()))
            yield Wait(0.0)

        def wait(k: int, seconds: float = 60.0):
            return asyncio.ensure_future(client._run(push(k, time.monotonic() + seconds)))

        async def settle() -> None:
            for _ in range(500):
                await asyncio.sleep(0)

        held = [window.open() for _ in range(64)]
        tasks = [wait(k) for k in range(100)]
        late = wait(100, 0.01)
        await settle()
        for sequence in held[1:40]:  # the oldest is still undecided: there is no room
            window.close(sequence)
        await settle()
        assert (begun, woken) == ([], [])
        with pytest.raises(NotApplied, match="64 pushes are undecided"):
            await late
        tasks[1].cancel()
        window.close(held[0])
        await settle()
        assert [k for k, _ in begun] == [0, *range(2, 41)]
        assert len(woken) <= len(begun) + 1  # the one that was cancelled wakes another, in case that it had been woken
        for _ in range(2):
            for sequence in [*held[40:], *(s for _, s in begun)]:
                window.close(sequence)
            await settle()
        assert len(begun) == 99
        assert not client._line
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(work())


def test_an_attempt_of_a_long_request_ends_early_enough_for_others_to_take_over():
    """A server hangs: the first attempt gets a second, later ones twice as long each, and never above a third."""
    verbs = World().verbs()
    now = time.monotonic()
    spans = [verbs.attempt_until(now + 120.0, attempt) - now for attempt in (0, 1, 2, 9)]
    np.testing.assert_allclose(spans, [1, 2, 4, 40], atol=0.1)
    assert verbs.attempt_until(now + 0.25, 0) - now == pytest.approx(0.1, abs=0.02)


def test_who_hangs_is_not_asked_for_a_newer_view_while_others_answer():
    world = World(3, replicas=2)
    verbs = world.verbs()
    asked = []

    def fault(server, op):
        asked.append((server, op))
        return "ok" if op != "pull" else "request lost" if server == "s0" else WrongView("not mine", 0)

    world.fault = fault
    with pytest.raises(EmbringError):
        pull(world, verbs, "a", list(range(50)), timeout=0.5)
    assert ("s0", "pull") in asked
    assert ("s1", "ping") in asked
    assert ("s0", "ping") not in asked


def test_many_attempts_are_no_arithmetic_error():
    world = World()
    verbs = world.verbs()
    world.drive(verbs.after({0: Overloaded("not now")}, verbs.routing, 5000, time.monotonic() + 1))
    assert world.waits == 1


def test_a_reply_that_tells_of_a_newer_view_is_reason_to_have_it():
    """Nothing fails by the old view, but it may lack the owner to turn to when something does."""
    world = World(3, replicas=2)
    verbs = world.verbs()
    world.change(AlterTable("a", {**TableSpec("a", DIM, SGD(lr=1.0), seed=1, absent="zeros").to_plain()}))
    asked = []
    world.fault = lambda server, op: asked.append(op) or "ok"
    pull(world, verbs, "a", [1, 2, 3])
    assert verbs.routing.epoch == world.view.epoch
    assert asked.count("view") == 1
    pull(world, verbs, "a", [1, 2, 3])
    assert asked.count("view") == 1
    world.change(Renew(np.arange(64)))
    world.fault = lambda server, op: "refused" if op == "view" else "ok"
    verbs._caught_up = 0.0
    push(world, verbs, "a", [1, 2, 3])  # that it cannot be had is no matter
    assert verbs.routing.epoch == world.view.epoch - 1


def test_who_answers_that_a_push_is_undecided_is_no_suspect():
    """One server hangs; another tells that a slot got another primary. It is the one to turn to."""
    world = World(2, replicas=2)
    verbs = world.verbs()
    undecided = PerhapsApplied("a slot got another primary meanwhile")
    undecided.answered = True
    world.fault = lambda server, op: "ok" if op != "push" else "request lost" if server == "s0" else undecided
    with pytest.raises(PerhapsApplied):
        push(world, verbs, "a", list(range(50)), timeout=0.1)
    assert verbs._left_out() == {0}


def test_a_table_made_anew_is_found_under_its_new_number():
    world = World()
    verbs = world.verbs()
    push(world, verbs, "a", [1])
    world.change(TruncateTable("a"))
    np.testing.assert_array_equal(pull(world, verbs, "a", [1]), [[0, 0]])
    push(world, verbs, "a", [1])
    np.testing.assert_array_equal(pull(world, verbs, "a", [1]), [[-1, -1]])


def test_a_table_that_this_client_has_not_heard_of_is_looked_up_once():
    world = World()
    verbs = world.verbs()
    spec = TableSpec("late", DIM, SGD(lr=1.0), absent="zeros")
    world.change(CreateTable("late", spec.to_plain(), "sharded", 1))
    push(world, verbs, "late", [1])
    with pytest.raises(RequestError, match="unknown table 'nobody'; the tables are: a, b, late"):
        push(world, verbs, "nobody", [1])


def test_lost_slots_are_named_before_anything_is_sent():
    world = World()
    verbs = world.verbs()
    world.change(Fail("s1"))
    verbs.adopt(world.view)
    asked = []
    world.fault = lambda server, op: asked.append(op) or "ok"
    with pytest.raises(SlotsLost, match="no living owner") as caught:
        push(world, verbs, "a", np.arange(100))
    assert len(caught.value.slots) == 1
    assert "push" not in asked
    slots = tokens(np.arange(100), ord("a")) >> np.uint64(58)
    push(world, verbs, "a", np.flatnonzero(verbs.routing.primaries[slots, 0] >= 0))


@pytest.mark.parametrize("error", [RequestError("bad"), MemoryFull("full")])
def test_a_wrong_request_is_never_retried(error):
    world = World()
    verbs = world.verbs()
    calls = []
    world.fault = lambda server, op: calls.append(op) or (error if op == "push" else "ok")
    with pytest.raises(type(error), match=str(error)):
        push(world, verbs, "a", [1])
    assert calls.count("push") == 1
    assert verbs.window.undecided == 0


@pytest.mark.parametrize(
    ("faults", "raised"),
    [
        (["refused"], NotApplied),
        (["request lost"], PerhapsApplied),
        (["request lost", "refused"], PerhapsApplied),
        (["overloaded"], Overloaded),
    ],
)
def test_what_a_push_ends_with_when_time_runs_out(faults, raised):
    world = World()
    verbs = world.verbs()
    script = iter(faults)
    world.fault = lambda server, op: next(script, faults[-1]) if op == "push" else "ok"
    with pytest.raises(raised):
        push(world, verbs, "a", [1], timeout=0.05)
    assert verbs.window.undecided == 0


def test_a_push_that_was_applied_in_part_is_never_reported_as_not_applied():
    world = World()
    verbs = world.verbs()
    world.fault = lambda server, op: "refused" if server == "s2" and op == "push" else "ok"
    with pytest.raises(PerhapsApplied, match="a part of the push was applied"):
        push(world, verbs, "a", np.arange(60), timeout=0.05)


def test_attempts_pause_and_never_pass_the_deadline():
    world = World()
    verbs = world.verbs()
    until = []
    begin = time.monotonic()

    def drive(steps) -> None:
        outcome = None
        while True:
            command = steps.send(outcome)
            outcome = None
            if isinstance(command, Ask):
                until.append(command.until)
                outcome = {call.key: NotApplied("no") for call in command.calls if call.op == "pull"}
            else:
                time.sleep(command.seconds)

    with pytest.raises(NotApplied):
        drive(verbs.pull("a", [1], None, 0.2))
    assert max(until) <= begin + 0.2 + 0.05
    assert 2 <= len(until) < 200


def test_the_window_keeps_undecided_sequences_within_64():
    window = Window()
    first = [window.open() for _ in range(WINDOW)]
    assert first == list(range(1, WINDOW + 1))
    assert window.full
    window.close(first[5])
    assert window.full
    with pytest.raises(EmbringError, match="undecided"):
        window.open()
    window.close(first[0])
    assert window.open() == WINDOW + 1
    assert window.undecided == WINDOW - 1
    assert Window().client != Window().client


@pytest.mark.parametrize(("parts", "raised"), [(1, NotApplied), (2, PerhapsApplied)])
def test_a_push_for_which_the_window_never_has_room_ends_at_its_deadline(monkeypatch, parts, raised):
    """Whatever a shell makes of `Full`; and where a part of the push went before, nobody is told that none did."""
    monkeypatch.setattr("ps.client.verbs.CHUNK", 512)
    world = World()
    verbs = world.verbs()
    held = [verbs.window.open()]

    def fill() -> None:
        while not verbs.window.full:
            held.append(verbs.window.open())

    if parts == 1:
        fill()
    else:
        world.before_ask = fill
    steps = verbs.push("a", np.arange(40 * parts), np.ones((40 * parts, DIM), np.float32), "push", 1.0, 0.2)
    with pytest.raises(raised, match="64 pushes are undecided, and none was decided in time"):
        world.drive(steps, full=lambda: None)
    assert len({sequence for _, sequence, _ in world.frames}) == parts - 1
    assert verbs.window.undecided == len(held)


# -- administration


def drop(world: World, verbs: Verbs, timeout: float = 30.0):
    return world.drive(verbs.drop_table("a", timeout))


def test_a_server_that_hangs_does_not_keep_an_administrator_from_the_others():
    """Neither one that answers no ping, nor one that dies between that and the request."""
    world = World()
    verbs = world.verbs()
    world.fault = lambda server, op: "request lost" if server == "s0" else "ok"
    called = world.log()
    drop(world, verbs)
    assert [server for server, op in called if op == "admin"] == ["s1"]
    world = World()
    verbs = world.verbs()
    world.fault = lambda server, op: "refused" if (server, op) == ("s0", "admin") else "ok"
    called = world.log()
    drop(world, verbs)
    assert [server for server, op in called if op == "admin"] == ["s0", "s1"]


def test_an_administrator_asks_suspects_last_and_gives_none_of_them_all_the_time():
    world = World(servers=4)
    verbs = world.verbs()
    verbs._suspects = {0: time.monotonic() + 600, 2: time.monotonic() + 600}
    steps = verbs.admin("drop_table", {"name": "a"}, time.monotonic() + 30.0, lambda now: True)
    order, command = [], next(steps)
    for _ in range(4):
        (call,) = command.calls
        assert call.op == "ping"
        assert command.until < time.monotonic() + 1.5
        order.append(call.server)
        command = steps.send({call.key: PerhapsApplied("no answer")})
    assert order == [1, 3, 0, 2]
    assert isinstance(command, Wait)
    for s in order:  # who failed is a suspect for a while
        assert s in verbs._suspects
    steps.close()


@pytest.mark.parametrize("fault", ["reply lost", "request lost"])
def test_what_may_be_done_is_not_asked_for_again(fault):
    """Of a table that was dropped, the second time nobody would know; one that was emptied would lose new rows."""
    world = World()
    verbs = world.verbs()
    world.fault = lambda server, op: fault if op == "admin" else "ok"
    called = world.log()
    if fault == "reply lost":
        drop(world, verbs)
        assert "a" not in verbs.routing.tables
    else:
        with pytest.raises(PerhapsApplied, match="no answer"):
            drop(world, verbs, 0.3)
    assert [op for _, op in called].count("admin") == 1


def test_why_nobody_could_ask_the_controller_is_said_by_whoever_answered():
    world = World()
    verbs = world.verbs()
    starting = NotApplied("the controller is still starting")
    starting.answered = True
    world.fault = lambda server, op: (
        starting if op == "admin" else "request lost" if server == "s2" and op == "ping" else "ok"
    )
    with pytest.raises(NotApplied, match="still starting"):
        drop(world, verbs, 0.3)
    world.fault = lambda server, op: AuthError("the token is wrong") if op == "ping" else "ok"
    with pytest.raises(AuthError):
        drop(world, verbs, 0.3)


# -- ranges


def scan(world: World, verbs: Verbs, start: int, stop: int | None):
    pulled = PullRange(verbs, "a", start, stop, None)
    ids: list = []
    while parts := world.drive(pulled.next(pulled.until())):
        ids += [i for part in parts for i in part.ids.tolist()]
    return ids


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6, unique=True), st.data(), st.integers(0, 2**32))
def test_the_union_of_seven_ranges_is_every_row_once_while_slots_move(cuts, data, seed):
    world = World()
    verbs = world.verbs()
    push(world, verbs, "a", np.arange(200))
    rng = np.random.default_rng(seed)
    joins = iter(range(3, 99))
    script = iter(data.draw(st.lists(FAULTS, max_size=20)))
    world.fault = lambda server, op: next(script, "ok") if op == "range" else "ok"

    def shuffle() -> None:
        if rng.random() < 0.15:
            names = [s.name for s in world.view.servers]
            joining = len(names) < 3 or rng.random() < 0.5
            world.change(Join((world.server(next(joins)),)) if joining else Leave((str(rng.choice(names)),)))

    world.before_ask = shuffle
    edges = [0, *sorted(cuts), None]
    if edges[1] == 0:
        edges.pop(0)
    ids: list = []
    for start, stop in itertools.pairwise(edges):
        ids += scan(world, verbs, start, stop)
    assert sorted(ids) == list(range(200))


@pytest.mark.parametrize("renewed", [False, True])
def test_rows_by_another_view_count_only_where_owner_and_term_are_the_same(renewed):
    world = World()
    verbs = world.verbs()
    push(world, verbs, "a", np.arange(100))
    old = world.view
    if renewed:
        groups = tuple(replace(g, terms=np.full(g.slots, old.epoch + 1)) for g in old.groups)
        world.view = replace(old, epoch=old.epoch + 1, groups=groups)
    else:
        world.change(Join((world.server(3),)))
    by_new_view = world.answer
    strays = iter(range(4))

    def answer(server, call):
        # The first answers are of a server that already judges by the next view, and holds nothing of a renewed slot.
        reply = by_new_view(server, call)
        if call.op == "range" and renewed and next(strays, None) is not None:
            arrays = {"ids": np.array([999]), "rows": np.zeros((1, DIM), np.float32)}
            return Message("ok", 1, {**reply.fields, "cursor": None}, arrays)
        return reply

    world.answer = answer
    assert sorted(scan(world, verbs, 0, None)) == list(range(100))
    assert verbs.routing.epoch == world.view.epoch


def test_rows_of_a_server_that_lags_behind_do_not_count():
    world = World()
    verbs = world.verbs()
    push(world, verbs, "a", np.arange(100))
    lagging = iter(range(3))
    by_view = world.answer

    def answer(server, call):
        reply = by_view(server, call)
        if call.op == "range" and next(lagging, None) is not None:
            arrays = {"ids": np.empty(0, np.int64), "rows": np.empty((0, DIM), np.float32)}
            return Message("ok", 1, {"cursor": None, "epoch": world.view.epoch - 1}, arrays)
        return reply

    world.answer = answer
    assert sorted(scan(world, verbs, 0, None)) == list(range(100))


@pytest.mark.parametrize("seconds", [0.2, 30.0])
def test_rows_that_came_before_a_range_pull_failed_are_handed_out_by_the_next_call(seconds):
    """Of too little time, and of a server that refuses for good while others answered."""
    world = World()
    verbs = world.verbs()
    push(world, verbs, "a", np.arange(200))
    pulled = PullRange(verbs, "a", 0, None, seconds)
    calls = itertools.count()
    fault = PerhapsApplied("no answer") if seconds < 1 else EmbringError("broken")
    world.fault = lambda server, op: fault if op == "range" and server == "s1" and next(calls) > 2 else "ok"
    with pytest.raises(type(fault)):
        world.drive(pulled.next(pulled.until()))
    world.fault = lambda server, op: "ok"
    ids = []
    while parts := world.drive(pulled.next(pulled.until())):
        ids += [i for part in parts for i in part.ids.tolist()]
    assert sorted(ids) == list(range(200))


def test_ranges_are_aligned_to_slots_and_cover_the_ring():
    world = World()
    verbs = world.verbs()
    for n in (1, 3, 7, 64, 1000):
        ranges = world.drive(verbs.ranges("a", n, None))
        assert len(ranges) == min(n, 64)
        assert ranges[0][0] == 0
        assert ranges[-1][1] is None
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert all(start % 2**58 == 0 for start, _ in ranges)
    with pytest.raises(RequestError, match="is 0; it must be a whole number"):
        world.drive(verbs.ranges("a", 0, None))


def test_a_range_push_refuses_an_id_outside():
    world = World()
    verbs = world.verbs()
    place = int(tokens(np.array([7]), ord("a"))[0])
    grads = np.ones((1, DIM), np.float32)
    world.drive(verbs.push("a", [7], grads, "push", 1.0, None, within=(place, place + 1)))
    assert world.rows[verbs.routing.table("a").number, 7].tolist() == [-1, -1]
    for start, stop in ((place + 1, None), (0, place)):
        with pytest.raises(RequestError, match="outside the range"):
            world.drive(verbs.push("a", [7], grads, "push", 1.0, None, within=(start, stop)))
    with pytest.raises(RequestError, match="0 <= start < stop"):
        world.drive(verbs.push("a", [7], grads, "push", 1.0, None, within=(5, 5)))


# -- cutting


def test_a_push_beyond_a_frame_is_cut_under_several_sequences_with_duplicates_together(monkeypatch):
    monkeypatch.setattr("ps.client.verbs.CHUNK", 512)
    world = World()
    verbs = world.verbs()
    ids = np.concatenate([np.arange(300), np.arange(300)])
    push(world, verbs, "a", ids, np.ones((600, DIM), np.float32))
    sequences = {sequence for _, sequence, _ in world.frames}
    assert len(sequences) > 4
    of_id = defaultdict(set)
    for server, sequence, some in world.frames:
        for i in some:
            of_id[i].add((server, sequence))
    assert all(len(places) == 1 for places in of_id.values())
    np.testing.assert_array_equal(pull(world, verbs, "a", np.arange(300)), np.full((300, DIM), -2))
    bags = {"a": (ids, np.arange(0, 601, 2)), "b": (ids[:4], [0, 4, 4])}
    pooled = world.drive(verbs.pull_bags(bags, "mean", None, None))
    np.testing.assert_array_equal(pooled["a"], np.full((300, DIM), -2))
    np.testing.assert_array_equal(pooled["b"], np.zeros((2, DIM)))
