"""`embring table import|export`: rows of a table from files of other tools, and into them."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli_checkpoint import access_to, progress, servers_of
from deploy.cli_common import JsonOption, running

Table = Annotated[str, typer.Argument(metavar="NAME", help="The table.")]
File = Annotated[Path, typer.Argument(help="A .npy, .safetensors or .parquet file.")]

CHECKED = 4096
"""Rows at each end of what an interrupted import brought, which are compared with the file."""


def import_rows(
    name: Table,
    file: File,
    values: Annotated[
        str | None, typer.Option(help="Tensor or column that holds the rows; 'row' in Parquet, else the only matrix.")
    ] = None,
    ids: Annotated[
        str | None, typer.Option(help="Tensor, column or .npy file of the ids; 'ids' or 'id', else rows count from 0.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted import of it stopped.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Overwrite rows of a table with those of a file; the others stay. Optimizer state starts anew.

    Nothing is written where the width is another, a column is missing, or an id comes twice.

    Example:  embring table import item embedding.safetensors --values item.weight
    """
    from ps.bulk import bring, check_dim, open_source
    from ps.client import connect

    view = _view(running())
    source = open_source(file, values, ids)
    with connect() as client, progress("importing") as counter:
        check_dim(file, source, name, client.describe(name).dim)
        number = _number(view, name)
        record = _Record(file, values, ids, view.cluster, number)
        start = record.read() if resume else 0
        _check_there(client, name, file, source, start)
        if not start:  # else, were this one killed at once, a resume would believe how far an older one came
            record.remove()
        bring(client, name, file, source, start, record, counter)
        _check_same(name, number, f"rows that had come are gone, import {file} again")
        record.remove()
    told = {"table": name, "rows": counter.rows, "skipped": start, "bytes": counter.bytes}
    already = f" ({start:,} were there already)" if start else ""
    print(json.dumps(told) if as_json else f"{name}: {counter.rows:,} rows of {file}{already}")


def export_rows(
    name: Table,
    file: File,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted export stopped.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write ids and rows of a table into a file, in no order. Optimizer state is not in it: that is in a checkpoint.

    .npy gives FILE.npy and FILE.ids.npy; .safetensors the tensors "rows" and "ids"; .parquet the columns "id", "row".
    Rows that are pushed meanwhile come as they were at some moment of it.

    Example:  embring table export item item.parquet
    """
    from ps.bulk import Export, take
    from ps.client import connect

    view = _view(running())
    with connect() as client, progress("exporting") as counter:
        dim = client.describe(name).dim
        number = _number(view, name)
        export = Export(file, view.cluster, number, dim, resume)
        take(client, name, export, counter)
        _check_same(name, number, f"{file} may hold rows of both, export it again")
    told = {"table": name, "rows": export.mark.rows, "file": str(file), "resumed": export.resumed}
    print(json.dumps(told) if as_json else f"{file}: {export.mark.rows:,} rows of {name}")


def _check_same(name: str, number: int, cure: str) -> None:
    """Raise RequestError where a table has been made anew, or was truncated, since it had this number."""
    from ps.errors import RequestError

    if _number(_view(running()), name) != number:
        raise RequestError(f"table {name!r} was made anew, or truncated, meanwhile: {cure}")


def _check_there(client: Any, table: str, file: Path, source: Any, count: int) -> None:
    """Raise RequestError unless the first `count` rows are still as in the file, by some at their begin and their end:
    slots that were lost since, and restored or given up, hold some of any thousand ids."""
    from ps.bulk import TIMEOUT_S
    from ps.errors import RequestError

    for at in {0, max(0, count - CHECKED)} if count else ():
        rows = next(iter(source.rows(at, CHECKED)))[: count - at]
        there = client.pull(table, source.ids[at : at + len(rows)], timeout=TIMEOUT_S)
        if wrong := int((there != rows).any(axis=1).sum()):
            raise RequestError(
                f"{wrong} of {len(rows)} rows that were imported from {file} are no longer as in it: import it again "
                "without --resume"
            )


def _view(runtime: Any) -> Any:
    """The newest view of the running cluster."""
    from ps.checkpoint.reach import newest_view

    return newest_view(servers_of(runtime), access_to(runtime))


def _number(view: Any, name: str) -> int:
    """What tells a table from later ones of its name. Raises RequestError where there is none."""
    from ps.errors import RequestError

    table = view.table(name)
    if table is None:
        raise RequestError(f"no table is named {name!r} in epoch {view.epoch}")
    return int(table.number)


def _known(file: Path) -> dict[str, Any]:
    """What tells a file from another, and from itself when it has changed."""
    known = file.resolve().stat()
    return {"file": str(file.resolve()), "size": known.st_size, "changed": known.st_mtime_ns}


class _Record:
    """How many rows of a file an import has brought, in the user's state folder, until it ends."""

    def __init__(self, file: Path, values: str | None, ids: str | None, cluster: int, table: int) -> None:
        import xxhash

        from ps.bulk import ids_file
        from ps.cluster import state_folder

        beside = ids_file(file, ids)
        self._of = {
            **_known(file), "values": values, "ids": _known(beside) if beside else ids,
            "table": table, "cluster": cluster,
        }  # fmt: skip
        digest = xxhash.xxh64_hexdigest(f"{file.resolve()}\0{table}".encode())
        self._path = state_folder() / "imports" / f"{digest}.json"

    def read(self) -> int:
        """Rows that are there already; 0 where the file, what of it was chosen, or the table was another."""
        try:
            plain = json.loads(self._path.read_bytes())
            return int(plain["rows"]) if plain["of"] == self._of else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def write(self, rows: int) -> None:
        """So many rows are there. Raises RequestError where that cannot be written."""
        from ps.bulk import writing

        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = self._path.with_suffix(".new")
            temporary.write_text(json.dumps({"of": self._of, "rows": rows}))
            os.replace(temporary, self._path)

    def remove(self) -> None:
        """The import has ended."""
        from ps.bulk import writing

        with writing(self._path):
            self._path.unlink(missing_ok=True)
