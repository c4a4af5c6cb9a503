"""Shared reads: processes of a server's own host may map its rows and read them without asking.

A message costs two wake-ups and four copies; a lookup costs 40 ns. So a server may keep what a pull reads (roles,
directories, values) in memory that other processes of the same user can map, read-only, and a client that finds all
owners of its ids on its own host does what the server's kernel would do (ps/client/shared.py).

What keeps such a read as good as a pull over the fabric:

* **A seqlock.** SEQUENCE is odd while the data thread changes something. A reader notes it, reads, and looks again:
  where it was odd or has moved, what was read is thrown away. So a read is atomic on its server, as a request is, and
  nothing is locked: writers never wait for readers. (Lameter, "Effective synchronization on Linux/NUMA systems", 2005.)
* **A lease.** BEAT is when the data thread last went round (monotonic, nanoseconds). From LEASE on after it nobody
  reads, and no view leaves a stopped server out before that. A dead one is known by its pidfd at once.
* **The server's own judgement.** Roles are read under the same seqlock: what this server would refuse is not read.

A reader may see anything while a writer is at work: it checks every number before it follows it, and no loop of it is
endless. It writes nothing: the mappings are read-only.
"""

import time
from types import TracebackType

import numpy as np

from ps.kernels.shared import BEAT, GENERATION, HEADER_FIELDS, INCARNATION, LEASE, SEQUENCE, fence
from ps.memory import Reservation

LEASE_NS = 200_000_000
"""The longest lease: far below the 500 ms after which a silent owner leaves its slots, and above what one request or
part of a copy holds the data thread."""


def lease(noticed_ms: float) -> int:
    """Nanoseconds after a beat in which memory may be read, where silent servers are noticed after so many ms."""
    return min(LEASE_NS, int(noticed_ms * 1_000_000) // 2)


class Latch:
    """The header of a server's shared memory: `with latch:` while anything that readers see is being changed."""

    def __init__(self, incarnation: int, shared: bool) -> None:
        self.memory = Reservation((HEADER_FIELDS,), np.int64, huge=False, shared=shared)
        self._words = self.memory.array
        self._words[INCARNATION] = np.uint64(incarnation).astype(np.int64)
        self._depth = 0

    @property
    def shared(self) -> bool:
        """Whether other processes may read."""
        return self.memory.fd >= 0

    @property
    def generation(self) -> int:
        """Rises whenever tables come, go or change their settings: codes that a reader knows are void then."""
        return int(self._words[GENERATION])

    def __enter__(self) -> None:
        if self._depth == 0:
            self._words[SEQUENCE] += 1
            fence()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            fence()
            self._words[SEQUENCE] += 1

    def renew(self) -> None:
        """Make what readers know of the tables void; within the latch."""
        self._words[GENERATION] += 1

    def beat(self, lease: int) -> None:
        """The data thread is alive, and may be read for so many nanoseconds from now on (0: not at all)."""
        self._words[LEASE] = lease
        self._words[BEAT] = time.monotonic_ns()
