"""`embring bench`: help with an example, bad options named, figures printed and written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.suites import checkpoint, placement, pull
from deploy.cli_bench import app
from ps.errors import RequestError
from tests.benchmarks.test_bench_placement import placement_result

RESULT = {"S3": {"ray": 0.02}, "equal": True, "missing": [], "raw_us": {"S3": {}}, "settings": {}}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", ["pull", "kernels", "placement", "push", "rebalance", "chaos", "checkpoint"])
def test_help_shows_an_example(command: str) -> None:
    shown = invoke(command, "--help")
    assert shown.exit_code == 0
    assert f"embring bench {command}" in shown.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--goals", "S1,S9"), "'S9'"),
        (("--shapes", "M,X"), "'X'"),
        (("--batches", "32,many"), "'many'"),
        (("--batches", "0"), "'0'"),
        (("--batches", ","), "--batches is empty"),
        (("--placement", "round"), "'round'"),
        (("--placement", "sharded,whole"), "must be one of"),
        (("--goals", "S1,S1"), "each once"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], says: str) -> None:
    shown = invoke("pull", *arguments)
    assert isinstance(shown.exception, RequestError)
    assert says in str(shown.exception)


def test_figures_are_printed_and_everything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[pull.Settings] = []

    def run(settings: pull.Settings, report: Any) -> dict[str, Any]:
        asked.append(settings)
        return dict(RESULT)

    monkeypatch.setattr(pull, "run", run)
    shown = invoke("pull", "--goals", "S3", "--batches", "32,64", "--rounds", "2", "--json", str(tmp_path / "out.json"))
    assert shown.exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text()) == RESULT
    assert json.loads(shown.stdout)["S3"] == {"ray": 0.02}
    assert (asked[0].goals, asked[0].batches, asked[0].rounds) == (("S3",), (32, 64), 2)


def test_results_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "run", lambda settings, report: {**RESULT, "equal": False})
    shown = invoke("pull")
    assert isinstance(shown.exception, RequestError)
    assert "differ" in str(shown.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "Z"), "'Z'"),
        (("--ids", "3,x"), "'x'"),
        (("--placements", "sharded,round"), "'round'"),
        (("--arrivals", "bursts"), "'bursts'"),
        (("--shape", "M,O"), "must be one of"),
        (("--placements", "sharded,sharded"), "each once"),
        (("--json", "out", "--html", "./out"), "both name out"),
    ],
)
def test_bad_options_of_placement_are_named(arguments: tuple[str, ...], says: str) -> None:
    shown = invoke("placement", *arguments)
    assert isinstance(shown.exception, RequestError)
    assert says in str(shown.exception)


def test_placement_prints_a_table_and_writes_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[placement.Settings] = []

    def run(settings: placement.Settings, report: Any) -> dict[str, Any]:
        asked.append(settings)
        return placement_result()

    monkeypatch.setattr(placement, "run", run)
    page = tmp_path / "page.html"
    shown = invoke("placement", "--quick", "--html", str(page))
    assert shown.exit_code == 0
    assert "bytes a sample" in shown.stdout
    assert "whole tables" in shown.stdout
    assert "<svg" in page.read_text()
    assert (asked[0].rows, asked[0].rounds, asked[0].seconds) == (20_000, 2, 1.0)


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_nothing_is_measured_that_cannot_be_written(
    option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[placement.Settings] = []
    monkeypatch.setattr(placement, "run", lambda settings, report: asked.append(settings) or placement_result())
    (tmp_path / "file").touch()
    for place, says in (
        ("no/page", "cannot write .*no/page: the folder .*no does not exist"),
        ("file/page", "cannot write .*file/page: the folder .*file does not exist"),
        ("", "cannot write .*: it is a folder"),
    ):
        refused = invoke("placement", option, str(tmp_path / place))
        assert isinstance(refused.exception, RequestError)
        assert re.fullmatch(says, str(refused.exception))
    assert not asked


def test_a_checkpoint_is_measured_in_a_folder_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "run", lambda settings, report: pytest.fail("it was measured"))
    refused = invoke("checkpoint", "--folder", str(tmp_path / "no"))
    assert isinstance(refused.exception, RequestError)
    assert re.fullmatch("--folder: the folder .*/no does not exist", str(refused.exception))
