"""The heads themselves: MLP, DLRM, DeepFM and the two-branch network, all built from one `HeadSpec`.

Every module's forward takes `embeddings` {feature: float32[B, dim]} and `dense` float32[B, D] (None where D = 0), and
returns logits float32[B]. Symbols: B samples, F features, d width of an embedding, D dense columns.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dense_head.spec import HeadError, HeadSpec

Embeddings = Mapping[str, Tensor]


def build(spec: HeadSpec) -> nn.Module:
    """The module that `spec` describes, freshly initialised from torch's generator. HeadError where spec is wrong."""
    return _MODULES[spec.check().kind](spec)


def mlp(widths: Sequence[int], activation: str, last: bool = False) -> nn.Sequential:
    """Linear layers through `widths`, with the activation between them, and behind the last one if `last`."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(wide, narrow))
        if activation == "relu" and (last or i < len(widths) - 2):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Head(nn.Module):
    """What all heads share: the spec, and the checked order of their inputs."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec

    def vectors(self, embeddings: Embeddings) -> list[Tensor]:
        """The embeddings in the spec's order, F of float32[B, d]; HeadError names one that is missing or unknown."""
        if embeddings.keys() != self.spec.dims.keys():
            missing = [name for name in self.spec.dims if name not in embeddings]
            extra = [name for name in embeddings if name not in self.spec.dims]
            problem = f"lack {missing[0]!r}" if missing else f"hold {extra[0]!r}"
            raise HeadError(f"embeddings {problem}; the head takes {', '.join(self.spec.dims)}")
        return [embeddings[name] for name in self.spec.dims]

    def columns(self, dense: Tensor | None) -> list[Tensor]:
        """The dense matrix as a list of none or one, to be concatenated; HeadError where its width is another."""
        width = 0 if dense is None else dense.shape[-1]
        if width != self.spec.dense:
            raise HeadError(f"dense has {width} columns; the head takes {self.spec.dense}")
        return [dense] if dense is not None and width else []


class MLP(Head):
    """All embeddings and the dense columns side by side, through one MLP."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self.top = mlp([sum(spec.dims.values()) + spec.dense, *spec.hidden, 1], spec.activation)

    def forward(self, embeddings: Embeddings, dense: Tensor | None = None) -> Tensor:
        """Logits float32[B]."""
        return self.top(torch.cat(self.vectors(embeddings) + self.columns(dense), 1)).squeeze(1)


class DLRM(Head):
    """Deep learning recommendation model (Naumov et al. 2019): dot products of all pairs of vectors, then an MLP.

    The dense columns, through the bottom MLP, are one more vector, and stand beside the products. Without dense
    columns the products alone go up.
    """

    pairs: Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        dim, vectors = spec.features[0].dim, len(spec.features) + bool(spec.dense)
        self.bottom = mlp([spec.dense, *spec.dense_hidden, dim], spec.activation, last=True) if spec.dense else None
        pairs = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("pairs", pairs[0] * vectors + pairs[1], persistent=False)
        self.top = mlp([pairs.shape[1] + dim * bool(spec.dense), *spec.hidden, 1], spec.activation)

    def forward(self, embeddings: Embeddings, dense: Tensor | None = None) -> Tensor:
        """Logits float32[B]."""
        vectors, columns = self.vectors(embeddings), self.columns(dense)
        beside = [self.bottom(columns[0])] if self.bottom is not None else []
        stacked = torch.stack(beside + vectors, 1)  # [B, V, d]
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([*beside, products], 1)).squeeze(1)


class DeepFM(Head):
    """DeepFM (Guo et al. 2017): first order + factorisation machine + MLP over the same embeddings.

    The first column of each embedding is the first-order weight of its id, the other d - 1 are the factors: one table
    and one row hold both, so that one pull brings all. The pairwise sum is Rendle's (2010) identity,
    sum_{i<j} <v_i, v_j> = ((sum_i v_i)^2 - sum_i v_i^2) / 2, added over the columns. Dense columns enter the first
    order by a linear layer (which holds the bias), and the MLP.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        factors = len(spec.features) * (spec.features[0].dim - 1)
        self.linear = nn.Linear(spec.dense, 1) if spec.dense else None
        self.deep = mlp([factors + spec.dense, *spec.hidden, 1], spec.activation)

    def forward(self, embeddings: Embeddings, dense: Tensor | None = None) -> Tensor:
        """Logits float32[B]."""
        stacked, columns = torch.stack(self.vectors(embeddings), 1), self.columns(dense)  # [B, F, d]
        factors = stacked[:, :, 1:]
        logits = stacked[:, :, 0].sum(1)
        logits = logits + 0.5 * (factors.sum(1).square() - factors.square().sum(1)).sum(1)
        if self.linear is not None:
            logits = logits + self.linear(columns[0]).squeeze(1)
        return logits + self.deep(torch.cat([factors.flatten(1), *columns], 1)).squeeze(1)


class TwoBranch(Head):
    """A sparse branch over the embeddings and a dense branch over the columns, each linear layers with a batch
    normalisation behind each, joined by an MLP: the network of PERSIA's Adult example with activation "none".
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self.sparse = self._branch([sum(spec.dims.values()), *spec.sparse_hidden])
        self.dense = self._branch([spec.dense, *spec.dense_hidden]) if spec.dense else None
        joined = [sum(spec.dims.values()), *spec.sparse_hidden][-1] + [spec.dense, *spec.dense_hidden][-1]
        self.top = mlp([joined, *spec.hidden, 1], spec.activation)

    def _branch(self, widths: list[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow)]
            if self.spec.activation == "relu":
                layers.append(nn.ReLU())
        return nn.Sequential(*layers)

    def forward(self, embeddings: Embeddings, dense: Tensor | None = None) -> Tensor:
        """Logits float32[B]."""
        branches = [self.sparse(torch.cat(self.vectors(embeddings), 1))]
        columns = self.columns(dense)
        if self.dense is not None:
            branches.append(self.dense(columns[0]))
        return self.top(torch.cat(branches, 1)).squeeze(1)


_MODULES: dict[str, type[Head]] = {"mlp": MLP, "dlrm": DLRM, "deepfm": DeepFM, "two_branch": TwoBranch}
