"""`embring checkpoint save|restore|list|verify|prune`."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli_common import STYLE, JsonOption, reachable, running, say

HELP = """Save, restore, list and verify checkpoints.

DIR is a folder, or a place that fsspec knows: s3://bucket/path with the package s3fs, and so on.

Example:  embring checkpoint save backups --incremental
"""

app = typer.Typer(help=HELP, no_args_is_help=True, **STYLE)
Folder = Annotated[str, typer.Argument(metavar="DIR", help="Where checkpoints lie: a folder or an fsspec URL.")]
NameOption = Annotated[str | None, typer.Option(help="Name of the checkpoint in DIR.")]


@app.command()
def save(
    folder: Folder,
    name: NameOption = None,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Only what changed since the newest checkpoint, if there is one.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Then remove all but so many full ones, each with its increments.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Note the newest version of each model of this repository.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Save every row, or what changed, into a new checkpoint of DIR, named by the time unless --name says otherwise.

    Pushes and pulls go on. Asks the servers alone: it works though controller and Ray head are dead.

    Example:  embring checkpoint save backups --incremental --keep 3
    """
    from ps.checkpoint.models import newest_versions
    from ps.checkpoint.retention import prune_after
    from ps.checkpoint.save import save as save_rows
    from ps.checkpoint.storage import Storage

    runtime, storage = reachable(), Storage(folder).lasting()
    with progress("saving") as counter:
        saved = save_rows(
            storage, servers_of(runtime), access_to(runtime), runtime.fingerprint,
            name=name, incremental=incremental, models=newest_versions(models) if models else None, counter=counter,
        )  # fmt: skip
    what = f"an increment to {saved.parent}: " if saved.parent else ""
    if not as_json:  # before anything else can fail, or be interrupted
        print(f"{saved.path}: {what}{saved.rows:,} rows, {saved.bytes:,} bytes in {saved.seconds:.1f} s", flush=True)
    after = prune_after(storage, keep, runtime.cluster) if keep else {"pruned": [], "prune_error": ""}
    if as_json:
        print(json.dumps({**vars(saved), **after}))
    else:
        for gone in after["pruned"]:
            print(f"removed {gone}")
    if after["prune_error"]:
        say(f"error: {after['prune_error']}")
        raise typer.Exit(1)


