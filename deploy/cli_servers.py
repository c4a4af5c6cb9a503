"""`embring add-server` and `embring remove-server`: the cluster grows and shrinks while it serves and trains."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from deploy.cli_common import JsonOption, YesOption, running, say, size

POLL_S = 0.5
"""Between two looks at how far a move is."""

SILENT_S = 120.0
"""How long the controller may be away, as when it is started again, before the command gives up waiting for it."""

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Servers, as `embring status` names them.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, and do nothing.")]
Abort = Annotated[
    bool,
    typer.Option("--abort", help="Undo it: the change of these servers, or the one of this kind that is under way."),
]
Bandwidth = Annotated[
    int | None,
    typer.Option("--max-bandwidth", min=1, max=2**20, metavar="MiB/s", help="What each server may spend on copying."),
]

Ask = Callable[..., dict[str, Any]]


def add_server(
    names: Names = None,
    dry_run: DryRun = False,
    max_bandwidth: Bandwidth = None,
    abort: Abort = False,
    as_json: JsonOption = False,
) -> None:
    """Start servers that take their share of the slots from the others, while pulls and pushes go on.

    Without a name the next free one is taken. Ctrl-C, or --abort from elsewhere, gives back what they have by then.

    Example:  embring add-server --dry-run && embring add-server
    """
    _change("join", names or [], dry_run, max_bandwidth, abort, as_json)


def remove_server(
    names: Names = None,
    dry_run: DryRun = False,
    max_bandwidth: Bandwidth = None,
    abort: Abort = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give the slots of servers, dead ones too, to the others, while pulls and pushes go on; then end their processes.

    Ctrl-C, or --abort from elsewhere, gives back what they had.

    Example:  embring remove-server server-3 --max-bandwidth 50
    """
    from ps.errors import ConfigError

    if not names and not abort:
        raise ConfigError("no server is named: `embring status` lists them")
    if (
        not dry_run
        and not abort
        and not yes
        and sys.stdin.isatty()
        and not typer.confirm(f"Remove {', '.join(names or [])}?")
    ):
        raise typer.Exit(1)
    _change("leave", names or [], dry_run, max_bandwidth, abort, as_json)


def _change(kind: str, names: list[str], dry_run: bool, max_bandwidth: int | None, abort: bool, as_json: bool) -> None:
    from ps.cluster import controller
    from ps.errors import ConfigError

    if abort and dry_run:
        raise ConfigError("--abort and --dry-run exclude each other")
    with controller(running()) as ask:
        if abort:
            told = ask("abort", kind=kind, names=names)
            say(f"going back: {', '.join(told['names'])}")
        else:
            wanted = {"kind": kind, "names": names, "bytes_per_s": (max_bandwidth or 0) << 20}
            plan = ask("outlook", **wanted)
            if dry_run:
                print(json.dumps(plan) if as_json else table_of(plan))
                return
            say(line_of(plan))
            told = plan  # who is asked for, until the controller answers: Ctrl-C may come before that
            wanted["names"] = plan["names"]
        copied, interrupted = Copied(ask("status", fresh=True)), False
        try:
            if not abort:
                told = ask("move", **wanted)
            follow(ask, told["names"], abort, copied)
        except KeyboardInterrupt:
            interrupted = _go_back(ask, kind, told["names"])
            follow(ask, told["names"], interrupted, copied)
        record = ask("status", fresh=True)
        copied.see(record)
    _check(kind, told["names"], record, abort or interrupted)
    if interrupted:
        say(f"{', '.join(told['names'])}: gone back; the servers are {', '.join(_servers(record))}")
        raise typer.Exit(130)
    _report("abort" if abort else kind, told["names"], record, copied, as_json)


def _go_back(ask: Ask, kind: str, names: list[str]) -> bool:
    """Undo the change of these servers; False where it was done before that could be."""
    from ps.errors import RequestError

    try:
        ask("abort", kind=kind, names=names)
    except RequestError as error:
        say(f"too late to go back: {error}")
        return False
    say("going back to the servers of before; another Ctrl-C leaves that to the cluster")
    return True


def _check(kind: str, names: list[str], record: Mapping[str, Any], undone: bool) -> None:
    """Raise NotApplied where a change, or that it was undone, is not what the cluster shows."""
    from ps.errors import NotApplied

    joined = (kind == "join") != undone
    if not (wrong := sorted(name for name in names if (name in _servers(record)) != joined)):
        return
    if undone:
        raise NotApplied(
            f"{', '.join(wrong)} did not go back: another change was made meanwhile, or the controller was started "
            f"again; the servers are {', '.join(_servers(record))}"
        )
    if kind == "leave":
        raise NotApplied(f"{', '.join(wrong)} did not leave: it was aborted, or had not begun")
    raise NotApplied(
        record["move_failed"]
        or f"{', '.join(names)} did not join: it was aborted, or the controller was started again before it had joined"
    )


def _servers(record: Mapping[str, Any]) -> list[str]:
    return sorted(s["name"] for s in record["servers"])


def _report(kind: str, names: list[str], record: Mapping[str, Any], copied: "Copied", as_json: bool) -> None:
    there = _servers(record)
    rows, size = copied.total()
    figures = {"epoch": record["epoch"], "servers": there, "rows_copied": rows, "bytes_copied": size}
    if as_json:
        print(json.dumps({"names": names, **figures}))
        return
    done = {"join": "joined", "leave": "left", "abort": "gone back"}[kind]
    left = ", ".join(there)
    print(f"{', '.join(names)}: {done} in epoch {record['epoch']}; {rows:,} rows copied; the servers are {left}")


