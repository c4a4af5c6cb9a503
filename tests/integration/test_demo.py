"""`embring demo`: the whole path, its figures, its verdict, and that nothing is left."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy import cli_demo, demo
from deploy.datasets import Targets
from deploy.demo import Outcome

ROOT = Path(__file__).parents[2]
KERNELS = os.environ.get("NUMBA_CACHE_DIR") or str(Path.home() / ".cache" / "embring" / "kernels")


def environment(home: Path) -> dict[str, str]:
    """A user with a home folder of his own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("EMBRING_", "RAY_", "XDG_"))}
    scratch = home / "tmp"
    scratch.mkdir(exist_ok=True)
    return {
        **inherited, "HOME": str(home), "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": KERNELS, "COLUMNS": "200",
        "TMPDIR": str(scratch),
    }  # fmt: skip


def run(home: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """`embring demo` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "demo", *arguments], capture_output=True, text=True, timeout=timeout,
        cwd=home, stdin=subprocess.DEVNULL, env=environment(home),
    )  # fmt: skip


def processes_of(home: Path) -> list[str]:
    """Command lines of processes whose environment names this home."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if f"HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_whole_path_on_synthetic_clicks(tmp_path: Path) -> None:
    figures, lines = tmp_path / "figures.json", tmp_path / "scores.jsonl"
    done = run(tmp_path, "--data", "synthetic", "--json", str(figures), "--predictions", str(lines), timeout=400)
    assert done.returncode == 0, done.stderr
    assert "everything as it must be" in done.stdout
    assert "Traceback" not in done.stderr
    found = json.loads(figures.read_text())
    assert found["ok"] is True
    assert found["failures"] == []
    assert found["heldout_rows"] == found["parity_rows_grpc"] == found["parity_rows_rest"] == 12_000
    assert found["parity_max_abs_diff"] <= 1e-5
    assert found["servers"] == len(found["rows_per_server"]) == 3
    assert sum(found["rows_per_server"]) == found["rows"] > 5_000
    assert min(found["rows_per_server"]) > 0
    assert sum(found["staleness"]) == math.ceil(48_000 / demo.BATCH) * demo.EPOCHS
    assert found["processes_left"] == 0
    assert processes_of(tmp_path) == []
    assert not list((tmp_path / "tmp").glob("embring-*"))
    assert not (tmp_path / ".cache" / "embring" / "cluster.json").exists()

    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 12_000
    assert len({row["row"] for row in rows}) == 12_000
    np.testing.assert_allclose([row["grpc"] for row in rows], [row["rest"] for row in rows], atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ended_from_outside_it_takes_its_cluster_down(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "demo", "--data", "synthetic"], cwd=tmp_path, env=environment(tmp_path),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert program.stderr is not None
        assert any("training" in line for line in program.stderr)
        program.send_signal(signal.SIGTERM)
        _, said = program.communicate(timeout=120)
    finally:
        program.kill()
        program.wait()
    assert program.returncode == 128 + signal.SIGTERM, said
    assert processes_of(tmp_path) == []
    assert not list((tmp_path / "tmp").glob("embring-*"))


def test_data_that_cannot_be_had_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    for source, message in (("criteo:nowhere.tsv", "nowhere.tsv cannot be read"), ("movies", "'movies' is unknown")):
        done = run(tmp_path, "--data", source, timeout=100)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert "starting" not in done.stderr


def test_help_is_enough(tmp_path: Path) -> None:
    done = run(tmp_path, "--help", timeout=60)
    assert done.returncode == 0, done.stderr
    for word in (
        "--data",
        "criteo:PATH",
        "movielens-small:DIR",
        "synthetic",
        "--json",
        "--predictions",
        "--kill-server",
        "Example:  embring demo",
    ):
        assert word in done.stdout


LABELS = np.array([0, 1, 0, 1] * 50, np.float32)
SCORES = np.where(LABELS > 0, 0.7, 0.3).astype(np.float32) + np.linspace(-0.25, 0.25, 200, dtype=np.float32)


def judged(scores: dict | None = None, **figures: object) -> list[str]:
    outcome = Outcome(servers=3, heldout_rows=200, rows=50, rows_per_server=[20, 20, 10])
    for name, value in figures.items():
        setattr(outcome, name, value)
    dataset = SimpleNamespace(targets=Targets(0.5, 1.0, 0.69, 200, 50))
    given = {"grpc": SCORES, "rest": SCORES, **(scores or {})}
    demo._judge(outcome, dataset, LABELS, given, SCORES)  # type: ignore[arg-type]
    return outcome.failures


def test_good_figures_pass() -> None:
    assert judged() == []


@pytest.mark.parametrize(
    ("figures", "scores", "named"),
    [
        ({"servers": 2}, {}, "servers is 2; it must be 3 to 3"),
        ({"rows": 49}, {}, "rows is 49"),
        ({"rows_per_server": [25, 25, 0]}, {}, "rows of the emptiest server is 0"),
        ({}, {"rest": SCORES[:-1]}, "parity_rows_rest is 199; it must be 200 to 200"),
        ({}, {"grpc": SCORES + np.float32(2e-5)}, "parity_max_abs_diff is"),
        ({}, {"rest": SCORES + np.float32(2e-5)}, "parity_max_abs_diff is"),
        ({}, {"grpc": np.full(200, 0.5, np.float32)}, "score_std is 0"),
        ({}, {"grpc": 1 - SCORES}, "auc is"),
        ({"heldout_rows": 199}, {}, "heldout_rows is 199"),
    ],
)
def test_each_figure_that_is_wrong_is_named(figures: dict, scores: dict, named: str) -> None:
    failures = judged(scores, **figures)
    assert any(named in failure for failure in failures), failures


@pytest.mark.parametrize(
    ("auc", "killed", "named"),
    [(0.787, "server-1", []), (0.7801, "server-1", ["auc_difference is 0.0039"]), (0.784, "", ["before a server was"])],
)
def test_a_killed_server_must_not_change_the_auc(
    auc: float, killed: str, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, kill: bool = False) -> Outcome:
        return Outcome(auc=auc, killed=killed) if kill else Outcome(auc=0.784, failures=[])

    monkeypatch.setattr(demo, "run", run)
    outcome = demo.run_killed("synthetic", None, lambda line: None, lambda progress, batches: None, 2)
    assert (outcome.auc, outcome.undisturbed_auc) == (auc, 0.784)
    assert len(outcome.failures) == len(named)
    assert all(words in failure for words, failure in zip(named, outcome.failures, strict=True))
    assert outcome.ok is not bool(named)


def test_one_copy_cannot_outlive_a_killed_server(tmp_path: Path) -> None:
    done = run(tmp_path, "--kill-server", timeout=60)
    assert done.returncode == 2
    assert "--kill-server needs --replicas 2" in " ".join(done.stderr.split())


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_status_is_the_verdict(ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(ok=ok, failures=[] if ok else ["auc is 0.4; it must be 0.765 to 0.82"])
    monkeypatch.setattr(demo, "run", lambda *arguments: outcome)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import typer

    app = typer.Typer()
    app.command()(cli_demo.demo)
    done = CliRunner().invoke(app, ["--json", str(tmp_path / "out.json")])
    assert done.exit_code == (0 if ok else 1)
    assert json.loads((tmp_path / "out.json").read_text())["ok"] is ok
    assert ("auc is 0.4" in done.output) is not ok
