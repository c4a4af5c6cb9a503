"""The arithmetic of placements against brute force: every request there can be, a real split, a real store."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_sides import change, one_server_store
from benchmarks.model import Model, covers, directory_bytes, pull_bytes, slots_of
from benchmarks.placements import NAMES, lay_out, mixed_tables
from benchmarks.workloads import Shape, Workload
from hashring.planner import CreateTable, Fail, Join, plan
from hashring.tokens import tokens
from hashring.view import Server, View
from ps.client.batch import bags_batch
from ps.client.request import PullRequest
from ps.client.routing import Routing
from ps.kernels.split import choose_readers
from ps.spec import SGD, TableSpec

NAMED = ("a", "b", "c")


def view_of(lays, servers: int, names=NAMED) -> View:
    """Tables of dim 4 that lie as they are told, on so many servers of one host."""
    members = tuple(Server(f"s{k}", k + 1, "localhost") for k in range(servers))
    view = plan(View.empty(1, 8), Join(members))
    for number, (name, lay) in enumerate(zip(names, lays, strict=True)):
        spec = TableSpec(name, 4, SGD(), seed=number + 5, placement=lay.placement, replicas=lay.replicas)
        view = plan(view, CreateTable(name, spec.to_plain(), lay.placement, lay.replicas))
    return view


def model_of(name: str, servers: int, ids, rows: int, zipf: float = 1.0) -> Model:
    workload = Workload(Shape("own", tuple(ids), 4), rows, zipf)
    names = NAMED[: len(ids)]
    return Model(view_of(lay_out(name, workload, servers, 0.3), servers, names), names, workload)


def request_of(model: Model, ids) -> PullRequest:
    """One sample's bags, one tuple of ids a table."""
    bags = {n: (np.array(bag), np.array([0, len(bag)])) for n, bag in zip(model.names, ids, strict=True)}
    routing = Routing(model.view)
    batch = bags_batch(bags)
    features = routing.features(batch.names)
    return PullRequest(batch, features, features.zeros, None)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["sharded", "whole"]), st.integers(2, 4), st.integers(2, 4), st.sampled_from([(2, 1), (3,)]))
def test_partial_sums_and_servers_are_those_of_every_request_there_can_be(placement, servers, rows, ids):
    model = model_of(placement, servers, ids, rows)
    routing = Routing(model.view)
    expected_rows = expected_servers = 0.0
    laws = [law for law, k in zip(model.laws, ids, strict=True) for _ in range(k)]
    for chosen in product(*(range(len(law)) for law in laws)):
        chance = np.prod([law[i] for law, i in zip(laws, chosen, strict=True)])
        edges = np.cumsum([0, *ids])
        request = request_of(model, [chosen[a:b] for a, b in pairwise(edges)])
        calls = request.split(routing, frozenset(), np.zeros(servers))
        expected_servers += chance * len(calls)
        expected_rows += chance * sum(call.arrays["features"][:, 1].sum() for call in calls)
    found = model.pull(1)
    assert found.servers == pytest.approx(expected_servers, rel=1e-9)
    assert found.rows == pytest.approx(expected_rows, rel=1e-9)


@pytest.mark.parametrize("placement", NAMES)
def test_rows_servers_and_bytes_are_those_of_drawn_requests(placement):
    # Of pools of 10, rows and partial sums never cost nearly the same: figures may be some percent off there.
    workload = Workload(Shape("own", (10, 1, 3), 4, rows=(400, 30, 200)), 400, 1.1)
    model = Model(view_of(lay_out(placement, workload, 3, 0.5), 3), NAMED, workload)
    routing, load = Routing(model.view), np.zeros(3)
    rows, calls_made, sent, ids = [], 0, 0, np.zeros(3)
    for number in range(60):
        batch = bags_batch(dict(zip(NAMED, workload.batch(64, number).values(), strict=True)))
        features = routing.features(batch.names)
        calls = PullRequest(batch, features, features.zeros, None).split(routing, frozenset(), load)
        calls_made += len(calls)
        rows.append(sum(call.arrays["features"][:, 1].sum() for call in calls))
        for call in calls:
            offsets = call.arrays.get("offsets")
            bags = len(call.arrays["ids"]) if offsets is None else len(offsets) - 1
            sent += pull_bytes(len(call.arrays["ids"]), bags, 3)
            ids[call.key] += len(call.arrays["ids"])
    found = model.pull(64)
    assert found.servers == pytest.approx(calls_made / 60, rel=0.01)
    assert found.rows == pytest.approx(np.mean(rows), rel=0.02)
    assert found.bytes_sent == pytest.approx(sent / 60, rel=0.02)
    assert found.busiest == pytest.approx(ids.max() / ids.sum(), rel=0.04)


def test_a_push_changes_as_many_rows_as_are_drawn():
    workload = Workload(Shape("own", (5, 2), 4), 100, 1.0)
    model = Model(view_of(lay_out("twofold", workload, 3, 0.0), 3, NAMED[:2]), NAMED[:2], workload)
    distinct = [sum(len(np.unique(ids)) for ids, _ in workload.batch(16, n).values()) for n in range(200)]
    cost = model.push(16, 0)
    assert cost.rows == pytest.approx(np.mean(distinct), rel=0.02)
    assert cost.bytes_between > cost.rows * (4 * 4 + 16 + 12)
    assert model_of("sharded", 3, (5, 2), 100).push(16, 0).bytes_between == 0


