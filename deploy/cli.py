"""The `embring` command: a table of commands, each imported only when it is asked for.

A command is a function (or a `typer.Typer` with commands of its own) in a module of this table. Its errors on
purpose (`EmbringError`) become one line and exit status 1; `--help` needs none of the modules.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from deploy.cli_common import STYLE

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module:attribute, one line of help)
    "demo": ("deploy.cli_demo:demo", "The whole path on this machine: train on real data, serve, compare."),
    "up": ("deploy.cli_cluster:up", "Start a cluster on this machine, or on a running Ray."),
    "down": ("deploy.cli_cluster:down", "End the cluster, and nothing else."),
    "status": ("deploy.cli_status:status", "Servers, tables, rows, rates, latency, lost slots."),
    "logs": ("deploy.cli_cluster:logs", "Show what the servers and the controller logged."),
    "doctor": ("deploy.cli_doctor:doctor", "Look for what slows or breaks a cluster on this machine."),
    "recover": ("deploy.cli_cluster:recover", "Give lost slots to live servers, accepting that their rows are gone."),
    "failover": ("deploy.cli_cluster:failover", "Declare a server dead: others take over its slots."),
    "add-server": ("deploy.cli_servers:add_server", "Start servers that take their share of the slots, under load."),
    "remove-server": ("deploy.cli_servers:remove_server", "Move the slots of servers to the others, then end them."),
    "verify": ("deploy.verify:verify", "Compare the copies of every slot, and repair what differs."),
    "table": ("deploy.cli_table:app", "List, describe, alter, drop, import and export tables."),
    "checkpoint": ("deploy.cli_checkpoint:app", "Save, restore, list and verify checkpoints."),
    "train": ("deploy.cli_train:train", "Train a model whose tables live in the cluster."),
    "serve": ("deploy.cli_serve:serve", "Start a router that serves the models of a folder."),
    "predict": ("deploy.cli_predict:predict", "Score the rows of a file with a served model."),
    "bench": ("deploy.cli_bench:app", "Measure embring beside its peers."),
    "config": ("deploy.cli_cluster:config", "Print a cluster.toml with every setting explained."),
}


class CommandTable(TyperGroup):
    """The commands of COMMANDS, in its order. Listing them imports nothing."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, for `--help`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name (imported now), or None."""
        if cmd_name not in COMMANDS:
            return None
        target, line = COMMANDS[cmd_name]
        app = typer.Typer(**STYLE)
        if self.listing:
            app.command(cmd_name, help=line)(lambda: None)
            return typer.main.get_command(app)
        module, _, attribute = target.partition(":")
        loaded = getattr(import_module(module), attribute)
        if isinstance(loaded, typer.Typer):
            command = typer.main.get_command(loaded)
        else:
            app.command(cmd_name)(loaded)
            command = typer.main.get_command(app)
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Help of the whole command, from the table alone."""
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


app = typer.Typer(cls=CommandTable, no_args_is_help=True, pretty_exceptions_enable=False, **STYLE)


@app.callback()
def root() -> None:
    """embring: a distributed embedding parameter server with an inference router.

    Each command has its own --help, with an example.

    Example:  embring up && embring status && embring down
    """


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the command as an exception does: what it has started is
    ended too. Where they are ignored (nohup) they stay so."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Exits with 0, 1 (a clear error), 2 (wrong usage), 130 (interrupted), or 128 and a signal."""
    from ps.errors import EmbringError

    try:
        with _ended_in_order():
            app(args=arguments, prog_name="embring")
    except EmbringError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `embring status | head`
        sys.stderr.close()
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
