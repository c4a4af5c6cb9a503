"""Scores from a head: numpy in, numpy out, in inference mode."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dense_head.io import load
from dense_head.spec import HeadError, HeadSpec


def batch_tensors(
    embeddings: Mapping[str, NDArray[np.float32]], dense: NDArray[np.float32] | None, device: torch.device
) -> tuple[dict[str, Tensor], Tensor | None]:
    """A batch as tensors on `device`: without copying on a CPU, through pinned memory to a GPU.

    HeadError where an array is not two-dimensional or the numbers of rows disagree.
    """
    if not embeddings:
        raise HeadError("a batch has no embeddings; it needs at least one")
    rows = len(next(iter(embeddings.values())))
    pooled = {name: _tensor(f"embedding {name!r}", array, rows, device) for name, array in embeddings.items()}
    return pooled, None if dense is None else _tensor("dense", dense, rows, device)


def _tensor(what: str, array: NDArray[np.float32], rows: int, device: torch.device) -> Tensor:
    if array.ndim != 2:
        raise HeadError(f"{what} has shape {array.shape}; it must be two-dimensional")
    if len(array) != rows:
        raise HeadError(f"{what} has {len(array)} rows where the first embedding has {rows}")
    if not array.flags.writeable:
        array = array.copy()  # torch would share, and might write into, memory that is not ours to change
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Predictor:
    """A head that answers batches. One thread may use it at a time.

    device: "auto" is the first GPU where there is one, else the CPU; or any name that torch knows. Where torch has no
    GPU, the copies through pinned memory do not run (and have not been run by the project's own tests then).
    """

    def __init__(self, spec: HeadSpec, module: nn.Module, device: str = "auto") -> None:
        self.spec = spec
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self.device = torch.device(name)
            self.module = module.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:
            raise HeadError(f"device is {device!r}, which cannot be used here: {error}") from None

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> "Predictor":
        """The head that `dense_head.save` wrote into `folder`."""
        spec, module = load(folder)
        return cls(spec, module, device)

    def predict(
        self, embeddings: Mapping[str, NDArray[np.float32]], dense: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Scores float32[B] in 0..1. embeddings {feature: float32[B, dim]}, dense float32[B, D] or None (D = 0).

        HeadError names an input that is missing, unknown or of the wrong shape. 0 rows give 0 scores.
        """
        self._check(embeddings, dense)
        pooled, columns = batch_tensors(embeddings, dense, self.device)
        with torch.inference_mode():
            return torch.sigmoid(self.module(pooled, columns)).cpu().numpy()

    def _check(self, embeddings: Mapping[str, NDArray[np.float32]], dense: NDArray[np.float32] | None) -> None:
        for name, dim in self.spec.dims.items():
            if name not in embeddings:
                raise HeadError(f"embeddings lack {name!r}; the head takes {', '.join(self.spec.dims)}")
            if embeddings[name].shape[1:] != (dim,):
                raise HeadError(f"embedding {name!r} has shape {embeddings[name].shape}; it must be (rows, {dim})")
        if self.spec.dense and (dense is None or dense.shape[1:] != (self.spec.dense,)):
            shape = None if dense is None else dense.shape
            raise HeadError(f"dense has shape {shape}; it must be (rows, {self.spec.dense})")

    def warmup(self, batch: int = 32, repeats: int = 3) -> None:
        """Answer `repeats` batches of zeros, so that the first real one meets no lazy initialisation."""
        embeddings = {name: np.zeros((batch, dim), np.float32) for name, dim in self.spec.dims.items()}
        dense = np.zeros((batch, self.spec.dense), np.float32) if self.spec.dense else None
        for _ in range(repeats):
            self.predict(embeddings, dense)
