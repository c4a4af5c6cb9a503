"""A training worker: a process that pulls, steps and pushes its share of a run's batches, in order.

While a batch is computed, the next one is prepared and pulled on a second thread, with a connection of its own; a push
is on its way while the next batch is computed, and is waited for before the one after. The ledger says how each batch
is applied once (router/training_ledger.py).
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ps
from dense_head import TrainStep, build
from router.training_config import TrainConfig
from router.training_data import PreparedBatch
from router.training_dense import SharedDense, TableBags
from router.training_ledger import Ledger, lock

LEDGER_FILE = "ledger"
TAKEOVER_S = 30.0
"""Seconds that a worker waits for a killed one of its number to be gone."""


@dataclass(frozen=True)
class WorkerOrder:
    """What a worker is told: settings as plain data, the run's folder, its number and client id, where to connect."""

    config: dict[str, Any]
    config_folder: str
    run_folder: str
    worker: int
    client: int
    addresses: str | Sequence[str] | None
    token: str | None


@dataclass(frozen=True, slots=True)
class _Pulled:
    """A batch (this worker's number k, from 0) with its rows: what was pulled, by table."""

    k: int
    batch: PreparedBatch
    bags: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    rows: Mapping[str, NDArray[np.float32]]
    absent: int
    applied: int


@dataclass(frozen=True, slots=True)
class _Pushed:
    """A push on its way."""

    k: int
    handle: ps.PushHandle
    rows: int
    absent: int
    loss: float
    staleness: int


def work(order: WorkerOrder, report: Connection) -> None:
    """Body of a worker process: exits with 0 when its batches are applied, else tells what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator hears Ctrl-C too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with lock(Path(order.run_folder) / f"worker-{order.worker}.lock", TAKEOVER_S, "its former worker still lives"):
            _Worker(order).run()
    except Exception as error:
        report.send_bytes(f"{type(error).__name__}: {error}".encode())
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """A worker whose coordinator died must not go on beside the workers of the next one."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Worker:
    """One worker's state. `run` is all there is to do with it."""

    def __init__(self, order: WorkerOrder) -> None:
        self.order = order
        self.config = TrainConfig.from_plain(order.config, folder=Path(order.config_folder))
        torch.set_num_threads(self.config.threads)
        spec = self.config.spec
        self.data = self.config.dataset()
        self.batches = range(order.worker, self.config.epochs * len(self.data), self.config.workers)
        self.ledger = Ledger(Path(order.run_folder) / LEDGER_FILE, self.config.workers, order.worker)
        self.dense = SharedDense(build(spec), self.config.name)
        self.tables = TableBags(spec)
        self.modes = {**self.tables.modes, **dict.fromkeys(self.dense.rows(), "sum")}
        self.step = TrainStep(self.dense.module)

    def run(self) -> None:
        """Every batch that is not acknowledged yet: pull, step, push."""
        order, timeout = self.order, self.config.timeout_s
        with (
            ps.connect(order.addresses, order.token, timeout=timeout) as puller,
            ps.connect(order.addresses, order.token, timeout=timeout) as pusher,
            closing(self._pulled(puller)) as batches,
        ):
            pusher.identify(order.client, self.ledger.sequence)
            before: _Pushed | None = None
            for pulled in batches:
                loss, grads = self._step(pulled)
                if before is not None:
                    self._settle(pusher, before)
                before = self._push(pusher, pulled, loss, grads)
                if not self.config.prefetch:
                    self._settle(pusher, before)
                    before = None
            if before is not None:
                self._settle(pusher, before)

    def _pulled(self, client: ps.Client) -> Generator[_Pulled]:
        """This worker's batches with their rows, in order, `prefetch` of them ahead of the caller."""
        ahead: deque[Future[_Pulled]] = deque()
        following = self.ledger.acknowledged
        with ThreadPoolExecutor(1) as thread:
            while ahead or following < len(self.batches):
                while len(ahead) <= self.config.prefetch and following < len(self.batches):
                    ahead.append(thread.submit(self._pull, client, following))
                    following += 1
                yield ahead.popleft().result()

    def _pull(self, client: ps.Client, k: int) -> _Pulled:
        epoch, index = divmod(self.batches[k], len(self.data))
        batch = self.data.batch(epoch, index)
        bags = {**self.tables.by_table(batch.bags), **self.dense.bags()}
        applied = self.ledger.applied()
        rows = client.pull_bags(bags, mode=self.modes, absent="initial")
        return _Pulled(k, batch, bags, rows, client.last_absent, applied)

    def _step(self, pulled: _Pulled) -> tuple[float, dict[str, NDArray[np.float32]]]:
        """The loss, and every table's gradients."""
        batch = pulled.batch
        self.dense.load(pulled.rows)
        dense = batch.dense if batch.dense.shape[1] else None
        loss, grads = self.step(self.tables.by_feature(pulled.rows), dense, batch.labels)
        return loss, {**self.tables.gradients(grads), **self.dense.gradients()}

    def _push(self, client: ps.Client, pulled: _Pulled, loss: float, grads: dict[str, NDArray[np.float32]]) -> _Pushed:
        self.ledger.begin(pulled.k)
        staleness = self.ledger.applied() - pulled.applied
        handle = client.push_bags_nowait(pulled.bags, grads, mode=self.modes)
        return _Pushed(pulled.k, handle, pulled.batch.rows, pulled.absent, loss, staleness)

    def _settle(self, client: ps.Client, pushed: _Pushed) -> None:
        """Wait for the acknowledgement, then write it down. No other push is on its way: the sequence is this one's."""
        pushed.handle.result()
        self.ledger.settle(pushed.k, client.last_sequence)
        self.ledger.note(pushed.rows, pushed.absent, pushed.loss, pushed.staleness)
