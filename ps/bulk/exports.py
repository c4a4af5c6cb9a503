"""Rows of a table into files of other tools.

An export streams into raw files beside the target, which can be gone on with after an interruption, and gives the
target its name when it is whole.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ps.bulk.sources import CHUNK_BYTES, TIMEOUT_S, Rows, ids_path, kind_of
from ps.errors import RequestError

GROUP_BYTES = 16 * 2**20
"""Rows of one group of a Parquet file."""

PARTS = 16
"""Parts of an export; an interrupted one goes on with the first that is not whole."""

_SPANS = tuple(pairwise((k << 64) // PARTS for k in range(PARTS + 1)))


Names = tuple[tuple[str, Path | None], ...]
"""What partial files become, one after another: a name, or None where they go."""


@dataclass
class Mark:
    """How far an interrupted export came: of which table of which cluster, up to which token, with how many rows."""

    cluster: int
    table: int
    dim: int
    token: int
    rows: int


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RequestError, naming the file and the reason, where it cannot be written: a full disk, say."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def _lockable() -> Iterator[None]:
    """Pass over what a file system without locks says."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


class Export:
    """Rows on their way into a file. With `resume` what an interrupted export left is gone on with."""

    HEAD = 4096
    """Bytes left for the header, which names the number of rows: known at the end only."""

    def __init__(self, path: Path, cluster: int, table: int, dim: int, resume: bool) -> None:
        """Raises RequestError where the file cannot be written, or another process exports to it."""
        self.path, self.kind = path, kind_of(path)
        self.mark = Mark(cluster, table, dim, 0, 0)
        with writing(path), ExitStack() as opened:
            if path.is_dir():
                raise RequestError(f"{path} cannot be written: it is a folder")
            self._rows = opened.enter_context(self._open("rows"))
            self._lock()  # before anything else is looked at: it may be another's, and under way
            self._ids = opened.enter_context(self._open("ids"))
            left = self._left()
            self.resumed = resume and left is not None and (left.cluster, left.table, left.dim) == (cluster, table, dim)
            if self.resumed and left is not None:
                self.mark = left
            else:  # first of all: after a kill an older mark would be believed of the new rows
                self._partial("mark").unlink(missing_ok=True)
            self._rows.truncate(self.HEAD + self.mark.rows * dim * 4)
            self._ids.truncate(self.HEAD + self.mark.rows * 8)
            for file in (self._rows, self._ids):
                file.seek(0, os.SEEK_END)
            self._files = opened.pop_all()

    def _open(self, what: str) -> IO[bytes]:
        """A partial file, made where there is none, and not cut where there is."""
        return open(self._partial(what), "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666))

    def _lock(self) -> None:
        """Lock the file of rows, until it is closed: the partial files of two exports have the same names."""
        try:
            with _lockable():
                fcntl.flock(self._rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(self._rows.fileno()), self._partial("rows").stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # locked, or given its name since it was opened
            raise RequestError(f"{self.path} is being exported to by another command")

    def _partial(self, what: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{what}")

    def _left(self) -> Mark | None:
        try:
            left = Mark(**json.loads(self._partial("mark").read_bytes()))
            whole = self._partial("rows").stat().st_size >= self.HEAD + left.rows * left.dim * 4
            return left if whole and self._partial("ids").stat().st_size >= self.HEAD + left.rows * 8 else None
        except (OSError, ValueError, TypeError):
            return None

    def write(self, ids: NDArray[np.int64], rows: Rows) -> None:
        """Some rows."""
        with writing(self.path):
            self._ids.write(np.ascontiguousarray(ids).data)
            self._rows.write(np.ascontiguousarray(rows).data)
        self.mark.rows += len(ids)

    def reached(self, token: int) -> None:
        """Every row up to this token was written: an interrupted export goes on from here."""
        self.mark.token = token
        with writing(self.path):
            self._rows.flush()
            self._ids.flush()
            temporary = self._partial("mark.new")
            temporary.write_text(json.dumps(asdict(self.mark)))
            os.replace(temporary, self._partial("mark"))

    def close(self) -> None:
        """Close the files; what was written stays for a resume."""
        with writing(self.path):
            self._files.close()  # each, also where another cannot write what it still holds

    def finish(self) -> None:
        """Give the file its name: it is whole."""
        n, dim = self.mark.rows, self.mark.dim
        with writing(self.path):
            names = {".npy": self._npy, ".safetensors": self._tensors, ".parquet": self._parquet}[self.kind](n, dim)
            self._partial("mark").unlink(missing_ok=True)  # else, after a kill, a resume would publish these rows again
            for what, name in names:
                if name is not None:
                    os.replace(self._partial(what), name)
                else:
                    self._partial(what).unlink()
            self.close()

    # Each makes the partial files whole, and tells what they become: the rows, which are locked, at the end, for from
    # then on the others may be another export's.

    def _npy(self, n: int, dim: int) -> Names:
        for file, code, shape in ((self._rows, "<f4", (n, dim)), (self._ids, "<i8", (n,))):
            text = f"{{'descr': {code!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
            head = b"\x93NUMPY\x01\x00" + (self.HEAD - 10).to_bytes(2, "little")
            file.seek(0)
            file.write(head + text.encode().ljust(self.HEAD - 11) + b"\n")
            file.flush()
        # The rows get their name last, and older ones go first: after a kill in between they would lie beside new ids.
        self.path.unlink(missing_ok=True)
        return ("ids", ids_path(self.path)), ("rows", self.path)

    def _tensors(self, n: int, dim: int) -> Names:
        end = n * dim * 4
        table = {
            "rows": {"dtype": "F32", "shape": [n, dim], "data_offsets": [0, end]},
            "ids": {"dtype": "I64", "shape": [n], "data_offsets": [end, end + n * 8]},
        }
        self._ids.flush()
        with open(self._partial("ids"), "rb") as ids:
            ids.seek(self.HEAD)
            while data := ids.read(CHUNK_BYTES):
                self._rows.write(data)
        self._rows.seek(0)
        self._rows.write((self.HEAD - 8).to_bytes(8, "little") + json.dumps(table).encode().ljust(self.HEAD - 8))
        self._rows.flush()
        return ("ids", None), ("rows", self.path)

    def _parquet(self, n: int, dim: int) -> Names:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._rows.flush()
        self._ids.flush()
        # Columns without nulls, and rows without a least and a greatest value: a third less work to write and to read.
        lists = pa.list_(pa.field("element", pa.float32(), nullable=False), dim)
        schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("row", lists, nullable=False)])
        options = {"compression": "none", "use_dictionary": False, "write_statistics": ["id"]}
        step = max(1, GROUP_BYTES // (4 * dim))
        with self._new() as path, pq.ParquetWriter(path, schema, **options) as writer:
            for at in range(0, n, step):
                count = min(step, n - at)
                ids = np.fromfile(self._partial("ids"), np.int64, count, offset=self.HEAD + at * 8)
                rows = np.fromfile(self._partial("rows"), np.float32, count * dim, offset=self.HEAD + at * dim * 4)
                columns = [pa.array(ids), pa.FixedSizeListArray.from_arrays(pa.array(rows), type=lists)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        return ("new", self.path), ("ids", None), ("rows", None)

    @contextmanager
    def _new(self) -> Iterator[Path]:
        """Where a file is written that takes as much room again: it goes where that fails, on a full disk say."""
        path = self._partial("new")
        try:
            yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def take(client: Any, table: str, export: Export, counter: Any) -> None:
    """Write all rows of a table into an export, from where it stands, and finish it.

    counter: a ps.checkpoint.reach.Counter. Raises what Client.pull_range raises.
    """
    counter.expect(PARTS)
    counter.add(export.mark.rows, 0, sum(stop <= export.mark.token for _, stop in _SPANS))
    try:
        for stop, part in _pulled(client, table, export.mark.token):
            if part is None:
                export.reached(stop)
                counter.add(0, 0, 1)
            else:
                export.write(part.ids, part.rows)
                counter.add(len(part.ids), part.rows.nbytes, 0)
        export.finish()
    finally:
        export.close()


def _pulled(client: Any, table: str, token: int) -> Iterator[tuple[int, Any]]:
    """(end of a span, some of its rows), and (end, None) where all of a span have come; of spans that end after
    `token`."""
    for start, stop in _SPANS:
        if stop > token:
            for part in client.pull_range(table, start, stop if stop < 2**64 else None, TIMEOUT_S):
                yield stop, part
            yield stop, None