class Copied:
    """What servers have copied to others since a first status, also those that have left or were started meanwhile."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._last: dict[int, tuple[int, int]] = {}
        self.see(record)
        self._first = dict(self._last)

    def see(self, record: Mapping[str, Any]) -> None:
        """A later status. Figures are of each incarnation, and grow."""
        for server in record["servers"]:
            if "copied_rows" in server:
                self._last[server["incarnation"]] = (server["copied_rows"], server["copied_bytes"])

    def total(self) -> tuple[int, int]:
        """Rows and bytes."""
        counted = [(now, self._first.get(i, (0, 0))) for i, now in self._last.items()]
        return sum(now[0] - then[0] for now, then in counted), sum(now[1] - then[1] for now, then in counted)


def follow(
    ask: Ask, names: list[str] | None = None, to_the_end: bool = False, copied: Copied | None = None
) -> dict[str, Any]:
    """Wait until no change is under way, with a bar on a terminal; the status then. copied: sees every status.

    names: the servers whose change it is, and no other is waited for. to_the_end: until nothing at all is left to copy.
    Raises NotApplied where the controller, or a server without which that cannot be told, is away for too long: the
    change goes on when it is back.
    """
    from ps.errors import NotApplied

    total, heard, busy = 0, time.monotonic(), time.monotonic()
    with _progress() as show:
        while True:
            try:
                record = ask("status")
                heard = time.monotonic()
            except NotApplied as error:
                if time.monotonic() - heard > SILENT_S:
                    raise NotApplied(f"{error}; the change goes on once it is back, see `embring status`") from None
                time.sleep(POLL_S)
                continue
            if copied is not None:
                copied.see(record)
            changing = _changing(record)
            ours = changing if names is None else changing & set(names)
            # What is left to copy is ours where nobody else moves; who is ending owns nothing any more.
            left = to_the_end and (changing - _ending(record)) <= ours
            if ours or (left and record["slots_left"]):
                busy = heard
            elif not left or not (missed := away(record)):
                return record
            elif heard - busy > SILENT_S:
                raise NotApplied(f"{', '.join(missed)}: no answer; the change goes on after it, see `embring status`")
            total = max(total, record["slots_left"])
            show(stage(record), total - uncopied(record), total)
            time.sleep(POLL_S)


def _changing(record: Mapping[str, Any]) -> set[str]:
    """Servers that start, join, leave or end."""
    return {*(record["move"]["names"] if record["move"] else ()), *record["starting"]} | _ending(record)


def _ending(record: Mapping[str, Any]) -> set[str]:
    return {s["name"] for s in record["servers"] if s["state"] == "ending"}


def away(record: Mapping[str, Any]) -> list[str]:
    """Servers that do not answer, or are being started again: until they do, something may be left to copy."""
    restarting = (s["name"] for s in record["servers"] if s["state"] in ("dead", "starting"))
    return sorted({*record["unheard"], *restarting})


def uncopied(record: Mapping[str, Any]) -> int:
    """Slots that are to be copied still: most are handed over together, once all have been."""
    return max(0, record["slots_left"] - record["slots_held"])


def stage(record: Mapping[str, Any]) -> str:
    """What is under way, in a few words."""
    from hashring.view import Move

    if record["starting"]:
        return f"starting {', '.join(record['starting'])}"
    move = record["move"]
    if move is None and record["slots_left"]:
        return "copying slots"
    if move is None:
        missed = "" if _changing(record) else ", ".join(away(record))
        return f"waiting for {missed}" if missed else "ending processes that have left"
    states = {s["name"]: s["state"] for s in record["servers"]}
    bad = [f"{name} is {states.get(name, 'gone')}" for name in move["names"] if states.get(name) != "alive"]
    what = str(Move(move["kind"], tuple(move["names"]), undoes=move["undoes"]))
    return what + (f" ({'; '.join(bad)})" if bad else "")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """show(what, done, total): a bar on standard error where that is a terminal, else a line when `what` changes."""
    if not sys.stderr.isatty():
        last = [""]

        def show(what: str, done: int, total: int) -> None:
            if what != last[0]:
                last[0] = what
                say(what)

        yield show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("slots"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def draw(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield draw


def line_of(plan: Mapping[str, Any]) -> str:
    """The change in one line."""
    verb = plan["kind"] + ("s" if len(plan["names"]) == 1 else "")
    later = f"; {plan['lost']:,} slots are lost: loads are evened out once they are back" if plan["lost"] else ""
    return (
        f"{', '.join(plan['names'])} {verb}: {plan['slots']:,} copies of slots with about {plan['rows']:,} rows "
        f"({size(plan['bytes'])}) are copied, some {plan['seconds']:,.10g} s; "
        f"{plan['turns']:,} slots get another primary" + (later if plan["kind"] == "join" else "")
    )


def table_of(plan: Mapping[str, Any]) -> str:
    """The change, with loads before and after."""
    lines = [line_of(plan), ""]
    for what in ("server", "host"):
        head = ("copies", "primaries", "bytes")
        lines.append(f"{what:<24}" + "".join(f"{title:>26}" for title in head))
        for entry in plan[f"{what}s"]:
            pairs = [entry["slots"], entry["primaries"], entry["bytes"]]
            cells = [f"{a:,} -> {b:,}" for a, b in pairs[:2]] + [f"{size(pairs[2][0])} -> {size(pairs[2][1])}"]
            lines.append(f"{entry['name' if what == 'server' else 'host']:<24}" + "".join(f"{c:>26}" for c in cells))
        lines.append("")
    bandwidth = plan["bytes_per_s"] / 2**20
    limit = f"{bandwidth:,.10g} MiB/s a server" if bandwidth else "no limit: 64 MiB/s a server"
    lines.append(f"rows, bytes and time are estimates, from averages of each table and {limit}")
    return "\n".join(lines)
