"""Training by real worker processes over real sockets: learnt weights, kills, and going on."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ps"))

import ps
from dense_head import HeadError, Predictor, TrainStep, build
from ps.errors import NotApplied, RequestError
from router import training
from router.training import TrainingError, TrainProgress, pull_head, train
from router.training_config import TrainConfig
from router.training_data import PreparedRows
from router.training_ledger import REST_MAX_S, Ledger, lock
from router.training_worker import LEDGER_FILE
from tests.ps.cluster_fixture import TOKEN, LocalCluster, local_cluster

pytestmark = pytest.mark.timeout(300)  # each worker process imports torch anew: seconds, or a minute under load

LR = 0.25
SIZE = 16  # rows of a batch


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


def settings(
    folder: Path, name: str, batches: int, size: int = SIZE, noise: float = 0.3, **more: object
) -> TrainConfig:
    """Unshuffled rows. Feature "tag": an id of the row's own; feature "user" is shared, and decides the label.

    noise: the share of labels that are turned round, so that no gradient fades away.
    """
    rng = np.random.default_rng(3)
    rows = batches * size
    users = rng.integers(0, 40, rows)
    labels = ((users % 2 == 0) ^ (rng.random(rows) < noise)).astype(np.float32)
    bags = {"tag": (np.arange(rows), np.arange(rows + 1)), "user": (users, np.arange(rows + 1))}
    PreparedRows(bags, np.zeros((rows, 0), np.float32), labels).save(folder / "rows")
    features = [{"name": n, "table": f"{name}-{n}", "dim": 4} for n in ("tag", "user")]
    plain = {
        "name": name,
        "head": {"kind": "two_branch", "features": features, "sparse_hidden": [6], "hidden": [4]},
        "data": {"folder": "rows"},
        "tables": {f"{name}-{n}": {"optimizer": {"kind": "adagrad", "lr": LR, "eps": 1e-20}} for n in ("tag", "user")},
        "dense": {"optimizer": {"kind": "adam", "lr": 0.01}},
        "batch": size,
        "shuffle": False,
    }
    return TrainConfig.from_plain({**plain, **more}, folder=folder)


def applied_once(client: ps.Client, config: TrainConfig, batches: int) -> None:
    """Every tag row has taken exactly one step of its batch, and the counter of batches is exact.

    Adagrad's first step from zero is LR * sign(gradient), whatever the gradient; a second one would add to it.
    """
    ids = np.arange(batches * SIZE)
    before = client.pull(f"{config.name}-tag", ids + 10**6, absent="zeros")
    assert not before.any()
    moved = client.pull(f"{config.name}-tag", ids) - initial_rows(client, config, ids)
    np.testing.assert_allclose(np.abs(moved), LR, rtol=1e-3)
    tracked = pull_head(client, config).module.state_dict()["sparse.1.num_batches_tracked"]
    assert int(tracked) == batches


def initial_rows(client: ps.Client, config: TrainConfig, ids: np.ndarray) -> np.ndarray:
    """The rows that training began with: those of an equal table that nobody trains."""
    spec = client.describe(f"{config.name}-tag")
    client.create_table("untrained", 4, initializer=spec.initializer, seed=spec.seed)
    rows = client.pull("untrained", ids, absent="initial")
    client.drop_table("untrained")
    return rows


@pytest.mark.slow
def test_two_workers_learn_what_decides_the_label(cluster: LocalCluster, tmp_path: Path) -> None:
    slow = {"learn-tag": {"optimizer": {"kind": "sgd", "lr": 0.0}}}
    config = settings(
        tmp_path, "learn", 60, size=32, epochs=2, noise=0.0, workers=2, test={"folder": "rows"}, tables=slow
    )
    seen: list[TrainProgress] = []
    report = train(config, tmp_path / "run", cluster.addresses, TOKEN, watch=seen.append)
    assert (report.batches, report.rows, report.resumed, report.restarts) == (120, 120 * 32, 0, 0)
    assert sum(report.staleness) == 120
    assert seen[-1].totals.batches == seen[-1].batches_total == 120
    assert report.evaluation is not None
    assert report.evaluation.auc > 0.95
    with cluster.client() as client:
        mine = pull_head(client, config).module.state_dict()
    torch.testing.assert_close(Predictor.load(report.head).module.state_dict(), mine)
    json.dumps(report.evaluation.__dict__)
    again = train(config, tmp_path / "run", cluster.addresses, TOKEN)
    assert (again.batches, again.resumed, again.rows) == (120, 120, report.rows)


@pytest.mark.slow
def test_one_worker_without_prefetch_is_plain_training(cluster: LocalCluster, tmp_path: Path) -> None:
    sgd = {"optimizer": {"kind": "sgd", "lr": LR}}
    tables = {"plain-tag": sgd, "plain-user": sgd}
    config = settings(tmp_path, "plain", 12, workers=1, prefetch=0, tables=tables, dense=sgd)
    with cluster.client() as client:
        initial = {}
        for spec in config.specs()[:2]:
            client.create_table(spec.name, spec.dim, spec.optimizer, spec.initializer)
            initial[spec.name] = client.pull(spec.name, np.arange(200), absent="initial")
        train(config, tmp_path / "run", cluster.addresses, TOKEN)
        torch.manual_seed(config.seed)
        module = build(config.spec)
        tables = {n: torch.tensor(rows, requires_grad=True) for n, rows in initial.items()}
        step = TrainStep(module, torch.optim.SGD(module.parameters(), LR))
        sparse = torch.optim.SGD(tables.values(), lr=LR)
        data = config.dataset()
        for index in range(len(data)):
            batch = data.batch(0, index)
            pooled = {}
            for feature in config.spec.features:
                ids, offsets = (torch.tensor(a) for a in batch.bags[feature.name])
                table = tables[feature.table]
                pooled[feature.name] = torch.nn.functional.embedding_bag(
                    ids, table, offsets, mode="sum", include_last_offset=True
                )
            _, grads = step({n: p.detach().numpy() for n, p in pooled.items()}, None, batch.labels)
            sparse.zero_grad()
            torch.autograd.backward(list(pooled.values()), [torch.tensor(grads[n]) for n in pooled])
            sparse.step()
        for name, table in tables.items():
            found = client.pull(name, np.arange(200), absent="initial")
            np.testing.assert_allclose(found, table.detach().numpy(), rtol=2e-3, atol=2e-4)
        mine = pull_head(client, config).module.state_dict()
        for key, expected in module.state_dict().items():
            torch.testing.assert_close(mine[key], expected, rtol=2e-3, atol=2e-4)


class Killer:
    """`watch` that kills a worker with signal 9 whenever training has advanced by `every` batches."""

    def __init__(self, every: int, kills: int) -> None:
        self.every, self.kills, self.done, self.next = every, kills, 0, every

    def __call__(self, now: TrainProgress) -> None:
        import multiprocessing

        workers = [p for p in multiprocessing.active_children() if p.name.startswith("embring-worker")]
        if self.done < self.kills and now.totals.batches >= self.next and workers and workers[0].pid:
            os.kill(workers[self.done % len(workers)].pid, signal.SIGKILL)  # type: ignore[arg-type]
            self.done += 1
            self.next = now.totals.batches + self.every


@pytest.mark.slow
def test_killed_workers_go_on_and_each_batch_is_applied_once(cluster: LocalCluster, tmp_path: Path) -> None:
    config = settings(tmp_path, "killed", 400, workers=2)
    killer = Killer(every=40, kills=3)
    report = train(config, tmp_path / "run", cluster.addresses, TOKEN, watch=killer)
    assert killer.done >= 2
    assert report.restarts == killer.done
    assert report.batches == 400
    with cluster.client() as client:
        applied_once(client, config, 400)


COORDINATOR = """
import sys
from pathlib import Path
from router.training import train
from router.training_config import TrainConfig
if __name__ == "__main__":
    config = TrainConfig.from_plain(__import__("json").loads(sys.argv[1]), folder=Path(sys.argv[2]))
    train(config, sys.argv[3], sys.argv[4].split(","), sys.argv[5])
