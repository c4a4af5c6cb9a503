"""How good scores are: area under the ROC curve, and log-loss."""

import numpy as np
from numpy.typing import ArrayLike

from dense_head.spec import HeadError


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive outscores a negative, ties counting half.

    labels [n] of 0 and 1, scores [n]. By the rank sum (Mann and Whitney 1947), equal scores sharing their mean rank.
    HeadError where lengths differ or a class is missing.
    """
    truth, values = _pair(labels, scores)
    positives = float((truth > 0.5).sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        raise HeadError(f"labels hold {positives:.0f} positives and {negatives:.0f} negatives; both are needed")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    return float((ranks[truth > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(labels: ArrayLike, scores: ArrayLike, eps: float = 1e-7) -> float:
    """Mean binary cross-entropy of scores in 0..1, kept `eps` away from both ends."""
    truth, values = _pair(labels, scores)
    values = np.clip(values, eps, 1 - eps)
    return float(-(truth * np.log(values) + (1 - truth) * np.log(1 - values)).mean())


def _pair(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    truth, values = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    if truth.shape != values.shape or truth.ndim != 1 or not len(truth):
        raise HeadError(f"labels have shape {truth.shape} and scores {values.shape}; they must be equal, [n], n > 0")
    if not np.isfinite(values).all():
        raise HeadError("scores hold a value that is not finite")
    return truth, values
