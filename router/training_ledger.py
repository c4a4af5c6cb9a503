"""The ledger of a training run: which batches are surely applied, in a file that a `kill -9` cannot tear.

One record a worker, in a file mapped into memory by every process of the run; each worker writes its own. Numbers are
stored whole (8 aligned bytes), and a process's death loses nothing that was stored: only the machine's may.

Why each batch is applied once. Worker w of W has batches w, w + W, w + 2 W, ... of the run, in that order, and always
pushes under the same client id, one batch a push. `acknowledged` counts its batches whose push was acknowledged; it
rises only after the acknowledgement, and the record keeps the client's sequence at that point. A worker that begins
again computes the batches after `acknowledged` anew and pushes them under the same client and sequences. A batch whose
push had reached some servers, or all, before the death goes to the same slots, which have marked that sequence and
skip it; the others apply it now. (The gradient is another by then, as the weights are; each slot still takes exactly
one step for the batch.) Servers forget a client an hour after its last push: a run that rested longer than
`REST_MAX_S` with a batch undecided is refused, unless told to skip or to repeat it.
"""

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ps.errors import NotApplied, RequestError

STALENESS_MAX = 63
"""Last bucket of the histogram; it counts everything beyond, too."""

REST_MAX_S = 3000.0
"""Seconds after which undecided batches cannot be told any more: servers forget an idle client after 3,600."""

RECORD = np.dtype(
    [
        ("acknowledged", "<i8"),  # batches of this worker that are surely applied
        ("sequences", "<i8", (2,)),  # the client's last sequence when `acknowledged` was even, and odd
        ("pushing", "<i8"),  # batches whose push may have begun
        ("pushed_at", "<f8"),  # seconds since 1970 of the last push's beginning
        ("rows", "<i8"),  # rows of acknowledged batches
        ("absent", "<i8"),  # ids without a row when they were pulled
        ("loss", "<f8"),  # moving mean over batches
        ("staleness", "<i8", (STALENESS_MAX + 1,)),  # batches by how many others were applied since their pull
    ]
)
LOSS_MEMORY = 0.98


@dataclass(frozen=True)
class Totals:
    """The ledger added up over workers. loss: the mean of their moving means, nan before the first batch."""

    batches: int
    rows: int
    absent: int
    loss: float
    staleness: tuple[int, ...]


class Ledger:
    """The records of all workers; `worker` is the one that this process may write."""

    def __init__(self, path: Path, workers: int, worker: int = 0) -> None:
        """Opens the file, which is made with zeros if absent. RequestError where it is of another number of workers."""
        size = workers * RECORD.itemsize
        if not path.exists():
            new = path.with_name(f".{path.name}.new")
            new.write_bytes(bytes(size))
            os.replace(new, path)
        if path.stat().st_size != size:
            raise RequestError(f"{path} has {path.stat().st_size} bytes; a ledger of {workers} workers has {size}")
        self.records: NDArray = np.memmap(path, RECORD, "r+", shape=(workers,))
        self._mine = self.records[worker : worker + 1]

    @property
    def acknowledged(self) -> int:
        """This worker's batches that are surely applied."""
        return int(self._mine["acknowledged"][0])

    @property
    def sequence(self) -> int:
        """The client's last sequence behind the last acknowledged batch."""
        return int(self._mine["sequences"][0, self.acknowledged % 2])

    def applied(self) -> int:
        """Batches of all workers that are surely applied."""
        return int(self.records["acknowledged"].sum())

    def begin(self, batch: int) -> None:
        """Before the push of this worker's batch (from 0) is sent."""
        self._mine["pushing"] = batch + 1
        self._mine["pushed_at"] = time.time()

    def settle(self, batch: int, sequence: int) -> None:
        """After the push of this worker's batch (from 0), which ended at `sequence`, was acknowledged."""
        self._mine["sequences"][0, (batch + 1) % 2] = sequence
        self._mine["acknowledged"] = batch + 1

    def note(self, rows: int, absent: int, loss: float, staleness: int) -> None:
        """Statistics of an acknowledged batch. A death between `settle` and here leaves one batch out of them."""
        mine = self._mine
        old = float(mine["loss"][0])
        mine["loss"] = loss if mine["rows"][0] == 0 else LOSS_MEMORY * old + (1 - LOSS_MEMORY) * loss
        mine["rows"] += rows
        mine["absent"] += absent
        mine["staleness"][0, min(staleness, STALENESS_MAX)] += 1

    def totals(self) -> Totals:
        """Everything added up."""
        seen = self.records["loss"][self.records["rows"] > 0]
        return Totals(
            self.applied(),
            int(self.records["rows"].sum()),
            int(self.records["absent"].sum()),
            float(seen.mean()) if len(seen) else float("nan"),
            tuple(int(n) for n in self.records["staleness"].sum(axis=0)),
        )

    def rested_s(self) -> float:
        """Seconds for which undecided batches have waited, the longest over workers; 0 where there are none."""
        undecided = self.records["pushing"] > self.records["acknowledged"]
        return float((time.time() - self.records["pushed_at"][undecided]).max(initial=0.0))

    def settle_rest(self, skip: bool) -> None:
        """Under new client ids, whose sequences begin anew: take undecided batches for applied, or for not sent.

        Only while no worker runs.
        """
        decided = self.records["pushing"] if skip else self.records["acknowledged"]
        decided = np.maximum(decided, self.records["acknowledged"])
        self.records["sequences"] = 0
        self.records["acknowledged"] = decided
        self.records["pushing"] = decided


def lock(path: Path, wait_s: float, what: str) -> IO[bytes]:
    """An exclusive lock, held until the file is closed or the process ends, however it ends.

    NotApplied, naming `what` holds it, where it is not free within `wait_s` seconds.
    """
    file = open(path, "ab")  # noqa: SIM115  the caller keeps it open as long as the lock is needed
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise NotApplied(f"{path} is locked: {what}") from None
            time.sleep(0.05)
