"""Who pushes: a random client id, and its sequences of which at most 64 neighbours are undecided."""

import secrets
from collections.abc import Callable

from ps.errors import EmbringError, RequestError

WINDOW = 64
"""Sequences that a slot remembers of a client (DESIGN.md, "Push"): an older one would be refused."""

SEQUENCE_MAX = 2**62
"""No client counts so far; far enough from the end of int64."""


class Window:
    """Hands out sequences from 1 on. A sequence is undecided until it is acknowledged, or given up for good.

    on_close is called when one is decided.
    """

    def __init__(self) -> None:
        self.on_close: Callable[[], None] | None = None
        self.client = secrets.randbits(64) or 1
        self._next = 1
        self._undecided: set[int] = set()

    @property
    def last(self) -> int:
        """The newest sequence that was handed out, 0 before the first."""
        return self._next - 1

    def resume(self, client: int, last: int) -> None:
        """Go on as `client` after its sequence `last`. Raises RequestError where that cannot be."""
        if type(client) is not int or not 1 <= client < 2**64:
            raise RequestError(f"client is {client!r}; it must be a whole number from 1 to 2**64 - 1")
        if type(last) is not int or not 0 <= last < SEQUENCE_MAX:
            raise RequestError(f"sequence is {last!r}; it must be a whole number from 0 to 2**62 - 1")
        if self._undecided:
            raise RequestError(f"{len(self._undecided)} pushes are open under the present identity: flush them first")
        self.client, self._next = client, last + 1

    @property
    def undecided(self) -> int:
        """How many sequences are neither acknowledged nor given up."""
        return len(self._undecided)

    @property
    def full(self) -> bool:
        """Whether the next sequence would leave the oldest undecided one outside the window."""
        return bool(self._undecided) and self._next - min(self._undecided) >= WINDOW

    def open(self) -> int:
        """The next sequence; never where the window is full."""
        if self.full:
            raise EmbringError(f"{WINDOW} sequences are undecided; wait for the oldest")
        sequence = self._next
        self._next += 1
        self._undecided.add(sequence)
        return sequence

    def close(self, sequence: int) -> None:
        """The sequence is decided."""
        self._undecided.discard(sequence)
        if self.on_close is not None:
            self.on_close()
