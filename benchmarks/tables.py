"""Results of suites as tables for a terminal."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmarks.placements import LABELS
from benchmarks.tradeoff import ALIKE, AXES, CHECKED, OFF_MAX

MIB = 2**20

Show = Callable[[float], str]

PLACEMENT_ROWS: tuple[tuple[str, str, Show], ...] = (
    ("rows_per_sample", "rows sent back a sample", lambda v: f"{v:.2f}"),
    ("servers_per_request", "servers a request", lambda v: f"{v:.2f}"),
    ("bytes_per_sample", "bytes a sample", lambda v: f"{v:,.0f}"),
    ("frames_per_sample", "messages a sample", lambda v: f"{v:.3f}"),
    ("memory_bytes", "memory, all servers, MiB", lambda v: f"{v / MIB:,.1f}"),
    ("memory_max_bytes", "memory, fullest server, MiB", lambda v: f"{v / MIB:,.1f}"),
    ("resident_bytes", "memory by the system's count, MiB", lambda v: f"{v / MIB:,.1f}"),
    ("busiest_share", "ids on the busiest server", lambda v: f"{v:.1%}"),
    ("samples_per_s", "samples/s, as fast as it goes", lambda v: f"{v:,.0f}"),
    ("servers_cpu_us_per_sample", "CPU of servers a sample, us", lambda v: f"{v:.1f}"),
    ("client_cpu_us_per_sample", "CPU of the client a sample, us", lambda v: f"{v:.1f}"),
    ("p50_ms", "reads at the stated rate, p50, ms", lambda v: f"{v:.2f}"),
    ("p95_ms", "reads at the stated rate, p95, ms", lambda v: f"{v:.2f}"),
    ("p99_ms", "reads at the stated rate, p99, ms", lambda v: f"{v:.2f}"),
    ("push_p50_ms", "pushes at the stated rate, p50, ms", lambda v: f"{v:.2f}"),
    ("push_p99_ms", "pushes at the stated rate, p99, ms", lambda v: f"{v:.2f}"),
    ("reads_timed", "reads timed", lambda v: f"{v:,}"),
    ("pushes_timed", "pushes timed", lambda v: f"{v:,}"),
    ("failed", "requests failed", lambda v: f"{v:,}"),
    ("lag_p99_ms", "the generator's lag, p99, ms", lambda v: f"{v:.2f}"),
    ("push_rows_per_s", "push, rows/s", lambda v: f"{v:,.0f}"),
    ("push_bytes_per_row", "push, bytes a row", lambda v: f"{v:,.1f}"),
    ("join_rows_moved", "a join moves, rows", lambda v: f"{v:,.0f}"),
    ("loss_slots_lost", "a lost server: slots lost", lambda v: f"{v:,.0f}"),
    ("loss_slots_under_replicated", "a lost server: slots one copy short", lambda v: f"{v:,.0f}"),
    ("loss_rows", "a lost server: rows lost", lambda v: f"{v:,.0f}"),
    ("loss_bags_failed", "a lost server: bags that fail", lambda v: f"{v:.1%}"),
    ("loss_reads_failed_until_view", "reads failed until the next view", lambda v: f"{v:,.0f}"),
    ("loss_reads_until_view", "of so many", lambda v: f"{v:,.0f}"),
    ("loss_share_failed_after", "reads failing after it", lambda v: f"{v:.0%}"),
)


def print_placement(result: Mapping[str, Any]) -> None:
    """Print the result of `bench placement`: what was measured, and in grey what the arithmetic says."""
    console = Console()
    # A pipe has no width of its own: give the columns room there.
    Console(width=None if console.is_terminal else 160).print(placement(result))


def placement(result: Mapping[str, Any]) -> Group:
    """The result of `bench placement`."""
    work, figures, told = result["workload"], result["placement"], result["summary"]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in figures:
        table.add_column(LABELS[name], justify="right", no_wrap=True)
    for key, title, show in PLACEMENT_ROWS:
        cells = [_cell(found, key, show) for found in figures.values()]
        if any(cell.plain for cell in cells):
            table.add_row(title, *cells)
    head = (
        f"shape {work['shape']}: {work['tables']} tables, {work['ids_per_sample']} ids a sample, {work['rows']:,} "
        f"rows of {work['dim']} floats, {work['optimizer']}, Zipf {work['zipf']:g}; {work['batch']} samples a request, "
        f"{work['servers']} servers; "
        f"latency at {work['rate_samples_per_s']:,.0f} samples/s ({work['arrivals']} arrivals, "
        f"{work['writes']:.0%} of them pushes)"
    )
    lines = [Text(line, style=style) for line, style in verdicts(result["equal"], told)]
    return Group(Text(head), Text(), table, Text(), *lines)


def _cell(found: Mapping[str, Any], key: str, show: Show) -> Text:
    measured, model = found["measured"].get(key), found["model"].get(key)
    if measured is None:
        return Text("" if model is None else show(model), style="dim")
    text = Text(show(measured), style="bold red" if key == "failed" and measured else "")
    if model is not None and key in found["off"]:
        off = found["off"][key]
        text.append(f" {off:+.1%}", style="dim" if abs(off) <= OFF_MAX or key not in CHECKED else "bold red")
    return text


def verdicts(equal: bool, told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(sentence, style): what the result says as a whole."""
    worst = told["worst_off"]
    out = [
        (
            "Every placement answered the same, bit for bit." if equal else "Answers DIFFERED.",
            "" if equal else "bold red",
        )
    ]
    titles = {key: title for key, title, _ in PLACEMENT_ROWS}
    what = f"{titles.get(worst['figure'], '')}, {LABELS.get(worst['placement'], '')}"
    near = f"the furthest ({what}) is {worst['off']:.2%} off"
    if told["agrees"]:
        out.append((f"Counted figures agree with the arithmetic within {OFF_MAX:.0%}: {near}.", ""))
    else:
        out.append((f"A counted figure is more than {OFF_MAX:.0%} from the arithmetic: {near}.", "bold red"))
    wrong = [key for key, right in told["ordered"].items() if not right]
    if wrong:
        out.append((f"Not in the expected order: {', '.join(titles[key] for key in wrong)}.", "bold red"))
    if told["late"]:
        names = ", ".join(LABELS[name] for name in told["late"])
        out.append((f"The stated rate was too much ({names}): latencies are of what piled up.", "bold red"))
    for name, others in told["dominated_by"].items():
        if others:
            by = ", ".join(LABELS[other] for other in others)
            near = f"figures within {ALIKE:.0%} count as equal"
            out.append((f"{LABELS[name]} is nowhere better than {by} (in {', '.join(AXES)}; {near}).", "yellow"))
    free = [LABELS[name] for name, others in told["dominated_by"].items() if not others]
    out.append((f"No other placement is as good everywhere and better somewhere: {', '.join(free)}.", ""))
    out.append(("Grey: what the arithmetic says alone; a percentage: how far the count is from it.", "dim"))
    return out
