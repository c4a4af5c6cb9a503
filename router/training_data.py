"""Training data: prepared batches that can be asked for by number.

A data set is asked for batch `index` of `epoch`, and must answer the same each time: this is what lets a killed worker
begin again at the batch where it stopped. `PreparedRows` holds prepared rows as arrays (in memory, or mapped from a
folder that `save` wrote, which all workers of a machine share); `Batches` shuffles and cuts them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ps.errors import ConfigError, RequestError
from ps.ragged import RaggedIds
from router.features import Bags, Prepared

MANIFEST = "rows.json"


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A batch: feature -> (ids int64[n], offsets int64[B + 1]), dense float32[B, D], labels float32[B]."""

    bags: Mapping[str, Bags]
    dense: NDArray[np.float32]
    labels: NDArray[np.float32]

    @property
    def rows(self) -> int:
        """B."""
        return len(self.labels)


class Dataset(Protocol):
    """What training asks of its data."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def batch(self, epoch: int, index: int) -> PreparedBatch:
        """Batch `index` (from 0) of `epoch` (from 0): the same rows whenever it is asked for, in any process."""
        ...


@dataclass(frozen=True)
class PreparedRows:
    """Rows that feature preparation has been through. bags: feature -> (ids int64[n], offsets int64[rows + 1]).

    dense float32[rows, D] (D may be 0), labels float32[rows] in 0..1. Arrays may be memory maps.
    """

    bags: Mapping[str, Bags]
    dense: NDArray[np.float32]
    labels: NDArray[np.float32]

    @classmethod
    def of(cls, prepared: Prepared, labels: NDArray[np.float32]) -> "PreparedRows":
        """What `FeaturePrep.prepare` gave, with a label for each row; RequestError where the numbers disagree."""
        return cls(prepared.bags, prepared.dense, np.asarray(labels, np.float32)).check()

    def check(self) -> "PreparedRows":
        """Return self, or raise RequestError naming the array that does not fit."""
        rows = len(self.labels)
        if self.labels.ndim != 1 or not ((self.labels >= 0) & (self.labels <= 1)).all():
            raise RequestError(f"labels have shape {self.labels.shape}; they must be [rows], each from 0 to 1")
        if self.dense.ndim != 2 or len(self.dense) != rows:
            raise RequestError(f"dense has shape {self.dense.shape}; it must be ({rows}, D)")
        for name, (ids, offsets) in self.bags.items():
            if len(offsets) != rows + 1:
                raise RequestError(f"feature {name!r} has {len(offsets) - 1} bags for {rows} labels")
            try:
                RaggedIds.of(ids, offsets)
            except RequestError as error:
                raise RequestError(f"feature {name!r}: {error}") from None
        return self

    def __len__(self) -> int:
        """Rows."""
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> PreparedBatch:
        """The given rows, in their order."""
        bags = {name: _take(ids, offsets, rows) for name, (ids, offsets) in self.bags.items()}
        return PreparedBatch(bags, np.array(self.dense[rows]), np.array(self.labels[rows]))

    def save(self, folder: str | Path) -> None:
        """Write the arrays into `folder` (made if absent) as .npy files; the manifest comes last."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        np.save(target / "dense.npy", self.dense)
        np.save(target / "labels.npy", self.labels)
        for i, (ids, offsets) in enumerate(self.bags.values()):
            np.save(target / f"ids-{i}.npy", ids)
            np.save(target / f"offsets-{i}.npy", offsets)
        (target / MANIFEST).write_text(json.dumps({"features": list(self.bags)}) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "PreparedRows":
        """Memory-mapped, from a folder that `save` wrote; ConfigError where it is missing or damaged."""
        source = Path(folder)
        try:
            names = json.loads((source / MANIFEST).read_text())["features"]
            parts = [(_map(source / f"ids-{i}.npy"), _map(source / f"offsets-{i}.npy")) for i in range(len(names))]
            return cls(
                dict(zip(names, parts, strict=True)), _map(source / "dense.npy"), _map(source / "labels.npy")
            ).check()
        except FileNotFoundError as error:
            raise ConfigError(f"there are no prepared rows in {source}: {error.filename} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, RequestError) as error:
            raise ConfigError(f"the prepared rows in {source} cannot be read: {error}") from None


@dataclass(frozen=True)
class Batches:
    """Rows cut into batches of `size`. shuffle: anew each epoch, by `seed` and the epoch alone. The last batch of an
    epoch may be smaller, or is left out with drop_last (batch normalisation cannot take a single row).
    """

    rows: PreparedRows
    size: int
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.rows) // self.size if self.drop_last else -(-len(self.rows) // self.size)

    def batch(self, epoch: int, index: int) -> PreparedBatch:
        """See `Dataset.batch`."""
        if not 0 <= index < len(self):
            raise RequestError(f"batch {index} was asked for; an epoch has batches 0 to {len(self) - 1}")
        chosen = np.arange(index * self.size, min((index + 1) * self.size, len(self.rows)))
        return self.rows.take(self._order(epoch)[chosen] if self.shuffle else chosen)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != epoch:
            kept = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows)))
            self.__dict__["_kept"] = kept
        return kept[1]


def _take(ids: NDArray[np.int64], offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> Bags:
    """The bags of `rows`, laid end to end."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    at = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
    return np.asarray(ids[at], np.int64), bounds


def _map(path: Path) -> NDArray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
