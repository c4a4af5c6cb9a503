"""The placement benchmark: its load, what it says of its figures, its table and its page, and one whole small run."""

import asyncio
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.load import Outcome, arrivals, closed, opened
from benchmarks.page import page, ticks
from benchmarks.suites import placement as suite
from benchmarks.tables import placement as table
from benchmarks.tradeoff import CHECKED, dominated, in_order, late, summary
from ps.errors import NotApplied, RequestError

MEASURED = {
    **dict.fromkeys(("rows_per_sample", "bytes_per_sample", "push_bytes_per_row", "servers_per_request"), 1.0),
    **dict.fromkeys(("frames_per_sample", "memory_bytes", "memory_max_bytes", "resident_bytes"), 2.0**20),
    "join_rows_moved": 7.0,
    **dict.fromkeys(("samples_per_s", "servers_cpu_us_per_sample", "client_cpu_us_per_sample"), 5.0),
    **dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "push_rows_per_s"), 3.0),
    "busiest_share": 0.5,
    "lag_p99_ms": 0.5,
    **dict.fromkeys(("failed", "reads_timed", "pushes_timed"), 0),
}
MODEL = {**{key: MEASURED[key] for key in CHECKED}, "busiest_share": 0.5, "loss_bags_failed": 0.25}


def figures(**measured: dict[str, float]) -> dict[str, Any]:
    """Placements whose figures are alike but for what is given."""
    return {
        name: {"measured": {**MEASURED, **own}, "model": dict(MODEL), "off": dict.fromkeys(CHECKED, 0.0)}
        for name, own in measured.items()
    }


def placement_result() -> dict[str, Any]:
    """A result as the suite makes it, of two placements."""
    found = figures(sharded={"bytes_per_sample": 9.0}, whole={"memory_bytes": 3 * 2.0**20})
    settings = suite.Settings(ids=(3, 1), placements=("sharded", "whole"))
    return {
        "placement": found,
        "summary": summary(found),
        "workload": suite.described(settings, settings.workload(), 1000.0),
        "equal": True,
        "missing": [],
        "machine": {"cpu": "a <cpu>", "cores": 2, "memory_gib": 8, "kernel": "6", "load": [1.0]},
        "versions": {"python": "3"},
        "settings": {"command": "embring bench placement", "ids": (3, 1)},
        "raw_us": {},
    }


# -- load


@pytest.mark.parametrize("kind", ["poisson", "fixed"])
def test_arrivals_come_at_the_stated_rate(kind: str) -> None:
    due = arrivals(500.0, 2.0, 1, kind)
    assert len(due) == 1000
    assert (np.diff(due) >= 0).all()
    assert due[-1] == pytest.approx(2.0, rel=0.01)
    assert np.std(np.diff(due)) == pytest.approx(0.002 if kind == "poisson" else 0.0, rel=0.2, abs=1e-9)


def test_an_open_load_begins_requests_that_are_due_though_none_is_answered() -> None:
    async def run() -> Outcome:
        gate = asyncio.Event()

        async def request(number: int) -> None:
            if number == 19:
                gate.set()  # the last one lets all go: a closed load would wait for ever
            await gate.wait()
            if number == 7:
                raise NotApplied("as you wish")

        return await asyncio.wait_for(opened(request, np.arange(20) / 2000), 30)

    found = asyncio.run(run())
    assert (found.requests, found.failed, len(found.latency_s), len(found.lag_s)) == (20, 1, 19, 20)
    assert found.errors == ["NotApplied: as you wish"]
    assert found.refused == [7]
    assert sorted(found.answered) == [n for n in range(20) if n != 7]
    assert max(found.latency_s) >= 0.0095  # the first waits for the last, from the moment when it was due


def test_a_closed_load_keeps_as_many_in_flight_as_it_is_told() -> None:
    flying: list[int] = []
    most = 0

    async def request(number: int) -> None:
        nonlocal most
        flying.append(number)
        most = max(most, len(flying))
        await asyncio.sleep(0)
        flying.remove(number)

    found = asyncio.run(closed(request, 4, requests_max=50))
    assert (found.requests, most) == (50, 4)


def test_a_rate_counts_requests_that_were_answered() -> None:
    """What is refused at once would else be the fastest."""
    assert Outcome(2.0, requests=10, refused=[1, 4, 6, 8], answered=[0, 2, 3, 5, 7, 9]).rate == 3.0


@pytest.mark.parametrize(("read_s", "tails"), [([[], [0.002], [0.001]], [1.0, 2.0]), ([[], []], None)])
def test_rounds_without_a_read_have_no_say_in_the_spread(read_s: list[list[float]], tails: list[float] | None) -> None:
    placed = suite.Placed("whole", [], (), [], [], read_s=read_s)
    placed.closed = [Outcome(1.0, answered=[0, 1]), Outcome(1.0, answered=[0])]
    spreads = placed.spreads(32)
    assert spreads["samples_per_s"] == [32.0, 64.0]
    assert spreads.get("p99_ms") == tails


# -- what the figures say