@app.command()
def restore(
    folder: Folder,
    name: NameOption = None,
    table: Annotated[
        list[str] | None, typer.Option(help="Only this table (again for more), into any running cluster.")
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Drop the cluster's tables first; with --table, replace those at the end."),
    ] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on though tables made later lose rows in the lost slots.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring back the newest checkpoint of DIR: all of it into an empty cluster, or the slots that a cluster has lost.

    An increment is restored with all that it stands on. Without --name, damaged manifests are named and passed over.
    The number of servers may be another. With --table the rest of the cluster goes on, and a table of that name serves
    until the restored one takes its place.

    Example:  embring checkpoint restore backups --name before --table item --replace
    """
    from ps.checkpoint.restore import restore as restore_rows
    from ps.checkpoint.storage import Storage
    from ps.cluster import controller

    runtime = running()
    access = access_to(runtime)
    with controller(runtime) as ask, progress("restoring") as counter:
        done = restore_rows(
            Storage(folder), ask, access, name=name, replace_tables=replace, accept_loss=accept_loss,
            tables=table or (), counter=counter,
        )  # fmt: skip
    if as_json:
        print(json.dumps(vars(done)))
    else:
        print(f"{done.path}: {done.rows:,} rows in {done.slots:,} slots of {done.tables} tables are back")
        if done.models:
            print(f"they go with the models {named_versions(done.models)}")


@app.command("list")
def list_checkpoints(folder: Folder, as_json: JsonOption = False) -> None:
    """List the checkpoints of DIR, oldest first; an increment names what it stands on, and tells where that is missing.

    Ends with status 1 where one is damaged, and names it on standard error. `verify` reads more than manifests.

    Example:  embring checkpoint list backups
    """
    from ps.checkpoint.files import survey
    from ps.checkpoint.retention import severed
    from ps.checkpoint.storage import Storage

    storage = Storage(folder).existing()
    known, broken = survey(storage)
    if as_json:
        keys = ("name", "created", "cluster", "epoch", "parent", "rows", "bytes", "models")
        tables = [{"tables": [t[1] for t in m.tables]} for m in known]
        print(json.dumps([{k: getattr(m, k) for k in keys} | t for m, t in zip(known, tables, strict=True)]))
    else:
        lacking = {m.name for m in severed(storage, known)}
        for m in known:
            kind = (f"+ {m.parent}" if m.parent else "full") + (f"  {named_versions(m.models)}" if m.models else "")
            kind += "  cannot be restored: its chain lacks a checkpoint" if m.name in lacking else ""
            print(f"{m.name}  {m.created[:19]}  {m.rows:,} rows  {m.bytes:,} bytes  {len(m.tables)} tables  {kind}")
        if not known and not broken:
            print(f"there is no checkpoint in {folder}")
    for error in broken:
        say(f"error: {error}")
    if broken:
        raise typer.Exit(1)


@app.command()
def verify(folder: Folder, name: NameOption = None, as_json: JsonOption = False) -> None:
    """Read every byte of DIR's checkpoints, or of one and what it stands on, and compare checksums.

    Ends with status 1 where a file is damaged, too short or missing, and names each, and what stands on it.

    Example:  embring checkpoint verify backups
    """
    from ps.checkpoint.retention import verify as verify_files
    from ps.checkpoint.storage import CheckpointError, Storage

    with progress("verifying") as counter:
        found = list(verify_files(Storage(folder).existing(), name, counter))
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    bad = [c for c in found if c.problems]
    if as_json:
        print(json.dumps([{**vars(c)} for c in found]))
    else:
        for c in found:
            for problem in c.problems:
                print(f"{c.name}: {problem}")
        print(f"{len(found) - len(bad)} of {len(found)} checkpoints are sound, {counter.bytes:,} bytes read")
    if bad:
        raise typer.Exit(1)


@app.command()
def prune(
    folder: Folder,
    keep: Annotated[int, typer.Option(min=1, help="How many full checkpoints stay, each with its increments.")],
    as_json: JsonOption = False,
) -> None:
    """Remove old checkpoints of the running cluster, whole chains only, and what killed saves left a day ago.

    Increments go too where a checkpoint that they stand on is missing, or another one: they can restore nothing.

    Example:  embring checkpoint prune backups --keep 3
    """
    from ps.checkpoint.retention import prune as prune_chains
    from ps.checkpoint.storage import Storage

    gone = prune_chains(Storage(folder).existing(), keep, running().cluster)
    print(json.dumps(gone) if as_json else "\n".join(f"removed {name}" for name in gone) or "nothing to remove")


def named_versions(models: Mapping[str, str]) -> str:
    """For people: name and version of each model."""
    return ", ".join(f"{name} {version}" for name, version in models.items())


def servers_of(runtime: Any) -> list[Any]:
    """The servers that the runtime file names, by address alone."""
    from hashring.view import Server

    return [Server("", 0, "", "", (address,)) for address in runtime.addresses]


def access_to(runtime: Any) -> Any:
    """How this user reaches the servers of a running cluster: ps.checkpoint.reach.Access."""
    from ps.checkpoint.reach import Access
    from ps.fabric.tls import trusting
    from ps.runtime import read_token

    return Access(read_token(runtime.token_path), trusting(runtime.tls_ca))


@contextmanager
def progress(verb: str) -> Iterator[Any]:
    """A `ps.checkpoint.reach.Counter`, shown as a bar on standard error where that is a terminal."""
    from ps.checkpoint.reach import Counter

    if not sys.stderr.isatty():
        yield Counter()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn(verb), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()]
    with Progress(*columns, TextColumn("{task.fields[moved]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None, moved="")

        def show(counter: Counter) -> None:
            moved = f"{counter.rows:,} rows, {counter.bytes / 2**20:,.0f} MiB"
            bar.update(task, total=counter.total or None, completed=counter.done, moved=moved)

        yield Counter(show)
