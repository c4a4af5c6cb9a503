"""The gateway: what a user hands in, checked once and joined into the flat arrays of a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ps.errors import RequestError
from ps.kernels.batch import join_offsets
from ps.kernels.merge import MAX, MEAN, SUM
from ps.ragged import RaggedIds, as_float32, as_ids, check_offsets
from ps.spec import ABSENT_CODES

MODES = {"sum": SUM, "mean": MEAN, "max": MAX}

Bag = Sequence[ArrayLike]
"""(ids, offsets) or (ids, offsets, weights) of one table."""

NO_OFFSETS = np.empty(0, np.int64)
NO_WEIGHTS = np.empty(0, np.float32)
_SEQUENCES = {tuple, list}


@dataclass(slots=True)
class Batch:
    """The ids of a request, all features one behind another; the symbols are those of kernels/split.py.

    names: the table of each feature. starts int64[F+1]. offsets int64[G+1], or empty: every id is a bag of its own.
    weights float32[n], or empty. weighted: features that came with weights.
    """

    names: tuple[str, ...]
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32]
    weighted: frozenset[str]

    @property
    def bags(self) -> int:
        """Bags of all features."""
        return int(self.starts[-1])

    def part(self, low: int, high: int) -> "Batch":
        """The bags low..high-1 of the whole request, of whichever features they are."""
        starts = np.clip(self.starts - low, 0, high - low)
        if not self.offsets.size:
            return Batch(self.names, self.ids[low:high], starts, NO_OFFSETS, NO_WEIGHTS, frozenset())
        offsets = self.offsets[low : high + 1]
        span = slice(int(offsets[0]), int(offsets[-1]))
        weights = self.weights[span] if self.weights.size else NO_WEIGHTS
        return Batch(self.names, self.ids[span], starts, offsets - offsets[0], weights, self.weighted)


def writable(array: NDArray[Any]) -> NDArray[Any]:
    """The array, copied if it is read-only: a kernel is compiled once, for arrays of one kind."""
    return array if array.flags.writeable else array.copy()


def rows_batch(name: str, ids: ArrayLike) -> Batch:
    """Single ids of one table."""
    checked = writable(as_ids(ids))
    return Batch((name,), checked, np.array([0, len(checked)], np.int64), NO_OFFSETS, NO_WEIGHTS, frozenset())


def ragged_batch(tables: Sequence[str], ragged: RaggedIds) -> Batch:
    """A RaggedIds whose features are rows of the given tables."""
    if len(tables) != ragged.features:
        raise RequestError(f"{len(tables)} tables were given for {ragged.features} features; they must be as many")
    starts = np.arange(len(tables) + 1, dtype=np.int64) * ragged.bags
    weights = NO_WEIGHTS if ragged.weights is None else writable(ragged.weights)
    names = tuple(tables)
    weighted = frozenset(() if ragged.weights is None else names)
    return Batch(names, writable(ragged.ids), starts, writable(ragged.offsets), weights, weighted)


def bags_batch(bags: Mapping[str, Bag]) -> Batch:
    """{table: (ids, offsets[, weights])}; RequestError naming the table and what is wrong with it."""
    if not isinstance(bags, Mapping):
        raise RequestError(f"bags is a {type(bags).__name__}; it must be a dictionary from table to (ids, offsets)")
    names = tuple(bags)
    if not names:
        nothing = np.zeros(1, np.int64)
        return Batch(names, np.empty(0, np.int64), nothing, nothing, NO_WEIGHTS, frozenset())
    plain = _plain_arrays(bags)
    ids, offsets, flat, every = plain or _checked_arrays(bags)
    counts = np.array([[*map(len, offsets)], [*map(len, ids)]])
    starts = np.zeros(len(names) + 1, np.int64)
    joined = np.empty(max(1, len(every) - len(names) + 1), np.int64)  # a table without an offset is refused first
    feature, _ = join_offsets(counts, every, starts, joined)
    if feature >= 0:
        check_offsets(np.asarray(offsets[feature]), len(ids[feature]), f"offsets of table {names[feature]!r}")
    if plain:
        return Batch(names, flat, starts, joined, NO_WEIGHTS, frozenset())
    weighted = [name for name, given in bags.items() if len(given) == 3 and given[2] is not None]
    weights = _weights(bags, weighted, counts[1].tolist()) if weighted else NO_WEIGHTS
    return Batch(names, flat, starts, joined, weights, frozenset(weighted))


_Arrays = tuple[Sequence[Any], Sequence[Any], NDArray[np.int64], NDArray[np.int64]]
"""(ids of each feature, offsets of each feature, all ids, all offsets)"""


def _plain_arrays(bags: Mapping[str, Bag]) -> _Arrays | None:
    """What most requests hold, pairs of int64[n]: numpy checks all in one call. None: they must be looked at singly."""
    if not {*map(type, bags.values())} <= _SEQUENCES:
        return None
    try:
        ids, offsets = zip(*bags.values(), strict=True)
        flat = np.concatenate(ids, dtype=np.int64, casting="no")
        every = np.concatenate(offsets, dtype=np.int64, casting="no")
    except (TypeError, ValueError):
        return None
    return (ids, offsets, flat, every) if flat.ndim == every.ndim == 1 else None


def _checked_arrays(bags: Mapping[str, Bag]) -> _Arrays:
    ids, offsets = [], []
    for name, given in bags.items():
        if type(given) not in _SEQUENCES or not 2 <= len(given) <= 3:
            raise RequestError(f"table {name!r} was given no (ids, offsets) or (ids, offsets, weights)")
        ids.append(as_ids(given[0], f"ids of table {name!r}"))
        offsets.append(as_ids(given[1], f"offsets of table {name!r}"))
    return ids, offsets, np.concatenate(ids), np.concatenate(offsets)


def _weights(bags: Mapping[str, Bag], weighted: Sequence[str], counts: Sequence[int]) -> NDArray[np.float32]:
    """Weights of all ids, 1 where a table came without."""
    parts = []
    for (name, given), n in zip(bags.items(), counts, strict=True):
        if name not in weighted:
            parts.append(np.ones(n, np.float32))
            continue
        weights = as_float32(given[2])
        if weights.shape != (n,):
            raise RequestError(f"weights of table {name!r} have shape {weights.shape}; it must be ({n},)")
        if not np.isfinite(weights).all():
            at = int(np.argmin(np.isfinite(weights)))
            raise RequestError(
                f"weights[{at}] of table {name!r} is {weights[at]}; every weight must be a finite float32"
            )
        parts.append(weights)
    return np.concatenate(parts)


def modes_of(batch: Batch, mode: str | Mapping[str, str], allowed: Sequence[str] = ("sum", "mean", "max")) -> Any:
    """uint8[F]: how each feature is pooled. RequestError for an unknown mode, or weights with any but "sum"."""
    if isinstance(mode, str):
        chosen = [mode] * len(batch.names)
    else:
        missing = [name for name in batch.names if name not in mode]
        if missing:
            raise RequestError(f"mode has no entry for table {missing[0]!r}")
        chosen = [mode[name] for name in batch.names]
    for name, one in zip(batch.names, chosen, strict=True):
        if one not in allowed:
            raise RequestError(f"mode of table {name!r} is {one!r}; it must be {' or '.join(map(repr, allowed))}")
        if one != "sum" and name in batch.weighted:
            raise RequestError(f'mode of table {name!r} is {one!r}; weights go with "sum" only')
    return np.array([MODES[one] for one in chosen], np.uint8)


def absent_code(absent: str | None) -> int | None:
    """The code of what an id without a row answers; None: as its table says."""
    if absent is not None and absent not in ABSENT_CODES:
        raise RequestError(f'absent is {absent!r}; it must be "initial", "zeros" or "default"')
    return None if absent is None else ABSENT_CODES[absent]
