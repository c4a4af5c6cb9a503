"""`embring up`, `down`, `logs`, `recover`, `failover` and `config`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli_common import ConfigOption, JsonOption, YesOption, running, say


def up(
    config: ConfigOption = None,
    servers: Annotated[int | None, typer.Option(help="Server processes, instead of the configuration's.")] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Owners of each row of tables created without a number; default 1.")
    ] = None,
    routers: Annotated[int | None, typer.Option(help="Router processes; 1 where --models is given alone.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Models repository of the routers: NAME/VERSION/ with model.toml in each.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where servers listen, instead of the configuration's.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Join a running Ray at host:port, as RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH say.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="State folder; default ~/.local/state/embring.")] = None,
    restore: Annotated[
        str | None, typer.Option(help='Then restore this checkpoint of [checkpoint] directory; "latest": the newest.')
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a cluster and return; `ps.connect()` and the other commands find it.

    Routers wait, open and not ready, for tables that are still to be made; `embring status` says for what.

    Example:  embring up --servers 3 --routers 2 --models models/
    """
    from ps.cluster import start
    from ps.config import load_config

    settings = _changed(load_config(config), "server", servers=servers, replicas=replicas, host=host)
    folder = str(models.resolve()) if models is not None else None
    settings = _changed(settings, "router", routers=routers, models=folder)
    if settings.router.models:
        from router.config import find_models

        find_models(Path(settings.router.models))  # a wrong folder is refused before a process is started
    elif routers is not None:
        raise typer.BadParameter("routers need a models repository: --models DIR, or models in [router]")
    if restore is not None:
        _check_restore(settings.checkpoint.directory, restore)
    runtime = start(settings, state=state, address=address, report=say)
    if restore is not None:
        _restored(runtime, settings.checkpoint.directory, restore)
    told = _routers(runtime, settings) if settings.router.models else []
    if as_json:
        print(
            json.dumps(
                {
                    "addresses": list(runtime.addresses),
                    "token_path": runtime.token_path,
                    "state": runtime.state,
                    "cluster": runtime.cluster,
                    "metrics": runtime.metrics,
                    "routers": told,
                }
            )
        )
        return
    print(f"{settings.server.servers} servers are up; the cluster's state is in {runtime.state}")
    for place in (a for a in runtime.addresses if a.startswith("tcp:")):
        print(f"  {place.removeprefix('tcp:')}")
    for router in told:
        print(f"  {router['name']}: HTTP {router['http']}, gRPC {router['grpc']}" + _waiting(router))
    print(f"token file: {runtime.token_path}\nmetrics:    {runtime.metrics}")


def _changed(settings: Any, section: str, **options: Any) -> Any:
    """The configuration with the options that were given."""
    given = {key: value for key, value in options.items() if value is not None}
    return settings.with_settings(section, **given) if given else settings


def _check_restore(directory: str, name: str) -> None:
    """Refuse a wrong name, or what cannot be read, before a process is started."""
    from ps.checkpoint.files import chain, checkpoints
    from ps.checkpoint.storage import Storage

    if not directory:
        raise typer.BadParameter("--restore needs the directory of [checkpoint] in a cluster.toml: --config FILE")
    if name == "latest":
        checkpoints(Storage(directory))
    else:
        chain(Storage(directory), name)


def _restored(runtime: Any, directory: str, name: str) -> None:
    """Restore a checkpoint into the cluster that was just started; a first start finds none."""
    from deploy.cli_checkpoint import access_to, progress
    from ps.checkpoint.files import checkpoints
    from ps.checkpoint.restore import restore
    from ps.checkpoint.storage import Storage
    from ps.cluster import controller

    storage = Storage(directory)
    if name == "latest" and not checkpoints(storage):
        say(f"there is no checkpoint in {directory} yet: the cluster is empty")
        return
    say(f"restoring {name} of {directory}")
    with controller(runtime) as ask, progress("restoring") as counter:
        done = restore(storage, ask, access_to(runtime), name=None if name == "latest" else name, counter=counter)
    say(f"{done.path}: {done.rows:,} rows of {done.tables} tables are back")


def _routers(runtime: Any, settings: Any) -> list[dict[str, Any]]:
    """Start the routers; a cluster without them is not what was asked for, and ends again."""
    from deploy.routers import start_all
    from ps.cluster import stop

    say(f"starting {settings.router.routers} routers")
    try:
        return start_all(runtime, settings.router)
    except BaseException:
        stop(runtime, keep_views=True)
        raise


def _waiting(router: dict[str, Any]) -> str:
    return f" (waiting: {router['waiting']})" if router["waiting"] else ""


