"""Training: worker processes that train a head and its tables through the parameter server.

    config = TrainConfig.load("train.toml")
    report = train(config, "runs/first")          # again after a crash, with the same folder: it goes on
    predictor = Predictor.load(report.head)

Training is asynchronous: each worker pulls, steps and pushes at its own pace, and sees the others' pushes when it next
pulls; the staleness histogram counts, for each batch, how many others were applied between its pull and its push. The
head's weights are shared through the parameter server (router/training_dense.py says why). A run can be killed at
any point, workers and coordinator, and goes on where it was, each batch applied once (router/training_ledger.py).

`train` starts processes by spawning: a program that calls it needs the usual `if __name__ == "__main__":`.
"""

import json
import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

import ps
from dense_head import HeadError, Predictor, build
from dense_head import save as save_head
from ps.errors import EmbringError, RequestError
from router.training_config import TrainConfig
from router.training_dense import SharedDense
from router.training_evaluate import Evaluation, evaluate
from router.training_ledger import REST_MAX_S, Ledger, Totals, lock
from router.training_worker import LEDGER_FILE, WorkerOrder, work

Undecided = Literal["refuse", "skip", "repeat"]
WATCH_S = 0.25
END_S = 10.0
RUN_FILE = "run.json"


class TrainingError(EmbringError):
    """A worker failed for good, or was killed too often. What was acknowledged is applied; the run can be resumed."""

    code = "training"


@dataclass(frozen=True)
class TrainProgress:
    """Where a run stands. seconds: since this call began; restarts: of killed workers."""

    batches_total: int
    totals: Totals
    seconds: float
    restarts: int


@dataclass(frozen=True)
class TrainReport:
    """What a run came to. rows_per_s: of this call alone; staleness[s]: batches with s others applied meanwhile.

    resumed: batches that had been applied before this call. head: folder of the trained head.
    """

    batches: int
    resumed: int
    rows: int
    seconds: float
    rows_per_s: float
    loss: float
    absent: int
    restarts: int
    staleness: tuple[int, ...]
    head: str
    evaluation: Evaluation | None


def train(
    config: TrainConfig,
    folder: str | Path,
    addresses: str | Sequence[str] | None = None,
    token: str | None = None,
    undecided: Undecided = "refuse",
    watch: Callable[[TrainProgress], None] | None = None,
) -> TrainReport:
    """Train to the end, or go on with the run in `folder`; returns when every batch is applied and the head is saved.

    addresses, token: as for ps.connect. watch: called about four times a second, on this thread.
    undecided: a run that rested so long that servers may have forgotten its workers is refused, unless told to "skip"
    the batches that were on their way, or to "repeat" them. TrainingError, ConfigError, or an error of the cluster.
    """
    run = Path(folder)
    run.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with lock(run / "lock", 0.0, "another training uses this folder"):
        batches = config.epochs * len(config.dataset())
        ledger = Ledger(run / LEDGER_FILE, config.workers)
        with ps.connect(addresses, token, timeout=config.timeout_s) as client:
            clients = _prepare(client, config, run, ledger, undecided)
        before = ledger.totals()
        orders = [
            WorkerOrder(config.to_plain(), str(config.folder), str(run), i, clients[i], addresses, token)
            for i in range(config.workers)
        ]
        crew = _Crew(config, orders, ledger)

        def tell() -> None:
            if watch is not None:
                watch(TrainProgress(batches, ledger.totals(), time.monotonic() - began, crew.restarts))

        try:
            crew.run(tell)
        finally:
            crew.end()
        seconds = time.monotonic() - began
        with ps.connect(addresses, token, timeout=config.timeout_s) as client:
            evaluation = _finish(client, config, run / "head")
    totals = ledger.totals()
    return TrainReport(
        totals.batches,
        before.batches,
        totals.rows,
        seconds,
        (totals.rows - before.rows) / seconds,
        totals.loss,
        totals.absent,
        crew.restarts,
        totals.staleness,
        str(run / "head"),
        evaluation,
    )


def pull_head(client: ps.Client, config: TrainConfig) -> Predictor:
    """The head as its weights stand in the cluster now, on the CPU."""
    module = build(config.spec)
    dense = SharedDense(module, config.name)
    dense.load(client.pull_bags(dense.bags(), mode="sum"))
    return Predictor(config.spec, module, "cpu")


def _finish(client: ps.Client, config: TrainConfig, head: Path) -> Evaluation | None:
    predictor = pull_head(client, config)
    save_head(head, config.spec, predictor.module)
    if not config.test:
        return None
    try:
        return evaluate(client, predictor, config.test_rows())
    except HeadError as error:
        raise RequestError(f"the head is saved in {head}, but cannot be judged by the test rows: {error}") from None


# -- the beginning of a run, and of its continuation


