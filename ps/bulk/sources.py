"""Rows of a table from files of other tools.

A source knows its ids at once (8 bytes a row), so that duplicates are found before anything is sent, and gives rows in
chunks from any row on.
"""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ps.errors import RequestError
from ps.ragged import as_float32

CHUNK_BYTES = 4 * 2**20
"""Rows read, and sent, at a time."""

Rows = NDArray[np.float32]

IN_FLIGHT = 4
"""Chunks sent and not yet acknowledged."""

TIMEOUT_S = 60.0
"""For one chunk."""

DENSE = 16
"""Ids of which there are more than one in so many numbers lie dense."""

KINDS = (".npy", ".safetensors", ".parquet")


class Source(Protocol):
    """A file of rows. ids int64[n]; dim: values in a row."""

    ids: NDArray[np.int64]
    dim: int

    def rows(self, start: int, count: int) -> Iterator[Rows]:
        """Rows from `start` on, float32[k, dim] each, `count` at a time (the last may have fewer)."""


def open_source(path: Path, values: str | None = None, ids: str | None = None) -> Source:
    """The rows of a file. values, ids: which tensor or column holds them; ids may be a .npy file too.

    Raises RequestError naming the file and what is wrong with it.
    """
    kind = kind_of(path)
    opening: dict[str, Callable[..., Source]] = {".npy": _Npy, ".safetensors": _Tensors, ".parquet": _Parquet}
    try:
        if not path.is_file():
            raise RequestError(f"{path} is missing")
        source = opening[kind](path, values, ids)
    except RequestError:
        raise
    except Exception as error:  # each library has errors of its own, and all mean that the file is not what it says
        raise RequestError(f"{path} cannot be read as {kind}: {error}") from None
    _check_distinct(path, source.ids)
    return source


def kind_of(path: Path) -> str:
    """The suffix of a file of rows, one of KINDS. Raises RequestError for any other."""
    kind = path.suffix.lower()
    if kind in (".pt", ".pth", ".bin", ".pkl"):
        raise RequestError(f"{path} is a pickle, and reading it runs code: save it with safetensors.torch.save_file")
    if kind not in KINDS:
        raise RequestError(f"{path} has suffix {kind!r}; it must be one of {', '.join(KINDS)}")
    return kind


def check_dim(path: Path, source: Source, table: str, dim: int) -> None:
    """Raise RequestError unless the rows are as wide as the table's; lists of which there are none have no width."""
    if source.dim != dim and (source.dim or len(source.ids)):
        raise RequestError(f"{path} has rows of {source.dim} values; table {table!r} has {dim}")


def check_finite(path: Path, rows: Rows, at: int) -> None:
    """Raise RequestError naming the row of the file where a value is not finite. at: number of the first row."""
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise RequestError(
            f"{path} has {rows[row, column]} in row {at + row}, column {column}; every value must be a finite float32"
        )


def _whole_numbers(path: Path, what: str, array: NDArray[Any]) -> NDArray[np.int64]:
    """Ids as int64; RequestError where they are others."""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(f"{what} of {path} is {array.dtype}{list(array.shape)}; ids are whole numbers, one a row")
    if array.dtype.kind == "u" and len(array) and array.max() > 2**63 - 1:
        at = int(array.argmax())
        raise RequestError(f"{what} of {path} has {array[at]} in row {at}; an id is -2**63 to 2**63 - 1")
    return np.ascontiguousarray(array, np.int64)


def _check_distinct(path: Path, ids: NDArray[np.int64]) -> None:
    if _distinct(ids):
        return
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])[0]
    first, second = order[twice], order[twice + 1]
    raise RequestError(f"{path} has id {ids[first]} in row {first} and in row {second}; an id has one row")


def _distinct(ids: NDArray[np.int64]) -> bool:
    if (ids[1:] > ids[:-1]).all():
        return True
    least, largest = int(ids.min()), int(ids.max())
    if largest - least < DENSE * len(ids):  # a mark for each number in between is less work than a sort
        seen = np.zeros(largest - least + 1, np.bool_)
        seen[ids - least] = True
        return int(np.count_nonzero(seen)) == len(ids)
    ordered = np.sort(ids)
    return bool((ordered[1:] > ordered[:-1]).all())


