"""RaggedIds: the shape in which ids go in, for pull and for push.

Invariants, checked once here (the gateway) and trusted inside:
  1. ids is int64[n] and C-contiguous; any value is a valid id. Of uint64 the 64 bits are kept: 2**63 and above are
     negative int64, and `.view(np.uint64)` of ids that come back has them as they were.
  2. offsets is int64[features * bags + 1], feature-major (as in TorchRec's KeyedJaggedTensor):
     bag b of feature f holds ids[offsets[f * bags + b] : offsets[f * bags + b + 1]].
  3. offsets begins with 0, never falls, and ends with n. (torch accepts [0, 2, 1, 3] in silence.)
  4. weights, where given, is float32[n], finite.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ps.errors import RequestError


def as_ids(values: ArrayLike, what: str = "ids") -> NDArray[np.int64]:
    """Ids as a contiguous int64[n]; raises RequestError for another shape or for values that are not whole numbers."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise RequestError(f"{what} has shape {array.shape}; it must be one-dimensional")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype == np.uint64:
        return np.ascontiguousarray(array).view(np.int64)
    if array.dtype.kind not in "iu":
        raise RequestError(f"{what} has dtype {array.dtype}; it must be a whole-number type")
    return np.ascontiguousarray(array, np.int64)


def as_float32(values: ArrayLike) -> NDArray[np.float32]:
    """Numbers as a contiguous float32 array. One beyond its range is an infinity, which whoever sends it refuses."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32)


def as_rows(values: ArrayLike, n: int, dim: int, what: str = "rows") -> NDArray[np.float32]:
    """Rows as a contiguous float32[n, dim]; raises RequestError naming the shape found and the one needed."""
    array = np.asarray(values)
    if array.shape != (n, dim):
        raise RequestError(f"{what} has shape {array.shape}; it must be ({n}, {dim})")
    if array.dtype.kind not in "fiu":
        raise RequestError(f"{what} has dtype {array.dtype}; it must be a number type")
    return as_float32(array)


def check_offsets(offsets: NDArray[np.int64], n: int, what: str = "offsets") -> None:
    """Invariants 2 and 3, or RequestError naming the first offset that breaks them."""
    if offsets.ndim != 1 or len(offsets) == 0:
        raise RequestError(f"{what} has shape {offsets.shape}; it must hold one more entry than there are bags")
    if offsets[0] != 0:
        raise RequestError(f"{what} begins with {offsets[0]}; it must begin with 0")
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falls):
        at = int(falls[0])
        raise RequestError(
            f"{what} falls from {offsets[at]} to {offsets[at + 1]} at index {at + 1}; they must not fall"
        )
    if offsets[-1] != n:
        raise RequestError(f"{what} ends with {offsets[-1]}; it must end with the number of ids, {n}")


def kept(offsets: NDArray[np.int64], keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the values of the kept lists stand, and their offsets. (`take` by these is twice as fast as a mask.)"""
    counts = np.diff(offsets)
    out = np.zeros(int(keep.sum()) + 1, np.int64)
    np.cumsum(counts[keep], out=out[1:])
    return np.flatnonzero(np.repeat(keep, counts)), out


@dataclass(frozen=True, slots=True)
class RaggedIds:
    """`features` x `bags` bags of ids; build with `RaggedIds.of`, which checks the invariants above."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    features: int = 1
    weights: NDArray[np.float32] | None = None

    @property
    def bags(self) -> int:
        """Bags of each feature (the batch size)."""
        return (len(self.offsets) - 1) // self.features if self.features else 0

    @classmethod
    def of(cls, ids: ArrayLike, offsets: ArrayLike, features: int = 1, weights: ArrayLike | None = None) -> "RaggedIds":
        """Checked arrays; RequestError in one sentence where an invariant is broken."""
        checked = as_ids(ids)
        bounds = as_ids(offsets, "offsets")
        check_offsets(bounds, len(checked))
        if features < 1 or (len(bounds) - 1) % features:
            raise RequestError(f"offsets describe {len(bounds) - 1} bags, which {features} features cannot share")
        factors = None
        if weights is not None:
            factors = as_float32(weights)
            if factors.shape != checked.shape:
                raise RequestError(f"weights has shape {factors.shape}; it must be {checked.shape}, one for each id")
            if not np.isfinite(factors).all():
                at = int(np.flatnonzero(~np.isfinite(factors))[0])
                raise RequestError(f"weights[{at}] is {factors[at]}; every weight must be a finite float32")
        return cls(checked, bounds, features, factors)