def test_a_push_costs_as_much_beside_other_placements_as_alone():
    workload = Workload(Shape("own", (5, 2), 4), 100, 1.0)
    lays = {name: lay_out(name, workload, 3, 0.0) for name in NAMES}
    together = view_of(
        [lay for some in lays.values() for lay in some], 3, [f"{name}_{k}" for name in NAMES for k in range(2)]
    )
    for name in NAMES:
        alone = Model(view_of(lays[name], 3, NAMED[:2]), NAMED[:2], workload).push(16, 0)
        beside = Model(together, [f"{name}_{k}" for k in range(2)], workload).push(16, 0)
        assert beside.bytes_between == pytest.approx(alone.bytes_between, rel=0.05), name  # seeds are others
        assert (beside.bytes_between > 0) == (name in ("twofold", "replicated")), name


@pytest.mark.parametrize("zipf", [4.0, 10.0])
def test_a_law_may_be_as_steep_as_it_likes(zipf):
    model = model_of("sharded", 3, (5, 1), 2000, zipf)
    cost = model.pull(8)
    assert 2 <= cost.rows <= 8 * 2 * 3
    assert 1 <= cost.servers <= 3


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 60), st.integers(0, 2**32))
def test_servers_are_taken_as_the_client_takes_them(servers, copies, n, seed):
    rng = np.random.default_rng(seed)
    owners = np.array([rng.permutation(servers)[: min(copies, servers)] for _ in range(n)], np.int16)
    counts = rng.integers(1, 9, n)
    ways = covers(owners, counts.astype(float), servers)
    assert sum(weight for weight, _ in ways) == pytest.approx(1.0)
    load = np.zeros(servers)
    slots = np.repeat(np.arange(n), counts).astype(np.int32)
    first = choose_readers(slots, owners, load)
    assert any((chosen == first).all() for _, chosen in ways)


@pytest.mark.parametrize(("rows", "placement", "tolerance"), [(5_000, "sharded", 0.0), (90_000, "whole", 0.005)])
def test_memory_is_what_a_store_accounts_for(rows, placement, tolerance):
    store = one_server_store([TableSpec("a", 4, SGD(), placement=placement, seed=5)])
    for at in range(0, rows, 10_000):
        ids = np.arange(at, min(rows, at + 10_000))
        change(store, "a", ids, np.zeros((len(ids), 4), np.float32), at + 1)
    model = Model(store.view, ["a"], Workload(Shape("own", (1,), 4), rows, 1.0))
    found = model.memory(np.zeros(store.view.slots_total, np.int64)).sum()
    assert found == pytest.approx(store.statistics().bytes_used, rel=tolerance or 1e-12)


def test_slots_that_tables_share_share_segments():
    both, one = np.array([4, 9]), np.array([2, 5])
    assert (directory_bytes(both) <= directory_bytes(one) + directory_bytes(both - one)).all()


def test_ids_have_the_slots_that_tokens_give_them():
    model = model_of("sharded", 2, (1,), 50)
    table = model.view.table("a")
    first, bits = model.view.group(table.group).first, model.view.slot_bits
    plain = [first + (int(t) >> (64 - bits)) for t in tokens(np.arange(50), table.spec["seed"])]
    assert slots_of(model.view, "a", 50).tolist() == plain


def test_a_loss_costs_what_the_view_without_the_server_lacks():
    sharded, twofold = model_of("sharded", 3, (4, 1), 200), model_of("twofold", 3, (4, 1), 200)
    assert twofold.loss().slots_lost == twofold.loss().rows_lost == twofold.loss().bags_failed == 0
    assert twofold.loss().slots_under_replicated > 0
    assert sharded.loss().rows_lost * 3 == sharded.copies()
    gone = plan(sharded.view, Fail("s0")).lost()
    failed = [1 - (1 - law[gone[s]].sum()) ** k for law, s, k in zip(sharded.laws, sharded.slots, (4, 1), strict=True)]
    assert sharded._bags_failed(gone) == pytest.approx(np.mean(failed))


def test_a_join_moves_about_its_share():
    model = model_of("twofold", 3, (1, 1), 3000)
    join = model.join(Server("s3", 99, "localhost"))
    assert join.rows_ideal == model.copies() / 4 == 3000
    assert join.rows_moved == pytest.approx(join.rows_ideal, rel=0.05)


def test_the_mixed_placement_takes_the_most_read_rows_within_its_budget():
    workload = Workload(Shape("own", (100, 1, 1, 2), 4, rows=(1000, 10, 500, 600)), 1000)
    assert mixed_tables(workload, 3, 0.0) == frozenset()
    assert mixed_tables(workload, 3, 0.02) == {1}  # 20 further rows of 2,110
    assert mixed_tables(workload, 3, 0.6) == {1, 3}  # by reads a row 0, 1, 3, 2; table 0 would take 2,000 rows more
    assert mixed_tables(workload, 3, 9.0) == {0, 1, 2, 3}
