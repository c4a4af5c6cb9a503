"""`embring status`."""

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from deploy.cli_common import JsonOption, running, size

PERCENTILES = ("p50", "p99")


def status(
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again until interrupted.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two, with --watch.")] = 2.0,
) -> None:
    """Show servers, routers, rows, bytes, slots, epoch, requests a second, latency, lost slots and missing copies.

    lag: of the slot whose other owners are farthest behind, changes that they lack, and for how long. A push is
    acknowledged once every owner of its slots has it: it survives the loss of all of them but one. What came after the
    last checkpoint is lost where all die at once.

    Example:  embring status --watch
    """
    from deploy.routers import statuses
    from ps.cluster import controller

    runtime = running()
    with controller(runtime) as ask:

        def look() -> dict[str, Any]:
            return {**ask("status"), "routers": statuses(runtime.namespace)}

        if not watch:
            _print(look(), as_json)
            return
        if as_json:
            while True:
                _print(look(), as_json)
                time.sleep(interval)
        from rich.live import Live

        with Live(render(look()), refresh_per_second=1, screen=False) as live:
            while True:
                time.sleep(interval)
                live.update(render(look()))


def _print(record: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(record), flush=True)
        return
    from rich.console import Console

    console = Console()
    # A pipe has no width of its own: give the columns room there.
    Console(width=None if console.is_terminal else 160).print(render(record))


def render(record: Mapping[str, Any]) -> Any:
    """The status record as text for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text(f"cluster {record['cluster']:x}, epoch {record['epoch']}, metrics {record['metrics']}")
    servers = Table(box=None, pad_edge=False)
    for title in (
        "server",
        "state",
        "host",
        "pid",
        "rows",
        "bytes",
        "slots",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "lag",
        "restarts",
    ):
        servers.add_column(title, justify="left" if title in ("server", "state", "host") else "right", no_wrap=True)
    for s in record["servers"]:
        latency = (f"{s[f'{p}_ms']:.2f}" if f"{p}_ms" in s else "-" for p in PERCENTILES)
        servers.add_row(
            *(s["name"], s["state"], s["host"], str(s["pid"])),
            *(f"{s.get('rows', 0):,}", size(s.get("bytes", 0)), f"{s['slots']:,}"),
            *(f"{s.get('requests_per_s', 0.0):,.0f}", *latency, _lag(s), str(s["restarts"])),
        )
    tables = Table(box=None, pad_edge=False)
    for title in ("table", "dim", "placement", "replicas", "optimizer", "rows in all copies"):
        tables.add_column(title, justify="right" if title in ("dim", "replicas", "rows in all copies") else "left")
    for t in record["tables"]:
        rows = sum(s.get("rows_by_table", {}).get(t["name"], 0) for s in record["servers"])
        kind = t["optimizer"]["kind"]
        tables.add_row(t["name"], str(t["dim"]), t["placement"], str(t["replicas"]), kind, f"{rows:,}")
    parts: list[Any] = [head, Text(), servers]
    if record["routers"]:
        parts += [Text(), _routers(record["routers"])]
    if record["tables"]:
        parts += [Text(), tables]
    if record["slots_lost"]:
        cure = "`embring checkpoint restore DIR`, or `embring recover --accept-loss`"
        warning = f"{record['slots_lost']} slots are lost: {cure}"
        parts += [Text(), Text(warning, style="bold red")]
    if line := _checkpoint(record):
        parts += [Text(), Text(line, style="yellow" if record["checkpoint"]["error"] else "")]
    if record["move"] or record["starting"]:
        from deploy.cli_servers import stage, uncopied

        left = f"{uncopied(record):,} slots are left to copy, {record['slots_held']:,} wait to be handed over"
        parts += [Text(), Text(f"{stage(record)}; {left}", style="yellow")]
    if record["slots_under_replicated"]:
        warning = (
            f"{record['slots_under_replicated']} slots have fewer copies than their tables ask for; "
            f"{record['slots_learning']} are being copied"
        )
        parts += [Text(), Text(warning, style="yellow")]
    for warning in record["warnings"]:
        parts += [Text(), Text(f"warning: {warning}", style="yellow")]
    return Group(*parts)


def _checkpoint(record: Mapping[str, Any]) -> str:
    """What the controller saves or restores, "" where it does neither."""
    told = record.get("checkpoint") or {}
    if not told.get("directory"):
        return ""
    done = {"save": "saved", "restore": "restored"}
    parts = [
        f"{done[job]} {last['name']} {record['time'] - last['at']:.0f} s ago" for job, last in told["last"].items()
    ]
    if told["doing"]:
        parts.append(f"a {told['doing']} is under way")
    if told["error"]:
        parts.append(f"the last one failed: {told['error']}")
    none = "the controller has saved none of this cluster yet" if told["every_s"] else ""
    return f"checkpoints in {told['directory']}: {'; '.join(parts) or none}" if parts or none else ""


def _lag(server: Mapping[str, Any]) -> str:
    """How far other owners are behind a server: changes of one slot, and for how long they have owed an answer."""
    changes, seconds = server.get("lag_changes", 0), server.get("lag_s", 0.0)
    return f"{changes} / {seconds:.1f} s" if changes else "-"


def _routers(records: list[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("router", "state", "HTTP", "gRPC", "pid", "restarts", "models"):
        table.add_column(title, justify="right" if title in ("pid", "restarts") else "left", no_wrap=title != "models")
    for r in records:
        about = r["waiting"] or ", ".join(r["models"])
        table.add_row(r["name"], r["state"], r["http"], r["grpc"], str(r["pid"]), str(r["restarts"]), about)
    return table