def _check_count(path: Path, ids: NDArray[np.int64], rows: int) -> None:
    if len(ids) != rows:
        raise RequestError(f"{path} has {rows} rows and {len(ids)} ids; each row has one")


class _Npy:
    """A matrix in one file, ids in another: --ids FILE, or NAME.ids.npy beside NAME.npy; else they count from 0."""

    def __init__(self, path: Path, values: str | None, ids: str | None) -> None:
        if values is not None:
            raise RequestError(f"{path} holds one array; --values chooses a tensor or column of other files")
        # "c": nothing is written; but what may not be written to would be copied before it is sent.
        self._rows = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
        self.dim = _matrix_dim(path, "its array", self._rows.shape, self._rows.dtype.kind == "f")
        self.ids = _ids_beside(path, ids, len(self._rows))

    def rows(self, start: int, count: int) -> Iterator[Rows]:
        for at in range(start, len(self._rows), count):
            yield as_float32(self._rows[at : at + count])


def ids_file(path: Path, ids: str | None) -> Path | None:
    """The .npy file that holds the ids, where the file of rows does not itself; ids: as in `open_source`."""
    kind = kind_of(path)
    if kind == ".npy":
        beside = ids_path(path)
        return Path(ids) if ids is not None else beside if beside.is_file() else None
    return Path(ids) if kind == ".safetensors" and ids and ids.endswith(".npy") else None


def _ids_beside(path: Path, ids: str | None, rows: int) -> NDArray[np.int64]:
    beside = ids_file(path, ids)
    if beside is None:
        return np.arange(rows)
    if not beside.is_file():
        raise RequestError(f"{beside} is missing")
    array = _whole_numbers(beside, "the array", np.load(beside, allow_pickle=False))
    _check_count(path, array, rows)
    return array


def ids_path(path: Path) -> Path:
    """Where the ids of a .npy file lie."""
    return path.with_name(f"{path.stem}.ids.npy")


def _matrix_dim(path: Path, what: str, shape: tuple[int, ...], floats: bool) -> int:
    if len(shape) != 2 or not floats:
        of = "" if floats else ", and not of floats"
        raise RequestError(f"{what} in {path} has shape {list(shape)}{of}; rows are a matrix of floats")
    return int(shape[1])


class _Tensors:
    """A matrix of a state_dict, the only one unless named. Ids: tensor --ids (or "ids"), else they count from 0."""

    def __init__(self, path: Path, values: str | None, ids: str | None) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="np")
        names = list(self._file.keys())
        shapes = {n: tuple(self._file.get_slice(n).get_shape()) for n in names}
        matrices = [n for n in names if len(shapes[n]) == 2]
        if values is None and len(matrices) != 1:
            raise RequestError(f"{path} has the matrices {', '.join(matrices) or 'none'}: choose one with --values")
        self._name = values or matrices[0]
        beside = ids_file(path, ids)
        for name in (self._name, *([ids] if ids and beside is None else [])):
            if name not in shapes:
                raise RequestError(f"{path} has no tensor {name!r}; it has {', '.join(names)}")
        kind = str(self._file.get_slice(self._name).get_dtype())
        if kind not in ("F64", "F32", "F16"):  # what numpy has no type for takes torch, which is long to load
            self._file = safe_open(path, framework="pt")
        self.dim = _matrix_dim(path, f"tensor {self._name!r}", shapes[self._name], "F" in kind)
        self._count = shapes[self._name][0]
        chosen = ids or ("ids" if "ids" in shapes else None)
        if chosen is None or beside is not None:
            self.ids = _ids_beside(path, chosen, self._count)
        else:
            self.ids = _whole_numbers(path, f"tensor {chosen!r}", np.asarray(self._file.get_tensor(chosen)))
            _check_count(path, self.ids, self._count)

    def rows(self, start: int, count: int) -> Iterator[Rows]:
        part = self._file.get_slice(self._name)
        for at in range(start, self._count, count):
            rows = part[at : min(at + count, self._count)]
            yield as_float32(rows if isinstance(rows, np.ndarray) else rows.float().numpy())