def test_a_placement_is_dominated_by_one_that_is_nowhere_worse() -> None:
    found = figures(sharded={"bytes_per_sample": 2.0}, whole={}, mixed={"busiest_share": 0.3, "memory_bytes": 9e9})
    assert dominated(found) == {"sharded": ["whole"], "whole": [], "mixed": []}


def test_figures_that_are_off_or_out_of_order_are_told() -> None:
    found = figures(sharded={"bytes_per_sample": 2.0}, whole={}, replicated={"bytes_per_sample": 0.5})
    assert in_order(found, "bytes_per_sample", ("replicated", "whole", "sharded"))
    assert not in_order(found, "bytes_per_sample", ("sharded", "whole"))
    assert summary(found)["agrees"]
    found["whole"]["off"]["memory_bytes"] = -0.021
    told = summary(found)
    assert not told["agrees"]
    assert told["worst_off"] == {"placement": "whole", "figure": "memory_bytes", "off": 0.021}


def printed(result: dict[str, Any]) -> str:
    """The table of a result, as a wide terminal has it."""
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(result))
    return shown.get()


def test_the_table_marks_what_is_off() -> None:
    result = placement_result()
    result["placement"]["whole"]["off"]["rows_per_sample"] = 0.5
    result["summary"] = summary(result["placement"])
    text = printed(result)
    assert "+50.0%" in text
    assert "more than 2% from the arithmetic" in text


def test_what_failed_came_late_or_is_out_of_order_is_told() -> None:
    assert late({"overrun": 0.3, "lag_p99_ms": 0.1, "p99_ms": 9.0})
    assert not late({"overrun": 0.2, "lag_p99_ms": 4.0, "p99_ms": 9.0})
    assert not late({})
    result = placement_result()
    found = result["placement"]
    found["sharded"]["measured"] |= {"failed": 7, "lag_p99_ms": 2.0}
    found["whole"]["measured"]["memory_bytes"] = 2.0**19  # below what sharded has, which is less by the arithmetic
    found["whole"]["model"]["memory_bytes"] *= 2
    result["summary"] = summary(found)
    assert result["summary"]["late"] == ["sharded"]
    assert result["summary"]["ordered"]["memory_bytes"] is False
    text = printed(result)
    assert "The stated rate was too much (sharded)" in text
    assert "Not in the expected order: memory, all servers, MiB" in text
    assert next(line for line in text.splitlines() if line.startswith("requests failed")).split()[2:] == ["7", "0"]


def test_an_order_that_the_arithmetic_does_not_have_is_not_expected() -> None:
    found = figures(sharded={"bytes_per_sample": 0.5}, whole={})
    found["sharded"]["model"]["bytes_per_sample"] = 0.5  # where bags have one id, sharded tables answer with less
    assert "bytes_per_sample" not in summary(found)["ordered"]


def test_few_requests_have_no_p99_and_those_that_failed_count_as_long() -> None:
    assert suite._percentiles([[0.001] * 99], (50, 99)) == {"p50_ms": 1.0}
    assert suite._percentiles([[0.001] * 99 + [suite.TIMEOUT_S] * 2], (50, 99))["p99_ms"] == 10_000.0
    assert suite._percentiles([[], []], (50, 99)) == {}


@pytest.mark.parametrize(("batch", "most"), [(5041, "at most 5041"), (65_536, "at most 5041")])
def test_a_request_that_clients_would_cut_is_refused(batch: int, most: str) -> None:
    settings = suite.Settings(batch=batch)
    if batch > 5041:
        with pytest.raises(RequestError, match=most):
            suite.check_size(settings, settings.workload())
    else:
        suite.check_size(settings, settings.workload())


class _Tags(HTMLParser):
    """Checks that tags close in order, and keeps what could ask for something elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "line", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_well_formed() -> None:
    text = page(placement_result())
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links == ["data:,"]
    assert "<script" not in text
    assert "$" not in text
    assert "a &lt;cpu&gt;" in text
    assert "embring bench placement" in text


@pytest.mark.parametrize("most", [0.003, 0.9, 7, 74, 1234, 9.9e6])
def test_ticks_are_few_and_reach_far_enough(most: float) -> None:
    found = ticks(most)
    assert 3 <= len(found) <= 10
    assert found[-1] >= most
    assert found[-2] < most


# -- all of it


@pytest.mark.slow
@pytest.mark.timeout(300)  # its cluster compiles every kernel where none is kept yet
def test_a_small_run_agrees_with_the_arithmetic() -> None:
    few = ("sharded", "mixed")  # each kills a server, and waits for it
    settings = suite.Settings(ids=(20, 1, 2), rows=2000, placements=few, rounds=1, seconds=0.3, pushes=8, join=False)
    result = suite.run(settings, lambda line: None)
    assert result["equal"]
    assert set(result["placement"]) == set(few)
    for found in result["placement"].values():
        assert found["measured"]["failed"] == 0
        for key in ("rows_per_sample", "servers_per_request", "memory_bytes", "bytes_per_sample"):
            assert abs(found["off"][key]) < 0.03, (key, found)
    assert result["placement"]["sharded"]["measured"]["loss_share_failed_after"] == 1.0
    page(result)
