"""`embring table import --resume`: it goes on with the same import only, and begins anew with any other."""

import json
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from deploy import cli_transfer
from deploy.cli_table import app
from ps import bulk, client
from ps.errors import RequestError

COUNT, DIM, CHUNK = 40, 2, 4


class Table:
    """A cluster with one table, and its client. dies: at which call."""

    cluster, epoch, number, dim, dies = 7, 1, 1, DIM, -1

    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}

    def __enter__(self) -> "Table":
        self.calls = 0
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def table(self, name: str) -> "Table":
        return self

    describe = table

    def assign_nowait(self, name: str, ids: np.ndarray, rows: np.ndarray, timeout: float) -> SimpleNamespace:
        self.calls += 1
        if self.calls == self.dies:
            raise InterruptedError
        self.rows |= dict(zip(ids.tolist(), rows.tolist(), strict=True))
        return SimpleNamespace(result=lambda: None)

    def pull(self, name: str, ids: np.ndarray, timeout: float) -> np.ndarray:
        return np.array([self.rows.get(i, [0.0] * DIM) for i in ids.tolist()], np.float32).reshape(len(ids), DIM)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    found = Table()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(cli_transfer, "running", lambda: None)
    monkeypatch.setattr(cli_transfer, "_view", lambda runtime: found)
    monkeypatch.setattr(client, "connect", lambda: found)
    monkeypatch.setattr(bulk.sources, "CHUNK_BYTES", CHUNK * 4 * DIM)
    return found


def interrupt(table: Table, file: Path, *options: str, at: int = 8) -> None:
    """An import that ends at a call, and has written down the chunks acknowledged by then."""
    table.dies = at
    assert isinstance(CliRunner().invoke(app, ["import", "t", str(file), *options]).exception, InterruptedError)
    table.dies = -1


def skipped(file: Path, *options: str) -> int:
    """Rows that a resumed import takes for brought."""
    done = CliRunner().invoke(app, ["import", "t", str(file), "--resume", "--json", *options])
    assert done.exit_code == 0, done.exception
    return int(json.loads(done.stdout)["skipped"])


def matrix(value: float) -> np.ndarray:
    return np.full((COUNT, DIM), value, np.float32)


def named(kind: str, folder: Path) -> tuple[Path, Path]:
    """A file of rows A and B and of ids I and J, and a .npy file of ids."""
    file, ids = folder / f"in{kind}", folder / "names.npy"
    np.save(ids, np.arange(COUNT) + 2000)
    first, second = np.arange(COUNT), np.arange(COUNT) + 1000
    if kind == ".parquet":
        columns = {"A": pa.array(matrix(1).tolist()), "B": pa.array(matrix(2).tolist()), "I": first, "J": second}
        pq.write_table(pa.table(columns), file)
    else:
        plain = {"A": matrix(1), "B": matrix(2), "I": first, "J": second}
        save_file({name: torch.from_numpy(array) for name, array in plain.items()}, file)
    return file, ids


@pytest.mark.parametrize("kind", [".parquet", ".safetensors"])
@pytest.mark.parametrize(("values", "ids", "least", "row"), [("B", "I", 0, [2.0] * DIM), ("A", "J", 1000, [1.0] * DIM)])
def test_a_resumed_import_of_other_values_or_ids_begins_anew(
    table: Table, tmp_path: Path, kind: str, values: str, ids: str, least: int, row: list[float]
) -> None:
    file, _ = named(kind, tmp_path)
    interrupt(table, file, "--values", "A", "--ids", "I")
    table.rows = {}
    assert skipped(file, "--values", values, "--ids", ids) == 0
    assert table.rows == dict.fromkeys(range(least, least + COUNT), row)


@pytest.mark.parametrize("kind", [".parquet", ".safetensors"])
def test_a_resumed_import_of_the_same_goes_on(table: Table, tmp_path: Path, kind: str) -> None:
    file, _ = named(kind, tmp_path)
    interrupt(table, file, "--values", "B", "--ids", "J")
    assert skipped(file, "--values", "B", "--ids", "J") == (8 - bulk.IN_FLIGHT) * CHUNK
    assert table.rows == dict.fromkeys(range(1000, 1000 + COUNT), [2.0] * DIM)


