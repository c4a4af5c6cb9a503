"""Bulk import and export: every kind of file there and back, interruptions, bad files in one sentence."""

import errno
import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ps import bulk
from ps.bulk import Export, bring, check_dim, exports, ids_path, open_source, sources, take
from ps.checkpoint.reach import Counter
from ps.errors import RequestError

DIM = 3
IDS = np.random.default_rng(1).permutation(np.arange(-100, 150)).astype(np.int64)
ROWS = np.random.default_rng(2).normal(size=(len(IDS), DIM)).astype(np.float32)


class Handle:
    def result(self) -> None:
        """It was done at once."""


class Part:
    def __init__(self, ids: list[int], rows: list[np.ndarray]) -> None:
        self.ids = np.array(ids, np.int64)
        self.rows = np.array(rows, np.float32).reshape(-1, DIM)


class Table:
    """A client of one table, as a dictionary; ids lie on the ring in their order. dies: at which call."""

    def __init__(self, dies: int = -1) -> None:
        self.rows: dict[int, np.ndarray] = {}
        self.calls, self.dies = 0, dies

    def _live(self) -> None:
        self.calls += 1
        if self.calls == self.dies:
            raise InterruptedError

    def assign_nowait(self, name: str, ids: np.ndarray, rows: np.ndarray, timeout: float) -> Handle:
        self._live()
        if not np.isfinite(rows).all():
            raise RequestError("as a client says it, of a table")
        self.rows |= dict(zip(ids.tolist(), rows.copy(), strict=True))
        return Handle()

    def pull_range(self, name: str, start: int, stop: int | None, timeout: float) -> Any:
        self._live()
        place = {i: (i + 100) * (2**64 // 300) for i in self.rows}
        inside = [i for i in self.rows if start <= place[i] < (stop or 2**64)]
        for at in range(0, len(inside), 7):
            yield Part(inside[at : at + 7], [self.rows[i] for i in inside[at : at + 7]])


class Notes:
    def __init__(self) -> None:
        self.rows = 0

    def write(self, rows: int) -> None:
        self.rows = rows


def expected() -> dict[int, list[float]]:
    return dict(zip(IDS.tolist(), ROWS.tolist(), strict=True))


def imported(path: Path, **options: Any) -> dict[int, list[float]]:
    table = Table()
    bring(table, "t", path, open_source(path, **options), 0, Notes(), Counter())
    return {i: row.tolist() for i, row in table.rows.items()}


def write(path: Path, ids: Any = IDS, rows: Any = ROWS) -> Path:
    """The rows as a file of a kind, under its own names."""
    if path.suffix == ".npy":
        np.save(path, rows)
        np.save(ids_path(path), ids)
    elif path.suffix == ".safetensors":
        save_file({"rows": torch.from_numpy(np.asarray(rows)), "ids": torch.from_numpy(np.asarray(ids))}, path)
    else:
        lists = pa.array(list(rows), pa.list_(pa.float32()))
        pq.write_table(pa.table({"id": pa.array(ids), "row": lists}), path, row_group_size=60)
    return path


@pytest.fixture(params=bulk.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_there_and_back(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 16 * 4 * DIM)
    table = Table()
    path = write(tmp_path / f"in{kind}")
    bring(table, "t", path, open_source(path), 0, Notes(), Counter())
    assert {i: r.tolist() for i, r in table.rows.items()} == expected()
    assert table.calls > 10
    counter = Counter()
    take(table, "t", Export(tmp_path / f"out{kind}", 1, 2, DIM, resume=False), counter)
    assert (counter.rows, counter.done, counter.total) == (len(IDS), bulk.PARTS, bulk.PARTS)
    assert imported(tmp_path / f"out{kind}") == expected()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_others_read_is_what_was_written(tmp_path: Path) -> None:
    table = Table()
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    for kind in bulk.KINDS:
        take(table, "t", Export(tmp_path / f"out{kind}", 1, 2, DIM, resume=False), Counter())
    order = np.argsort(IDS)
    tensors = load_file(tmp_path / "out.safetensors")
    columns = pq.read_table(tmp_path / "out.parquet")
    for ids, rows in (
        (np.load(tmp_path / "out.ids.npy"), np.load(tmp_path / "out.npy")),
        (tensors["ids"].numpy(), tensors["rows"].numpy()),
        (columns["id"].to_numpy(), np.array(columns["row"].to_pylist(), np.float32)),
    ):
        assert (np.sort(ids) == IDS[order]).all()
        assert (rows[np.argsort(ids)] == ROWS[order]).all()


def test_an_empty_table(tmp_path: Path, kind: str) -> None:
    take(Table(), "t", Export(tmp_path / f"out{kind}", 1, 2, DIM, resume=False), Counter())
    assert imported(tmp_path / f"out{kind}") == {}


@pytest.mark.parametrize("dies", [2, 9, 17])
def test_an_interrupted_import_goes_on_where_it_stopped(
    tmp_path: Path, kind: str, dies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 11 * 4 * DIM)
    path, notes, table = write(tmp_path / f"in{kind}"), Notes(), Table(dies)
    with pytest.raises(InterruptedError):
        bring(table, "t", path, open_source(path), 0, notes, Counter())
    assert notes.rows == max(0, dies - bulk.IN_FLIGHT) * 11
    counter, before = Counter(), table.calls
    bring(table, "t", path, open_source(path), notes.rows, notes, counter)
    assert counter.rows == len(IDS) - max(0, dies - bulk.IN_FLIGHT) * 11
    assert table.calls - before == -(-counter.rows // 11)
    assert {i: r.tolist() for i, r in table.rows.items()} == expected()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30), st.integers(-50, 50), st.integers(0, 40))
def test_ids_are_distinct_or_not_whether_they_lie_dense_or_apart(apart: list[int], least: int, dense: int) -> None:
    near = list(range(least, least + dense))[::-1]
    for ids in (apart, near, [*near, *apart[:1]], [*near, *near[:1]], [*apart, *apart[-1:]]):
        assert sources._distinct(np.array(ids, np.int64)) == (len(set(ids)) == len(ids))


@pytest.mark.parametrize("dies", [1, 5, 15])
def test_an_interrupted_export_goes_on_where_it_stopped(tmp_path: Path, kind: str, dies: int) -> None:
    table, path = Table(dies), tmp_path / f"out{kind}"
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    export = Export(path, 1, 2, DIM, resume=False)
    with pytest.raises(InterruptedError):
        take(table, "t", export, Counter())
    assert not path.exists()
    export = Export(path, 1, 2, DIM, resume=True)
    assert export.resumed == (dies > 1)
    take(table, "t", export, Counter())
    assert table.calls == (dies - 1) + 1 + bulk.PARTS - (dies - 1)
    assert imported(path) == expected()


def test_what_another_table_left_counts_for_nothing(tmp_path: Path) -> None:
    table, path = Table(5), tmp_path / "out.npy"
    table.rows = dict.fromkeys(range(-90, 0), ROWS[0])
    with pytest.raises(InterruptedError):
        take(table, "t", Export(path, 1, 2, DIM, resume=False), Counter())
    export = Export(path, 1, 3, DIM, resume=True)
    assert not export.resumed
    table.rows = {5: ROWS[1]}
    take(table, "t", export, Counter())
    assert imported(path) == {5: ROWS[1].tolist()}


def interrupted(path: Path, dies: int = 5) -> Table:
    """A table, and what an export of it left that died after some parts, when the table had few rows."""
    table = Table(dies)
    table.rows = {int(i): row for i, row in zip(IDS[:20], ROWS, strict=False)}
    with pytest.raises(InterruptedError):
        take(table, "t", Export(path, 1, 2, DIM, resume=False), Counter())
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    return table


def test_an_export_begun_anew_forgets_how_far_an_older_one_came(tmp_path: Path, kind: str) -> None:
    """Else its rows, longer than those of the older one, would be taken for them."""
    path = tmp_path / f"out{kind}"
    table = interrupted(path)
    anew = Export(path, 1, 2, DIM, resume=False)
    first = next(exports._pulled(table, "t", 0))[1]
    for _ in range(20):
        anew.write(first.ids, first.rows)
    anew.close()  # as a kill before its own first mark leaves it
    export = Export(path, 1, 2, DIM, resume=True)
    assert not export.resumed
    take(table, "t", export, Counter())
    assert imported(path) == expected()


@pytest.mark.parametrize("resume", [False, True])
def test_the_older_mark_is_gone_before_anything_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """So that a kill in between leaves no mark of rows that are no more. resume: of another table."""
    path = tmp_path / "out.npy"
    interrupted(path)
    marks: list[bool] = []

    class Partial(io.BufferedRandom):
        def truncate(self, size: int | None = None) -> int:
            marks.append((tmp_path / ".out.npy.mark").exists())
            return super().truncate(size)

    def opened(file: Path, mode: str, opener: Any) -> Any:
        return Partial(io.FileIO(file, "r+", opener=opener))

    monkeypatch.setattr(exports, "open", opened, raising=False)
    Export(path, 1, 3 if resume else 2, DIM, resume).close()
    assert marks == [False, False]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_kill_between_ids_and_rows_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: int
) -> None:
    """An older export of as many rows lay there. dies: before how many of the two got their names."""
    path, table = tmp_path / "out.npy", Table()
    table.rows = dict(zip((IDS + 1000).tolist(), ROWS, strict=True))
    take(table, "t", Export(path, 1, 2, DIM, resume=False), Counter())
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    replace = exports.os.replace

    def killed(source: Path, target: Path) -> None:
        if target == (ids_path(path), path)[dies]:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(exports.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            take(table, "t", Export(path, 1, 2, DIM, resume=False), Counter())
    assert not path.exists()
    take(table, "t", Export(path, 1, 2, DIM, resume=True), Counter())
    assert imported(path) == expected()


def test_two_exports_into_one_file_are_one_and_a_sentence(tmp_path: Path, kind: str) -> None:
    """While the first is under way, and at every step of its end."""
    path, table = tmp_path / f"out{kind}", Table()
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    refused: list[int] = []

    class Second(Counter):
        def add(self, rows: int, size: int, done: int) -> None:
            super().add(rows, size, done)
            with pytest.raises(RequestError, match=rf"out{kind} is being exported to by another command"):
                Export(path, 1, 2, DIM, resume=bool(done))
            refused.append(done)

    take(table, "t", Export(path, 1, 2, DIM, resume=False), Second())
    assert sum(refused) == bulk.PARTS
    assert imported(path) == expected()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_takes_exports_too(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(exports.fcntl, "flock", flock)
    if number == errno.EIO:
        with pytest.raises(RequestError, match="cannot be written"):
            Export(tmp_path / "out.npy", 1, 2, DIM, resume=False)
    else:
        Export(tmp_path / "out.npy", 1, 2, DIM, resume=False).close()


@pytest.mark.parametrize("between", ["opened and locked", "named and closed"])
def test_an_export_that_begins_while_another_ends_leaves_both_whole(
    tmp_path: Path, kind: str, between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / f"out{kind}", Table()
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    first, second = Export(path, 1, 2, DIM, resume=False), list[Export]()
    if between == "opened and locked":
        flock = exports.fcntl.flock

        def ended_meanwhile(*arguments: Any) -> None:
            monkeypatch.setattr(exports.fcntl, "flock", flock)
            take(table, "t", first, Counter())
            flock(*arguments)

        monkeypatch.setattr(exports.fcntl, "flock", ended_meanwhile)
        with pytest.raises(RequestError, match="is being exported to by another command"):
            Export(path, 1, 2, DIM, resume=False)
    else:
        close = first.close

        def begun_meanwhile() -> None:
            if not second:
                second.append(Export(path, 1, 2, DIM, resume=False))
            close()

        monkeypatch.setattr(first, "close", begun_meanwhile)
        take(table, "t", first, Counter())
        assert imported(path) == expected()
        table.rows = {5: ROWS[1]}
        take(table, "t", second[0], Counter())
    assert imported(path) == {i: row.tolist() for i, row in table.rows.items()}


def test_an_export_that_was_killed_when_it_had_its_name_is_not_told_again(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / f"out{kind}", Table()
    table.rows = dict.fromkeys(range(-90, 0), ROWS[0])
    replace = exports.os.replace

    def killed(source: Path, target: Path) -> None:
        replace(source, target)
        if target == path:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exports.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            take(table, "t", Export(path, 1, 2, DIM, resume=False), Counter())
    table.rows = {5: ROWS[1]}
    export = Export(path, 1, 2, DIM, resume=True)
    assert not export.resumed
    take(table, "t", export, Counter())
    assert imported(path) == {5: ROWS[1].tolist()}


def test_a_state_dict_counts_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    bag = torch.nn.EmbeddingBag(20, DIM)
    save_file({"item.weight": bag.weight.detach().half(), "bias": torch.zeros(4)}, path)
    rows = imported(path)
    assert sorted(rows) == list(range(20))
    np.testing.assert_allclose(rows[7], bag.weight[7].detach().numpy(), atol=2e-3)
    np.save(tmp_path / "names.npy", np.arange(20) * 5)
    assert sorted(imported(path, ids=str(tmp_path / "names.npy"))) == list(range(0, 100, 5))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_of_every_kind_of_float(tmp_path: Path, kind: torch.dtype) -> None:
    path, rows = tmp_path / "model.safetensors", torch.from_numpy(ROWS).to(kind)
    save_file({"w": rows, "ids": torch.from_numpy(IDS)}, path)
    assert imported(path) == dict(zip(IDS.tolist(), rows.float().tolist(), strict=True))


def test_tensors_that_numpy_knows_do_without_torch(tmp_path: Path) -> None:
    """It takes seconds to load."""
    path = write(tmp_path / "in.safetensors")
    code = (
        "import sys; from pathlib import Path; from ps.bulk import open_source; "
        f"print(sum(len(rows) for rows in open_source(Path({str(path)!r})).rows(0, 7)), 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == [str(len(IDS)), "False"]


def test_an_export_that_cannot_be_written_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are asked for ahead, by a thread: none is left behind."""
    table, export = Table(), Export(tmp_path / "out.npy", 1, 2, DIM, resume=False)
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    monkeypatch.setattr(export, "write", lambda ids, rows: np.zeros(2)[len(ids) * 1000])
    before = threading.active_count()
    with pytest.raises(IndexError):
        take(table, "t", export, Counter())
    assert threading.active_count() == before
    assert table.calls < bulk.PARTS


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("when", ["it is begun", "rows come", "it is finished"])
def test_a_full_disk_is_one_sentence_and_the_export_goes_on_once_there_is_room(
    tmp_path: Path, kind: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, path = Table(), tmp_path / f"out{kind}"
    table.rows = dict(zip(IDS.tolist(), ROWS, strict=True))
    sentence = rf"out{kind} cannot be written: .*File too large"
    if when == "it is begun":
        with pytest.raises(RequestError, match=sentence), disk_of(100):
            Export(path, 1, 2, DIM, resume=False)
    else:
        export = Export(path, 1, 2, DIM, resume=False)
        finish = export.finish

        def late() -> None:
            with disk_of(100):
                finish()

        monkeypatch.setattr(export, "finish", late)
        room = Export.HEAD + 8 * 100 if when == "rows come" else 2**20
        with pytest.raises(RequestError, match=sentence), disk_of(room):
            take(table, "t", export, Counter())
        assert export._rows.closed
        assert export._ids.closed
        assert not (tmp_path / f".out{kind}.new").exists()  # it takes as much room again
    assert not path.exists()
    again = Export(path, 1, 2, DIM, resume=True)
    assert again.resumed == (when != "it is begun")
    take(table, "t", again, Counter())
    assert imported(path) == expected()


def test_rows_that_no_buffer_holds_meet_a_full_disk_in_one_sentence(tmp_path: Path) -> None:
    export = Export(tmp_path / "out.npy", 1, 2, DIM, resume=False)
    with pytest.raises(RequestError, match=r"out\.npy cannot be written: File too large"), disk_of(10_000):
        export.write(np.arange(100_000), np.ones((100_000, DIM), np.float32))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), pa.ArrowInvalid("no page is there")])
def test_rows_that_cannot_be_read_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = write(tmp_path / "in.parquet")
    source = open_source(path)

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(source, "_file", SimpleNamespace(**vars(source._file), iter_batches=broken, num_row_groups=0))
    with pytest.raises(RequestError, match=rf"in\.parquet cannot be read: .*{error.args[-1]}"):
        bring(Table(), "t", path, source, 0, Notes(), Counter())


def test_a_file_that_may_not_be_looked_at_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot be read as \.npy: .*File name too long"):
        open_source(tmp_path / ("x" * 300 + ".npy"))


def test_other_columns_and_kinds_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.astype(np.float64).reshape(-1)), DIM)
    pq.write_table(pa.table({"key": pa.array(IDS.astype(np.int32)), "vector": fixed}), path)
    assert imported(path, values="vector", ids="key") == expected()


def parquet(**columns: Any) -> Any:
    def make(path: Path) -> None:
        pq.write_table(pa.table(columns), path)

    return make


def tensors(**given: Any) -> Any:
    return lambda path: save_file(given, path)


TWO = [[1.0, 2.0], [3.0, 4.0]]
BAD: list[tuple[str, Any, dict[str, str], str]] = [
    ("a.parquet", parquet(id=[1, 2], vector=TWO), {}, r"has no column 'row'; it has id, vector"),
    ("a.parquet", parquet(id=[1, 2], row=[1, 2]), {}, r"column 'row' of .* is int64; rows are lists of floats"),
    ("a.parquet", parquet(id=[1.5, 2], row=TWO), {}, r"column 'id' of .* is double.*whole numbers|float64"),
    ("a.parquet", parquet(id=[1, None], row=TWO), {}, r"column 'id' of .* has 1 nulls"),
    ("a.parquet", parquet(id=[7, 7], row=TWO), {}, r"has id 7 in row 0 and in row 1; an id has one row"),
    ("a.parquet", parquet(id=np.array([1, 2**63], np.uint64), row=TWO), {}, r"has 9223372036854775808 in row 1"),
    ("a.parquet", parquet(id=[1, 2], row=[[1.0, 2.0], [3.0]]), {}, r"has 1 values in row 1; the first row has 2"),
    ("a.parquet", parquet(id=[1, 2, 3], row=[[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]), {}, r"has 1 values in row 1; the"),
    ("a.parquet", parquet(id=[1, 2, 3], row=[[1.0, 2.0], [3.0] * 3, [4.0]]), {}, r"has 3 values in row 1; the first"),
    ("a.parquet", parquet(id=[1, 2, 3], row=[[1.0, 2.0], [], [3.0] * 4]), {}, r"has 0 values in row 1; the first"),
    ("a.parquet", parquet(id=[1, 2], row=[[1.0, 2.0], None]), {}, r"has a null in row 1; every row has 2 values"),
    ("a.parquet", parquet(id=[1, 2], row=[None, [1.0, 2.0]]), {}, r"has a null in row 0; every row has 2 values"),
    ("a.parquet", parquet(id=[1, 2], row=[[1.0, None], [1.0, 2.0]]), {}, r"has a null in row 0; every row has 2"),
    ("a.parquet", parquet(id=[1], row=pa.array([None], pa.list_(pa.float32()))), {}, r"has nulls only; every row is a"),
    ("a.parquet", parquet(id=[1, 2], row=[[1.0, 2.0], [3.0, np.nan]]), {}, r"has nan in row 1, column 1"),
    ("a.parquet", lambda path: path.write_bytes(b"no"), {}, r"cannot be read as \.parquet"),
    ("a.safetensors", tensors(a=torch.zeros(2, 2), b=torch.zeros(2, 2)), {}, r"the matrices a, b: choose one"),
    ("a.safetensors", tensors(a=torch.zeros(2)), {}, r"the matrices none"),
    ("a.safetensors", tensors(a=torch.zeros(2, 2)), {"values": "c"}, r"has no tensor 'c'; it has a"),
    ("a.safetensors", tensors(a=torch.zeros(2, 2), ids=torch.arange(3)), {}, r"has 2 rows and 3 ids"),
    ("a.safetensors", tensors(a=torch.zeros(2, 2, dtype=torch.int64)), {}, r"\[2, 2\], and not of floats; rows are"),
    ("a.safetensors", lambda path: path.write_bytes(b"no"), {}, r"cannot be read as \.safetensors"),
    ("a.npy", lambda path: np.save(path, np.zeros(3, np.float32)), {}, r"has shape \[3\]; rows are a matrix"),
    ("a.npy", lambda path: np.save(path, np.zeros((3, 2), np.float32)), {"ids": "none.npy"}, r"none.npy is missing"),
    ("a.npy", lambda path: np.save(path, np.array([{}, {}])), {}, r"cannot be read as \.npy"),
    ("a.npy", lambda path: np.save(path, np.full((3, 2), 1e39)), {}, r"has inf in row 0, column 0; .* finite float32"),
    ("a.npy", lambda path: None, {}, r"a\.npy is missing"),
    ("a.pt", lambda path: None, {}, r"is a pickle, and reading it runs code"),
    ("a.csv", lambda path: None, {}, r"has suffix '\.csv'; it must be one of \.npy, \.safetensors, \.parquet"),
]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("name", "make", "options", "sentence"), BAD, ids=range(len(BAD)))
def test_a_bad_file_is_one_sentence(
    tmp_path: Path, name: str, make: Any, options: dict[str, str], sentence: str
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(RequestError, match=sentence) as told:  # noqa: PT012 - a bad row is met when it is read
        source = open_source(path, **options)
        bring(Table(), "t", path, source, 0, Notes(), Counter())
    assert str(tmp_path / name) in str(told.value) or "none.npy" in str(told.value)


def test_another_width_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    with pytest.raises(RequestError, match=r"has rows of 3 values; table 'item' has 8"):
        check_dim(path, open_source(path), "item", 8)


def test_lists_of_which_there_are_none_fit_any_table(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "row": pa.array([], pa.list_(pa.float32()))}), path)
    check_dim(path, open_source(path), "item", 8)
    assert imported(path) == {}
    np.save(tmp_path / "a.npy", np.zeros((0, 3), np.float32))
    with pytest.raises(RequestError, match="has rows of 3 values; table 'item' has 8"):
        check_dim(tmp_path / "a.npy", open_source(tmp_path / "a.npy"), "item", 8)


@pytest.mark.parametrize("kind", [".npy", ".safetensors", ".parquet"])
def test_an_export_into_a_folder_is_refused_before_any_row_comes(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"out{kind}").mkdir()
    with pytest.raises(RequestError, match=r"out\.\w+ cannot be written: it is a folder"):
        Export(tmp_path / f"out{kind}", 1, 2, DIM, resume=False)


def test_an_export_into_a_folder_that_may_not_be_entered_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shut(path: Path, **_: Any) -> None:  # root, who may run this, may enter any
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", shut)
    with pytest.raises(RequestError, match=r"out\.npy cannot be written: Permission denied"):
        Export(tmp_path / "out.npy", 1, 2, DIM, resume=False)
