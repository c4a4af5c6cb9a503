"""`embring demo`."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from deploy.demo import Outcome


def demo(
    data: Annotated[
        str,
        typer.Option(
            help="movielens (fetched, 2 MB, for research use), movielens-small:DIR, criteo:PATH (raw TSV, also .gz), "
            "or synthetic (needs no network)."
        ),
    ] = "movielens",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure as JSON; - is standard output.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=3, help="Servers that hold each row.")] = 1,
    kill_server: Annotated[
        bool,
        typer.Option(
            "--kill-server", help="Do it again with kill -9 of a server halfway: AUCs must agree within 0.003."
        ),
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write label and scores of each held-out row, as JSON lines.")
    ] = None,
) -> None:
    """Train, serve and check a CTR model on a cluster on this machine, which is started and ended for it.

    Three servers and a router on local Ray, two asynchronous training workers. Every held-out row is scored over gRPC
    and REST and compared with plain torch over the same weights. Takes some two minutes on two cores; exit status 1
    where a figure is not what it must be.

    Example:  embring demo --data synthetic --json figures.json
    """
    if kill_server and replicas == 1:
        raise typer.BadParameter("one copy dies with its server: --kill-server needs --replicas 2 or 3")
    from ps.cluster import kernel_cache

    # Before numba is imported: servers, workers, router and this process share one cache of compiled kernels.
    os.environ["NUMBA_CACHE_DIR"] = str(kernel_cache())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _check(data, json_file, predictions)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from deploy.demo import run, run_killed

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bars:
        task: Any = None

        def watch(progress: Any, batches: int) -> None:
            nonlocal task
            if task is None:
                task = bars.add_task("  batches", total=batches)
            bars.update(task, completed=progress.totals.batches)

        carry_out = run_killed if kill_server else run
        outcome = carry_out(data, predictions, lambda line: console.print(f"[dim]•[/dim] {line}"), watch, replicas)
    text = json.dumps(asdict(outcome), indent=2)
    if json_file is not None and str(json_file) == "-":
        print(text)
    else:
        if json_file is not None:
            json_file.write_text(text + "\n")
        Console().print(summary(outcome))
    for failure in outcome.failures:
        print(f"error: {failure}", file=sys.stderr)
    if not outcome.ok:
        raise typer.Exit(1)


def _check(data: str, *files: Path | None) -> None:
    """Refuse a data set that there is none of, and before two minutes of work what could not be written after them."""
    from deploy.datasets import check_source
    from ps.errors import ConfigError

    check_source(data)
    for file in files:
        if file is not None and str(file) != "-" and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ConfigError(f"{file} cannot be written: {file.absolute().parent} is no folder, or it is one itself")


def _killed(outcome: "Outcome") -> str:
    apart = f"{outcome.auc_difference:.4f}" if outcome.auc_difference is not None else "?"
    return f"{outcome.killed}; AUC {apart} from the {outcome.undisturbed_auc} of an undisturbed run"


def summary(outcome: "Outcome") -> Any:
    """The figures as text for a terminal."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    per_server = ", ".join(f"{rows:,}" for rows in outcome.rows_per_server)
    skipped = f", {outcome.rows_skipped:,} malformed left out" if outcome.rows_skipped else ""
    latency = ", ".join(f"{door} {ms['p50']:.1f} / {ms['p99']:.1f}" for door, ms in outcome.latency_ms.items())
    compared = f"gRPC {outcome.parity_rows_grpc:,} and REST {outcome.parity_rows_rest:,}"
    for name, text in (
        ("data", f"{outcome.dataset}: {outcome.train_rows:,} rows trained, {outcome.heldout_rows:,} held out{skipped}"),
        ("quality", f"AUC {outcome.auc:.4f}, log-loss {outcome.logloss:.4f} on the held-out rows"),
        *([("killed", _killed(outcome))] if outcome.killed else []),
        ("training", f"{outcome.train_rows_per_s:,.0f} rows/s with {outcome.workers} asynchronous workers"),
        ("tables", f"{outcome.rows:,} rows on {outcome.servers} servers ({per_server})"),
        ("scores", f"{compared} compared with plain torch: largest difference {outcome.parity_max_abs_diff:.1e}"),
        ("latency", f"{latency} ms (p50 / p99, one row a request)"),
        ("time", f"{outcome.seconds.get('total', 0.0):.0f} s; {outcome.processes_left} processes left"),
        ("result", "everything as it must be" if outcome.ok else "NOT as it must be"),
    ):
        table.add_row(name, text)
    return table
