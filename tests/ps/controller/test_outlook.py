"""What a move would do, and which names servers may have."""

import pytest

from hashring.planner import Begin, CreateTable, Enlist, Fail, plan
from hashring.view import Move, Server, View
from ps.controller.outlook import COPY_BYTES_PER_S, begun, names_for, outlook
from ps.errors import RequestError
from ps.spec import SGD, TableSpec

SLOTS = 2**6


def cluster(servers: int, hosts: int = 1) -> View:
    view = plan(
        View.empty(1, slot_bits=6),
        Enlist(tuple(Server(f"server-{i}", 10 + i, f"h{i % hosts}") for i in range(servers))),
    )
    spec = TableSpec("t", 16, SGD(lr=1.0), replicas=2)
    return plan(view, CreateTable("t", spec.to_plain(), replicas=2))


def figures(view: View, rows: int) -> dict[str, dict[str, object]]:
    return {s.name: {"rows_by_table": {"t": rows}} for s in view.servers}


def test_a_join_takes_its_share_of_copies_rows_and_bytes() -> None:
    view = cluster(3)
    told = outlook(view, Move("join", ("server-3",)), figures(view, 800))
    assert told["slots"] == SLOTS * 2 / 4
    assert told["rows"] == 600
    assert told["bytes"] == 600 * (4 * 16 + 16 + 12)
    assert [s["name"] for s in told["servers"]] == ["server-0", "server-1", "server-2", "server-3"]
    assert told["servers"][3]["slots"] == [0, 32]
    assert told["servers"][3]["primaries"] == [0, 16]
    assert sum(s["slots"][0] for s in told["servers"]) == sum(s["slots"][1] for s in told["servers"]) == 2 * SLOTS
    assert len(told["hosts"]) == 1
    assert told["hosts"][0]["slots"] == [128, 128]
    assert told["bytes_per_s"] == 0
    assert view.move is None


def test_the_time_is_that_of_the_busiest_server_at_the_lowest_limit() -> None:
    view = cluster(2, hosts=2)
    view = plan(view, Enlist((Server("server-2", 99, "h2"),)))
    told = [
        outlook(view, Move("leave", ("server-1",), rate), figures(view, 64_000), limit)
        for rate, limit in ((0, 0), (10**6, 0), (10**6, 10**5))
    ]
    assert told[0]["slots"] == SLOTS
    assert told[0]["bytes_per_s"] == 0
    assert [t["bytes_per_s"] for t in told[1:]] == [10**6, 10**5]
    assert told[0]["seconds"] <= told[0]["bytes"] / COPY_BYTES_PER_S + 0.1
    assert told[2]["seconds"] == pytest.approx(10 * told[1]["seconds"], rel=0.05)
    names = {h["host"]: h["slots"][1] for h in told[0]["hosts"]}
    assert names == {"h0": SLOTS, "h1": 0, "h2": SLOTS}


def test_the_time_counts_bytes_not_slots() -> None:
    """One slot of a whole table may weigh more than all others, and its primary alone copies it."""
    view = cluster(4)
    spec = TableSpec("w", 16, SGD(lr=1.0), placement="whole", replicas=1)
    view = plan(view, CreateTable("w", spec.to_plain(), placement="whole", replicas=1))
    owner = view.servers[int(view.owners()[-1, 0])].name
    other = next(s.name for s in view.servers if s.name != owner)
    told = {s.name: {"rows_by_table": {"w": 1e6 * (s.name == owner)}} for s in view.servers}
    for names in ((owner,), (owner, other)):
        found = outlook(view, Move("leave", names, 10**6), told)
        assert found["bytes"] == 1e6 * (4 * 16 + 16 + 12)
        assert found["seconds"] == found["bytes"] / 10**6


def test_lost_slots_weigh_nothing_and_take_nothing_from_the_others() -> None:
    view = plan(View.empty(1, slot_bits=6), Enlist(tuple(Server(f"server-{i}", 10 + i, "h") for i in range(4))))
    view = plan(view, CreateTable("t", TableSpec("t", 16, SGD(lr=1.0)).to_plain(), replicas=1))
    row = 4 * 16 + 16 + 12
    told = {f"server-{i}": {"rows_by_table": {"t": 1600}} for i in range(1, 4)}
    lost = plan(view, Fail("server-0"))
    assert lost.lost().sum() == SLOTS / 4
    servers = {s["name"]: s for s in outlook(lost, Move("leave", ("server-3",)), told)["servers"]}
    assert [servers[f"server-{i}"]["bytes"][0] for i in range(4)] == [0, 1600 * row, 1600 * row, 1600 * row]
    assert outlook(lost, Move("leave", ("server-3",)), told)["rows"] == 1600


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (Move("join", ("server-1",)), "'server-1' is in the view already"),
        (Move("leave", ("nobody",)), "no server is named 'nobody'; the servers are server-0, server-1, server-2"),
        (Move("leave", ("server-0", "server-1")), "fewer than replicas = 2"),
    ],
)
def test_what_cannot_be_is_refused(move: Move, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        outlook(cluster(3), move, {})


def test_a_second_move_is_refused() -> None:
    view = plan(cluster(3), Begin(Move("leave", ("server-2",))))
    with pytest.raises(RequestError, match=r"\(server-2 leaving\): wait until it is done, or abort it"):
        begun(view, Move("join", ("x",)))


def test_names() -> None:
    view = cluster(3)
    assert names_for(view, (), 0) == ("server-3",)
    assert names_for(View.empty(1), (), 0) == ("server-0",)
    assert names_for(view, ("a", "b-2"), 0) == ("a", "b-2")
    assert names_for(view, ("b-2",), 5000) == ("b-2",)
    for bad in ("", "-x", "a/b", "x" * 64, "controller", "ray", "router", "router-3", "a b"):
        with pytest.raises(RequestError, match="a server cannot be named"):
            names_for(view, (bad,), 0)
    with pytest.raises(RequestError, match="its name must end in -N"):
        names_for(view, ("alpha",), 5000)
    with pytest.raises(RequestError, match="at most 64 join at a time"):
        names_for(view, [f"x-{i}" for i in range(65)], 0)
