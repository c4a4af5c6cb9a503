"""Who can pool a workload's bags: one registry, read by the benchmarks and by the tests that compare results.

Nothing can be measured that is not in it, and everything in it is compared with the plain twin of the tests.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

import ps
from benchmarks.peers.redis_peer import RedisBags
from benchmarks.peers.torch_bag import TorchBags
from benchmarks.workloads import Batch, Workload

LOAD_ROWS = 25_000
"""Rows of one assign while a table is loaded."""


class Pooler(Protocol):
    """Holds a workload's tables and pools bags of them by sum."""

    def pool(self, batch: Batch) -> list[NDArray[np.float32]]:
        """float32[B, dim] of each table, in the order of the batch."""

    def close(self) -> None:
        """Free what it holds."""


class EmbringBags:
    """The tables of a workload in a running cluster, pulled by the public blocking client."""

    def __init__(
        self, workload: Workload, client: "ps.Client", placement: Literal["sharded", "whole"] = "sharded"
    ) -> None:
        self.client = client
        self.prefix = f"{placement}_"
        for i, name in enumerate(workload.tables):
            table = self.prefix + name
            if table in client.tables():
                continue
            client.create_table(table, workload.shape.dim, optimizer=ps.SGD(), placement=placement)
            values = workload.values(i)
            for at in range(0, len(values), LOAD_ROWS):
                part = values[at : at + LOAD_ROWS]
                client.assign(table, np.arange(at, at + len(part)), part, timeout=60.0)

    def request(self, batch: Batch) -> Batch:
        """The batch under the names that the tables have in the cluster."""
        return {self.prefix + name: bags for name, bags in batch.items()}

    def pool(self, batch: Batch) -> list[NDArray[np.float32]]:
        """float32[B, dim] of each table, in the order of the batch."""
        return list(self.client.pull_bags(self.request(batch), mode="sum", absent="zeros").values())

    def close(self) -> None:
        """Nothing: the client and the cluster are the caller's."""


PEERS: Mapping[str, Callable[[Workload], Pooler]] = {"torch": TorchBags, "redis": RedisBags}
"""Peers that pool, by name; they may raise PeerMissing."""


def same(a: list[NDArray[np.float32]], b: list[NDArray[np.float32]]) -> bool:
    """Whether two results agree in every bit (-0.0 counts as 0.0)."""
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
