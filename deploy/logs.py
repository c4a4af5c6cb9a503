"""Reading the log files of a cluster's state folder."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ps.errors import ConfigError

POLL_S = 0.2


def log_files(state: Path, name: str | None) -> list[Path]:
    """The log files of a state folder, or the one of `name`. Raises ConfigError where there is none."""
    folder = state / "logs"
    files = sorted(folder.glob("*.log"))
    if not files:
        raise ConfigError(f"there are no logs in {folder}")
    if name is None:
        return files
    named = [f for f in files if f.stem == name]
    if not named:
        raise ConfigError(f"there is no log of {name!r}; there are: {', '.join(f.stem for f in files)}")
    return named


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file."""
    with open(path, errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, lines)]


def follow_logs(files: list[Path], write: Callable[[str, str], None]) -> None:
    """Tell each new line of the files, after the name of its process, as it appears, without end."""
    opened = {f.stem: open(f, errors="replace") for f in files}  # noqa: SIM115 - open until the process ends
    for file in opened.values():
        file.seek(0, 2)
    while True:
        for stem, file in opened.items():
            for line in file:
                write(stem, line.rstrip())
        time.sleep(POLL_S)