"""


@pytest.mark.slow
def test_a_killed_coordinator_takes_its_workers_along_and_the_run_goes_on(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    import subprocess

    config = settings(tmp_path, "coordinator", 300, workers=2)
    (tmp_path / "coordinator.py").write_text(COORDINATOR)
    run = tmp_path / "run"
    command = [sys.executable, str(tmp_path / "coordinator.py"), json.dumps(config.to_plain()), str(tmp_path), str(run)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*command, ",".join(cluster.addresses), TOKEN], env=environment)
    deadline = time.monotonic() + 60
    while not (run / LEDGER_FILE).exists() or Ledger(run / LEDGER_FILE, 2).applied() < 30:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait(30)
    report = train(config, run, cluster.addresses, TOKEN)
    assert 30 <= report.resumed < 300
    assert report.batches == 300
    with cluster.client() as client:
        applied_once(client, config, 300)


@pytest.mark.slow
def test_what_cannot_go_on_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    config = settings(tmp_path, "refused", 6, workers=1)
    run = tmp_path / "run"
    train(config, run, cluster.addresses, TOKEN)
    other = TrainConfig.from_plain({**config.to_plain(), "batch": 8}, folder=tmp_path)
    with pytest.raises(RequestError, match="begun with other settings"):
        train(other, run, cluster.addresses, TOKEN)
    with lock(run / "lock", 5.0, "held"), pytest.raises(NotApplied, match="another training uses this folder"):
        train(config, run, cluster.addresses, TOKEN)
    ledger = Ledger(run / LEDGER_FILE, 1)
    ledger.records["acknowledged"] = 5
    ledger.records["pushed_at"] = time.time() - REST_MAX_S - 60
    with pytest.raises(RequestError, match="rested for 51 minutes"):
        train(config, run, cluster.addresses, TOKEN)
    assert train(config, run, cluster.addresses, TOKEN, undecided="skip").batches == 6
    with cluster.client() as client:
        applied_once(client, config, 6)
        client.truncate("refused.dense")
    with pytest.raises(RequestError, match=r"lacks 1 rows of its table 'refused.dense'"):
        train(config, run, cluster.addresses, TOKEN)


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_run_with_its_reason(cluster: LocalCluster, tmp_path: Path) -> None:
    config = settings(tmp_path, "fails", 8, workers=2, size=1)  # batch normalisation takes no single row
    with pytest.raises(TrainingError, match=r"worker \d failed: ValueError: Expected more than 1 value"):
        train(config, tmp_path / "run", cluster.addresses, TOKEN)


def test_a_head_that_cannot_be_judged_is_saved_all_the_same(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(training, "pull_head", lambda *_: SimpleNamespace(module="weights"))
    monkeypatch.setattr(training, "save_head", lambda *given: saved.append(given))

    def one_class(*_):
        raise HeadError("all labels are 1.0; AUC needs both classes")

    monkeypatch.setattr(training, "evaluate", one_class)
    config = SimpleNamespace(test=("t.csv",), spec="spec", test_rows=lambda: None)
    with pytest.raises(RequestError, match=r"the head is saved in .*head, but cannot be judged by the test rows: all"):
        training._finish(None, config, tmp_path / "head")
    assert saved == [(tmp_path / "head", "spec", "weights")]
