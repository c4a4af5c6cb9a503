"""`embring verify`: the copies of every slot are compared, each primary's with those of the other owners."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.cli_common import JsonOption, reachable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hashring.view import View

PART = 256
"""Slots that are asked for at once; a server does as many of them as are cheap enough."""

ROUNDS = 5
"""Times that a slot is asked for where some copy was not compared, ROUND_S seconds apart."""

ROUND_S = 1.0
MEND_S = 120.0
"""Seconds in which a repair should have made its copies, beyond the wait before missing copies are made anew."""

Report = Callable[[int], None]
"""Told how many slots are finished since the last call."""


@dataclass
class Findings:
    """What came of it. compared: copies. different: (slot, server's name) of copies that differ from their primary's,
    mended: those of them that are equal by now. not_compared: slots of which some copy never was. single: slots with
    one copy, which there is nothing to compare with."""

    slots: int = 0
    compared: int = 0
    single: int = 0
    different: list[tuple[int, str]] = field(default_factory=list)
    mended: list[tuple[int, str]] = field(default_factory=list)
    not_compared: list[int] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether no copy differs, any more."""
        return set(self.different) <= set(self.mended)


def verify(
    tables: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...", help="Only the slots of these.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Have copies that differ made anew.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the copies of every slot, under load too. Exit status 1 if one differs and was not repaired.

    Example:  embring verify --repair
    """
    from deploy.cli_checkpoint import access_to

    runtime = reachable()
    cluster = Copies(list(runtime.addresses), access_to(runtime))
    with _progress() as started:
        findings = cluster.compare(tables or [], repair, started)
        if repair and findings.different:
            cluster.await_repair(findings)
    if as_json:
        print(json.dumps({**asdict(findings), "good": findings.good}))
    else:
        for line in lines(findings, repair):
            print(line)
    if not findings.good:
        raise typer.Exit(1)


def lines(findings: Findings, repair: bool) -> list[str]:
    """The summary, and each copy that differs."""
    mended = set(findings.mended)
    out = [
        f"slot {slot}: the copy of {name} differs from its primary's"
        + ("; it was made anew" if (slot, name) in mended else "")
        for slot, name in findings.different
    ]
    out.append(
        f"{findings.slots:,} slots, {findings.compared:,} copies compared, {len(findings.different):,} differ, "
        f"{findings.single:,} slots have one copy"
    )
    if findings.not_compared:
        named = ", ".join(map(str, findings.not_compared[:8])) + (", ..." if len(findings.not_compared) > 8 else "")
        out.append(f"{len(findings.not_compared):,} slots were not compared, their owners change: {named}")
    if repair and not findings.good:
        out.append(f"the repair is not done after {MEND_S:g} s: see `embring status`, and verify again")
    return out


class Copies:
    """Asks the primaries of a running cluster. access: ps.checkpoint.move.Access."""

    def __init__(self, addresses: Sequence[str], access: Any) -> None:
        self._addresses = addresses
        self._access = access

    def view(self) -> "View":
        """The newest view that a server answers with."""
        from hashring.view import Server
        from ps.checkpoint.move import newest_view

        return newest_view([Server("", 0, "", "", (address,)) for address in self._addresses], self._access)

    def compare(self, tables: Sequence[str], repair: bool, started: Callable[[int], Report]) -> Findings:
        """Compare the slots of these tables (of all where none is named). started(slots) gives whom to report to.

        Raises RequestError for an unknown table.
        """
        import numpy as np

        view = self.view()
        left = slots_of(view, tables)
        findings = Findings(slots=len(left))
        report = started(len(left))
        lost = view.lost()[left] if len(left) else np.empty(0, bool)
        left, unreachable = left[~lost], left[lost]
        for again in range(ROUNDS):
            if again:
                time.sleep(ROUND_S)
                view = self.view()
            copies = (view.owners()[left] >= 0).sum(axis=1) if len(left) else np.empty(0, np.int64)
            findings.single += int((copies == 1).sum())
            report(int((copies == 1).sum()))
            compared, different, skipped = self._round(view, left[copies > 1], repair, report)
            findings.compared += compared
            findings.different += [pair for pair in different if pair not in findings.different]
            left = np.array(sorted(skipped), np.int64)
            if not len(left):
                break
        report(len(left) + len(unreachable))
        findings.not_compared = sorted({*left.tolist(), *unreachable.tolist()})
        return findings

    def _round(
        self, view: "View", slots: "NDArray[np.int64]", repair: bool, report: Report
    ) -> tuple[int, list[tuple[int, str]], set[int]]:
        """Ask each primary once for all its slots: copies compared, those that differ, slots that were skipped."""
        from ps.checkpoint.move import call, connected
        from ps.errors import NotApplied, PerhapsApplied, WrongView

        compared, different, skipped = 0, [], set()
        for index, server in enumerate(view.servers):
            left = slots[view.owners()[slots, 0] == index] if len(slots) else slots
            if not len(left):
                continue
            start = 0
            missed: set[int] = set()
            try:
                with connected(server, self._access) as connection:
                    while len(left):
                        asked = {"start": start, "repair": repair}
                        told = call(connection, "verify", asked, {"slots": left[:PART]}).fields
                        compared += told["compared"]
                        different += [(slot, name) for slot, _, name, _ in told["different"]]
                        missed.update(told["skipped"])
                        finished = set(left[: told["done"]].tolist())
                        skipped |= missed & finished
                        report(len(finished - missed))
                        left, start = left[told["done"] :], told["cursor"]
            except (NotApplied, PerhapsApplied, WrongView):
                skipped.update(left.tolist())
        return compared, sorted(set(different)), skipped

    def await_repair(self, findings: Findings) -> None:
        """Wait until the copies that differed are equal, and note those that are."""
        import numpy as np

        slots = np.array(sorted({slot for slot, _ in findings.different}), np.int64)
        wanted = self._wanted(slots)
        end = time.monotonic() + MEND_S
        while True:
            view = self.view()
            whole = slots[(view.owners()[slots] >= 0).sum(axis=1) >= wanted]
            _, different, skipped = self._round(view, whole, True, lambda _: None)
            wrong = {slot for slot, _ in different} | skipped | (set(slots.tolist()) - set(whole.tolist()))
            findings.mended = [(slot, name) for slot, name in findings.different if slot not in wrong]
            if findings.good or time.monotonic() > end:
                return
            time.sleep(ROUND_S)

    def _wanted(self, slots: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """Owners that each slot should have, as far as there are servers."""
        import numpy as np

        view = self.view()
        alive = sum(s.alive for s in view.servers)
        wanted = np.ones(view.slots_total, np.int64)
        for g in view.groups:
            wanted[g.first : g.first + g.slots] = alive if g.replicas == "all" else min(alive, int(g.replicas))
        out: NDArray[np.int64] = wanted[slots]
        return out


def slots_of(view: "View", tables: Sequence[str]) -> "NDArray[np.int64]":
    """The slots of tables, of all of them where none is named. Raises RequestError for an unknown one."""
    import numpy as np

    from ps.errors import RequestError

    known = {t.name: t.group for t in view.tables}
    for name in tables:
        if name not in known:
            raise RequestError(f"table {name!r} is unknown; there are: {', '.join(sorted(known)) or 'none'}")
    groups = {known[name] for name in tables} if tables else {g.number for g in view.groups}
    parts = [np.arange(g.first, g.first + g.slots) for g in view.groups if g.number in groups]
    return np.concatenate([np.empty(0, np.int64), *parts])


@contextmanager
def _progress() -> Iterator[Callable[[int], Report]]:
    """A bar of slots on standard error, where that is a terminal: gives `started` of `Copies.compare`."""
    if not sys.stderr.isatty():
        yield lambda slots: lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:

        def started(slots: int) -> Report:
            task = bar.add_task("comparing copies", total=slots)
            return lambda done: bar.advance(task, done)

        yield started
