"""Rounds: interleaved, medians and ratios by round."""

import numpy as np
import pytest

from benchmarks.measure import Rounds, interleave, machine, timed, versions
from benchmarks.report import Findings


def test_sides_take_turns_and_their_first_calls_do_not_count() -> None:
    order: list[tuple[str, int]] = []

    def side(name: str, seconds: float):
        def calls(n: int) -> list[float]:
            order.append((name, n))
            return [seconds] * n

        return calls

    rounds = interleave({"a": side("a", 0.1), "b": side("b", 0.001)}, rounds=3, seconds=0.5, calls_max=100)
    assert order[:4] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)]
    assert order[4:] == [("a", 1), ("a", 5), ("b", 1), ("b", 100)] * 3
    assert [len(one) for one in rounds.samples["a"]] == [5, 5, 5]
    assert rounds.ratio("a", "b") == (pytest.approx(100), pytest.approx(100), pytest.approx(100))


def test_ratios_are_of_each_rounds_medians() -> None:
    rounds = Rounds({"a": [[1, 2, 9], [4, 4, 4]], "b": [[1, 1, 1], [1, 2, 3]]})
    assert rounds.ratios("a", "b") == [2, 2]
    assert rounds.median("a") == 4
    assert rounds.percentile("b", 100) == 3
    assert rounds.to_plain()["b"] == [[1e6, 1e6, 1e6], [1e6, 2e6, 3e6]]


def test_arguments_come_in_turn_across_rounds() -> None:
    seen: list[int] = []
    side = timed(seen.append, [1, 2, 3])
    assert len(side(2)) == 2
    assert all(seconds >= 0 for seconds in side(3))
    assert seen == [1, 2, 3, 1, 2]


def test_the_report_is_keyed_by_goal_shape_and_batch() -> None:
    findings = Findings()
    rounds = Rounds({"redis": [[3.0], [8.0], [5.0]], "embring": [[1.0], [2.0], [1.0]]})
    assert findings.ratio(rounds, "redis", "embring", "S1", "M", "32") == 4
    findings.ratio(rounds, "redis", "embring", "S1", "M", "256")
    plain = findings.to_plain({"rounds": 3})
    assert plain["S1"] == {"M": {"32": 4, "256": 4}}
    assert plain["spread"]["S1"]["M"]["32"] == [3, 5]
    assert plain["raw_us"]["S1"]["M"]["32"] == {
        "redis": [[3e6], [8e6], [5e6]],
        "embring": [[1e6], [2e6], [1e6]],
    }
    assert plain["equal"] is True
    assert plain["machine"]["cores"] >= 1
    assert "numpy" in plain["versions"]


def test_machine_and_versions_are_said() -> None:
    assert {"cpu", "cores", "memory_gib", "kernel", "load"} <= machine().keys()
    assert versions()["numpy"] == np.__version__
