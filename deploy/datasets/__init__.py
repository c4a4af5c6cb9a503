"""Data sets of the demo: real ones, fetched or read where they lie, and a synthetic one. None is part of embring.

    dataset = load("movielens")              # or "movielens-small:DIR", "criteo:PATH", "synthetic"

A data set is columns, labels and a split, and the features.toml that a model of it uses.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ps.errors import ConfigError
from router.columns import Column, take_rows
from router.features import FeaturePrep

HELDOUT_SHARE = 0.2

_SOURCES = {
    # name: (module, whether it needs ":PATH")
    "movielens": ("movielens", False),
    "movielens-small": ("movielens_small", True),
    "criteo": ("criteo", True),
    "synthetic": ("synthetic", False),
}


@dataclass(frozen=True)
class Targets:
    """What a model of the data set must reach on its held-out rows; beyond auc_max a label has leaked."""

    auc_min: float
    auc_max: float
    logloss_max: float
    heldout_rows_min: int = 1
    rows_min: int = 1


@dataclass(frozen=True)
class Dataset:
    """n rows: raw columns, labels float32[n] of 0 and 1, heldout bool[n], and the text of a features.toml.

    skipped: rows of the source that are malformed and were left out; readers refuse a source with more than a few.
    """

    name: str
    columns: dict[str, Column]
    labels: NDArray[np.float32]
    heldout: NDArray[np.bool_]
    features_toml: str
    targets: Targets
    skipped: int = 0

    @property
    def features(self) -> FeaturePrep:
        """Its features, ready to prepare."""
        import tomllib

        return FeaturePrep.from_plain(tomllib.loads(self.features_toml))

    def split(self, heldout: bool) -> tuple[dict[str, Column], NDArray[np.float32]]:
        """(columns, labels) of the held-out rows, or of the rest."""
        rows = np.flatnonzero(self.heldout == heldout)
        return take_rows(self.columns, rows), self.labels[rows]


def check_source(source: str) -> tuple[str, str]:
    """(name, path) of a data set; ConfigError, in one sentence, where there is none of the name."""
    name, colon, path = source.partition(":")
    if name not in _SOURCES:
        raise ConfigError(f"data set {source!r} is unknown; there is {', '.join(_SOURCES)}")
    needs_path = _SOURCES[name][1]
    if needs_path != bool(path) or (colon and not path):
        raise ConfigError(f"data set {source!r} {'needs' if needs_path else 'takes no'} path: give {usage(name)}")
    return name, path


def load(source: str, cache: Path | None = None) -> Dataset:
    """The data set that `source` names; ConfigError, in one sentence, where it cannot be had.

    cache: folder for what is fetched; None is ~/.cache/embring/data.
    """
    name, path = check_source(source)
    module, needs_path = _SOURCES[name]
    reader = import_module(f"deploy.datasets.{module}")
    if needs_path:
        return reader.load(Path(path).expanduser())
    return reader.load(cache or Path.home() / ".cache" / "embring" / "data") if name == "movielens" else reader.load()


def usage(name: str) -> str:
    """How a data set is named on a command line."""
    return f"{name}:PATH" if _SOURCES[name][1] else name


def features_text(name: str) -> str:
    """The features.toml that lies beside the readers."""
    return (Path(__file__).parent / f"{name}.features.toml").read_text()


def random_split(n: int, seed: int = 0) -> NDArray[np.bool_]:
    """bool[n]: a random fifth is held out; the same for the same n and seed."""
    heldout = np.zeros(n, np.bool_)
    heldout[np.random.default_rng(seed).permutation(n)[: int(n * HELDOUT_SHARE)]] = True
    return heldout
