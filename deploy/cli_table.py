"""`embring table`: list, describe, alter, drop, import and export tables of the running cluster."""

import json
import sys
from typing import Annotated, Any

import typer

from deploy.cli_common import STYLE, JsonOption, YesOption, running, say
from deploy.cli_transfer import export_rows, import_rows

HELP = """List, describe, alter and drop tables; bring rows in from other tools' files, and out.

Example:  embring table list
"""

app = typer.Typer(help=HELP, no_args_is_help=True, **STYLE)
app.command("import")(import_rows)
app.command("export")(export_rows)

Name = Annotated[str, typer.Argument(help="The table.")]


def _client() -> Any:
    import ps

    running()  # one clear sentence where there is no cluster
    return ps.connect()


@app.command("list")
def list_tables(as_json: JsonOption = False) -> None:
    """List the tables with dim, placement, replicas and optimizer.

    Example:  embring table list
    """
    with _client() as client:
        specs = client.tables()
    if as_json:
        print(json.dumps({name: spec.to_plain() for name, spec in specs.items()}))
        return
    if not specs:
        print("no tables")
    for name, spec in specs.items():
        print(f"{name}  dim {spec.dim}  {spec.placement}  replicas {spec.replicas}  {spec.optimizer.kind}")


@app.command()
def describe(name: Name, as_json: JsonOption = False) -> None:
    """Show every setting of a table.

    Example:  embring table describe item
    """
    with _client() as client:
        plain = client.describe(name).to_plain()
    if as_json:
        print(json.dumps(plain))
        return
    for key, value in plain.items():
        print(f"{key:<12} {value}")


@app.command()
def alter(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The table, or several.")],
    replicas: Annotated[
        str | None, typer.Option(help='Copies of each row: a number, or "all" for every server.')
    ] = None,
    placement: Annotated[
        str | None, typer.Option(help="sharded: rows over all servers; or whole: all rows on one server.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Give tables other copies or another placement while pulls and pushes go on; returns once all is there.

    A table that shares slots with others gets slots of its own first: its servers look through its rows for that, some
    two millions a second, and answer nothing meanwhile.

    Example:  embring table alter country --placement whole --replicas all
    """
    from ps.errors import ConfigError

    changes: dict[str, Any] = {}
    if replicas is not None:
        if replicas != "all" and not replicas.isdecimal():
            raise ConfigError(f'--replicas is {replicas!r}; it must be a number from 1 on, or "all"')
        changes["replicas"] = replicas if replicas == "all" else int(replicas)
    if placement is not None:
        changes["placement"] = placement
    if not changes:
        raise ConfigError("nothing to change: say --replicas or --placement")
    record = _altered(names, changes)
    if as_json:
        print(json.dumps({"names": names, **changes, "epoch": record["epoch"]}))
    else:
        told = ", ".join(f"{key} {value}" for key, value in changes.items())
        print(f"{', '.join(names)}: {told} in epoch {record['epoch']}")


def _altered(names: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    """Ask for the change, and wait until every slot has the owners that it should have; the status then.

    The controller may answer too late, since servers that look through their rows answer nothing. Whether it has made
    the change, the tables say.
    """
    from deploy.cli_servers import follow
    from ps.cluster import controller
    from ps.errors import PerhapsApplied

    doubt = None
    with controller(running()) as ask:
        try:
            try:
                ask("alter_table", names=names, changes=changes)
            except PerhapsApplied as error:
                doubt = error
            record = follow(ask, to_the_end=True)
        except KeyboardInterrupt:
            say("the change goes on: `embring status`")
            raise
    now = {table["name"]: table for table in record["tables"]}
    if doubt and not all(name in now and now[name].items() >= changes.items() for name in names):
        raise doubt
    if lacking := record["slots_under_replicated"]:
        say(f"{lacking:,} slots have fewer copies than their tables ask for, and no server to put them on")
    return record


@app.command()
def drop(name: Name, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Remove a table with all its rows.

    Example:  embring table drop item
    """
    from ps.errors import ConfigError

    if not yes and not sys.stdin.isatty():
        raise ConfigError("nothing was dropped: say --yes where nobody can be asked")
    if not yes and not typer.confirm(f"Drop {name} and all its rows?"):
        raise typer.Exit(1)
    with _client() as client:
        client.drop_table(name)
    print(json.dumps({"dropped": name}) if as_json else f"{name} is dropped")
