"""What the replication machine asks its shell to do, and the limits that it keeps."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.view import View
from ps.errors import EmbringError
from ps.share import PushShare

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ReplicationLimits:
    """Limits of one server's replication. Times are of the machine's own clock, which stands still while it is paused.

    queue_bytes_max: changes on their way to one peer; a push that would pass it is refused before it is applied. More
    rides out a longer pause of a backup, and takes that much memory for each peer.
    blocks_max: blocks of changes on their way to one peer; what is pushed meanwhile leaves as one block once an answer
    comes, or at block_bytes_max bytes. More shortens the wait of single pushes, fewer save work under many.
    bulk_bytes_max: copies to a learner on their way to one peer; live changes wait behind them.
    silent_s: a peer that owes an answer for so long is complained of (or, as a learner, dropped).
    tick_max_s: what one tick adds to the clock at most, however long the process was stopped.
    owners_min: owners that a slot must have for pushes to be taken.
    refusals_max: blocks that a peer refuses, one after another, before it is complained of.
    repair_slots: slots in one block of a repair. copy_bytes: of rows, in one block of a copy.
    copy_bytes_per_s: what is spent on copies at most; 0 is no limit. A move in the view may limit it further.
    verify_rows: rows that are compared with other owners in one go, at about a microsecond each on the data threads of
    both. verify_slots_per_s: of the sweep (of a slot with more rows, such a part); 0 is none.
    """

    queue_bytes_max: int = 64 * 2**20
    blocks_max: int = 1
    block_bytes_max: int = 4 * 2**20
    bulk_bytes_max: int = 2**20
    silent_s: float = 0.5
    tick_max_s: float = 0.1
    owners_min: int = 1
    refusals_max: int = 3
    repair_slots: int = 256
    copy_bytes: int = 1024 * 1024
    copy_bytes_per_s: int = 0
    verify_rows: int = 8192
    verify_slots_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request to a peer (its incarnation) on connection number `link`, behind all that was sent on it before.

    A connection of a higher number is a new one: the shell closes the old one. Its reply goes to `replied`.
    """

    peer: int
    link: int
    number: int
    op: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SendView:
    """Send `install` with this view, in the same order as `Send`."""

    peer: int
    link: int
    number: int
    view: View


@dataclass(frozen=True, slots=True)
class Forward:
    """Send `push` with this share, `only` (slots to be decided there, by the view of epoch `at`) and acks, in the same
    order as `Send`."""

    peer: int
    link: int
    number: int
    share: PushShare
    only: NDArray[np.int64]
    at: int
    acks: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the request that the shell knows by this token."""

    token: Hashable
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer it with an error."""

    token: Hashable
    error: EmbringError


Action = Send | SendView | Forward | Answer | Refuse
