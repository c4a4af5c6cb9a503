"""The result of `bench placement` as one HTML page that stands alone: no script, no font, no file beside it. Pure."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.placements import ABOUT, LABELS
from benchmarks.tables import MIB, PLACEMENT_ROWS, verdicts

COLOURS = {"sharded": "#3b6fd4", "whole": "#d9822b", "twofold": "#2a9d8f", "replicated": "#c8455e", "mixed": "#7b4fb5"}

WIDTH, HEIGHT = 540, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 18, 52
RADIUS = 13

CHARACTER = 7.4
"""Width of a letter of a label, about."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of something drawn."""

CARDS = (
    (
        "rows_per_sample",
        "Rows sent back",
        "partial sums, or single rows where they are fewer, for one sample",
        1.0,
        "{:.1f}",
    ),
    (
        "servers_cpu_us_per_sample",
        "CPU of the servers",
        "microseconds for one sample, all servers together",
        1.0,
        "{:.1f} us",
    ),
    (
        "busiest_share",
        "Ids on the busiest server",
        "of all ids asked for; even would be one part in so many servers",
        100.0,
        "{:.0f} %",
    ),
    ("samples_per_s", "Samples a second", "as fast as it goes: longer is better", 1.0, "{:,.0f}"),
    (
        "push_bytes_per_row",
        "Cost of a push",
        "bytes on the wire for each row that changes, copies included",
        1.0,
        "{:,.0f} B",
    ),
    (
        "loss_bags_failed",
        "When one server is lost",
        "bags of a sample that nobody can answer until a restore; arithmetic alone",
        100.0,
        "{:.0f} %",
    ),
)
"""Figure, title, what it is, factor, how it is written."""


def page(result: Mapping[str, Any]) -> str:
    """The page: page.html, filled."""
    work, figures = result["workload"], result["placement"]
    machine, given = result["machine"], dict(result["settings"])
    rate = f"{work['rate_samples_per_s']:,.0f}"
    late = f"99 % of reads answered within, ms, at {rate} samples/s"
    words = {
        **{key: work[key] for key in ("tables", "dim", "servers", "batch", "arrivals", "optimizer")},
        "rows": f"{work['rows']:,}",
        "ids": work["ids_per_sample"],
        "zipf": f"{work['zipf']:g}",
        "rate": rate,
        "writes": f"{work['writes']:.0%}",
        "ways": len(figures),
        "replicated": len(work["replicated_in_mixed"]),
        "command": given.pop("command"),
        "settings": ", ".join(f"{key} {value}" for key, value in given.items() if value not in ((), [])),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, load {machine['load'][0]} at the end",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    parts = {
        "legend": _legend(figures),
        "bytes_panel": _panel(figures, "bytes_per_sample", "bytes on the wire for one sample"),
        "latency_panel": _panel(figures, "p99_ms", late),
        "told": _told(result),
        "cards": "".join(_card(figures, *card) for card in CARDS),
        "table": _table(figures),
    }
    template = Template(Path(__file__).with_suffix(".html").read_text())
    return template.substitute({key: escape(str(value)) for key, value in words.items()} | parts)


def _legend(figures: Mapping[str, Any]) -> str:
    return "".join(
        f'<li><span class="dot" style="background:{COLOURS[name]}"></span><b>{LABELS[name]}</b>: {ABOUT[name]}</li>'
        for name in figures
    )


