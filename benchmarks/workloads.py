"""What is asked: the shapes of GOALS, ids by Zipf's law, and row values whose sums are exact in float32.

    M  multi-hot: the 26 tables of MLPerf's DLRM-v2, 214 ids a sample        O  one-hot: 26 tables, one id each

A row's values are multiples of 1/64 between -2 and 2. Sums of fewer than 2**16 of them are exact in float32 in any
order, so implementations that add differently must still agree in every bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Batch = Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
"""table -> (ids int64[n], offsets int64[B + 1])"""


@dataclass(frozen=True)
class Shape:
    """ids_per_sample: ids of each table's bag; dim: floats of a row; rows: of each table, where they differ."""

    name: str
    ids_per_sample: tuple[int, ...]
    dim: int = 64
    rows: tuple[int, ...] = ()


SHAPES: Mapping[str, Shape] = {
    "M": Shape("M", (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)),
    "O": Shape("O", (1,) * 26),
}

PUBLISHED_ROWS = (
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
"""Rows of the 26 tables of MLPerf's DLRM-v2."""


@dataclass(frozen=True)
class Workload:
    """Requests of one shape, ids by a Zipf law with exponent `zipf`; tables have `rows` rows, or fewer by the shape."""

    shape: Shape
    rows: int = 100_000
    zipf: float = 1.05
    seed: int = 20

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables, the same for every shape of one width."""
        return tuple(f"t{self.shape.dim}_{i:02d}" for i in range(len(self.shape.ids_per_sample)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each table."""
        own = self.shape.rows or (self.rows,) * len(self.shape.ids_per_sample)
        return tuple(min(rows, self.rows) for rows in own)

    def law(self, table: int) -> NDArray[np.float64]:
        """float64[rows] of one table: how probable each of its ids is."""
        rows = self.sizes[table]
        out = np.empty(rows)
        out[_names_of_ranks(rows, (self.seed, 3, table))] = _weights(rows, self.zipf)
        return out

    def values(self, table: int) -> NDArray[np.float32]:
        """float32[rows, dim] of one table: id i has row i."""
        rng = np.random.default_rng((self.seed, 1, table))
        codes = rng.integers(-128, 128, (self.sizes[table], self.shape.dim), np.int8)
        return np.multiply(codes, np.float32(1 / 64), dtype=np.float32)

    def batch(self, samples: int, number: int = 0) -> Batch:
        """Request `number` for so many samples; the same arguments give the same ids."""
        rng = np.random.default_rng((self.seed, 2, samples, number))
        out = {}
        for i, (name, k) in enumerate(zip(self.tables, self.shape.ids_per_sample, strict=True)):
            ids = zipf_ids(rng, samples * k, self.sizes[i], self.zipf, (self.seed, 3, i))
            out[name] = (ids, np.arange(samples + 1, dtype=np.int64) * k)
        return out

    def batches(self, samples: int, n: int) -> list[Batch]:
        """The first n requests of this size."""
        return [self.batch(samples, number) for number in range(n)]


def _weights(rows: int, exponent: float) -> NDArray[np.float64]:
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


@lru_cache(maxsize=64)
def _law(rows: int, exponent: float) -> NDArray[np.float64]:
    return np.cumsum(_weights(rows, exponent))


@lru_cache(maxsize=64)
def _names_of_ranks(rows: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(rows)


def zipf_ids(rng: np.random.Generator, n: int, rows: int, exponent: float, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """int64[n] ids below `rows`: P(rank r) ~ r**-exponent, and a permutation by `seed` gives each rank its id."""
    ranks = np.minimum(np.searchsorted(_law(rows, exponent), rng.random(n)), rows - 1)
    return _names_of_ranks(rows, seed)[ranks]


def distinct_zipf_ids(
    rng: np.random.Generator, n: int, rows: int, exponent: float, seed: tuple[int, ...]
) -> NDArray[np.int64]:
    """int64[min(n, rows)] distinct ids, as if drawn one after another without replacement by the law of `zipf_ids`.

    By the Gumbel-top-k trick (Kool et al., 2019): those with the greatest log p + Gumbel noise, however skewed the law.
    """
    keys = np.log(_weights(rows, exponent)) + rng.gumbel(size=rows)
    n = min(n, rows)
    first = np.argpartition(-keys, n - 1)[:n]
    return _names_of_ranks(rows, seed)[first[np.argsort(-keys[first])]]
