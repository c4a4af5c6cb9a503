"""`EmbeddingBag`: a torch module whose rows live in the parameter server."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ps.client import Client
from ps.errors import RequestError
from ps.ragged import RaggedIds
from ps.spec import Absent

Mode = Literal["sum", "mean", "max"]


class EmbeddingBag(torch.nn.Module):
    """Forward pulls, backward pushes: `torch.nn.EmbeddingBag` over a table of the parameter server.

        bag = ps.nn.EmbeddingBag(client, "item", mode="mean")
        loss = criterion(head(bag(ids, offsets)), labels)
        loss.backward()                     # the servers' optimizer has run when this returns
        optimizer.step()                    # of the head alone

    When the push is sent. In `backward()`, as soon as autograd knows the gradient of this call's output, and
    `backward()` returns when it is acknowledged. A module called twice pushes twice; a second backward over a
    retained graph pushes again. The module has no parameters: no torch optimizer ever sees the rows, and
    `zero_grad()` and `state_dict()` are empty. An error of the push (`ps.errors`) comes out of `backward()`.

    Gradient accumulation. Each backward is one push, hence one step of the servers' optimizer: k micro-batches are k
    steps, which equals one large step for SGD only. With `deferred=True` backward only keeps the gradients, and
    `step()` sends all that were kept in one push, where duplicate ids are summed first; `discard()` forgets them.

    GradScaler. The gradients that reach this module carry the loss scale. Use `deferred=True` and
    `bag.step(1 / scaler.get_scale())` before `scaler.update()`; where the gradients overflowed, `step` raises
    RequestError (the push is refused whole): call `discard()` in the steps that the scaler skips.

    DistributedDataParallel. There is nothing to average or broadcast, and DDP leaves the module alone. Every rank
    pushes its own gradients, so the servers see the sum over ranks where DDP averages the head's: pass
    `lr_scale=1 / world_size` to match (exact for SGD). Ranks need not wait for each other here.

    `eval()` and `torch.no_grad()`. Outputs need no gradient: nothing is pushed, and a pull never writes. In
    training mode the output always requires one, frozen or not: freeze a table by `bag.eval()`.

    mode "sum" and "mean" are pooled by the servers; "max" pulls the single rows and pools here, where the gradient
    must know which row won, and pushes the rows that did. Weights go with "sum" only, and get no gradient themselves.
    A fork (a DataLoader worker) is the client's matter; ids may come from one.
    """

    def __init__(
        self,
        client: Client,
        table: str,
        mode: Mode = "sum",
        include_last_offset: bool = False,
        lr_scale: float = 1.0,
        absent: Absent | None = None,
        deferred: bool = False,
    ) -> None:
        """include_last_offset: as torch's; whether offsets hold one entry more than there are bags.

        lr_scale: multiplies the table's learning rate. absent: what an id without a row answers; None is the table's
        own setting. RequestError where the mode is unknown.
        """
        super().__init__()
        if mode not in ("sum", "mean", "max"):
            raise RequestError(f'mode is {mode!r}; it must be "sum", "mean" or "max"')
        self.client = client
        self.table = table
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.lr_scale = lr_scale
        self.absent = absent
        self.deferred = deferred
        self._kept: list[_Gradient] = []

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pooled rows float32[bags, dim], on the device of `ids`.

        ids int64[n] with offsets int64[bags] (or bags + 1), or int64[bags, n] without: n ids in each bag.
        per_sample_weights float32, shaped as ids. RequestError where they do not fit together.
        """
        bags = self._bags(ids, offsets, per_sample_weights)
        anchor = torch.empty(0, requires_grad=self.training and torch.is_grad_enabled())
        if self.mode != "max":
            return _Rows.apply(anchor, self, bags, ids.device)
        unique, inverse = np.unique(bags.ids, return_inverse=True)
        each = RaggedIds(unique, np.arange(len(unique) + 1))
        rows = _Rows.apply(anchor, self, each, torch.device("cpu"))
        pooled = torch.nn.functional.embedding_bag(
            torch.from_numpy(inverse), rows, torch.from_numpy(bags.offsets), mode="max", include_last_offset=True
        )
        return pooled.to(ids.device)

    def step(self, grad_scale: float = 1.0) -> None:
        """Push what backward kept (deferred=True), times `grad_scale`, as one push; nothing kept is no push.

        Returns when it is acknowledged. What was kept is forgotten even where the push raises.
        """
        kept, self._kept = self._kept, []
        if not kept:
            return
        lengths = np.concatenate([np.diff(one.bags.offsets) for one in kept])
        weights = [one.bags.weights for one in kept if one.bags.weights is not None]
        joined = RaggedIds.of(
            np.concatenate([one.bags.ids for one in kept]),
            np.concatenate([[0], np.cumsum(lengths)]),
            weights=_joined_weights(kept) if weights else None,
        )
        self._push(_Gradient(joined, np.concatenate([one.rows for one in kept]) * np.float32(grad_scale)))

    def discard(self) -> None:
        """Forget what backward kept (deferred=True)."""
        self._kept = []

    def extra_repr(self) -> str:
        """The table and the mode, for `print(model)`."""
        return f"{self.table!r}, mode={self.mode!r}"

    def _bags(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> RaggedIds:
        if weights is not None and (self.mode != "sum" or weights.requires_grad):
            reason = "needs a gradient, and gets none here" if self.mode == "sum" else f"come with mode {self.mode!r}"
            raise RequestError(f'per_sample_weights {reason}; they go with mode "sum", as constants')
        if ids.dim() == 2 and offsets is None:
            bounds = np.arange(ids.shape[0] + 1, dtype=np.int64) * ids.shape[1]
        elif ids.dim() == 1 and offsets is not None:
            bounds = offsets.cpu().numpy()
            if not self.include_last_offset:
                bounds = np.append(bounds, len(ids))
        else:
            found = "without" if offsets is None else "with"
            raise RequestError(
                f"ids have {ids.dim()} dimensions {found} offsets; they must have one with offsets, or two without"
            )
        if weights is not None and weights.shape != ids.shape:
            raise RequestError(f"per_sample_weights have shape {tuple(weights.shape)}; it must be {tuple(ids.shape)}")
        factors = None if weights is None else weights.detach().cpu().reshape(-1).numpy()
        return RaggedIds.of(ids.detach().cpu().reshape(-1).numpy(), bounds, weights=factors)

    def _pull(self, bags: RaggedIds) -> NDArray[np.float32]:
        if self.mode == "max":
            return self.client.pull(self.table, bags.ids, absent=self.absent)
        return self.client.pull_bags({self.table: _parts(bags)}, mode=self.mode, absent=self.absent)[self.table]

    def _take(self, gradient: "_Gradient") -> None:
        """What backward calls."""
        if self.deferred:
            self._kept.append(gradient)
        else:
            self._push(gradient)

    def _push(self, gradient: "_Gradient") -> None:
        bags, rows = gradient.bags, gradient.rows
        if self.mode == "max":
            won = rows.any(axis=1) | ~np.isfinite(rows).all(axis=1)
            self.client.push(self.table, bags.ids[won], rows[won], lr_scale=self.lr_scale)
        else:
            self.client.push_bags(
                {self.table: _parts(bags)}, {self.table: rows}, mode=self.mode, lr_scale=self.lr_scale
            )


@dataclass(frozen=True, slots=True)
class _Gradient:
    """The gradient of one call: rows float32[bags, dim]. For "max" every unique id is a bag."""

    bags: RaggedIds
    rows: NDArray[np.float32]


def _parts(bags: RaggedIds) -> tuple[NDArray, ...]:
    return (bags.ids, bags.offsets) if bags.weights is None else (bags.ids, bags.offsets, bags.weights)


def _joined_weights(kept: list[_Gradient]) -> NDArray[np.float32]:
    """Weights of all calls; calls without any count 1 for each id."""
    ones = [np.ones(len(one.bags.ids), np.float32) if one.bags.weights is None else one.bags.weights for one in kept]
    return np.concatenate(ones)


class _Rows(torch.autograd.Function):
    """Pulled rows as the output of an operation that autograd knows. The anchor, empty, is what makes it look back."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, module: EmbeddingBag, bags: RaggedIds, device: torch.device) -> Tensor:
        ctx.module, ctx.bags = module, bags
        return torch.from_numpy(np.array(module._pull(bags), np.float32, copy=None)).to(device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grads[0].detach().to(torch.float32).contiguous().cpu().numpy()
        ctx.module._take(_Gradient(ctx.bags, rows))
        return torch.empty(0), None, None, None
