"""Shares: the part of one request that one server answers, as arrays.

A share lists *features* (one table each; a table may occur more than once), a line of `features int32[F, 4]` for each:
its table's number, how many bags it has, how they are pooled, and what an absent id answers (the last two are 0 in a
push). The bags of all features stand one behind another in `offsets`. A row request is the case without offsets: then
every id is a bag of its own.

Rows travel flat: feature f fills `bags(f) * dim(f)` floats, feature behind feature, so that tables of several
widths share one array and one kernel call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

TABLE, BAGS, MODE, ABSENT = range(4)
"""Columns of `features`."""
FEATURE_COLUMNS = 4

SUM, MAX = 0, 1
"""Pooling of a feature on the server. A mean is summed there and divided by the client, which knows the whole bag."""

PushKind = Literal["push", "assign", "delete"]

Acks = Literal["all", "primary"]
"""Who must hold a push before it is acknowledged: every owner, or the primary, with whom the push may be lost."""


def features_of(
    tables: Sequence[int], bags: Sequence[int], modes: ArrayLike = SUM, absent: ArrayLike = 0
) -> NDArray[np.int32]:
    """int32[F, 4] of columns, or of what all features have in common."""
    lines = np.zeros((len(tables), FEATURE_COLUMNS), np.int32)
    lines[:, TABLE], lines[:, BAGS], lines[:, MODE], lines[:, ABSENT] = tables, bags, modes, absent
    return lines


@dataclass(frozen=True, slots=True)
class PullShare:
    """What a server is asked for.

    features int32[F, 4]: table numbers of the view, bags, modes (SUM or MAX), ABSENT_CODES.
    ids int64[n]. offsets int64[all bags + 1], or None: every id is a bag. weights float32[n] (SUM only), or None.
    """

    features: NDArray[np.int32]
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class PullReply:
    """rows float32[sum(bags(f) * dim(f))], flat, feature-major; absent: how many of the ids had no row."""

    rows: NDArray[np.float32]
    absent: int


@dataclass(frozen=True, slots=True)
class PushShare:
    """What a server is told: a gradient ("push") or a value ("assign") for each bag, or ids to forget ("delete").

    client uint64 (random, one a process) and sequence (from 1, rising) make it apply once.
    rows float32[sum(bags(f) * dim(f))], flat; empty for "delete". With offsets, each bag's gradient goes to every id of
    the bag, times its weight. lr_scale multiplies the learning rate of this push alone.
    "assign" and "delete" have no offsets; of duplicates in one assign, the last wins.
    """

    client: int
    sequence: int
    kind: PushKind
    features: NDArray[np.int32]
    ids: NDArray[np.int64]
    rows: NDArray[np.float32]
    offsets: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    lr_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class PushReply:
    """applied: slots changed now; seen: slots skipped, since they had this sequence before; rows_new: rows made."""

    applied: int
    seen: int
    rows_new: int
