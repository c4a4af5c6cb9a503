"""The parts of training: rows and batches, the ledger, shared dense weights, settings."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense_head import HeadFeature, HeadSpec, TrainStep, build
from ps.errors import ConfigError, NotApplied, RequestError
from router import training
from router.training_config import TrainConfig
from router.training_data import Batches, PreparedRows
from router.training_dense import DENSE_DIM, SharedDense, TableBags
from router.training_ledger import STALENESS_MAX, Ledger, lock


def rows_of(bags: list[list[int]]) -> PreparedRows:
    offsets = np.cumsum([0] + [len(bag) for bag in bags]).astype(np.int64)
    ids = np.array([i for bag in bags for i in bag], np.int64)
    labels = np.array([len(bag) % 2 for bag in bags], np.float32)
    dense = np.arange(2 * len(bags), dtype=np.float32).reshape(-1, 2)
    return PreparedRows({"tags": (ids, offsets)}, dense, labels).check()


@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_an_epoch_has_every_row_once(bags: list[list[int]], size: int, shuffle: bool, drop: bool, epoch: int) -> None:
    data = Batches(rows_of(bags), size, shuffle, seed=5, drop_last=drop)
    seen = []
    for index in range(len(data)):
        batch = data.batch(epoch, index)
        ids, offsets = batch.bags["tags"]
        for b in range(batch.rows):
            row = int(batch.dense[b, 0]) // 2
            assert list(ids[offsets[b] : offsets[b + 1]]) == bags[row]
            assert batch.labels[b] == len(bags[row]) % 2
            seen.append(row)
    assert len(seen) == len(set(seen)) == (len(bags) // size * size if drop else len(bags))
    if not shuffle:
        assert seen == sorted(seen)


def test_the_same_batch_whenever_it_is_asked_for() -> None:
    rows = rows_of([[i] for i in range(40)])
    data = Batches(rows, 8, seed=1)
    first = data.batch(0, 3).dense
    data.batch(1, 0)
    np.testing.assert_array_equal(data.batch(0, 3).dense, first)
    np.testing.assert_array_equal(Batches(rows, 8, seed=1).batch(0, 3).dense, first)
    assert not np.array_equal(data.batch(1, 3).dense, first)
    with pytest.raises(RequestError, match="batch 5 was asked for; an epoch has batches 0 to 4"):
        data.batch(0, 5)


def test_rows_on_disk(tmp_path: Path) -> None:
    rows = rows_of([[1, 2], [], [-3]])
    rows.save(tmp_path / "rows")
    again = PreparedRows.load(tmp_path / "rows")
    assert isinstance(again.labels, np.memmap)
    np.testing.assert_array_equal(again.take(np.array([2, 0])).bags["tags"][0], [-3, 1, 2])
    (tmp_path / "rows" / "ids-0.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match="cannot be read"):
        PreparedRows.load(tmp_path / "rows")
    with pytest.raises(ConfigError, match=r"rows.json is missing"):
        PreparedRows.load(tmp_path)


def test_rows_that_do_not_fit_are_named() -> None:
    good = rows_of([[1], [2]])
    with pytest.raises(RequestError, match="labels have shape"):
        PreparedRows(good.bags, good.dense, np.array([0.0, 2.0], np.float32)).check()
    with pytest.raises(RequestError, match=r"dense has shape \(1, 2\); it must be \(2, D\)"):
        PreparedRows(good.bags, good.dense[:1], good.labels).check()
    with pytest.raises(RequestError, match="feature 'tags' has 2 bags for 1 labels"):
        PreparedRows(good.bags, good.dense[:1], good.labels[:1]).check()


# -- dense weights


def test_shared_weights_follow_a_local_twin() -> None:
    """Pull, step and push of weights and running statistics over a dictionary are plain SGD."""
    features = (HeadFeature("a", "a", 4), HeadFeature("b", "b", 4))
    spec = HeadSpec("two_branch", features, 3, (8,), (4,), (8,))
    torch.manual_seed(6)
    twin = build(spec)
    module = build(spec)
    module.load_state_dict(twin.state_dict())
    shared = SharedDense(module, "run")
    tables = {name: rows.copy() for name, rows in shared.rows().items()}
    assert {name: rows.shape[1] for name, rows in tables.items()} == {"run.dense": DENSE_DIM, "run.buffers": DENSE_DIM}
    here, there = TrainStep(twin, torch.optim.SGD(twin.parameters(), 0.1)), TrainStep(module)
    rng = np.random.default_rng(0)
    for _ in range(5):
        batch = (
            {f.name: rng.normal(size=(16, 4)).astype(np.float32) for f in features},
            rng.normal(size=(16, 3)).astype(np.float32),
            rng.integers(0, 2, 16).astype(np.float32),
        )
        here(*batch)
        shared.load(tables)
        there(*batch)
        grads = shared.gradients()
        tables["run.dense"] -= np.float32(0.1) * grads["run.dense"]
        tables["run.buffers"] -= grads["run.buffers"]
    shared.load(tables)
    for name, expected in twin.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], expected, rtol=1e-4, atol=1e-6)


def test_a_head_without_buffers_has_one_table() -> None:
    spec = HeadSpec("mlp", (HeadFeature("a", "a", 4),), 0, (3,))
    shared = SharedDense(build(spec), "run")
    assert list(shared.rows()) == ["run.dense"]
    assert list(shared.gradients()) == ["run.dense"]
    ids, offsets = shared.bags()["run.dense"]
    assert (list(ids), list(offsets)) == ([0], [0, 1])


def test_features_of_one_table_travel_together() -> None:
    spec = HeadSpec(
        "mlp",
        (
            HeadFeature("item", "item", 2, "mean"),
            HeadFeature("user", "user", 3),
            HeadFeature("seen", "item", 2, "mean"),
        ),
    )
    tables = TableBags(spec)
    bags = {"item": (np.array([5, 6]), np.array([0, 1, 2])), "seen": (np.array([7, 8, 9]), np.array([0, 0, 3]))}
    bags["user"] = (np.array([1, 2]), np.array([0, 1, 2]))
    joined = tables.by_table(bags)
    assert list(joined["item"][0]) == [5, 6, 7, 8, 9]
    assert list(joined["item"][1]) == [0, 1, 2, 2, 5]
    assert tables.modes == {"item": "mean", "user": "sum"}
    rows = {"item": np.arange(8, dtype=np.float32).reshape(4, 2), "user": np.ones((2, 3), np.float32)}
    parts = tables.by_feature(rows)
    np.testing.assert_array_equal(parts["seen"], [[4, 5], [6, 7]])
    for name, back in tables.gradients(parts).items():
        np.testing.assert_array_equal(back, rows[name])


# -- the ledger


def test_a_ledger_outlives_its_process(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", 2, 1)
    for batch in range(3):
        ledger.begin(batch)
        ledger.settle(batch, sequence=10 * (batch + 1))
        ledger.note(rows=8, absent=1, loss=0.5, staleness=batch * 100)
    ledger.begin(3)
    again = Ledger(tmp_path / "ledger", 2, 1)
    assert (again.acknowledged, again.sequence, again.applied()) == (3, 30, 3)
    assert 0 <= again.rested_s() < 60
    totals = again.totals()
    assert (totals.batches, totals.rows, totals.absent, totals.loss) == (3, 24, 3, 0.5)
    assert (totals.staleness[0], totals.staleness[STALENESS_MAX]) == (1, 2)
    assert Ledger(tmp_path / "ledger", 2, 0).acknowledged == 0
    with pytest.raises(RequestError, match="a ledger of 3 workers"):
        Ledger(tmp_path / "ledger", 3)


@pytest.mark.parametrize(("skip", "batches"), [(True, 2), (False, 1)])
def test_undecided_batches_are_skipped_or_repeated(tmp_path: Path, skip: bool, batches: int) -> None:
    ledger = Ledger(tmp_path / "ledger", 1)
    ledger.begin(0)
    ledger.settle(0, 5)
    ledger.begin(1)
    ledger.settle_rest(skip)
    assert (ledger.acknowledged, ledger.sequence, ledger.rested_s()) == (batches, 0, 0.0)


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with lock(tmp_path / "lock", 0.0, "held"), pytest.raises(NotApplied, match="held"):
        lock(tmp_path / "lock", 0.0, "held")
    lock(tmp_path / "lock", 0.0, "held").close()


# -- settings

GOOD = {
    "name": "run",
    "head": {"kind": "mlp", "features": [{"name": "tags", "table": "tag", "dim": 4}], "dense": 2},
    "data": {"folder": "rows"},
    "tables": {"tag": {"optimizer": {"kind": "sgd", "lr": 0.5}, "seed": 3}},
    "dense": {"optimizer": {"kind": "sgd", "lr": 0.1}},
}


def test_settings_give_tables() -> None:
    config = TrainConfig.from_plain(GOOD)
    tag, dense, buffers = config.specs()
    assert (tag.name, tag.dim, tag.optimizer.kind, tag.seed) == ("tag", 4, "sgd", 3)
    assert (dense.name, dense.dim, dense.optimizer.lr) == ("run.dense", DENSE_DIM, 0.1)  # type: ignore[union-attr]
    assert (buffers.name, buffers.optimizer.kind, buffers.optimizer.lr) == ("run.buffers", "sgd", 1.0)  # type: ignore[union-attr]
    assert TrainConfig.from_plain(config.to_plain()) == config


def test_tables_leave_seed_and_replicas_that_nobody_named_to_the_cluster() -> None:
    made: dict[str, dict] = {}
    client = SimpleNamespace(create_table=lambda name, dim, **plain: made.update({name: plain}))
    plain = {**GOOD, "dense": {**GOOD["dense"], "replicas": 3}}
    training._create(client, TrainConfig.from_plain(plain))  # type: ignore[arg-type]
    left = {name: (plain["seed"], plain["replicas"]) for name, plain in made.items()}
    assert left == {"tag": (3, None), "run.dense": (None, 3), "run.buffers": (None, 3)}


def test_the_fingerprint_is_of_what_is_computed() -> None:
    base = TrainConfig.from_plain(GOOD).fingerprint()
    for same in ({"prefetch": 3}, {"threads": 2}, {"timeout_s": 9}):
        assert TrainConfig.from_plain({**GOOD, **same}).fingerprint() == base
    for other in ({"workers": 3}, {"batch": 7}, {"seed": 1}, {"epochs": 2}, {"shuffle": False}):
        assert TrainConfig.from_plain({**GOOD, **other}).fingerprint() != base


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"batch": 0}, "batch is 0; it must be 1 to 1048576$"),
        ({"head": {"kind": "mlp"}}, r"\[head\]: features of a head are None"),
        ({"data": {}}, "either a folder or a function"),
        ({"data": {"folder": "a", "function": "b:c"}}, "either a folder or a function"),
        ({"data": {"function": "b"}}, "must be module:function"),
        ({"data": {"path": "a"}}, "unknown key 'path'"),
        ({"tables": {"other": {}}}, r"\[tables.other\] is no table of the head, which takes tag"),
        ({"tables": {"tag": {"dim": 3}}}, "without dim and name"),
        ({"tables": {"tag": {"optimizer": {"kind": "lion"}}}}, "optimizer kind is 'lion'"),
        ({"dense": {"rate": 1}}, "unknown key 'rate'"),
        ({"name": "a b"}, "table name is 'a b.dense'"),
        (
            {"head": {"kind": "mlp", "features": [{"name": "t", "table": "tag", "dim": 4, "pooling": "max"}]}},
            "pooling of feature 't' is 'max'",
        ),
        ({"folder": "x"}, "unknown key 'folder'"),
    ],
)
def test_wrong_settings_are_named(change: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        TrainConfig.from_plain({**GOOD, **change})


def test_data_come_from_a_folder_or_a_function_beside_the_settings(tmp_path: Path) -> None:
    rows = rows_of([[1], [2], [3]])
    rows.save(tmp_path / "rows")
    (tmp_path / "train.toml").write_text(
        'name = "run"\nbatch = 2\n[head]\nkind = "mlp"\ndense = 2\n'
        'features = [{ name = "tags", table = "tag", dim = 4 }]\n[data]\nfolder = "rows"\n'
        '[test]\nfunction = "rows_beside_settings:load"\narguments = { path = "' + str(tmp_path / "rows") + '" }\n'
    )
    (tmp_path / "rows_beside_settings.py").write_text(
        "from router.training_data import PreparedRows\n\ndef load(path):\n    return PreparedRows.load(path)\n"
    )
    config = TrainConfig.load(tmp_path / "train.toml")
    assert len(config.dataset()) == 2
    assert len(config.test_rows()) == 3
    wrong = TrainConfig.from_plain({**config.to_plain(), "head": {**config.head, "dense": 1}}, folder=tmp_path)
    with pytest.raises(
        ConfigError, match=r"\[data\] gives features tags and 2 dense columns; the head takes tags and 1"
    ):
        wrong.dataset()
    for function, says in (
        ("no_such_module:f", "cannot be imported"),
        ("rows_beside_settings:g", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=says):
            TrainConfig.from_plain({**config.to_plain(), "data": {"function": function}}, folder=tmp_path).dataset()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "return 5",
            r"\[data\]: MODULE:load returned int; it must return PreparedRows, or a Dataset with len\(\) and ",
        ),
        ("return [1, 2]", r"\[data\]: MODULE:load returned list; it must return PreparedRows"),
        ("return {}['user']", r"\[data\]: MODULE:load failed: KeyError: 'user'$"),
        ("raise ValueError('one\\n  two')", r"\[data\]: MODULE:load failed: ValueError: one two$"),
        ("raise RuntimeError", r"\[data\]: MODULE:load failed: RuntimeError$"),
        ("return PreparedRows({}, None, None)", r"\[data\]: MODULE:load failed: TypeError: object of type 'NoneType'"),
        ("return (", r"\[data\]: module 'MODULE' has a syntax error in .*MODULE.py line 4: '\(' was never closed$"),
        ("pass\n1 / 0", r"\[data\]: function 'MODULE:load' cannot be imported: ZeroDivisionError: division by zero$"),
    ],
)
def test_a_function_that_gives_no_rows_is_named(body: str, says: str, tmp_path: Path) -> None:
    module = f"rows_of_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(
        f"from router.training_data import PreparedRows\n\ndef load():\n    {body}\n"
    )
    config = TrainConfig.from_plain({**GOOD, "data": {"function": f"{module}:load"}}, folder=tmp_path)
    with pytest.raises(RequestError, match=says.replace("MODULE", module)):
        config.dataset()
