"""What a push has changed, as one record: what its blocks for other owners are cut from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ps.arena import Arena
from ps.rowblock import RowBlock
from ps.share import PushReply


@dataclass(frozen=True, slots=True)
class Changed:
    """What a push changes in one arena: plan and inverse as `dedupe` left them; codes, ids, slots, rows of u ids."""

    arena: Arena
    plan: NDArray[np.int64]
    inverse: NDArray[np.int32]
    codes: NDArray[np.int32]
    ids: NDArray[np.int64]
    slots: NDArray[np.int32]
    rows: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Applied:
    """A push that was decided: its reply, and what it changed.

    touched int64[k]: its slots. verdicts uint8 by slot number (NEW: changed now). written: rows made or changed.
    erased: ids deleted (rows -1 where there was none). Borrows arrays of the store: gone with the next push.
    """

    reply: PushReply
    touched: NDArray[np.int64]
    verdicts: NDArray[np.uint8]
    written: list[Changed]
    erased: list[Changed]
    client: int = 0


NOTHING_APPLIED = Applied(PushReply(0, 0, 0), np.empty(0, np.int64), np.empty(0, np.uint8), [], [])


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Clients forgotten as a change of each slot: the block that tells it, None where no slot remembered one."""

    block: RowBlock | None


class Streams(Protocol):
    """To whom changes of a slot are sent: see ps.kernels.replicate."""

    peers: NDArray[np.int16]
    modes: NDArray[np.uint8]
