"""The real store, whose every change is looked at."""

from typing import TYPE_CHECKING, Any

import numpy as np

from hashring.view import View
from ps.rowblock import RowBlock
from ps.store import Store

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


class CheckedStore(Store):
    """Tells the checks of each slot that moved."""

    def __init__(self, cluster: "Cluster", server: Any, incarnation: int, limits: Any, clock: Any) -> None:
        super().__init__(incarnation, limits, clock)
        self.cluster, self.server = cluster, server

    def _moved(self, slots: np.ndarray) -> None:
        self.cluster.checks.moved(self.server, slots)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        applied = super().apply(*args, **kwargs)
        if applied.written or applied.erased:
            self._moved(applied.touched)
        return applied

    def absorb(self, block: RowBlock, *args: Any, **kwargs: Any) -> Any:
        taken = super().absorb(block, *args, **kwargs)
        self._moved(block.slots[taken])
        return taken

    def forget(self, clients: list[int]) -> Any:
        forgotten = super().forget(clients)
        if forgotten.block is not None:
            self._moved(forgotten.block.slots)
        return forgotten

    def install(self, view: View) -> None:
        before = self.view
        super().install(view)
        if self.view is view:
            self.cluster.checks.installed(self.server, before, view)
