"""`embring checkpoint save|restore|list`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli_common import STYLE, JsonOption, reachable, running

HELP = """Save, restore and list checkpoints.

Example:  embring checkpoint save backups
"""

app = typer.Typer(help=HELP, no_args_is_help=True, **STYLE)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds checkpoints.")]
NameOption = Annotated[str | None, typer.Option(help="Name of the checkpoint in DIR.")]


@app.command()
def save(folder: Folder, name: NameOption = None, as_json: JsonOption = False) -> None:
    """Save every row into a new checkpoint of DIR, named by the time unless --name says otherwise. Pushes go on.

    Asks the servers alone: it works though controller and Ray head are dead.

    Example:  embring checkpoint save backups
    """
    from hashring.view import Server
    from ps.checkpoint.move import newest_view
    from ps.checkpoint.move import save as save_rows

    runtime = reachable()
    access = access_to(runtime)
    view = newest_view([Server("", 0, "", "", (address,)) for address in runtime.addresses], access)
    with progress("saved") as report:
        moved = save_rows(folder, view, access, runtime.fingerprint, name=name, report=report)
    if as_json:
        print(json.dumps({**vars(moved), "path": str(moved.path)}))
    else:
        print(f"{moved.path}: {moved.rows:,} rows of {moved.tables} tables, {moved.bytes:,} bytes")


@app.command()
def restore(
    folder: Folder,
    name: NameOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Drop the cluster's tables first.")] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on though tables made later lose rows in the lost slots.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring back the newest checkpoint of DIR: all of it into an empty cluster, or the lost slots of its own cluster.

    Example:  embring checkpoint restore backups --name before
    """
    from ps.checkpoint.move import restore as restore_rows
    from ps.cluster import controller

    runtime = running()
    access = access_to(runtime)
    with controller(runtime) as ask, progress("restored") as report:
        moved = restore_rows(
            folder, ask, access, name=name, replace_tables=replace, accept_loss=accept_loss, report=report
        )
    if as_json:
        print(json.dumps({**vars(moved), "path": str(moved.path)}))
    else:
        print(f"{moved.path}: {moved.rows:,} rows in {moved.slots:,} slots are back")


@app.command("list")
def list_checkpoints(folder: Folder, as_json: JsonOption = False) -> None:
    """List the checkpoints of DIR, oldest first.

    Example:  embring checkpoint list backups
    """
    from ps.checkpoint.files import checkpoints

    known = checkpoints(folder)
    if as_json:
        keys = ("name", "created", "cluster", "epoch", "rows", "bytes")
        tables = [{"tables": [t[1] for t in m.tables]} for m in known]
        print(json.dumps([{k: getattr(m, k) for k in keys} | t for m, t in zip(known, tables, strict=True)]))
        return
    for m in known:
        print(f"{m.name}  {m.created}  {m.rows:,} rows  {m.bytes:,} bytes  {len(m.tables)} tables  epoch {m.epoch}")
    if not known:
        print(f"there is no checkpoint in {folder}")


def access_to(runtime: Any) -> Any:
    """How this user reaches the servers of a running cluster: ps.checkpoint.move.Access."""
    from ps.checkpoint.move import Access
    from ps.fabric.tls import trusting
    from ps.runtime import read_token

    return Access(read_token(runtime.token_path), trusting(runtime.tls_ca))


@contextmanager
def progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A counter of rows and bytes on standard error, where that is a terminal."""
    from ps.checkpoint.move import Counter

    if not sys.stderr.isatty():
        yield Counter(lambda rows, size: None)
        return
    from rich.console import Console

    with Console(stderr=True).status("connecting") as status:
        yield Counter(lambda rows, size: status.update(f"{verb} {rows:,} rows, {size / 2**20:,.0f} MiB"))
