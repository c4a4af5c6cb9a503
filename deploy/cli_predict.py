"""`embring predict`: score a file of rows with a running router."""

import asyncio
import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

ROUTER = "EMBRING_ROUTER"
BATCH_ROWS = 256
SEPARATOR = "|"
"""Between the values of a multi-valued cell of a CSV file."""


def predict(
    file: Annotated[
        Path, typer.Argument(help="Rows: .jsonl (an object a line), .csv (with names above); - reads JSON lines.")
    ],
    model: Annotated[str, typer.Option(help="Name of the model.")],
    router: Annotated[
        str, typer.Option(envvar=ROUTER, help="Where the router speaks HTTP.", metavar="HOST:PORT")
    ] = "127.0.0.1:8000",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where scores go; standard output by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help='Print {"score": ...} a line.')] = False,
) -> None:
    """Score each row of a file with a model that a router serves; scores come in the order of the rows.

    A row names the model's inputs: whole numbers, numbers or text, and lists for multi-valued inputs (in a CSV file,
    values with | between them). Columns that the model does not take are ignored.

    Example:  embring predict rows.csv --model ctr --router 127.0.0.1:8000
    """
    from ps.errors import ConfigError

    rows = read_rows(file)
    scores = asyncio.run(_scores(router, model, rows))
    try:
        with _target(output) as out:
            for score in scores:
                out.write(json.dumps({"score": score}) + "\n" if as_json else f"{score:.9g}\n")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from None


@contextmanager
def _target(output: Path | None) -> Iterator[Any]:
    if output is None:
        yield sys.stdout
        return
    # Written beside its name, then renamed: a file of scores is whole or not there.
    new = output.with_name(f".{output.name}.new")
    with new.open("w") as file:
        yield file
    os.replace(new, output)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, at least one; ConfigError names the line that is malformed."""
    from ps.errors import ConfigError

    where = "standard input" if str(file) == "-" else str(file)
    try:
        if file.suffix == ".csv":
            with file.open(newline="", encoding="utf-8") as source:
                rows = list(_csv_rows(source, where))
        else:
            rows = _json_rows(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    if not rows:
        lacks = " below its line of names" if file.suffix == ".csv" else ": each line must be a JSON object"
        raise ConfigError(f"{where} has no rows{lacks}")
    return rows


def _json_rows(text: str, where: str) -> list[dict[str, Any]]:
    from ps.errors import ConfigError

    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where} line {number} is no JSON object")
        rows.append(row)
    return rows


def _csv_rows(source: Any, where: str) -> Iterator[dict[str, Any]]:
    from ps.errors import ConfigError

    reader = csv.DictReader(source)
    for row in reader:
        if None in row or None in row.values():
            raise ConfigError(f"{where} line {reader.line_num} has another number of cells than the line of names")
        yield row


def columns_of(rows: list[dict[str, Any]], inputs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of the model's inputs (as its metadata lists them) from rows; RequestError names row and input."""
    from ps.errors import RequestError
    from router.columns import Column
    from router.oip_codec import OFFSETS

    ragged = {one["name"].removesuffix(OFFSETS) for one in inputs if one["name"].endswith(OFFSETS)}
    columns = {}
    for one in inputs:
        name, datatype = one["name"], one["datatype"]
        if name.endswith(OFFSETS):
            continue
        cells = []
        for number, row in enumerate(rows, start=1):
            if name not in row:
                raise RequestError(f"row {number} has no {name!r}, which the model takes as {datatype}")
            cells.append(_cell(row[name], datatype, name in ragged, f"row {number}: {name}"))
        if name in ragged:
            columns[name] = Column.of_lists(cells, datatype)
        else:
            columns[name] = _flat(cells, datatype, name)
    return columns


def _flat(cells: list[Any], datatype: str, name: str) -> Any:
    import numpy as np

    from router.columns import BYTES, INT64, BytesColumn, Column

    if datatype == BYTES:
        return Column.of(BytesColumn.of(cells), what=name)
    return Column.of(np.array(cells, np.int64 if datatype == INT64 else np.float32), what=name)


def _cell(value: Any, datatype: str, ragged: bool, where: str) -> Any:
    """One cell as its datatype; text (from CSV) is read as a number where one is needed."""
    from ps.errors import RequestError
    from router.columns import BYTES, INT64

    if ragged:
        if isinstance(value, str):
            value = value.split(SEPARATOR) if value else []
        if not isinstance(value, list):
            raise RequestError(f"{where} is {value!r}; it must be a list")
        return [_cell(one, datatype, False, where) for one in value]
    try:
        if datatype == BYTES and isinstance(value, str):
            return value
        if datatype == INT64 and isinstance(value, str | int) and not isinstance(value, bool):
            number = int(value)
            if -(2**63) <= number < 2**63:
                return number
        if datatype not in (BYTES, INT64) and isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value) if value != "" else float("nan")
    except ValueError:
        pass
    raise RequestError(f"{where} is {value!r}; the model takes {datatype}")


async def _scores(router: str, model: str, rows: list[dict[str, Any]]) -> list[float]:
    from router.http_client import HttpClient

    scores: list[float] = []
    async with HttpClient(router) as client:
        inputs = (await client.metadata(model))["inputs"]
        columns = columns_of(rows, inputs)
        import numpy as np

        from router.columns import take_rows

        for start in range(0, len(rows), BATCH_ROWS):
            part = take_rows(columns, np.arange(start, min(start + BATCH_ROWS, len(rows))))
            scores += (await client.infer(model, part)).tolist()
    return scores
