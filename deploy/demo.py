"""The main job, on this machine, in one command: start, train, serve, compare, shut down.

    load     a data set (deploy.datasets), a random fifth of its rows held out
    start    three servers on a Ray of the demo's own, in a temporary state folder
    train    a DeepFM with two asynchronous workers, through pull and push
    serve    the trained head and its tables, by a router with both front doors
    score    every held-out row over gRPC and over REST
    compare  each score with plain torch that holds a dump of the same weights, taken by range pulls
    end      everything, and look that no process is left

A cluster that is running already is neither used nor disturbed. `run_killed` does it twice, the second time with a
server killed in the middle of training.
"""

import asyncio
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import embedding_bag

import ps
from dense_head import HeadFeature, HeadSpec, auc, load, log_loss
from deploy.datasets import Dataset
from deploy.datasets import load as load_dataset
from deploy.routers import start_router
from ps.cluster import controller, start, stop
from ps.config import Config, RouterConfig
from ps.rayhead import marked
from ps.runtime import Runtime, read_token
from router.columns import Column, take_rows
from router.features import Prepared
from router.grpc_client import GrpcClient
from router.http_client import HttpClient
from router.oip_codec import warmup
from router.training import TrainProgress, train
from router.training_config import TrainConfig
from router.training_data import PreparedRows

MODEL = "ctr"
SERVERS, WORKERS = 3, 2
DIM, HIDDEN = 16, (64, 32)
EPOCHS, BATCH, LEARNING_RATE, DENSE_LEARNING_RATE = 2, 512, 0.03, 0.001
RANGES = 7
"""Range pulls that a table's dump is cut into."""

REQUEST_ROWS, REQUESTS_AT_ONCE = 256, 4
LATENCY_REQUESTS = 200
PARITY_MAX = 1e-5
SCORE_STD_MIN = 0.05
FIGURES_TIMEOUT_S = 60.0
KILLED_AUC_MAX_DIFF = 0.003

Report = Callable[[str], None]
Watch = Callable[[TrainProgress, int], None]


@dataclass
class Outcome:
    """What the demo found. auc and logloss: of the scores served over gRPC. latency_ms: of requests of one row.

    rows: that training made, the head's own among them. rows_per_server: with their copies. staleness[s]: batches with
    s others applied between their pull and their push. killed: which server, and when. undisturbed_auc, auc_difference:
    of the run in which none was, and from it. failures: what was to be reached and was not.
    """

    dataset: str = ""
    servers: int = 0
    workers: int = WORKERS
    replicas: int = 1
    train_rows: int = 0
    heldout_rows: int = 0
    rows_skipped: int = 0
    rows: int = 0
    rows_per_server: list[int] = field(default_factory=list)
    train_seconds: float = 0.0
    train_rows_per_s: float = 0.0
    staleness: list[int] = field(default_factory=list)
    auc: float = 0.0
    logloss: float = 0.0
    score_std: float = 0.0
    killed: str = ""
    undisturbed_auc: float | None = None
    auc_difference: float | None = None
    parity_rows_grpc: int = 0
    parity_rows_rest: int = 0
    parity_max_abs_diff: float = float("inf")
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    processes_left: int = -1
    seconds: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    ok: bool = False


def run_killed(source: str, predictions: Path | None, report: Report, watch: Watch, replicas: int) -> Outcome:
    """The demo with `kill -9` of a server in the middle of training, after one without: their AUCs must agree."""
    calm = run(source, None, lambda line: report(f"undisturbed: {line}"), watch, replicas)
    outcome = run(source, predictions, report, watch, replicas, kill=True)
    difference = round(abs(outcome.auc - calm.auc), 5)
    outcome.undisturbed_auc, outcome.auc_difference = calm.auc, difference
    outcome.failures += [f"undisturbed: {failure}" for failure in calm.failures]
    if not outcome.killed:
        outcome.failures.append("training ended before a server was killed")
    if difference > KILLED_AUC_MAX_DIFF:
        outcome.failures.append(f"auc_difference is {difference:g}; it must be 0 to {KILLED_AUC_MAX_DIFF:g}")
    outcome.ok = not outcome.failures
    return outcome


