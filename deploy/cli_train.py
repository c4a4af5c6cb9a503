"""`embring train`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli_common import JsonOption


def train(
    config: Annotated[Path, typer.Argument(help="Settings of the run, a TOML file.", metavar="CONFIG")],
    folder: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of the run: its ledger and its head. The default is runs/NAME."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Worker processes, instead of the settings'.")
    ] = None,
    undecided: Annotated[
        str,
        typer.Option(
            help="Batches on their way when a run stopped, long ago: refuse | skip | repeat.", metavar="CHOICE"
        ),
    ] = "refuse",
    as_json: JsonOption = False,
) -> None:
    """Train a model whose tables are in the running cluster.

    A run that was interrupted, or killed, goes on where it was when the same command is given again; each batch is
    applied once.

    Example:  embring train train.toml --run runs/first

    A settings file:

    ```toml
    name = "ctr"
    workers = 2
    batch = 256

    [data]                        # or: folder = "rows", as PreparedRows.save wrote it
    function = "mine:train_rows"  # of mine.py beside this file; returns PreparedRows
    arguments = { path = "train.parquet" }

    [head]
    kind = "deepfm"
    hidden = [64, 32]
    features = [
      { name = "user", table = "user", dim = 16 },
      { name = "item", table = "item", dim = 16 },
    ]

    [tables.user]                 # optional, for each table
    optimizer = { kind = "adagrad", lr = 0.05 }
    ```
    """
    from rich.console import Console

    from ps.errors import ConfigError
    from router.training import report_plain
    from router.training import train as run
    from router.training_config import TrainConfig
    from router.training_progress import ProgressBar, render

    if undecided not in ("refuse", "skip", "repeat"):
        raise ConfigError(f"--undecided is {undecided!r}; it must be refuse, skip or repeat")
    settings = TrainConfig.load(config)
    if workers is not None:
        settings = TrainConfig.from_plain({**settings.to_plain(), "workers": workers}, str(config), settings.folder)
    target = folder or Path("runs") / settings.name
    with ProgressBar(Console(stderr=True)) as bar:
        report = run(settings, target, undecided=undecided, watch=bar)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(report_plain(report)))
    else:
        Console().print(render(report))
