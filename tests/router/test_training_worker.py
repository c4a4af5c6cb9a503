"""A worker, killed anywhere and begun again, over a cluster in a dictionary: every slot takes each batch once."""

import multiprocessing
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_head import build
from router import training_worker
from router.training_config import TrainConfig
from router.training_data import PreparedRows
from router.training_dense import SharedDense
from router.training_ledger import Ledger
from router.training_worker import LEDGER_FILE, WorkerOrder, _Worker, work
from tests.router.training_fake import SLOTS, FakeClient, FakeCluster, Killed

ROWS, BATCH = 24, 3


def config_in(folder: Path, **more: object) -> TrainConfig:
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 50, 3 * ROWS)
    offsets = np.arange(ROWS + 1) * 3
    dense, labels = rng.normal(size=(ROWS, 2)), rng.integers(0, 2, ROWS)
    PreparedRows({"tags": (ids, offsets)}, dense.astype(np.float32), labels.astype(np.float32)).save(folder / "rows")
    head = {"kind": "two_branch", "features": [{"name": "tags", "table": "tag", "dim": 2}], "dense": 2}
    plain = {"name": "run", "head": {**head, "hidden": [3], "dense_hidden": [3]}, "data": {"folder": "rows"}}
    return TrainConfig.from_plain({**plain, "batch": BATCH, **more}, folder=folder)


def order_of(config: TrainConfig, folder: Path, worker: int = 0) -> WorkerOrder:
    return WorkerOrder(config.to_plain(), str(config.folder), str(folder), worker, 100 + worker, None, None)


def expected_pushes(config: TrainConfig) -> Counter:
    """(client, sequence, slot) of every batch, once."""
    wanted: Counter = Counter()
    data = config.dataset()
    for worker in range(config.workers):
        for k, number in enumerate(range(worker, config.epochs * len(data), config.workers)):
            batch = data.batch(*divmod(number, len(data)))
            slots = {int(i) % SLOTS for i in batch.bags["tags"][0]} | {0}  # row 0 of the tables of dense weights
            wanted.update((100 + worker, k + 1, slot) for slot in slots)
    return wanted


def run_with_deaths(
    config: TrainConfig, folder: Path, deaths: list[int], patch: pytest.MonkeyPatch
) -> tuple[FakeCluster, int]:
    cluster = FakeCluster()
    cluster.dims = {spec.name: spec.dim for spec in config.specs()}
    cluster.deaths = list(deaths)
    patch.setattr(training_worker.ps, "connect", cluster.connect, raising=False)
    dense = SharedDense(build(config.spec), "run")
    for table, rows in dense.rows().items():
        cluster.rows.update({(table, i): row.copy() for i, row in enumerate(rows)})
    killed = 0
    for worker in range(config.workers):
        while True:
            try:
                _Worker(order_of(config, folder, worker)).run()
                break
            except Killed:
                killed += 1
    return cluster, killed


@settings(max_examples=25)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 2), st.integers(1, 2))
def test_each_slot_takes_each_batch_once(deaths: list[int], prefetch: int, workers: int) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        config = config_in(folder, prefetch=prefetch, workers=workers, epochs=2)
        cluster, killed = run_with_deaths(config, folder, deaths, patch)
        assert killed == len(deaths) - len(cluster.deaths)
        assert cluster.applied == expected_pushes(config)
        ledger = Ledger(folder / LEDGER_FILE, workers)
        assert ledger.applied() == 2 * ROWS // BATCH
        # num_batches_tracked of the batch normalisation counts the batches too, through its table.
        dense = SharedDense(build(config.spec), "run")
        table = {t: np.stack([cluster.rows[t, i] for i in range(len(r))]) for t, r in dense.rows().items()}
        dense.load(table)
        counts = [int(b) for key, b in dense.buffers.items() if key.endswith("num_batches_tracked")]
        assert counts == [2 * ROWS // BATCH]


def test_a_ledger_that_forgets_is_found_out() -> None:
    """The property can fail: a worker that begins one sequence later doubles what was on its way."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        config = config_in(folder, workers=1)
        begins: list[int] = []

        def forgetful(client: FakeClient, identity: int, sequence: int) -> None:
            begins.append(sequence)
            client.client, client.last_sequence = identity, sequence + len(begins) - 1

        patch.setattr(FakeClient, "identify", forgetful)
        cluster, killed = run_with_deaths(config, folder, [9], patch)
        assert killed == 1
        assert cluster.applied != expected_pushes(config)


def test_staleness_counts_batches_between_pull_and_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path, prefetch=0, workers=1)
    run_with_deaths(config, tmp_path, [], monkeypatch)
    totals = Ledger(tmp_path / LEDGER_FILE, 1).totals()
    assert totals.staleness[0] == totals.batches == ROWS // BATCH
    assert totals.rows == ROWS
    (tmp_path / LEDGER_FILE).unlink()
    config = config_in(tmp_path, prefetch=2, workers=1)
    run_with_deaths(config, tmp_path, [], monkeypatch)
    stale = Ledger(tmp_path / LEDGER_FILE, 1).totals().staleness
    assert sum(stale) == ROWS // BATCH
    assert max(s for s, n in enumerate(stale) if n) <= 3  # two pulled ahead, and one push on its way


def test_a_failing_worker_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    plain = {**config_in(tmp_path).to_plain(), "data": {"folder": "nowhere"}}
    order = WorkerOrder(plain, str(tmp_path), str(tmp_path), 0, 1, None, None)
    monkeypatch.setattr(training_worker.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        work(order, theirs)
    assert "ConfigError: there are no prepared rows in" in ours.recv_bytes().decode()
