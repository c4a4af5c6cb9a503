"""Training as a person watches it: a bar while it runs, a table when it is over."""

from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from router.training import TrainProgress, TrainReport

BAR = 40


class ProgressBar:
    """`watch` of `train`: a live bar on a terminal, a line every `lines_s` seconds elsewhere (0: nothing).

    with ProgressBar(Console(stderr=True)) as bar:
        train(config, folder, watch=bar)
    """

    def __init__(self, console: Console, lines_s: float = 10.0) -> None:
        self._console = console
        self._lines_s = lines_s
        self._said = 0.0
        self._first: int | None = None
        self._progress = Progress(
            TextColumn("batches"),
            BarColumn(BAR),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("batches", total=None, line="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, now: TrainProgress) -> None:
        """Show where training stands."""
        totals = now.totals
        if self._first is None:
            self._first = totals.rows
        rate = (totals.rows - self._first) / max(now.seconds, 1e-9)
        stale = staleness_quantile(totals.staleness, 0.5)
        line = f"loss {totals.loss:.4f}  {rate:,.0f} rows/s  staleness {stale}"
        if now.restarts:
            line += f"  restarts {now.restarts}"
        self._progress.update(self._task, total=now.batches_total, completed=totals.batches, line=line)
        due = self._lines_s and now.seconds - self._said >= self._lines_s
        if not self._console.is_terminal and due:
            self._said = now.seconds
            self._console.print(f"{totals.batches} of {now.batches_total} batches  {line}", highlight=False)


def staleness_quantile(staleness: tuple[int, ...], share: float) -> int:
    """The smallest staleness that at least `share` of the batches do not exceed; 0 before the first batch."""
    wanted, seen = share * sum(staleness), 0
    for value, count in enumerate(staleness):
        seen += count
        if seen >= wanted:
            return value
    return 0


def render(report: TrainReport) -> RenderableType:
    """The report for a terminal, with the staleness histogram."""
    facts = Table.grid(padding=(0, 2))
    resumed = f" ({report.resumed:,} of them before)" if report.resumed else ""
    facts.add_row("batches", f"{report.batches:,}{resumed}")
    facts.add_row("rows", f"{report.rows:,}, {report.rows_per_s:,.0f} a second")
    facts.add_row("loss", f"{report.loss:.4f} (moving mean)")
    if report.evaluation is not None:
        found = report.evaluation
        facts.add_row("test", f"AUC {found.auc:.4f}, log-loss {found.log_loss:.4f}, {found.rows:,} rows")
    if report.restarts:
        facts.add_row("restarts", str(report.restarts))
    facts.add_row("head", report.head)
    histogram = Table("staleness", "batches", "", box=None, pad_edge=False)
    most = max(report.staleness, default=0)
    for value, count in enumerate(report.staleness):
        if count:
            label = f"{value}" if value < len(report.staleness) - 1 else f"{value} or more"
            histogram.add_row(label, f"{count:,}", "█" * max(1, round(BAR * count / most)))
    note = Text("staleness: batches of all workers applied between a batch's pull and its push", style="dim")
    return Group(facts, histogram, note)
