"""The settings of a training run, read from TOML.

name = "adult"
epochs = 1
batch = 128
workers = 2

[data]                                # or folder = "rows", as `PreparedRows.save` wrote it
function = "adult:train_rows"         # module:function, looked for beside this file too
arguments = { path = "adult.parquet" }

[head]
kind = "deepfm"
hidden = [64, 32]
features = [{ name = "user", table = "user", dim = 16 }, { name = "item", table = "item", dim = 16 }]

[tables.user]                         # optional; dim comes from the head
optimizer = { kind = "adagrad", lr = 0.05 }

[dense]
optimizer = { kind = "adam", lr = 0.001 }
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dense_head import HeadError, HeadSpec
from ps.errors import ConfigError, RequestError
from ps.spec import TableSpec
from router.settings import build, read_toml, setting
from router.training_data import Batches, Dataset, PreparedRows
from router.training_dense import DENSE_DIM


def section(doc: str) -> Any:
    """A field that holds a table of settings, empty by default."""
    return field(default_factory=dict, metadata={"doc": doc, "low": None, "high": None, "choices": ()})


@dataclass(frozen=True)
class DataSource:
    """Where batches come from: a folder of prepared rows, or a function that returns PreparedRows or any Dataset."""

    folder: str = setting("", "Folder that PreparedRows.save wrote; relative to the settings' own folder.")
    function: str = setting("", "module:function; called in every worker, with `arguments` by name.")
    arguments: Mapping = section("Arguments of the function, as plain data.")


@dataclass(frozen=True)
class DenseSettings:
    """[dense]: the tables that hold the head's weights."""

    optimizer: Mapping = section("Optimizer of the head's weights, by kind and settings; none is Adam(lr=0.001).")
    replicas: int = setting(1, "Owners of each row of the head's weights; the cluster's default where left out.", 1, 64)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes, and how it is carried out."""

    name: str = setting(..., "Name of the run; its dense weights are tables NAME.dense and NAME.buffers.")
    head: Mapping = setting(..., "The head, as dense_head.HeadSpec has it.")
    data: Mapping = setting(..., "Training rows: see DataSource.")
    test: Mapping = section("Rows to evaluate on when training is over; none by default.")
    tables: Mapping = section("By table: optimizer, initializer, seed, placement, replicas, as ps.TableSpec has them.")
    dense: Mapping = section("See DenseSettings.")
    epochs: int = setting(1, "Passes over the rows.", 1, 100_000)
    batch: int = setting(256, "Rows of a batch. More make fewer, better filled pulls, and fewer steps.", 1, 2**20)
    shuffle: bool = setting(True, "Whether rows are shuffled, anew in each epoch.")
    drop_last: bool = setting(False, "Whether a last, smaller batch of an epoch is left out.")
    seed: int = setting(0, "Of the shuffling and of the head's first weights.", 0, 2**31 - 1)
    workers: int = setting(2, "Worker processes. More train faster while there are cores, on staler weights.", 1, 256)
    prefetch: int = setting(1, "Batches pulled ahead. 0 pulls only after the last push: slower, never stale.", 0, 16)
    threads: int = setting(1, "Threads of torch in each worker.", 1, 256)
    timeout_s: float = setting(120.0, "Seconds that a pull or push may take, its retries included.", 1, 600)
    restarts_max: int = setting(5, "Restarts of killed workers without any progress between them.", 0, 1000)
    folder: Path = Path()
    """Where relative paths begin: the folder of the settings' file."""

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """From a TOML file; ConfigError names the key, the value and what is allowed."""
        source = Path(path)
        return cls.from_plain(read_toml(source), str(source), source.resolve().parent)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], where: str = "training", folder: Path = Path()) -> "TrainConfig":
        """From plain data, as TOML gives it; ConfigError names `where`, the key and what is allowed."""
        if "folder" in plain:
            raise ConfigError(f"{where} has an unknown key 'folder'; paths begin in the folder of the file")
        config = replace(build(cls, plain, where), folder=folder)
        config.specs()
        for feature in config.spec.features:
            if feature.pooling == "max":
                raise ConfigError(
                    f"[head]: pooling of feature {feature.name!r} is 'max', which does not say whose row won; "
                    "training takes sum or mean"
                )
        for name in ("data", "test"):
            if name == "data" or config.test:
                config.source(name)
        return config

    @property
    def spec(self) -> HeadSpec:
        """The head; ConfigError where it is wrong."""
        try:
            return HeadSpec.from_plain(self.head)
        except HeadError as error:
            raise ConfigError(f"[head]: {error}") from None

    def specs(self) -> list[TableSpec]:
        """Tables of the features, then of the dense weights; ConfigError or RequestError where one is wrong."""
        dims = {feature.table: feature.dim for feature in self.spec.features}
        for table, plain in self.tables.items():
            if table not in dims:
                raise ConfigError(f"[tables.{table}] is no table of the head, which takes {', '.join(dims)}")
            if not isinstance(plain, Mapping) or "dim" in plain or "name" in plain:
                raise ConfigError(f"[tables.{table}] is {plain!r}; it must be settings, without dim and name")
        sparse = [TableSpec.from_plain({**self.tables.get(t, {}), "name": t, "dim": d}) for t, d in dims.items()]
        return sparse + self.dense_specs()

    def dense_specs(self) -> list[TableSpec]:
        """Tables of the head's weights and buffers."""
        settings = build(DenseSettings, self.dense, "[dense]")
        zeros = {"low": 0.0, "high": 0.0}
        common = {"dim": DENSE_DIM, "initializer": zeros, "replicas": settings.replicas}
        optimizer = settings.optimizer or {"kind": "adam", "lr": 0.001}
        return [
            TableSpec.from_plain({**common, "name": f"{self.name}.dense", "optimizer": optimizer}),
            TableSpec.from_plain({**common, "name": f"{self.name}.buffers", "optimizer": {"kind": "sgd", "lr": 1.0}}),
        ]

    def source(self, name: str) -> DataSource:
        """[data] or [test], checked."""
        source = build(DataSource, getattr(self, name), f"[{name}]")
        if bool(source.folder) == bool(source.function):
            raise ConfigError(f"[{name}] must have either a folder or a function")
        if source.function and ":" not in source.function:
            raise ConfigError(f"[{name}]: function is {source.function!r}; it must be module:function")
        return source

    def dataset(self) -> Dataset:
        """The training batches."""
        loaded = self._loaded("data")
        if isinstance(loaded, PreparedRows):
            self._check_rows(loaded, "[data]")
            return Batches(loaded, self.batch, self.shuffle, self.seed, self.drop_last)
        if not hasattr(loaded, "__len__") or not callable(getattr(loaded, "batch", None)):
            raise ConfigError(
                f"[data]: {self.source('data').function} returned {type(loaded).__name__}; it must return "
                "PreparedRows, or a Dataset with len() and batch(epoch, index)"
            )
        return loaded

    def test_rows(self) -> PreparedRows:
        """The rows of [test]."""
        loaded = self._loaded("test")
        if not isinstance(loaded, PreparedRows):
            raise ConfigError(
                f"[test]: {self.source('test').function} returned {type(loaded).__name__}; it must return PreparedRows"
            )
        self._check_rows(loaded, "[test]")
        return loaded

    def _check_rows(self, rows: PreparedRows, where: str) -> None:
        spec = self.spec
        if rows.bags.keys() != spec.dims.keys() or rows.dense.shape[1] != spec.dense:
            raise ConfigError(
                f"{where} gives features {', '.join(sorted(rows.bags))} and {rows.dense.shape[1]} dense columns; "
                f"the head takes {', '.join(sorted(spec.dims))} and {spec.dense}"
            )

    def _loaded(self, name: str) -> Any:
        source = self.source(name)
        if source.folder:
            return PreparedRows.load(self.folder / source.folder)
        module, _, function = source.function.partition(":")
        if str(self.folder.resolve()) not in sys.path:
            sys.path.append(str(self.folder.resolve()))
        try:
            loaded = getattr(import_module(module), function)
        except SyntaxError as error:
            where = f"{error.filename} line {error.lineno}"
            raise ConfigError(f"[{name}]: module {module!r} has a syntax error in {where}: {error.msg}") from None
        except Exception as error:  # whatever the module does
            raise ConfigError(f"[{name}]: function {source.function!r} cannot be imported: {_cause(error)}") from None
        try:
            rows = loaded(**source.arguments)
            return rows.check() if isinstance(rows, PreparedRows) else rows
        except Exception as error:
            raise RequestError(f"[{name}]: {source.function} failed: {_cause(error)}") from error

    def fingerprint(self) -> str:
        """Of what a run computes: two settings with one fingerprint apply the same batches in the same order."""
        carried_out = {"prefetch", "threads", "timeout_s", "restarts_max", "test", "folder"}
        plain = {key: value for key, value in asdict(self).items() if key not in carried_out}
        text = json.dumps(plain, sort_keys=True, default=os.fspath)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_plain(self) -> dict[str, Any]:
        """What `from_plain` takes."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def _cause(error: Exception) -> str:
    """An exception's type and message, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
