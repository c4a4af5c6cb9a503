"""Columns: the raw values of a batch of rows, one column for each declared input.

They are what a front door makes of a request, what a data set holds, and what feature preparation takes. Shapes:

    Column(values: int64[B] | float32[B] | float32[B, D] | BytesColumn of B)              one value a row
    Column(values: int64[n] | float32[n] | BytesColumn of n, offsets int64[B + 1])        ragged: 0..many a row

Row b of a ragged column holds values[offsets[b] : offsets[b + 1]]. `Column.of` checks; the rest trusts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ps.errors import RequestError
from ps.ragged import RaggedIds

BYTES, INT64, FP32 = "BYTES", "INT64", "FP32"
DTYPES = (BYTES, INT64, FP32)
"""Datatypes of an input, under their names in the Open Inference Protocol."""


@dataclass(frozen=True, slots=True)
class BytesColumn:
    """n byte strings: string i is buffer[offsets[i] : offsets[i + 1]] (uint8[m], int64[n + 1])."""

    buffer: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, strings: Sequence[str | bytes]) -> "BytesColumn":
        """From a sequence of strings; text is stored as UTF-8."""
        raw = [s.encode() if isinstance(s, str) else bytes(s) for s in strings]
        offsets = bounds(np.fromiter((len(s) for s in raw), np.int64, len(raw)))
        return cls(np.frombuffer(bytearray(b"".join(raw)), np.uint8), offsets)

    def to_list(self) -> list[bytes]:
        """The strings, one by one."""
        whole, at = self.buffer.tobytes(), self.offsets.tolist()
        return [whole[a:b] for a, b in pairwise(at)]

    def take(self, rows: NDArray[np.int64]) -> "BytesColumn":
        """The strings of these indices, in their order."""
        at, offsets = gather(self.offsets, rows)
        return BytesColumn(self.buffer[at], offsets)


Values = NDArray[np.int64] | NDArray[np.float32] | BytesColumn


@dataclass(frozen=True, slots=True)
class Column:
    """Values of one input for a batch of rows; ragged where `offsets` is given."""

    values: Values
    offsets: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, values: object, offsets: ArrayLike | None = None, what: str = "column") -> "Column":
        """From strings, whole numbers or floats, checked; RequestError names `what`."""
        checked = _values(values, what)
        if offsets is None:
            return cls(checked)
        return cls(checked, _ends(offsets, len(checked), what))

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[object]], dtype: str) -> "Column":
        """A ragged column from a list for each row."""
        flat = [value for row in rows for value in row]
        offsets = bounds(np.fromiter((len(row) for row in rows), np.int64, len(rows)))
        if dtype == BYTES:
            return cls(BytesColumn.of(flat), offsets)  # type: ignore[arg-type]
        if dtype == INT64:
            return cls(np.array(flat, np.int64), offsets)
        return cls(np.array(flat, np.float32), offsets)

    @property
    def dtype(self) -> str:
        """BYTES, INT64 or FP32."""
        if isinstance(self.values, BytesColumn):
            return BYTES
        return INT64 if self.values.dtype == np.int64 else FP32

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def take(self, rows: NDArray[np.int64]) -> "Column":
        """These rows, in their order."""
        if self.offsets is None:
            return Column(_take(self.values, rows))
        at, offsets = gather(self.offsets, rows)
        return Column(_take(self.values, at), offsets)


def _take(values: Values, at: NDArray[np.int64]) -> Values:
    if isinstance(values, BytesColumn):
        return values.take(at)
    return values[at]


def _ends(offsets: ArrayLike, n: int, what: str) -> NDArray[np.int64]:
    """Offsets of n values, checked as those of ids are: the values themselves are nothing to that check."""
    try:
        return RaggedIds.of(np.empty(n, np.int64), offsets).offsets
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from None


def _values(values: object, what: str) -> Values:
    if isinstance(values, BytesColumn):
        _ends(values.offsets, len(values.buffer), f"strings of {what}")
        return values
    array = np.asarray(values)
    if array.dtype.kind in "SUO":
        strings = array.tolist()
        if array.ndim != 1 or not all(isinstance(s, str | bytes) for s in strings):
            raise RequestError(f"{what} has shape {array.shape} and dtype {array.dtype}; strings come as a flat list")
        return BytesColumn.of(strings)
    if array.dtype.kind == "f" and array.ndim in (1, 2):
        return np.ascontiguousarray(array, np.float32)
    if array.dtype.kind in "iu" and array.ndim == 1:
        return array.view(np.int64) if array.dtype == np.uint64 else np.ascontiguousarray(array, np.int64)
    raise RequestError(
        f"{what} has shape {array.shape} and dtype {array.dtype}; it must be a flat array of strings or numbers"
    )


def bounds(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[n + 1] offsets of pieces with these int64[n] lengths."""
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def gather(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indices int64[m], offsets int64[len(rows) + 1]): where the pieces of `rows` lie, laid end to end."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    out = bounds(lengths)
    return np.arange(out[-1], dtype=np.int64) + np.repeat(starts - out[:-1], lengths), out


def take_rows(columns: Mapping[str, Column], rows: NDArray[np.int64]) -> dict[str, Column]:
    """The same rows of every column."""
    return {name: column.take(rows) for name, column in columns.items()}


def save_columns(path: Path, columns: Mapping[str, Column], **arrays: NDArray[np.generic]) -> None:
    """Write columns, and plain arrays beside them (labels, say), as one uncompressed .npz without pickles."""
    parts: dict[str, NDArray[np.generic]] = {f"array/{name}": array for name, array in arrays.items()}
    for name, column in columns.items():
        if isinstance(column.values, BytesColumn):
            parts[f"buffer/{name}"] = column.values.buffer
            parts[f"strings/{name}"] = column.values.offsets
        else:
            parts[f"values/{name}"] = column.values
        if column.offsets is not None:
            parts[f"offsets/{name}"] = column.offsets
    with path.open("wb") as file:
        np.savez(file, **parts)  # type: ignore[arg-type]


def load_columns(path: Path) -> tuple[dict[str, Column], dict[str, NDArray[np.generic]]]:
    """(columns, arrays) as `save_columns` wrote them; RequestError where the file is none of its kind."""
    columns: dict[str, Column] = {}
    arrays: dict[str, NDArray[np.generic]] = {}
    try:
        with np.load(path, allow_pickle=False) as parts:
            for key in parts.files:
                kind, name = key.split("/", 1)
                if kind == "array":
                    arrays[name] = parts[key]
                elif kind in ("values", "buffer"):
                    values = parts[key] if kind == "values" else BytesColumn(parts[key], parts[f"strings/{name}"])
                    offsets = parts[f"offsets/{name}"] if f"offsets/{name}" in parts.files else None
                    columns[name] = Column.of(values, offsets, f"column {name!r} of {path.name}")
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise RequestError(f"{path} holds no columns: {error}") from None
    return columns, arrays
