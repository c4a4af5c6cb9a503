"""What a push has changed, as one record: what blocks for other owners are cut from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ps.arena import Arena
from ps.rowblock import RowBlock
from ps.share import PushReply


@dataclass(frozen=True, slots=True)
class Changed:
    """What a push changes in one arena: plan and inverse as `dedupe` left them; codes, ids, slots, rows of u ids.

    versions int64[u]: of the rows once they are written, by which is seen whether a later push wrote them again.
    """

    arena: Arena
    plan: NDArray[np.int64]
    inverse: NDArray[np.int32]
    codes: NDArray[np.int32]
    ids: NDArray[np.int64]
    slots: NDArray[np.int32]
    rows: NDArray[np.int32]
    versions: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Applied:
    """A push that was decided: its reply, and what it changed.

    touched int64[t]: its slots. slots int64[k]: those of them that had not seen it. before int64[k]: where they stood.
    written: rows made or changed. erased: ids deleted (rows -1 where there was none).
    """

    reply: PushReply
    touched: NDArray[np.int64]
    slots: NDArray[np.int64]
    before: NDArray[np.int64]
    written: list[Changed]
    erased: list[Changed]
    client: int = 0


NO_SLOTS = np.empty(0, np.int64)
NOTHING_APPLIED = Applied(PushReply(0, 0, 0), NO_SLOTS, NO_SLOTS, NO_SLOTS, [], [])


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Clients forgotten as a change of each slot: the block that tells it, None where no slot remembered one."""

    block: RowBlock | None


class Streams(Protocol):
    """To whom changes of a slot are sent: see ps.kernels.replicate."""

    peers: NDArray[np.int16]
    modes: NDArray[np.uint8]