def run(
    source: str, predictions: Path | None, report: Report, watch: Watch, replicas: int = 1, kill: bool = False
) -> Outcome:
    """The whole demo on data set `source`; see `Outcome`. Errors of embring where it could not be carried through.

    predictions: a file for one JSON object for each held-out row. report: told each step. watch: told the progress
    of training, with the number of batches. replicas: owners of each row. kill: a server, in the middle of training.
    """
    outcome = Outcome(machine=_machine(), replicas=replicas)
    began = time.monotonic()
    with _timed(outcome, "data"):
        report(f"loading {source}")
        dataset = load_dataset(source)
        outcome.dataset, outcome.rows_skipped = dataset.name, dataset.skipped
        columns, labels = dataset.split(heldout=True)
        prepared = dataset.features.prepare(columns)
        warmup()  # this process fills the cache of compiled kernels that workers and router then read
        outcome.heldout_rows = len(labels)
    folder = Path(tempfile.mkdtemp(prefix="embring-demo-"))
    runtime: Runtime | None = None
    _end_on_sigterm()
    try:
        with _timed(outcome, "start"):
            config = Config().with_settings("server", servers=SERVERS)
            runtime = start(config, state=folder / "state", runtime_file=folder / "cluster.json", report=report)
            _end_on_sigterm()
        with _timed(outcome, "train"):
            report(f"training a DeepFM with {WORKERS} asynchronous workers")
            if kill:
                watch = _killing(runtime, outcome, report, watch)
                _end_on_sigterm()
            head = _train(dataset, runtime, folder, outcome, watch)
        with _timed(outcome, "serve"):
            report("starting a router")
            _publish(dataset, head, folder / "models")
            places = start_router(runtime, folder / "models", RouterConfig(grpc_port=0, http_port=0))
            _end_on_sigterm()
        with _timed(outcome, "score"):
            report(f"scoring {len(labels):,} held-out rows over gRPC and REST")
            scores = asyncio.run(_score_all(places, columns, outcome))
        with _timed(outcome, "compare"):
            report("comparing each score with plain torch over a dump of the same weights")
            reference, dumped = _reference(runtime, dataset, head, prepared)
            _rows(runtime, dumped, outcome)
        _judge(outcome, dataset, labels, scores, reference)
        if predictions is not None:
            _write_predictions(predictions, dataset, labels, scores)
    finally:
        with _timed(outcome, "end"):
            if runtime is not None:
                report("shutting down")
                stop(runtime, runtime_file=folder / "cluster.json")
                outcome.processes_left = len(marked(Path(runtime.scratch).name)) + len(active_children())
            shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds["total"] = round(time.monotonic() - began, 1)
    if outcome.processes_left:
        outcome.failures.append(f"processes_left is {outcome.processes_left}; it must be 0")
    outcome.ok = not outcome.failures
    return outcome