@pytest.mark.parametrize("which", ["beside .npy", "for .npy", "for .safetensors"])
def test_a_resumed_import_whose_file_of_ids_changed_begins_anew(table: Table, tmp_path: Path, which: str) -> None:
    file, ids = named(".safetensors", tmp_path)
    options = ["--values", "A", "--ids", str(ids)]
    if which != "for .safetensors":
        file = tmp_path / "in.npy"
        np.save(file, matrix(1))
        options = options[2:]
    if which == "beside .npy":
        ids = ids.rename(tmp_path / "in.ids.npy")
        options = []
    interrupt(table, file, *options)
    assert skipped(file, *options) > 0
    interrupt(table, file, *options)
    known = ids.stat()
    np.save(ids, np.arange(COUNT) + 3000)
    os.utime(ids, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    table.rows = {}
    assert skipped(file, *options) == 0
    assert sorted(table.rows) == list(range(3000, 3000 + COUNT))


def test_a_resumed_import_with_another_file_of_ids_or_none_begins_anew(table: Table, tmp_path: Path) -> None:
    file, beside, other = tmp_path / "in.npy", tmp_path / "in.ids.npy", tmp_path / "other.npy"
    np.save(file, matrix(1))
    for path, first in ((beside, 100), (other, 200)):
        np.save(path, np.arange(COUNT) + first)
        os.utime(path, (0, 0))
    interrupt(table, file)
    assert skipped(file, "--ids", str(other)) == 0
    interrupt(table, file)
    beside.unlink()
    table.rows = {}
    assert skipped(file) == 0
    assert sorted(table.rows) == list(range(COUNT))


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize(
    ("verb", "work", "cure"),
    [
        ("import", "bring", "rows that had come are gone, import .* again"),
        ("export", "take", "rows of both, export it"),
    ],
)
def test_a_table_that_was_made_anew_meanwhile_is_no_success(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, work: str, cure: str, made: bool
) -> None:
    """made: or dropped, and not made again."""
    file = tmp_path / "rows.npy"
    np.save(file, matrix(1))

    def remade(*arguments: object) -> None:
        monkeypatch.setattr(table, "number", table.number + 1)
        monkeypatch.setattr(table, "table", lambda name: table if made else None)

    monkeypatch.setattr(bulk, work, remade)
    failed = CliRunner().invoke(app, [verb, "t", str(file)]).exception
    assert isinstance(failed, RequestError)
    assert re.search(
        f"'t' was made anew, or truncated, meanwhile: .*{cure}" if made else "no table is named 't' in epoch 1",
        str(failed),
    )


@pytest.mark.parametrize("gone", ["some at the begin", "the last"])
def test_an_import_does_not_go_on_where_its_rows_are_gone(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """As after slots were lost, and restored from an older checkpoint, or given up."""
    monkeypatch.setattr(cli_transfer, "CHECKED", 4)
    file = tmp_path / "rows.npy"
    np.save(file, 1 + np.arange(COUNT * DIM, dtype=np.float32).reshape(COUNT, DIM))
    interrupt(table, file)
    brought = dict(table.rows)
    for i in sorted(brought)[:2] if gone == "some at the begin" else sorted(brought):
        del table.rows[i]
    done = CliRunner().invoke(app, ["import", "t", str(file), "--resume"])
    assert isinstance(done.exception, RequestError)
    assert "rows that were imported from" in str(done.exception)
    assert "without --resume" in str(done.exception)
    table.rows = brought
    assert CliRunner().invoke(app, ["import", "t", str(file), "--resume"]).exit_code == 0
    assert sorted(table.rows) == list(range(COUNT))


@pytest.mark.parametrize("options", [["--values", "A", "--ids", "I"], ["--values", "B", "--ids", "I", "--resume"]])
def test_an_import_begun_anew_forgets_how_far_an_older_one_came(
    table: Table, tmp_path: Path, options: list[str]
) -> None:
    """Rows that the older one brought may have been pushed to, or overwritten by the other, since."""
    file, _ = named(".safetensors", tmp_path)
    interrupt(table, file, "--values", "A", "--ids", "I")
    interrupt(table, file, *options, at=3)
    assert skipped(file, "--values", "A", "--ids", "I") == 0
    assert table.rows == dict.fromkeys(range(COUNT), [1.0] * DIM)


@pytest.mark.parametrize("when", ["it is begun", "rows have come"])
def test_a_record_that_cannot_be_written_is_one_sentence(table: Table, tmp_path: Path, when: str) -> None:
    file, _ = named(".safetensors", tmp_path)
    state = tmp_path / "state" / "embring"
    options = ["--values", "A", "--ids", "I"]
    if when == "it is begun":
        state.parent.mkdir()
        state.write_text("in the way")
        failed = CliRunner().invoke(app, ["import", "t", str(file), *options]).exception
    else:
        (state / "imports").mkdir(parents=True)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # a write fails as it does on a full disk
        try:
            failed = CliRunner().invoke(app, ["import", "t", str(file), *options]).exception
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(failed, RequestError)
    assert re.fullmatch(rf"{state}/imports/.*\.json cannot be written: [A-Z].*", str(failed))
