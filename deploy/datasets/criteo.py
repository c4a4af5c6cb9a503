"""Raw Criteo rows: tab-separated label, I1..I13 whole numbers, C1..C26 hexadecimal strings, empty where missing."""

import gzip
from itertools import islice
from pathlib import Path

import numpy as np

from deploy.datasets import Dataset, Targets, features_text, random_split
from ps.errors import ConfigError
from router.columns import Column

NUMBERS, STRINGS = 13, 26
ROWS_MAX = 200_000
"""Rows read from the beginning of the file: a demo, not a benchmark."""


def load(path: Path) -> Dataset:
    """The first ROWS_MAX rows of a file, plain or .gz; ConfigError names the line that is malformed."""
    labels: list[float] = []
    cells: list[list[str]] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for number, line in enumerate(islice(file, ROWS_MAX), start=1):
                row = line.rstrip("\r\n").split("\t")
                if len(row) != 1 + NUMBERS + STRINGS or row[0] not in ("0", "1"):
                    raise ConfigError(f"{path} line {number} is no Criteo row: label 0 or 1, then 39 cells, by tabs")
                labels.append(float(row[0]))
                cells.append(row[1:])
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if len(set(labels)) < 2:
        raise ConfigError(f"{path} has {len(labels)} rows, all of one label; both are needed")
    columns = list(zip(*cells, strict=True))
    return Dataset(
        "criteo",
        {
            **{f"I{i + 1}": _numbers(columns[i], f"{path} I{i + 1}") for i in range(NUMBERS)},
            **{f"C{i + 1}": Column.of(list(columns[NUMBERS + i])) for i in range(STRINGS)},
        },
        np.array(labels, np.float32),
        random_split(len(labels)),
        features_text("criteo"),
        Targets(auc_min=0.0, auc_max=1.0, logloss_max=10.0),
    )


def _numbers(cells: tuple[str, ...], what: str) -> Column:
    try:
        return Column.of(np.array([cell or "nan" for cell in cells], np.float32))
    except ValueError as error:
        raise ConfigError(f"{what} holds no numbers: {error}") from None