def _end_on_sigterm() -> None:
    """Ended from outside, the demo takes its cluster down all the same.

    To be said again whenever this process has been a driver of Ray, which puts its own handling in this one's place.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def _timed(outcome: Outcome, stage: str) -> Iterator[None]:
    start_of_stage = time.monotonic()
    try:
        yield
    finally:
        outcome.seconds[stage] = round(time.monotonic() - start_of_stage, 1)


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


def _killing(runtime: Runtime, outcome: Outcome, report: Report, watch: Watch) -> Watch:
    """`watch`, and halfway through training `kill -9` of a server."""
    with controller(runtime) as ask:
        victim = ask("status")["servers"][1]

    def told(progress: TrainProgress, batches: int) -> None:
        watch(progress, batches)
        if not outcome.killed and progress.totals.batches >= batches // 2:
            os.kill(victim["pid"], signal.SIGKILL)
            outcome.killed = f"{victim['name']} after {progress.totals.batches} of {batches} batches"
            report(f"killed {outcome.killed}")

    return told


def _train(dataset: Dataset, runtime: Runtime, folder: Path, outcome: Outcome, watch: Watch) -> Path:
    """Train through the cluster; the folder of the head."""
    columns, labels = dataset.split(heldout=False)
    PreparedRows.of(dataset.features.prepare(columns), labels).save(folder / "rows")
    bag_features = dataset.features.bag_features
    spec = HeadSpec(
        kind="deepfm",
        features=tuple(HeadFeature(f.name, f.table, DIM, f.pooling) for f in bag_features),
        dense=dataset.features.dense_width,
        hidden=HIDDEN,
    )
    optimizer = {"kind": "adagrad", "lr": LEARNING_RATE}
    config = TrainConfig.from_plain(
        {
            "name": MODEL,
            "head": asdict(spec),
            "data": {"folder": str(folder / "rows")},
            "tables": {f.table: {"optimizer": optimizer, "replicas": outcome.replicas} for f in bag_features},
            "dense": {"optimizer": {"kind": "adam", "lr": DENSE_LEARNING_RATE}, "replicas": outcome.replicas},
            "epochs": EPOCHS,
            "batch": BATCH,
            "workers": WORKERS,
        }
    )

    def tell(progress: TrainProgress) -> None:
        watch(progress, progress.batches_total)

    token = read_token(runtime.token_path)
    done = train(config, folder / "run", ",".join(runtime.addresses), token, watch=tell)
    outcome.train_rows = len(labels)
    outcome.train_seconds, outcome.train_rows_per_s = round(done.seconds, 2), round(done.rows_per_s, 1)
    counts = np.array(done.staleness)
    outcome.staleness = counts[: np.flatnonzero(counts)[-1] + 1].tolist() if counts.any() else []
    return Path(done.head)


def _publish(dataset: Dataset, head: Path, models: Path) -> None:
    """A model repository with version 1 of the model."""
    version = models / MODEL / "1"
    shutil.copytree(head, version / "head")
    (version / "features.toml").write_text(dataset.features_toml)
    (version / "model.toml").write_text('absent = "zeros"\n')


# -- scoring


Infer = Callable[[str, dict[str, Column]], Any]


async def _score_all(places: dict[str, Any], columns: dict[str, Column], outcome: Outcome) -> dict[str, NDArray]:
    """Door -> float32[heldout] scores; the latency of each door goes to the outcome."""
    scores = {}
    async with GrpcClient(places["grpc"]) as grpc_client, HttpClient(places["http"]) as http_client:
        for door, infer in (("grpc", grpc_client.infer), ("rest", http_client.infer)):
            scores[door] = await _score(infer, columns)
            outcome.latency_ms[door] = await _latency(infer, columns)
    return scores


async def _score(infer: Infer, columns: dict[str, Column]) -> NDArray[np.float32]:
    rows = next(iter(columns.values())).rows
    turn = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def part(start_row: int) -> NDArray[np.float32]:
        chosen = np.arange(start_row, min(start_row + REQUEST_ROWS, rows))
        async with turn:
            return await infer(MODEL, take_rows(columns, chosen))

    return np.concatenate(await asyncio.gather(*(part(at) for at in range(0, rows, REQUEST_ROWS))))


async def _latency(infer: Infer, columns: dict[str, Column]) -> dict[str, float]:
    """Percentiles of requests of one row, one after another, in milliseconds, as the client sees them."""
    rows = next(iter(columns.values())).rows
    taken = []
    for i in range(LATENCY_REQUESTS):
        one = take_rows(columns, np.array([i % rows]))
        begun = time.perf_counter()
        await infer(MODEL, one)
        taken.append((time.perf_counter() - begun) * 1e3)
    return {f"p{q}": round(float(np.percentile(taken, q)), 3) for q in (50, 99)}


# -- the same in plain torch


def _reference(runtime: Runtime, dataset: Dataset, head: Path, prepared: Prepared) -> tuple[NDArray[np.float32], int]:
    """(scores, rows dumped): the held-out rows through torch's own pooling, over tables dumped by range pulls.

    The last row of each dumped table is zeros: what an id answers that was never trained.
    """
    tables: dict[str, tuple[NDArray[np.int64], torch.Tensor]] = {}
    dumped = 0
    with ps.connect(runtime.addresses, read_token(runtime.token_path)) as client:
        for table in dataset.features.tables:
            ids, rows = _dump(client, table)
            order = np.argsort(ids)
            padded = np.concatenate([rows[order], np.zeros((1, rows.shape[1]), np.float32)])
            tables[table] = (ids[order], torch.from_numpy(padded))
            dumped += len(ids)
        for part in ("dense", "buffers"):
            dumped += len(_dump(client, f"{MODEL}.{part}")[0])
    embeddings = {}
    for feature in dataset.features.bag_features:
        known, weights = tables[feature.table]
        ids, offsets = prepared.bags[feature.name]
        at = np.searchsorted(known, ids)
        missing = len(known)
        at = np.where(known[np.minimum(at, missing - 1)] == ids, at, missing)
        embeddings[feature.name] = embedding_bag(
            torch.from_numpy(at), weights, torch.from_numpy(offsets), mode=feature.pooling, include_last_offset=True
        )
    _, module = load(head)
    dense = torch.from_numpy(prepared.dense) if prepared.dense.shape[1] else None
    with torch.inference_mode():
        return torch.sigmoid(module.eval()(embeddings, dense)).numpy(), dumped


def _dump(client: ps.Client, table: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(ids int64[n], rows float32[n, dim]) of a whole table, by range pulls."""
    dim = client.describe(table).dim
    ids, rows = [np.empty(0, np.int64)], [np.empty((0, dim), np.float32)]
    for first, last in client.ranges(table, RANGES):
        for block in client.pull_range(table, first, last):
            ids.append(block.ids)
            rows.append(block.rows)
    return np.concatenate(ids), np.concatenate(rows)


