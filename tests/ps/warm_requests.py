"""`python -m tests.ps.warm_requests FOLDER`: requests of every kind, and what had to be compiled for them."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

import ps.kernels
from ps.kernels import warmup
from tests.ps.cluster_fixture import local_cluster


def kernels() -> Iterator[tuple[str, Any]]:
    """Every kernel by its name."""
    for module in iter_modules(ps.kernels.__path__):
        for name, found in vars(import_module(f"ps.kernels.{module.name}")).items():
            if isinstance(found, Dispatcher) and found.py_func.__module__.endswith(module.name):
                yield f"{module.name}.{name}", found


def requests(folder: Path) -> None:
    """Servers in this process, and a client of them."""
    ids, offsets = np.arange(20), np.array([0, 5, 20])
    weights = np.ones(20, np.float32)
    with local_cluster(folder) as cluster, cluster.client() as client:
        for name, replicas in (("a", 1), ("b", 2)):
            client.create_table(name, dim=4, replicas=replicas)
        client.push("a", ids, np.ones((20, 4), np.float32))
        client.assign("b", ids, np.ones((20, 4), np.float32))
        client.push_bags({"a": (ids, offsets), "b": (ids, offsets)}, {n: np.ones((2, 4), np.float32) for n in "ab"})
        client.pull("a", ids)
        for mode in ("sum", "mean", "max"):
            client.pull_bags({"a": (ids, offsets), "b": (ids, offsets)}, mode=mode)
        client.pull_bags({"a": (ids, offsets, weights)}, mode="sum")
        client.delete("a", ids)


def main() -> None:
    """Print the types that warming up left out."""
    warmup()
    warm = {name: set(kernel.signatures) for name, kernel in kernels()}
    requests(Path(sys.argv[1]))
    for name, kernel in kernels():
        for types in set(kernel.signatures) - warm[name]:
            print(f"{name} was compiled for {types}")
    print("requests were made")


if __name__ == "__main__":
    main()
