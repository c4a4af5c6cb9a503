"""One training step: loss, and the gradients of the pooled embeddings, which the parameter server is to be told."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dense_head.predictor import batch_tensors
from dense_head.spec import HeadError

Arrays = Mapping[str, NDArray[np.float32]]


class TrainStep:
    """Forward and backward of a head over one batch, with binary cross-entropy, the mean over the batch.

    With an optimizer, the module's own weights take a step too. Without one, their gradients stay in `.grad`, for the
    caller to use (zeroed at the beginning of the next step, in place). Puts the module into training mode.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.module = module.train()
        self.optimizer = optimizer
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def __call__(
        self, embeddings: Arrays, dense: NDArray[np.float32] | None, labels: NDArray[np.float32]
    ) -> tuple[float, dict[str, NDArray[np.float32]]]:
        """(loss, {feature: d loss / d embedding, float32[B, dim]}) of a batch.

        embeddings {feature: float32[B, dim]}, dense float32[B, D] or None, labels float32[B] in 0..1. HeadError where
        shapes disagree. A loss that is not finite is returned as it is; nothing is stepped then.
        """
        pooled, columns = batch_tensors(embeddings, dense, self.device)
        targets = torch.as_tensor(np.ascontiguousarray(labels, np.float32), device=self.device)
        rows = len(next(iter(pooled.values())))
        if targets.shape != (rows,):
            raise HeadError(f"labels have shape {tuple(targets.shape)}; it must be ({rows},), one for each row")
        for tensor in pooled.values():
            tensor.requires_grad_()
        self.module.zero_grad(set_to_none=False)
        loss = binary_cross_entropy_with_logits(self.module(pooled, columns), targets)
        loss.backward()
        if self.optimizer is not None and bool(torch.isfinite(loss)):
            self.optimizer.step()
        grads = {name: _array(tensor.grad, tensor) for name, tensor in pooled.items()}
        return float(loss.detach()), grads


def _array(grad: torch.Tensor | None, like: torch.Tensor) -> NDArray[np.float32]:
    """A gradient as a C-contiguous array; zeros where the loss did not depend on the tensor."""
    return (torch.zeros_like(like.detach()) if grad is None else grad).contiguous().cpu().numpy()
