"""Placing whole tables: all slots of each have the same owners, and it is weights that servers should hold evenly.

There are at most some thousands, so this is plain Python. Servers on distinct hosts, then zones, come before the load.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hashring.placement import Sites


class WholeTables:
    """Owner lists `rows[i]` of whole tables with `weights[i]`, and `loads[s]`, the weight that server s holds.

    distances int32[tables, k]: how far each server is on the ring; decides among equals.
    """

    def __init__(
        self, rows: list[list[int]], weights: Sequence[float], sites: Sites, distances: NDArray[np.int32]
    ) -> None:
        self.rows = rows
        self.weights = weights
        self.sites = sites
        self.distances = distances
        self.loads = [0.0] * len(sites.hosts)
        for row, weight in zip(rows, weights, strict=True):
            for server in row:
                self.loads[server] += weight

    def fill(self, table: int, copies: int, among: Sequence[int]) -> None:
        """Give the table more owners of `among`, up to `copies`: apart from the others, then the least loaded.

        A table whose owners are all dead is lost, and gets none: it would begin anew as if never trained.
        """
        row = self.rows[table]
        if row and not any(self.sites.usable[s] for s in row):
            return
        while len(row) < copies and (free := [s for s in among if s not in row]):
            best = min(free, key=lambda s: (self.sites.clash(s, row), self.loads[s], self.distances[table, s]))
            row.append(best)
            self.loads[best] += self.weights[table]

    def shed(self, table: int, copies: int) -> None:
        """Take owners from the table beyond `copies`: those that share a host, then the most loaded."""
        row = self.rows[table]
        if row and not any(self.sites.usable[s] for s in row):
            return
        while len(row) > copies:
            worst = max(row, key=lambda s: (self.sites.clash(s, [o for o in row if o != s]), self.loads[s], s))
            row.remove(worst)
            self.loads[worst] -= self.weights[table]

    def spread(self, newcomer: int) -> None:
        """Move tables to the newcomer, biggest first from the most loaded, while it stays at or below the mean."""
        usable = self.sites.servers
        mean = sum(self.loads[s] for s in usable) / len(usable)
        for table in sorted(range(len(self.rows)), key=lambda i: (-self.weights[i], self.distances[i, newcomer], i)):
            row, weight = self.rows[table], self.weights[table]
            held = [s for s in row if self.sites.usable[s]]
            if newcomer in row or not held or self.loads[newcomer] + weight > mean:
                continue
            giver = max(held, key=lambda s: (self.loads[s], s))
            others = [s for s in row if s != giver]
            if self.loads[giver] > mean and self.sites.clash(newcomer, others) <= self.sites.clash(giver, others):
                row[row.index(giver)] = newcomer
                self.loads[giver] -= weight
                self.loads[newcomer] += weight

    def even_primaries(self) -> None:
        """Swap first places while that lowers the higher of the two servers' loads as primaries."""
        loads = [0.0] * len(self.loads)
        for row, weight in zip(self.rows, self.weights, strict=True):
            if row:
                loads[row[0]] += weight
        changed = True
        while changed:
            changed = False
            for row, weight in zip(self.rows, self.weights, strict=True):
                best = min(range(len(row)), key=lambda at: (loads[row[at]], at), default=0)
                if best and loads[row[best]] + weight < loads[row[0]]:
                    loads[row[0]] -= weight
                    loads[row[best]] += weight
                    row[0], row[best] = row[best], row[0]
                    changed = True
