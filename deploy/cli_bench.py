"""`embring bench`: measurements of embring beside its peers."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli_common import STYLE
from ps.errors import RequestError

HELP = """Measure embring beside its peers.

Example:  embring bench pull --shapes M --batches 32
"""

app = typer.Typer(help=HELP, no_args_is_help=True, **STYLE)

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write everything: figures, machine, versions, raw samples if any.")
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds of A/B/A/B; the median over them counts.")]
SecondsOption = Annotated[float, typer.Option(min=0.001, help="Seconds of each side in a round.")]


@app.command()
def pull(
    goals: Annotated[str, typer.Option(help="Of S1 (Redis), S2 (torch), S3 (Ray, gRPC), S13.")] = "S1,S2,S3,S13",
    shapes: Annotated[str, typer.Option(help="M: 26 tables, 214 ids a sample; O: one id each.")] = "M,O",
    batches: Annotated[str, typer.Option(help="Samples in a request.")] = "32,256,2048",
    rows: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 100_000,
    zipf: Annotated[float, typer.Option(min=0.0, max=10.0, help="Exponent of the ids' Zipf law.")] = 1.05,
    rounds: RoundsOption = 5,
    seconds: SecondsOption = 0.4,
    servers: Annotated[int, typer.Option(min=1, help="Server processes.")] = 3,
    placement: Annotated[str, typer.Option(help="Of the tables: sharded or whole.")] = "sharded",
    output: JsonOption = None,
) -> None:
    """Pooled pulls and round trips of a cluster of real processes, beside Redis, torch, Ray and gRPC.

    Example:  embring bench pull --shapes M --batches 32,256 --json pull.json
    """
    from benchmarks.suites import pull as suite
    from benchmarks.workloads import SHAPES

    settings = suite.Settings(
        goals=_chosen("--goals", goals, suite.GOALS),
        shapes=_chosen("--shapes", shapes, tuple(SHAPES)),
        batches=_numbers("--batches", batches),
        rows=rows,
        zipf=zipf,
        rounds=rounds,
        seconds=seconds,
        servers=servers,
        placement=_one("--placement", placement, ("sharded", "whole")),  # type: ignore[arg-type]
    )
    _measure(suite.run, settings, output)


@app.command()
def kernels(
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the store that pulls are measured on.")] = 2_000_000,
    large: Annotated[
        int, typer.Option(min=0, help="Rows of the stores filled to measure memory; 16900000 are 8 GiB.")
    ] = 1_000_000,
    rounds: RoundsOption = 5,
    seconds: SecondsOption = 0.4,
    output: JsonOption = None,
) -> None:
    """Lookup and pooling inside one process, beside torch and the memory's own limit; memory of a filled store.

    Example:  embring bench kernels --json kernels.json
    """
    from benchmarks.suites import kernels as suite

    settings = suite.Settings(rows=rows, large=large, rounds=rounds, seconds=seconds)
    _measure(suite.run, settings, output)


@app.command()
def checkpoint(
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the table; 4000000 are 1.1 GB.")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=1, max=4096, help="Floats in a row.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Saves and restores, each beside `cat`; medians count.")] = 3,
    servers: Annotated[int, typer.Option(min=1, help="Server processes.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the files lie; the present folder where left out.")] = None,
    output: JsonOption = None,
) -> None:
    """Save and restore beside `cat` on the same files, bytes of an increment, import and export beside plain reading.

    Example:  embring bench checkpoint --rows 4000000 --json checkpoint.json
    """
    from benchmarks.suites import checkpoint as suite

    if folder is not None:
        _check_folder("--folder", folder)
    place = str(folder.resolve()) if folder is not None else None
    _measure(suite.run, suite.Settings(rows, dim, rounds, servers, place), output)


@app.command()
def placement(
    shape: Annotated[str, typer.Option(help="M: 26 tables, 214 ids a sample; O: one id each.")] = "M",
    ids: Annotated[str, typer.Option(help="Ids a sample of each table, in place of a shape: 3,1,100.")] = "",
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows of a table at most; M and O have the published sizes. 100,000, or 20,000 (quick)."
        ),
    ] = None,
    dim: Annotated[int, typer.Option(min=1, max=4096, help="Floats of a row.")] = 64,
    zipf: Annotated[float, typer.Option(min=0.0, max=10.0, help="Exponent of the ids' Zipf law.")] = 1.05,
    batch: Annotated[int, typer.Option(min=1, max=65_536, help="Samples in a request.")] = 32,
    writes: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of pushes at the stated rate.")] = 0.1,
    placements: Annotated[
        str, typer.Option(help="Of sharded, whole, twofold, replicated, mixed.")
    ] = "sharded,whole,twofold,replicated,mixed",
    servers: Annotated[int, typer.Option(min=2, max=16, help="Server processes.")] = 3,
    budget: Annotated[
        float, typer.Option(min=0.0, help="Further copies of the mixed placement, as a part of all rows.")
    ] = 0.3,
    rate: Annotated[
        float,
        typer.Option(min=0.0, max=1e7, help="Samples a second of the open loop; 0: half of what the slowest one does."),
    ] = 0.0,
    arrivals: Annotated[str, typer.Option(help="Of the open loop: poisson or fixed.")] = "poisson",
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; medians over them count. 5, or 2 (quick).")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds of each phase in a round. 2, or 1 (quick).")
    ] = None,
    join: Annotated[bool, typer.Option(help="Have one more server join after the load.")] = True,
    kill: Annotated[bool, typer.Option(help="Kill a server at the end, under reads.")] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rows and rounds, where not given: within two minutes.")
    ] = False,
    output: JsonOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write one page that can be read without anything else.")
    ] = None,
) -> None:
    """Sharding against replication: one workload under five placements, measured on the wire, beside the arithmetic.

    Example:  embring bench placement --quick --html placement.html
    """
    from benchmarks.page import page
    from benchmarks.suites import placement as suite
    from benchmarks.tables import print_placement
    from benchmarks.workloads import SHAPES

    settings = suite.Settings(
        shape=_one("--shape", shape, tuple(SHAPES)),
        ids=_numbers("--ids", ids) if ids else (),
        rows=rows or (20_000 if quick else 100_000),
        dim=dim,
        zipf=zipf,
        batch=batch,
        writes=writes,
        placements=_chosen("--placements", placements, suite.NAMES),
        servers=servers,
        budget=budget,
        rate=rate,
        arrivals=_one("--arrivals", arrivals, ("poisson", "fixed")),
        rounds=rounds or (2 if quick else 5),
        seconds=seconds or (1.0 if quick else 2.0),
        join=join,
        kill=kill,
    )
    _measure(suite.run, settings, output, print_placement, html, page)


@app.command()
def push(
    optimizers: Annotated[str, typer.Option(help="Of adagrad, adam.")] = "adagrad,adam",
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 1_000_000,
    ids: Annotated[int, typer.Option(min=1, max=1_000_000, help="Distinct ids of a push.")] = 4096,
    dim: Annotated[int, typer.Option(min=1, max=4096, help="Floats of a row.")] = 64,
    zipf: Annotated[float, typer.Option(min=0.0, max=10.0, help="Exponent of the ids' Zipf law.")] = 1.05,
    servers: Annotated[int, typer.Option(min=2, max=16, help="Server processes.")] = 3,
    rounds: RoundsOption = 5,
    seconds: SecondsOption = 1.0,
    output: JsonOption = None,
) -> None:
    """Pushes with one and with two copies, beside torch's sparse optimizer step on the same rows in this process.

    Example:  embring bench push --optimizers adagrad --rows 200000
    """
    from benchmarks.suites import push as suite

    settings = suite.Settings(
        optimizers=_chosen("--optimizers", optimizers, tuple(suite.OURS)),
        rows=rows,
        ids=ids,
        dim=dim,
        zipf=zipf,
        servers=servers,
        rounds=rounds,
        seconds=seconds,
    )
    _measure(suite.run, settings, output)


@app.command()
def rebalance(
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the table.")] = 2_000_000,
    dim: Annotated[int, typer.Option(min=1, max=4096, help="Floats of a row.")] = 64,
    replicas: Annotated[int, typer.Option(min=1, max=8, help="Copies of each row.")] = 2,
    servers: Annotated[int, typer.Option(min=2, max=15, help="Server processes at first.")] = 3,
    load: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Part of what the cluster can answer, with and without the newcomer."),
    ] = 0.7,
    seconds: Annotated[float, typer.Option(min=1.0, help="Seconds before, between and after the changes.")] = 10.0,
    max_bandwidth: Annotated[
        int, typer.Option(min=0, metavar="MiB/s", help="What each server may spend on copying; 0: as is set.")
    ] = 0,
    output: JsonOption = None,
) -> None:
    """One server joins and leaves again under load: pulls and pushes before and meanwhile, and what is moved.

    Example:  embring bench rebalance --rows 500000 --seconds 5
    """
    from benchmarks.suites import rebalance as suite

    if replicas > servers:
        raise RequestError(f"--replicas is {replicas}; there are {servers} servers")
    settings = suite.Settings(
        rows=rows, dim=dim, replicas=replicas, servers=servers, load=load, seconds=seconds, bandwidth_mib=max_bandwidth
    )
    _measure(suite.run, settings, output)


@app.command()
def chaos(
    changes: Annotated[str, typer.Option(help="Of join, leave, failover, checkpoint.")] = (
        "join,leave,failover,checkpoint"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="How often each of them is gone through.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="No round begins later than this; 0: no limit.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the table.")] = 100_000,
    rate: Annotated[float, typer.Option(min=1.0, help="Requests a second meanwhile.")] = 100.0,
    output: JsonOption = None,
) -> None:
    """Processes killed and paused at the steps of joins, leaves, failovers and checkpoints, under load; broken promises
    counted.

    Example:  embring bench chaos --changes join --rounds 2
    """
    from benchmarks.suites import chaos as suite

    chosen = _chosen("--changes", changes, suite.CHANGES)
    settings = suite.Settings(changes=chosen, rounds=rounds, seconds=seconds, rows=rows, rate=rate)
    _measure(suite.run, settings, output)


def _chosen(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in found:
        if part not in allowed:
            raise RequestError(f"{option} has {part!r}; it may have {', '.join(allowed)}")
    if not found:
        raise RequestError(f"{option} is empty; it may have {', '.join(allowed)}")
    if len(set(found)) < len(found):
        raise RequestError(f"{option} is {text!r}; it may name each once")
    return found


def _one(option: str, text: str, allowed: tuple[str, ...]) -> str:
    first, *others = _chosen(option, text, allowed)
    if others:
        raise RequestError(f"{option} is {text!r}; it must be one of {', '.join(allowed)}")
    return first


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= 65_536:
            raise RequestError(f"{option} has {part!r}; it takes whole numbers from 1 to 65536")
    if not parts:
        raise RequestError(f"{option} is empty; it takes whole numbers from 1 to 65536")
    return tuple(int(part) for part in parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _measure(
    run: Callable[[Any, Callable[[str], None]], dict[str, Any]],
    settings: Any,
    output: Path | None,
    show: Callable[[dict[str, Any]], None] | None = None,
    html: Path | None = None,
    page: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Run a suite and print its figures (as a table where there is one); then write everything to `output`, and a page
    to `html`, which are looked at before anything is measured.

    Exit status 1 where results differed.
    """
    for path in (output, html):
        if path is not None:
            _check_file(path)
    if output is not None and html is not None and output.resolve() == html.resolve():
        raise RequestError(f"--json and --html both name {output}")
    result = run(settings, _say)
    if show is not None:
        show(result)
    else:
        shown = {key: value for key, value in result.items() if key not in ("raw_us", "settings")}
        print(json.dumps(shown, indent=1), flush=True)
    if output is not None:
        _write(output, json.dumps(result, indent=1) + "\n")
    if html is not None and page is not None:
        _write(html, page(result))
    if not result["equal"]:
        raise RequestError("results differ, or what was promised was broken: see the figures")


def _check_folder(what: str, folder: Path) -> None:
    if not folder.is_dir():
        raise RequestError(f"{what}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{what}: the folder {folder} may not be written to")


def _check_file(path: Path) -> None:
    """RequestError where a file cannot be written; it is left as it is."""
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder")
    if not path.exists():
        _check_folder(f"cannot write {path}", path.parent)
    elif not os.access(path, os.W_OK):
        raise RequestError(f"cannot write {path}: it may not be written to")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None
