"""Warming up compiles what clients and servers call: the first request of a process must not wait for a compiler."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ps.client
from ps.client.places import prepare

REPOSITORY = Path(__file__).parents[2]


def test_a_client_has_every_module_of_kernels_ready_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull's deadline is a fraction of what a compiler takes."""
    ready: set[str] = set()
    for name in ("batch", "merge", "shared", "split"):
        monkeypatch.setattr(f"ps.kernels.{name}.warmup", lambda name=name: ready.add(name))
    prepare()
    called = {
        node.module.rpartition(".")[2]
        for file in Path(ps.client.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ps.kernels.")
    }
    assert called == ready


def test_no_kernel_is_called_with_types_that_warming_up_left_out(tmp_path: Path) -> None:
    """In a process of its own: another test may have had the same types compiled."""
    command = [sys.executable, "-m", "tests.ps.warm_requests", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "requests were made\n", done.stderr
