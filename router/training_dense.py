"""Dense weights in the parameter server, and the bags of a head's features.

The head's weights lie in the parameter server as a table of their own, `NAME.dense`, cut into rows of 256 numbers; a
worker pulls them with each batch and pushes their gradients with the batch's, in one push under one sequence. That is
how workers share them, and why: workers may be on any machine; the servers' optimizer and its state are shared too; a
batch is applied once to dense and sparse rows alike, by the same rule; a dead worker takes nothing with it. (Weights
in memory shared between processes would be torn by a kill in the middle of a step.) It costs their size on the wire
in every step, which prefetching hides while heads stay below some millions of weights.

Buffers (the running mean and variance of batch normalisation) lie in `NAME.buffers` under SGD with rate 1: pushing
`pulled - new` adds a worker's change to whatever others have changed meanwhile.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dense_head import HeadSpec
from router.features import Bags, join_bags

DENSE_DIM = 256
"""Numbers in a row of a table of dense weights: rows of 1 KiB spread over all servers."""


class FlatVector:
    """float32 rows [n, DENSE_DIM] that hold n numbers of several tensors, end to end; the rest is zero."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self.size = sum(shape.numel() for shape in self.shapes.values())
        self.rows = torch.zeros(-(-self.size // DENSE_DIM), DENSE_DIM)

    def views(self) -> dict[str, torch.Tensor]:
        """The tensors, as windows onto the rows."""
        parts, flat, start = {}, self.rows.view(-1), 0
        for name, shape in self.shapes.items():
            parts[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return parts


class SharedDense:
    """A head whose weights come from, and whose gradients go to, two tables. Takes over the module's tensors.

    Parameters and their `.grad` become windows onto two flat arrays, so that a pull and a push copy once.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.tables = {"dense": f"{name}.dense", "buffers": f"{name}.buffers"}
        self.buffers = dict(module.named_buffers())
        persistent = module.state_dict().keys()
        self.buffers = {key: buffer for key, buffer in self.buffers.items() if key in persistent}
        self._weights = FlatVector({key: p.shape for key, p in module.named_parameters()})
        self._grads = FlatVector(self._weights.shapes)
        self._before = FlatVector({key: buffer.shape for key, buffer in self.buffers.items()})
        weights, grads = self._weights.views(), self._grads.views()
        for key, parameter in module.named_parameters():
            weights[key].copy_(parameter.detach())
            parameter.data, parameter.grad = weights[key], grads[key]
        for key, window in self._before.views().items():
            window.copy_(self.buffers[key])

    def rows(self) -> dict[str, NDArray[np.float32]]:
        """The present content, {table: float32[n, DENSE_DIM]}; tables without rows are left out."""
        return self._named(self._weights, self._before)

    def bags(self) -> dict[str, Bags]:
        """Every row of every table, each a bag of its own."""
        counts = {table: len(rows) for table, rows in self.rows().items()}
        return {table: (np.arange(n), np.arange(n + 1)) for table, n in counts.items()}

    def load(self, pulled: Mapping[str, NDArray[np.float32]]) -> None:
        """Take pulled rows as weights and buffers."""
        for key, vector in (("dense", self._weights), ("buffers", self._before)):
            if len(vector.rows):
                vector.rows.copy_(torch.from_numpy(np.ascontiguousarray(pulled[self.tables[key]])))
        for key, window in self._before.views().items():
            self.buffers[key].copy_(window)  # a whole-number buffer stays exact below 2**24

    def gradients(self) -> dict[str, NDArray[np.float32]]:
        """What to push after a step, {table: float32[n, DENSE_DIM]}, in arrays of the caller's own."""
        change = FlatVector(self._before.shapes)
        before = self._before.views()
        for key, window in change.views().items():
            window.copy_(before[key] - self.buffers[key])
        return {table: rows.copy() for table, rows in self._named(self._grads, change).items()}

    def _named(self, dense: FlatVector, buffers: FlatVector) -> dict[str, NDArray[np.float32]]:
        both = {self.tables["dense"]: dense.rows.numpy(), self.tables["buffers"]: buffers.rows.numpy()}
        return {table: rows for table, rows in both.items() if len(rows)}


class TableBags:
    """From the features of a head to its tables and back: features of one table travel as one run of bags."""

    def __init__(self, spec: HeadSpec) -> None:
        self.features: dict[str, list[str]] = {}
        self.modes: dict[str, str] = {}
        for feature in spec.features:
            self.features.setdefault(feature.table, []).append(feature.name)
            self.modes[feature.table] = feature.pooling

    def by_table(self, bags: Mapping[str, Bags]) -> dict[str, Bags]:
        """{feature: (ids, offsets)} of B bags each -> {table: (ids, offsets)} of B bags for each of its features."""
        return {table: join_bags([bags[name] for name in names]) for table, names in self.features.items()}

    def by_feature(self, rows: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """{table: float32[features * B, dim]} -> {feature: float32[B, dim]}."""
        parts: dict[str, NDArray[np.float32]] = {}
        for table, names in self.features.items():
            parts.update(zip(names, np.split(rows[table], len(names)), strict=True))
        return parts

    def gradients(self, grads: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """{feature: float32[B, dim]} -> {table: float32[features * B, dim]}, the inverse of `by_feature`."""
        return {table: np.concatenate([grads[name] for name in names]) for table, names in self.features.items()}