class _Parquet:
    """A column of lists of floats (--values, or "row"), and a column of ids (--ids, or "id")."""

    def __init__(self, path: Path, values: str | None, ids: str | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._values = path, values or "row"
        self._file = pq.ParquetFile(path, memory_map=True)
        schema = self._file.schema_arrow
        id_column = ids or "id"
        for name in (id_column, self._values):
            if name not in schema.names:
                raise RequestError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
        kind = schema.field(self._values).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not pa.types.is_floating(kind.value_type):
            raise RequestError(f"column {self._values!r} of {path} is {kind}; rows are lists of floats")
        column = self._file.read([id_column]).column(0)
        if column.null_count:
            raise RequestError(f"column {id_column!r} of {path} has {column.null_count} nulls; every row has an id")
        self.ids = _whole_numbers(path, f"column {id_column!r}", column.to_numpy())
        self.dim = kind.list_size if pa.types.is_fixed_size_list(kind) else self._first_length()

    def _first_length(self) -> int:
        """Values in the first row that is no null; 0 where there are no rows."""
        for batch in self._file.iter_batches(1024, columns=[self._values]):
            if len(lists := batch.column(0).drop_null()):
                return len(lists[0].as_py())
        if len(self.ids):
            raise RequestError(f"column {self._values!r} of {self._path} has nulls only; every row is a list of floats")
        return 0

    def rows(self, start: int, count: int) -> Iterator[Rows]:
        group = begin = 0
        while group < self._file.num_row_groups:  # whole groups before `start` are not read
            size = self._file.metadata.row_group(group).num_rows
            if begin + size > start:
                break
            begin, group = begin + size, group + 1
        at = begin
        for column in self._columns(count, list(range(group, self._file.num_row_groups))):
            cut = max(0, start - at)
            at += len(column)
            if cut < len(column):
                yield self._matrix(column.slice(cut), at - len(column) + cut)

    def _columns(self, count: int, groups: list[int]) -> Iterator[Any]:
        import pyarrow as pa

        try:
            for batch in self._file.iter_batches(count, row_groups=groups, columns=[self._values]):
                yield batch.column(0)
        except (OSError, pa.ArrowException) as error:  # opening it looked at its foot and its ids alone
            raise RequestError(f"{self._path} cannot be read: {error}") from None

    def _matrix(self, column: Any, at: int) -> Rows:
        import pyarrow.compute as pc

        flat = column.flatten()
        # Each length, for their sum may be right by chance: what one row lacks another may have too much.
        if column.null_count or flat.null_count or not pc.all(pc.equal(pc.list_value_length(column), self.dim)).as_py():
            lengths = [len(row) if row is not None and None not in row else -1 for row in column.to_pylist()]
            bad = next(i for i, length in enumerate(lengths) if length != self.dim)
            what = f"{lengths[bad]} values in row {at + bad}; the first row has {self.dim}"
            if lengths[bad] < 0:
                what = f"a null in row {at + bad}; every row has {self.dim} values"
            raise RequestError(f"column {self._values!r} of {self._path} has {what}")
        return as_float32(flat.to_numpy(zero_copy_only=False)).reshape(-1, self.dim)


class Progress(Protocol):
    """Where an import writes down how many rows have come, to be gone on from (`embring table import`)."""

    def write(self, rows: int) -> None:
        """The first `rows` of the file are there."""


def bring(client: Any, table: str, path: Path, source: Source, start: int, progress: Progress, counter: Any) -> None:
    """Assign the rows of a source from `start` on, some chunks sent before the first is acknowledged.

    counter: a ps.checkpoint.reach.Counter. Raises what Client.assign raises, and RequestError for a bad row.
    """
    sent: deque[tuple[Any, int, Rows]] = deque()

    def settle() -> None:
        handle, end, rows = sent.popleft()
        handle.result()
        progress.write(end)
        counter.add(len(rows), rows.nbytes, len(rows))

    counter.expect(len(source.ids))
    counter.add(0, 0, start)
    at = start
    for rows in source.rows(start, max(1, CHUNK_BYTES // (4 * max(1, source.dim)))):
        while len(sent) >= IN_FLIGHT:
            settle()
        end = at + len(rows)
        try:
            handle = client.assign_nowait(table, source.ids[at:end], rows, timeout=TIMEOUT_S)
        except RequestError:  # the client looks at every value, and need not know of a file
            check_finite(path, rows, at)
            raise
        sent.append((handle, end, rows))
        at = end
    while sent:
        settle()