def _rows(runtime: Runtime, dumped: int, outcome: Outcome) -> None:
    """Rows of each server, once the figures that servers send now and then, and copies of what a dead one had, have
    caught up with what was dumped."""
    deadline = time.monotonic() + FIGURES_TIMEOUT_S
    with controller(runtime) as ask:
        while True:
            servers = ask("status")["servers"]
            outcome.rows_per_server = [int(s.get("rows", 0)) for s in servers]
            held = sum(outcome.rows_per_server)
            outcome.rows = held // outcome.replicas
            outcome.servers = sum(s["state"] == "alive" for s in servers)
            if held == dumped * outcome.replicas or time.monotonic() > deadline:
                break
            time.sleep(0.2)
    if held != dumped * outcome.replicas:
        each = f", {outcome.replicas} copies each" if outcome.replicas > 1 else ""
        outcome.failures.append(f"servers count {held} rows where range pulls gave {dumped}{each}")


# -- the verdict


def _judge(outcome: Outcome, dataset: Dataset, labels: NDArray, scores: dict[str, NDArray], reference: NDArray) -> None:
    """Fill the figures in, and note each that is not what it must be."""
    served, targets = scores["grpc"], dataset.targets
    differences = {door: np.abs(given - reference) for door, given in scores.items() if len(given) == len(reference)}
    outcome.parity_rows_grpc, outcome.parity_rows_rest = len(scores["grpc"]), len(scores["rest"])
    outcome.parity_max_abs_diff = float(max((d.max() for d in differences.values()), default=np.inf))
    outcome.auc, outcome.logloss = round(auc(labels, served), 5), round(log_loss(labels, served), 5)
    outcome.score_std = round(float(served.std()), 5)
    must = [
        ("auc", outcome.auc, targets.auc_min, targets.auc_max),
        ("logloss", outcome.logloss, 0.0, targets.logloss_max),
        ("heldout_rows", outcome.heldout_rows, targets.heldout_rows_min, np.inf),
        ("parity_rows_grpc", outcome.parity_rows_grpc, outcome.heldout_rows, outcome.heldout_rows),
        ("parity_rows_rest", outcome.parity_rows_rest, outcome.heldout_rows, outcome.heldout_rows),
        ("parity_max_abs_diff", outcome.parity_max_abs_diff, 0.0, PARITY_MAX),
        ("score_std", outcome.score_std, SCORE_STD_MIN, np.inf),
        ("rows", outcome.rows, targets.rows_min, np.inf),
        # Copies of what a killed server had may have been made elsewhere before it was back.
        ("rows of the emptiest server", min(outcome.rows_per_server, default=0), 0 if outcome.killed else 1, np.inf),
        ("servers", outcome.servers, SERVERS, SERVERS),
    ]
    for name, value, low, high in must:
        if not low <= value <= high:
            outcome.failures.append(f"{name} is {value:g}; it must be {low:g} to {high:g}")


def _write_predictions(path: Path, dataset: Dataset, labels: NDArray, scores: dict[str, NDArray]) -> None:
    """One JSON object a line: the row's place in the data set, its label, its score over each door."""
    rows = np.flatnonzero(dataset.heldout)
    with path.open("w") as file:
        for row, label, grpc_score, rest_score in zip(rows, labels, scores["grpc"], scores["rest"], strict=True):
            line = {"row": int(row), "label": int(label), "grpc": float(grpc_score), "rest": float(rest_score)}
            file.write(json.dumps(line) + "\n")
