"""In-process torch: one nn.EmbeddingBag a table, one thread, inference mode."""

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.workloads import Batch, Workload


class TorchBags:
    """The tables of a workload as modules of this process."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(1)
        self.modules = {
            name: torch.nn.EmbeddingBag.from_pretrained(
                torch.from_numpy(workload.values(i)), mode="sum", include_last_offset=True
            )
            for i, name in enumerate(workload.tables)
        }

    def pool(self, batch: Batch) -> list[NDArray[np.float32]]:
        """float32[B, dim] of each table, in the order of the batch."""
        with torch.inference_mode():
            return [
                self.modules[name](torch.from_numpy(ids), torch.from_numpy(offsets)).numpy()
                for name, (ids, offsets) in batch.items()
            ]

    def close(self) -> None:
        """Free the tables."""
        self.modules.clear()
