"""Feature preparation: raw columns in, bags of ids and a dense matrix out. The same code in training and in serving.

A model's `features.toml` declares inputs (what a request brings) and features (what the model sees):

    [[input]]                      # name, dtype BYTES | INT64 | FP32
    name = "genres"
    dtype = "BYTES"
    split = "|"                    # or ragged = true: the request brings values and offsets
    values_max = 8                 # truncation of a multi-valued row; keep = "first" | "last"

    [[feature]]                    # kinds with a table give ids, pooled into one vector a row
    name = "genres"
    kind = "hash"                  # id | hash | bucketise | cross, and without a table: log | dense
    inputs = ["genres"]
    table = "genres"
    pooling = "mean"               # sum | mean | max

What each kind computes, for a value x:

    id         x itself (INT64)
    hash       BYTES: XXH64 of the first `prefix` bytes (0 = all); INT64: splitmix64. `buckets` > 0 takes it modulo
    bucketise  how many boundaries are <= x; NaN has a bucket of its own, after the last
    cross      every combination of one value of each input (id or string hash), hashed in order; `buckets` as above
    log        log(1 + max(x, 0)); NaN gives 0
    dense      (x - shift) * scale; NaN gives 0

log and dense features stand side by side in the dense matrix, in the order of the file. Features that name one table
share its rows. A request may bring prepared ids instead of raw inputs: a column `ids:FEATURE` (INT64, ragged or one id
a row) for each feature with a table, and `dense` (FP32, [B, D]) where the model has any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ps import hash_strings
from ps.errors import RequestError
from router.columns import FP32, INT64, BytesColumn, Column, bounds
from router.feature_kernels import cross_count, cross_fill, prefix_fill, split_count, split_fill
from router.feature_spec import BAG_KINDS, DENSE, DENSE_KINDS, IDS_PREFIX, FeatureSpec, InputSpec, parse
from router.settings import read_toml

Bags = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(ids int64[n], offsets int64[B + 1])"""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch as the model sees it: feature -> (ids int64[n], offsets int64[B + 1]), and dense float32[B, D]."""

    bags: dict[str, Bags]
    dense: NDArray[np.float32]

    @property
    def rows(self) -> int:
        """B."""
        return len(self.dense)

    @classmethod
    def join(cls, parts: list["Prepared"]) -> "Prepared":
        """Batches of one model laid end to end."""
        if len(parts) == 1:
            return parts[0]
        bags = {name: join_bags([part.bags[name] for part in parts]) for name in parts[0].bags}
        return cls(bags, np.concatenate([part.dense for part in parts]))


def join_bags(parts: list[Bags]) -> Bags:
    """Bags laid end to end."""
    lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
    return np.concatenate([ids for ids, _ in parts]), bounds(lengths)


class FeaturePrep:
    """What a features.toml declares, ready to prepare batches. Immutable; any thread may use it."""

    def __init__(self, inputs: tuple[InputSpec, ...], features: tuple[FeatureSpec, ...]) -> None:
        self.inputs = {spec.name: spec for spec in inputs}
        self.features = features

    @classmethod
    def load(cls, path: str | Path) -> "FeaturePrep":
        """From a features.toml, or a folder that holds one; ConfigError names what is wrong."""
        file = Path(path)
        file = file / "features.toml" if file.is_dir() else file
        return cls.from_plain(read_toml(file), str(file))

    @classmethod
    def from_plain(cls, plain: Mapping[str, object], where: str = "features.toml") -> "FeaturePrep":
        """From the parsed file."""
        return cls(*parse(plain, where))

    @cached_property
    def bag_features(self) -> tuple[FeatureSpec, ...]:
        """Features with a table, in the order of the file."""
        return tuple(spec for spec in self.features if spec.kind in BAG_KINDS)

    @cached_property
    def tables(self) -> dict[str, tuple[str, ...]]:
        """Table -> the features that share it."""
        shared: dict[str, list[str]] = {}
        for spec in self.bag_features:
            shared.setdefault(spec.table, []).append(spec.name)
        return {table: tuple(names) for table, names in shared.items()}

    @cached_property
    def modes(self) -> dict[str, str]:
        """Table -> pooling mode."""
        return {spec.table: spec.pooling for spec in self.bag_features}

    @cached_property
    def dense_width(self) -> int:
        """D, the columns of the dense matrix."""
        return sum(self.inputs[spec.inputs[0]].width for spec in self.features if spec.kind in DENSE_KINDS)

    def prepare(self, columns: Mapping[str, Column]) -> Prepared:
        """Bags and dense matrix of a batch of raw columns, or of prepared ids.

        RequestError in one sentence where a column is missing, unknown, of another datatype or shape, or of another
        number of rows than the first.
        """
        if any(name.startswith(IDS_PREFIX) for name in columns):
            return self._accept(columns)
        _same_names(columns, self.inputs)
        rows = next(iter(columns.values())).rows if columns else 0
        values = {name: _values(spec, columns[name], rows) for name, spec in self.inputs.items()}
        bags: dict[str, Bags] = {}
        dense = [np.empty((rows, 0), np.float32)]
        for spec in self.features:
            made_of = [values[name] for name in spec.inputs]
            if spec.kind in DENSE_KINDS:
                dense.append(_dense(spec, made_of[0]))
            elif spec.kind == "cross":
                bags[spec.name] = _cross(spec, made_of, rows)
            else:
                bags[spec.name] = (_ids(spec, made_of[0]), _offsets(made_of[0]))
        return Prepared(bags, np.concatenate(dense, axis=1))

    def by_table(self, prepared: Prepared) -> dict[str, Bags]:
        """Table -> its features' bags end to end (feature-major): what one pull of all tables asks."""
        return {table: join_bags([prepared.bags[name] for name in names]) for table, names in self.tables.items()}

    def by_feature(self, pooled: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """The reverse for pooled rows: table -> float32[F * B, dim] becomes feature -> float32[B, dim] (views)."""
        out: dict[str, NDArray[np.float32]] = {}
        for table, names in self.tables.items():
            rows = len(pooled[table]) // len(names)
            for i, name in enumerate(names):
                out[name] = pooled[table][i * rows : (i + 1) * rows]
        return out

    def _accept(self, columns: Mapping[str, Column]) -> Prepared:
        wanted = {IDS_PREFIX + spec.name: InputSpec(IDS_PREFIX + spec.name, INT64, True) for spec in self.bag_features}
        if self.dense_width:
            wanted[DENSE] = InputSpec(DENSE, FP32, width=self.dense_width)
        _same_names(columns, wanted)
        rows = next(iter(columns.values())).rows
        bags: dict[str, Bags] = {}
        for spec in self.bag_features:
            name = IDS_PREFIX + spec.name
            column = columns[name]
            if column.offsets is None and column.dtype == INT64:
                column = Column(column.values, np.arange(len(column.values) + 1, dtype=np.int64))
            checked = _values(wanted[name], column, rows, truncate=False)
            bags[spec.name] = (checked.values, _offsets(checked))  # type: ignore[assignment]
        if not self.dense_width:
            return Prepared(bags, np.empty((rows, 0), np.float32))
        dense = np.asarray(_values(wanted[DENSE], columns[DENSE], rows).values, np.float32)
        dense = dense.reshape(rows, self.dense_width)
        if not np.isfinite(dense).all():
            at = int(np.isfinite(dense).all(axis=1).argmin())
            raise RequestError(f"input {DENSE!r} is not finite in row {at}; prepared values are finite")
        return Prepared(bags, dense)


def _same_names(columns: Mapping[str, Column], wanted: Mapping[str, InputSpec]) -> None:
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise RequestError(f"input {missing[0]!r} is missing; the model takes {', '.join(wanted)}")
    extra = [name for name in columns if name not in wanted]
    if extra:
        raise RequestError(f"input {extra[0]!r} is unknown to the model, which takes {', '.join(wanted)}")


def _values(spec: InputSpec, column: Column, rows: int, truncate: bool = True) -> Column:
    """A column checked against its declaration, split and truncated."""
    if column.dtype != spec.dtype:
        raise RequestError(f"input {spec.name!r} has datatype {column.dtype}; it must be {spec.dtype}")
    if spec.ragged and column.offsets is None:
        raise RequestError(f"input {spec.name!r} is multi-valued; it needs offsets beside its values")
    if not spec.ragged and column.offsets is not None:
        raise RequestError(f"input {spec.name!r} has one value a row; it takes no offsets")
    if column.rows != rows:
        raise RequestError(f"input {spec.name!r} has {column.rows} rows where the first input has {rows}")
    if not isinstance(column.values, BytesColumn):
        shape, width = column.values.shape, (1 if spec.ragged else spec.width)
        if shape[1:] not in ([(), (1,)] if width == 1 else [(width,)]):
            raise RequestError(f"input {spec.name!r} has shape {list(shape)}; it must be [{shape[0]}, {width}]")
        if shape[1:] == (1,):
            column = Column(column.values.reshape(-1), column.offsets)
    if spec.split:
        column = _split(column.values, ord(spec.split))  # type: ignore[arg-type]
    return _truncate(column, spec.values_max, spec.keep) if spec.multi and truncate else column


def _split(strings: BytesColumn, separator: int) -> Column:
    counts = np.empty(len(strings), np.int64)
    split_count(strings.buffer, strings.offsets, np.uint8(separator), counts)
    offsets = bounds(counts)
    buffer, ends = np.empty(len(strings.buffer), np.uint8), np.empty(offsets[-1] + 1, np.int64)
    split_fill(strings.buffer, strings.offsets, np.uint8(separator), buffer, ends)
    return Column(BytesColumn(buffer[: ends[-1]], ends), offsets)


def _truncate(column: Column, values_max: int, keep: str) -> Column:
    offsets = _offsets(column)
    lengths = np.diff(offsets)
    kept = np.minimum(lengths, values_max)
    if np.array_equal(kept, lengths):
        return column
    starts = offsets[:-1] if keep == "first" else offsets[1:] - kept
    out = bounds(kept)
    at = np.arange(out[-1]) + np.repeat(starts - out[:-1], kept)
    values = column.values.take(at) if isinstance(column.values, BytesColumn) else column.values[at]
    return Column(values, out)


def _offsets(column: Column) -> NDArray[np.int64]:
    return np.arange(column.rows + 1, dtype=np.int64) if column.offsets is None else column.offsets


def _hashed(values: object, prefix: int = 0) -> NDArray[np.int64]:
    """Ids of strings (XXH64, as the whole cluster hashes them); whole numbers stay as they are."""
    if not isinstance(values, BytesColumn):
        return np.asarray(values, np.int64)
    buffer, offsets = values.buffer, values.offsets
    if prefix:
        buffer, offsets = np.empty_like(values.buffer), np.empty_like(values.offsets)
        prefix_fill(values.buffer, values.offsets, prefix, buffer, offsets)
    return hash_strings(buffer, offsets)


def _ids(spec: FeatureSpec, column: Column) -> NDArray[np.int64]:
    if spec.kind == "bucketise":
        numbers = np.asarray(column.values, np.float64)
        buckets = np.searchsorted(np.array(spec.boundaries), numbers, side="right")
        return np.where(np.isnan(numbers), len(spec.boundaries) + 1, buckets).astype(np.int64)
    ids = _hashed(column.values, spec.prefix)
    if spec.kind == "hash" and column.dtype == INT64:
        one_each = np.arange(len(ids) + 1, dtype=np.int64)
        hashed = np.empty_like(ids)
        cross_fill(np.ascontiguousarray(ids), np.zeros(1, np.int64), one_each[None], one_each, hashed)
        ids = hashed
    return _modulo(ids, spec.buckets)


def _cross(spec: FeatureSpec, columns: list[Column], rows: int) -> Bags:
    values = [_hashed(column.values) for column in columns]
    offsets = np.stack([_offsets(column) for column in columns])
    counts = np.empty(rows, np.int64)
    cross_count(offsets, spec.values_max, counts)
    ends = bounds(counts)
    ids = np.empty(ends[-1], np.int64)
    first = bounds(np.array([len(v) for v in values], np.int64))[:-1]
    cross_fill(np.concatenate(values), first, offsets, ends, ids)
    return _modulo(ids, spec.buckets), ends


def _modulo(ids: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
    return (ids.view(np.uint64) % np.uint64(buckets)).view(np.int64) if buckets else ids


def _dense(spec: FeatureSpec, column: Column) -> NDArray[np.float32]:
    numbers = np.asarray(column.values, np.float64)
    if numbers.ndim == 1:
        numbers = numbers[:, None]
    if np.isinf(numbers).any():
        at = int(np.flatnonzero(np.isinf(numbers).any(axis=1))[0])
        raise RequestError(f"input {spec.inputs[0]!r} is infinite in row {at}; it must be finite, or NaN where missing")
    out = np.log1p(np.maximum(numbers, 0.0)) if spec.kind == "log" else (numbers - spec.shift) * spec.scale
    with np.errstate(over="ignore"):
        scaled = np.nan_to_num(out, nan=0.0).astype(np.float32)
    if not np.isfinite(scaled).all():
        at = int(np.isfinite(scaled).all(axis=1).argmin())
        raise RequestError(
            f"input {spec.inputs[0]!r} is too large in row {at}; scaled by {spec.scale:g} it must be within float32"
        )
    return scaled
