"""Lost slots, missing copies and silent servers, as the status tells them."""

import pytest

from hashring.planner import Abort, Begin, CreateTable, Enlist, Fail, Return, plan
from hashring.view import Move, Server, View
from ps.controller.members import Member
from ps.controller.metrics import _Figures
from ps.controller.status import cluster_status, under_replicated
from ps.failover import Failover, FailoverLimits
from ps.replication import NOTHING
from ps.server import RECONNECT, reconnect_s

SLOTS = 2**3


def cluster(*replicas: int | str) -> View:
    view = plan(View.empty(1, slot_bits=3), Enlist(tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(3))))
    for number, copies in enumerate(replicas):
        view = plan(view, CreateTable(f"t{number}", {}, replicas=copies))  # type: ignore[arg-type]
    return view


def test_slots_that_lack_a_copy_are_counted_and_lost_ones_apart() -> None:
    view = cluster(1, 2, "all")
    assert under_replicated(view) == 0
    one, two = view.group(1).owners, view.group(2).owners
    after = plan(view, Fail("s1"))
    assert int(after.lost().sum()) == (one == 1).sum()
    assert under_replicated(after) == (two == 1).any(axis=1).sum() + SLOTS
    # A server that returned owns nothing yet; its predecessor's grave is no server.
    assert under_replicated(plan(after, Return(Server("s1", 99, "h1")))) == under_replicated(after)


def test_a_server_is_silent_after_so_many_pings() -> None:
    mind = Failover(cluster(1), FailoverLimits(pings_max=3))
    members = [Member(f"s{i}", incarnation=10 + i, state="alive") for i in range(3)]
    assert cluster_status(mind, members)["unheard"] == ["s0", "s1", "s2"]
    for _ in range(4):
        mind.tick()
        for incarnation in (10, 12):
            mind.answered(incarnation, mind.view.epoch, NOTHING)
    record = cluster_status(mind, members)
    assert [s["state"] for s in record["servers"]] == ["alive", "silent", "alive"]
    assert [s["unanswered"] for s in record["servers"]] == [0, 3, 0]
    assert record["unheard"] == ["s1"]
    assert sum(s["slots"] for s in record["servers"]) == SLOTS
    members[1].state = "dead"
    assert cluster_status(mind, members)["servers"][1]["state"] == "dead"


def test_a_join_that_was_aborted_is_told_from_a_leave() -> None:
    joining = plan(cluster(1), Begin(Move("join", ("s3",)), (Server("s3", 13, "h3"),)))
    record = cluster_status(Failover(joining), [])
    assert record["move"] == {"kind": "join", "names": ["s3"], "undoes": False}
    record = cluster_status(Failover(plan(joining, Abort("join", ("s3",)))), [])
    assert record["move"] == {"kind": "leave", "names": ["s3"], "undoes": True}


def test_servers_that_ray_would_end_soon_after_its_head_are_warned_of() -> None:
    members = [Member("s0", state="alive", reconnect_s=1e6), Member("s1", state="alive", reconnect_s=60.0)]
    record = cluster_status(Failover(cluster(1)), [*members, Member("s2", state="dead", reconnect_s=60.0)])
    (warning,) = record["warnings"]
    assert "Ray ends s1 60 s after its head dies" in warning
    members[1].reconnect_s = 600.0
    assert cluster_status(Failover(cluster(1)), members)["warnings"] == []


@pytest.mark.parametrize(("given", "seconds"), [(None, 60.0), ("3600", 3600.0), ("soon", 60.0)])
def test_how_long_a_process_outlives_the_head(given: str | None, seconds: float, monkeypatch) -> None:
    monkeypatch.delenv(RECONNECT, raising=False)
    if given is not None:
        monkeypatch.setenv(RECONNECT, given)
    assert reconnect_s() == seconds


def test_metrics_tell_the_same() -> None:
    mind = Failover(plan(cluster(2), Fail("s0")))
    record = cluster_status(mind, [])
    told = {m.name: m.samples[0].value for m in _Figures(lambda: record).collect() if m.samples}
    assert told["embring_slots_under_replicated"] == record["slots_under_replicated"] > 0
    assert told["embring_slots_lost"] == 0
    assert told["embring_slots_learning"] == 0
