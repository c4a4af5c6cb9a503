"""`embring bench`: measurements of embring beside its peers."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli_common import STYLE
from ps.errors import RequestError

HELP = """Measure embring beside its peers.

Example:  embring bench pull --shapes M --batches 32
"""

app = typer.Typer(help=HELP, no_args_is_help=True, **STYLE)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write figures, raw samples, machine and versions.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds of A/B/A/B; the median over them counts.")]
SecondsOption = Annotated[float, typer.Option(min=0.001, help="Seconds of each side in a round.")]


@app.command()
def pull(
    goals: Annotated[str, typer.Option(help="Of S1 (Redis), S2 (torch), S3 (Ray, gRPC), S13.")] = "S1,S2,S3,S13",
    shapes: Annotated[str, typer.Option(help="M: 26 tables, 214 ids a sample; O: one id each.")] = "M,O",
    batches: Annotated[str, typer.Option(help="Samples in a request.")] = "32,256,2048",
    rows: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 100_000,
    zipf: Annotated[float, typer.Option(min=0.0, help="Exponent of the ids' Zipf law.")] = 1.05,
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
        placement=_chosen("--placement", placement, ("sharded", "whole"))[0],  # type: ignore[arg-type]
    )
    _finish(suite.run(settings, _say), output)


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
    _finish(suite.run(settings, _say), output)


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

    place = str(folder.resolve()) if folder is not None else None
    _finish(suite.run(suite.Settings(rows, dim, rounds, servers, place), _say), output)


def _chosen(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in found:
        if part not in allowed:
            raise RequestError(f"{option} has {part!r}; it may have {', '.join(allowed)}")
    if not found:
        raise RequestError(f"{option} is empty; it may have {', '.join(allowed)}")
    return found


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


def _finish(result: dict[str, Any], output: Path | None) -> None:
    """Print the figures; write everything to `output`. Exit status 1 where results differed."""
    if output is not None:
        try:
            output.write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise RequestError(f"cannot write {output}: {error.strerror}") from None
    shown = {key: value for key, value in result.items() if key not in ("raw_us", "settings")}
    print(json.dumps(shown, indent=1))
    if not result["equal"]:
        raise RequestError("results of the sides differ; no figure of this run counts")