def _prepare(client: ps.Client, config: TrainConfig, run: Path, ledger: Ledger, undecided: Undecided) -> list[int]:
    """The workers' client ids, once the tables are there and the head's first weights are in them.

    Killed at any point, it is simply done again: before `begun` is written no worker has started.
    """
    state = _read(run / RUN_FILE, config)
    _create(client, config)
    if not state["begun"]:
        torch.manual_seed(config.seed)
        dense = SharedDense(build(config.spec), config.name)
        for table, rows in dense.rows().items():
            client.truncate(table)  # also of the optimizer's state that an earlier run of this name left
            client.assign(table, dense.bags()[table][0], rows)
        _write(run / RUN_FILE, {**state, "begun": True})
        return state["clients"]
    _check_weights(client, config, ledger, run)
    rested = ledger.rested_s()
    if rested > REST_MAX_S:
        if undecided == "refuse":
            raise RequestError(
                f"the run in {run} rested for {rested / 60:.0f} minutes with batches on their way, and servers "
                "remember them for an hour at most: say whether to skip or to repeat them"
            )
        # New client ids first: under the old ones, a sequence that is used again would be taken for a retry.
        state = {**state, "clients": _new_clients(config.workers)}
        _write(run / RUN_FILE, state)
        ledger.settle_rest(skip=undecided == "skip")
    return state["clients"]


def _create(client: ps.Client, config: TrainConfig) -> None:
    """Make the run's tables; one whose settings name no seed draws its own, so that equal ids lie apart. Of one whose
    settings name no replicas the cluster keeps as many as of others."""
    dense = config.dense_specs()
    for spec in config.specs():
        settings = config.dense if spec in dense else config.tables.get(spec.name, {})
        plain = {name: getattr(spec, name) for name in spec.__dataclass_fields__ if name not in ("name", "dim")}
        plain |= {key: None for key in ("seed", "replicas") if key not in settings}
        client.create_table(spec.name, spec.dim, **plain)


def _check_weights(client: ps.Client, config: TrainConfig, ledger: Ledger, run: Path) -> None:
    """A run must go on in the cluster where it began."""
    table, bags = next(iter(SharedDense(build(config.spec), config.name).bags().items()))
    client.pull(table, bags[0])
    if client.last_absent:
        raise RequestError(
            f"the run in {run} has {ledger.applied()} batches applied, but this cluster lacks {client.last_absent} "
            f"rows of its table {table!r}; it is another cluster, or lost them: "
            "restore a checkpoint, or use a new folder"
        )


def _read(path: Path, config: TrainConfig) -> dict:
    """The run's state; written, with new client ids, where there is none. RequestError where the settings changed."""
    fingerprint = config.fingerprint()
    with suppress(FileNotFoundError):
        state = json.loads(path.read_text())
        if state["fingerprint"] != fingerprint:
            raise RequestError(
                f"the run in {path.parent} was begun with other settings (fingerprint {state['fingerprint']}, "
                f"now {fingerprint}): use those, or a new folder"
            )
        return state
    state = {"fingerprint": fingerprint, "begun": False, "clients": _new_clients(config.workers)}
    _write(path, state)
    return state


def _write(path: Path, state: dict) -> None:
    new = path.with_name(f".{path.name}.new")
    with open(new, "w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _new_clients(workers: int) -> list[int]:
    return [secrets.randbits(63) | 1 for _ in range(workers)]


# -- the workers


class _Crew:
    """The worker processes: started, started again when killed, ended."""

    def __init__(self, config: TrainConfig, orders: list[WorkerOrder], ledger: Ledger) -> None:
        self.restarts = 0
        self._config = config
        self._orders = orders
        self._ledger = ledger
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, tuple[BaseProcess, Connection]] = {}
        self._fruitless = 0
        self._applied = -1

    def run(self, tell: Callable[[], None]) -> None:
        """Until every worker is done. TrainingError where one fails, or is killed too often without progress."""
        for order in self._orders:
            self._start(order)
        while self._processes:
            wait([process.sentinel for process, _ in self._processes.values()], WATCH_S)
            for worker, (process, report) in list(self._processes.items()):
                if process.exitcode is not None:
                    self._ended(worker, process, report)
            tell()

    def end(self) -> None:
        """Kill what still runs, which loses nothing, and wait for it."""
        for process, report in self._processes.values():
            process.kill()
            process.join(END_S)
            report.close()
        self._processes = {}

    def _start(self, order: WorkerOrder) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(order, theirs), name=f"embring-worker-{order.worker}")
        process.start()
        theirs.close()
        self._processes[order.worker] = (process, ours)

    def _ended(self, worker: int, process: BaseProcess, report: Connection) -> None:
        del self._processes[worker]
        said = ""
        with suppress(EOFError, OSError):
            said = report.recv_bytes().decode() if report.poll() else ""
        report.close()
        process.join()
        if process.exitcode == 0:
            return
        if said or (process.exitcode or 0) > 0:
            raise TrainingError(f"worker {worker} failed: {said or f'exit status {process.exitcode}'}")
        self._killed(worker, -(process.exitcode or 0))

    def _killed(self, worker: int, signal: int) -> None:
        applied = self._ledger.applied()
        self._fruitless = 1 if applied > self._applied else self._fruitless + 1
        self._applied = applied
        if self._fruitless > self._config.restarts_max:
            raise TrainingError(
                f"worker {worker} was killed by signal {signal}, and {self._config.restarts_max} restarts before it "
                "made no progress"
            )
        self.restarts += 1
        self._start(self._orders[worker])


def report_plain(report: TrainReport) -> dict:
    """The report as plain data, for JSON."""
    return asdict(report)
