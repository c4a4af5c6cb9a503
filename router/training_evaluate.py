"""Scores of prepared rows with the tables of a cluster, and how good they are."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import ps
from dense_head import Predictor, auc, log_loss
from router.training_data import PreparedRows
from router.training_dense import TableBags

Absent = Literal["initial", "zeros", "default"]


@dataclass(frozen=True)
class Evaluation:
    """How good scores are. auc in 0..1, log_loss in nats, absent: ids that had no row."""

    rows: int
    auc: float
    log_loss: float
    absent: int


def score(
    client: ps.Client, predictor: Predictor, rows: PreparedRows, batch: int = 1024, absent: Absent = "zeros"
) -> tuple[NDArray[np.float32], int]:
    """(scores float32[rows], ids without a row). absent: what such an id answers; "zeros" is what a router serves."""
    tables = TableBags(predictor.spec)
    scores, missing = np.empty(len(rows), np.float32), 0
    for start in range(0, len(rows), batch):
        part = rows.take(np.arange(start, min(start + batch, len(rows))))
        pulled = client.pull_bags(tables.by_table(part.bags), mode=tables.modes, absent=absent)
        missing += client.last_absent
        dense = part.dense if part.dense.shape[1] else None
        scores[start : start + batch] = predictor.predict(tables.by_feature(pulled), dense)
    return scores, missing


def evaluate(
    client: ps.Client, predictor: Predictor, rows: PreparedRows, batch: int = 1024, absent: Absent = "zeros"
) -> Evaluation:
    """AUC and log-loss of `score`. HeadError where the rows hold one class only."""
    scores, missing = score(client, predictor, rows, batch, absent)
    return Evaluation(len(rows), auc(rows.labels, scores), log_loss(rows.labels, scores), missing)