def _panel(figures: Mapping[str, Any], key: str, title: str) -> str:
    """A scatter of memory against one figure."""
    known = {name: f["measured"] for name, f in figures.items() if key in f["measured"]}  # not where nothing was read
    points = [(name, measured["memory_bytes"] / MIB, measured[key]) for name, measured in known.items()]
    if not points:
        return ""
    across, up = ticks(max(x for _, x, _ in points) * 1.1), ticks(max(y for _, _, y in points) * 1.1)

    def place(x: float, y: float) -> tuple[float, float]:
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + x / across[-1] * wide, HEIGHT - BOTTOM - y / up[-1] * high

    parts = []
    for x in across:
        at, _ = place(x, 0)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#edf0f4"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x:,.4g}</text>')
    for y in up:
        _, at = place(0, y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e6ec"/>')
        parts.append(f'<text x="{LEFT - 9}" y="{at + 4:.1f}" text-anchor="end">{y:,.6g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">memory of all servers, MiB</text>')
    for name, x, y in points:
        cx, cy = place(x, y)
        asked = figures[name]["measured"]["servers_per_request"]
        parts.append(
            f'<g><title>{LABELS[name]}: {x:,.1f} MiB, {y:,.5g}</title><circle cx="{cx:.1f}" cy="{cy:.1f}" r="{RADIUS}" '
            f'fill="{COLOURS[name]}" stroke="#fff" stroke-width="2"/><text x="{cx:.1f}" y="{cy + 4.5:.1f}" '
            f'text-anchor="middle" style="fill:#fff;font-weight:600">{asked:.2g}</text></g>'
        )
    parts += _labels([(name, *place(x, y)) for name, x, y in points])
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<div class="card"><h3>Memory against {escape(title)}</h3>{drawing}</div>'


def _labels(places: Sequence[tuple[str, float, float]]) -> list[str]:
    """Names beside the discs: at the first place of right, left, above, below where nothing else stands yet."""
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for _, x, y in places]
    out = []
    for name, x, y in places:
        wide = len(LABELS[name]) * CHARACTER
        side, far = RADIUS + 6, RADIUS + 12
        boxes = [
            *((x + side, y - 8, x + side + wide, y + 8), (x - side - wide, y - 8, x - side, y + 8)),
            *(
                (x - wide / 2, y - far - 8, x + wide / 2, y - far + 8),
                (x - wide / 2, y + far - 8, x + wide / 2, y + far + 8),
            ),
            *((x + side, y - 26, x + side + wide, y - 10), (x + side, y + 10, x + side + wide, y + 26)),
        ]
        free = [box for box in boxes if _inside(box) and not any(_touch(box, other) for other in taken)]
        box = (free or boxes)[0]
        taken.append(box)
        out.append(
            f'<text x="{(box[0] + box[2]) / 2:.1f}" y="{box[1] + 12.5:.1f}" text-anchor="middle" '
            f'style="fill:{COLOURS[name]};font-weight:600">{LABELS[name]}</text>'
        )
    return out


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to at least `most`, four to nine of them."""
    step = 1.0
    while step * 8 < most:
        step *= 10
    while step * 8 >= most * 10:
        step /= 10
    step = next((s for s in (step / 5, step / 2, step) if s * 8 >= most), step)
    out = [0.0]
    while out[-1] < most:
        out.append(len(out) * step)
    return out


def _told(result: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<li class="{"bad" if "red" in style else ""}">{escape(line)}</li>'
        for line, style in verdicts(result["equal"], result["summary"])
        if style != "dim"
    )
    return lines


def _card(figures: Mapping[str, Any], key: str, title: str, why: str, scale: float, form: str) -> str:
    values = {n: (f["measured"].get(key), f["model"].get(key)) for n, f in figures.items()}
    most = max((v for pair in values.values() for v in pair if v is not None), default=0.0) or 1.0
    bars = []
    for name, (measured, model) in values.items():
        shown = model if measured is None else measured
        if shown is None:
            continue
        both = model is not None and measured is not None
        tick = f'<span class="tick" style="left:calc({model / most:.2%} - 1px)"></span>' if both else ""
        look = "fill" if measured is not None else "fill alone"
        bars.append(
            f'<div class="bar"><span>{LABELS[name]}</span><span class="track"><span class="{look}" '
            f'style="width:{shown / most:.2%};background:{COLOURS[name]}"></span>{tick}</span>'
            f'<span class="value">{form.format(shown * scale)}</span></div>'
        )
    return f'<div class="card"><h3>{title}</h3><p class="why">{why}</p>{"".join(bars)}</div>'


def _table(figures: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{LABELS[name]}</th>" for name in figures)
    rows = []
    for key, title, show in PLACEMENT_ROWS:
        cells = []
        for found in figures.values():
            measured, model = found["measured"].get(key), found["model"].get(key)
            below = f"<small>{show(model)}</small>" if model is not None else ""
            cells.append(f"<td>{'' if measured is None else show(measured)}{below}</td>")
        rows.append(f"<tr><td>{escape(title)}</td>{''.join(cells)}</tr>")
    return f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