def down(
    yes: YesOption = False,
    checkpoint: Annotated[str | None, typer.Option(help="Save a checkpoint into this DIR first.")] = None,
    as_json: JsonOption = False,
) -> None:
    """End the cluster: its servers, its controller and the Ray that `up` started, and nothing else.

    Its rows are in memory only: save a checkpoint first if they matter.

    Example:  embring down --checkpoint backups
    """
    from ps.cluster import end_leftovers, find, stop
    from ps.errors import ConfigError, NotApplied

    runtime, dead = None, False
    try:
        runtime = find()
    except NotApplied:  # its Ray head: servers may live on without it, with every row, and be saved
        dead = True
    if runtime is None and not dead:
        print(json.dumps({"ended": False}) if as_json else "no cluster is running")
        return
    if not yes and not sys.stdin.isatty():
        raise ConfigError("nothing was ended: say --yes where nobody can be asked")
    if not yes and not typer.confirm("End the cluster and forget the rows in its memory?"):
        raise typer.Exit(1)
    if checkpoint is not None:
        from deploy.cli_checkpoint import save

        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            save(checkpoint)
    if runtime is None:
        end_leftovers()
        print(json.dumps({"ended": True}) if as_json else "ended what a dead cluster had left")
        return
    killed = stop(runtime)
    if as_json:
        print(json.dumps({"ended": True, "killed": killed}))
        return
    print("the cluster has ended" + (f" (processes that had to be killed: {killed})" if killed else ""))


def logs(
    name: Annotated[str | None, typer.Argument(help="server-0, controller, ray, ...; all where left out.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last lines of each.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the cluster's processes on this host logged. With --json, lists of lines by process; with --follow, an
    object more for each line.

    Example:  embring logs server-0 --follow
    """
    from deploy.logs import follow_logs, log_files, tail
    from ps.cluster import last_state

    files = log_files(last_state(), name)

    def show(process: str, line: str) -> None:
        named = f"{process}: {line}" if len(files) > 1 else line
        print(json.dumps({process: [line]}) if as_json else named, flush=True)

    shown = {path.stem: tail(path, lines) for path in files}
    if as_json:
        print(json.dumps(shown), flush=True)
    else:
        for process, some in shown.items():
            for line in some:
                show(process, line)
    if follow:
        follow_logs(files, show)


def recover(
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Accept that the rows of lost slots are gone.")
    ] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give slots whose server died to live servers, empty. To have their rows back, restore a checkpoint instead.

    Example:  embring recover --accept-loss
    """
    from ps.cluster import controller
    from ps.errors import ConfigError

    with controller(running()) as ask:
        lost = ask("status")["slots_lost"]
        if lost and not accept_loss:
            raise ConfigError(
                f"{lost} slots are lost: `embring checkpoint restore DIR` brings rows back, --accept-loss gives them up"
            )
        if lost and not yes and sys.stdin.isatty() and not typer.confirm(f"Give up the rows of {lost} slots?"):
            raise typer.Exit(1)
        answer = ask("recover") if lost else {"slots": 0}
    print(
        json.dumps(answer)
        if as_json
        else f"{answer['slots']} lost slots begin again, empty"
        if lost
        else "no slot is lost"
    )


def failover(
    name: Annotated[str, typer.Argument(help="The server, as `embring status` names it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also where rows are lost with it, because nobody else has a copy.")
    ] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Declare a server dead, as one that hangs, or whose host is gone for good: others take over its slots.

    Its process is ended where it can be reached, and started again as another, which owns nothing.

    Example:  embring failover server-1
    """
    from ps.cluster import controller
    from ps.errors import ConfigError

    if not yes and not sys.stdin.isatty():
        raise ConfigError("nothing was done: say --yes where nobody can be asked")
    if not yes and not typer.confirm(f"Declare {name} dead" + (", with the rows that it alone has?" if force else "?")):
        raise typer.Exit(1)
    with controller(running()) as ask:
        answer = ask("failover", name=name, force=force)
    if as_json:
        print(json.dumps(answer))
        return
    loss = f"; {answer['slots_lost']} slots are lost with it" if answer["slots_lost"] else ""
    print(f"{name} is declared dead in epoch {answer['epoch']}{loss}")


def config(
    path: Annotated[
        Path | None, typer.Argument(help="Check this cluster.toml, and print it with every setting.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a cluster.toml with every setting, its unit, range, default and trade-off.

    Example:  embring config > cluster.toml
    """
    from ps.config import annotated, load_config

    settings = load_config(path)
    print(json.dumps(settings.to_plain()) if as_json else annotated(settings).rstrip())
