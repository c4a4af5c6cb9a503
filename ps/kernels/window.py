"""The client window of each slot: the last sequence and a bit for each of the 64 up to it (bit k: last - k was seen).

It is the anti-replay window of IPsec (RFC 4303, section 3.4.3): a client may have several pushes in flight, they may
arrive in any order, and each is still applied once.
"""

import numpy as np
from numpy.typing import NDArray

from ps.kernels import kernel

WINDOW = 64
SEEN, NEW, TOO_OLD = 0, 1, 2


@kernel
def touch(slots: NDArray[np.int32], stamp: int, marks: NDArray[np.int32], touched: NDArray[np.int64]) -> int:
    """The distinct slots among slots int32[n], into touched int64[<= n]; marks int32[slots] remembers the stamp."""
    n = 0
    for i in range(len(slots)):
        slot = slots[i]
        if marks[slot] != stamp:
            marks[slot] = stamp
            touched[n] = slot
            n += 1
    return n


@kernel
def decide(
    touched: NDArray[np.int64],
    sequence: int,
    last: NDArray[np.int64],
    mask: NDArray[np.uint64],
    verdicts: NDArray[np.uint8],
) -> tuple[int, int]:
    """verdicts[slot] = SEEN, NEW or TOO_OLD for each touched slot; changes nothing else. Returns (new, too old)."""
    new, old = 0, 0
    for i in range(len(touched)):
        slot = touched[i]
        behind = last[slot] - sequence
        verdict = NEW
        if behind >= WINDOW:
            verdict = TOO_OLD
            old += 1
        elif behind >= 0 and (mask[slot] >> np.uint64(behind)) & np.uint64(1):
            verdict = SEEN
        else:
            new += 1
        verdicts[slot] = verdict
    return new, old


@kernel
def number(
    touched: NDArray[np.int64],
    sequence: int,
    verdicts: NDArray[np.uint8],
    last: NDArray[np.int64],
    mask: NDArray[np.uint64],
    positions: NDArray[np.int64],
) -> None:
    """Remember the sequence in every NEW slot and give it its next position."""
    for i in range(len(touched)):
        slot = touched[i]
        if verdicts[slot] != NEW:
            continue
        ahead = sequence - last[slot]
        if ahead > 0:
            kept = mask[slot] << np.uint64(ahead) if ahead < WINDOW else np.uint64(0)
            mask[slot] = kept | np.uint64(1)
            last[slot] = sequence
        else:
            mask[slot] |= np.uint64(1) << np.uint64(-ahead)
        positions[slot] += 1


@kernel
def put(
    slots: NDArray[np.int64],
    offsets: NDArray[np.int64],
    names: NDArray[np.uint64],
    client: int,
    in_last: NDArray[np.int64],
    in_mask: NDArray[np.uint64],
    last: NDArray[np.int64],
    mask: NDArray[np.uint64],
) -> None:
    """Set a client's windows in slots, from the entries of that name among offsets[i]..offsets[i + 1] of each."""
    for i in range(len(slots)):
        for j in range(offsets[i], offsets[i + 1]):
            if names[j] == client:
                last[slots[i]], mask[slots[i]] = in_last[j], in_mask[j]


def warmup() -> None:
    """Compile this module's kernels."""
    one, mask, verdicts = np.zeros(1, np.int64), np.zeros(1, np.uint64), np.zeros(1, np.uint8)
    touch(np.zeros(1, np.int32), 1, np.zeros(1, np.int32), one.copy())
    decide(one, 1, one.copy(), mask, verdicts)
    put(one, np.zeros(2, np.int64), mask, mask[0], one, mask, one.copy(), mask.copy())
    number(one, 1, verdicts, one.copy(), mask, one.copy())
