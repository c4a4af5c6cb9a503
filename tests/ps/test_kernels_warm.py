"""Warming up compiles what clients and servers call: the first request of a process must not wait for a compiler."""

import ast
from pathlib import Path

import numpy as np
import pytest

import ps.client
from ps.client.places import prepare
from ps.kernels import batch, merge, plan, pool, split, warmup
from tests.ps.cluster_fixture import local_cluster

KERNELS = [
    batch.join_offsets,
    batch.cut,
    split.split_into,
    plan.lay_out,
    pool.pull,
    merge.place_bags,
    merge.merge,
    merge.finish,
    merge.gather,
    merge.first_not_finite,
]


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


def signatures() -> list[set[object]]:
    return [set(kernel.signatures) for kernel in KERNELS]


def test_no_kernel_is_called_with_types_that_warming_up_left_out(tmp_path: Path) -> None:
    warmup()
    warm = signatures()
    ids, offsets = np.arange(20), np.array([0, 5, 20])
    weights = np.ones(20, np.float32)
    with local_cluster(tmp_path) as cluster, cluster.client() as client:
        for name in ("a", "b"):
            client.create_table(name, dim=4)
        client.push("a", ids, np.ones((20, 4), np.float32))
        client.assign("b", ids, np.ones((20, 4), np.float32))
        client.push_bags({"a": (ids, offsets), "b": (ids, offsets)}, {n: np.ones((2, 4), np.float32) for n in "ab"})
        client.pull("a", ids)
        for mode in ("sum", "mean", "max"):
            client.pull_bags({"a": (ids, offsets), "b": (ids, offsets)}, mode=mode)
        client.pull_bags({"a": (ids, offsets, weights)}, mode="sum")
        client.delete("a", ids)
    assert signatures() == warm
