"""What several commands share: options, and how they find the cluster and speak."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

STYLE: dict[str, Any] = {"add_completion": False, "rich_markup_mode": "markdown"}
"""Of every typer.Typer: paragraphs of help are filled to the terminal's width, as markdown is."""

ConfigOption = Annotated[Path | None, typer.Option("--config", help="A cluster.toml (see `embring config`).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def say(line: str) -> None:
    """A step of long work, on standard error so that results stay clean."""
    print(line, file=sys.stderr, flush=True)


def reachable() -> Any:
    """The runtime of this user's cluster, whether or not its Ray head lives: for what needs its servers alone.

    Raises ConfigError where there is none.
    """
    from ps.runtime import read_runtime

    return read_runtime()


def running() -> Any:
    """The runtime of this user's cluster. Raises ConfigError where none is running."""
    from ps.cluster import find
    from ps.errors import ConfigError

    runtime = find()
    if runtime is None:
        raise ConfigError("no cluster is running: start one with `embring up`")
    return runtime


def size(count: float) -> str:
    """Bytes as a short text with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
