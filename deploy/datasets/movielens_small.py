"""MovieLens ml-latest-small as GroupLens ships it: a folder with ratings.csv and movies.csv."""

import csv
from pathlib import Path

from deploy.datasets import Dataset, Targets, features_text, random_split
from deploy.datasets.ratings import Ratings, history
from ps.errors import ConfigError
from router.columns import Column


def load(folder: Path) -> Dataset:
    """The data set; ConfigError names a file that is missing or malformed."""
    ratings = Ratings.of(_rows(folder / "ratings.csv", 4), str(folder / "ratings.csv"))
    genres = {int(row[0]): row[2] for row in _rows(folder / "movies.csv", 3)}
    heldout = random_split(len(ratings.labels))
    columns = {
        "user": Column.of(ratings.users),
        "item": Column.of(ratings.items),
        "genres": Column.of([genres.get(i, "") for i in ratings.items.tolist()]),
        **history(ratings, ~heldout),
    }
    targets = Targets(auc_min=0.7, auc_max=0.9, logloss_max=0.65)
    text = features_text("movielens_small")
    return Dataset("movielens-small", columns, ratings.labels, heldout, text, targets, ratings.skipped)


def _rows(path: Path, width: int) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    for number, row in enumerate(rows, start=2):
        if len(row) != width:
            raise ConfigError(f"{path} line {number} has {len(row)} cells; it must have {width}")
    if not rows:
        raise ConfigError(f"{path} holds no rows")
    return rows
