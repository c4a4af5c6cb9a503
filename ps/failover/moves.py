"""What takes the slots of a view to its goal: which are to be copied, which to be given to others now. Pure.

A slot is ready once every server that it should have holds it: as an owner, or as a learner that its primary admitted.
Then one view gives it the owners that it should have. Where some learners were admitted and no others are on their
way, those become owners at once. A learner that the goal has no use for is let go by a new term.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashring.columns import any_of, differ
from hashring.view import View

Pairs = NDArray[np.int64]
"""(slot, server) pairs as slot * servers + server, sorted."""


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """From a view to its goal.

    missing: pairs that are to be copied, all told; teach: those that nobody copies yet. ready int64[r], with the
    owners int16[r, c] that they are to get: those that gain an owner come first, `gaining` of them. stray int64: slots
    with a learner that is not wanted.
    """

    missing: Pairs
    teach: Pairs
    ready: NDArray[np.int64]
    owners: NDArray[np.int16]
    gaining: int
    stray: NDArray[np.int64]

    @property
    def arrived(self) -> bool:
        """Whether all is as it should be."""
        return not len(self.missing) and not len(self.ready) and not len(self.stray)


def _lacking(now: NDArray[np.int16], then: NDArray[np.int16], slots: NDArray[np.int64], servers: int) -> Pairs:
    """The pairs of `slots` whose server is an owner then, and is none now; now, then: of every slot."""
    now, then = now[slots], then[slots]
    new = [(owner >= 0) & ~any_of(now == owner[:, None]) for owner in then.T]
    found = [slots[some] * servers + owner[some] for some, owner in zip(new, then.T, strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *found]))


def pairs(servers: int, told: Iterable[tuple[int, NDArray[np.int64]]]) -> Pairs:
    """The pairs of (server, its slots) entries."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *(slots * servers + server for server, slots in told)]))


def course(view: View, wanted: NDArray[np.int16], lessons: Pairs, admitted: Pairs, fresh: NDArray[np.bool_]) -> Course:
    """lessons, admitted: learners on their way, and there, in the present terms. fresh bool[k]: servers that answer,
    without whom no slot is given to anybody."""
    k = max(1, len(view.servers))
    n = len(wanted)
    present = view.owners()
    width = max(present.shape[1], wanted.shape[1])
    now, then = _wide(present, width), _wide(wanted, width)
    other = differ(now, then)
    missing = _lacking(now, then, np.flatnonzero(other), k)
    come = np.isin(missing, admitted, assume_unique=True)
    coming = np.isin(missing, lessons, assume_unique=True)
    there = missing[come]
    count = np.bincount(missing // k, minlength=n)
    have = np.bincount((there // k)[fresh[there % k]], minlength=n)
    awaited = np.bincount(missing[coming] // k, minlength=n)
    able = np.append(fresh, False)
    good = able[now[:, 0]] & able[then[:, 0]]
    whole = good & (have == count) & other
    part = np.flatnonzero(good & (have > 0) & (have < count) & (awaited == 0))
    some = np.full((len(part), width), -1, np.int16)
    for line, slot in zip(some, part.tolist(), strict=True):
        step = _step(now[slot], then[slot], set((there[there // k == slot] % k).tolist()))
        line[: len(step)] = step
    gains, turns = np.flatnonzero(whole & (count > 0)), np.flatnonzero(whole & (count == 0))
    ready = np.concatenate([gains, part, turns])
    learning = np.concatenate([lessons, admitted])
    strange = learning[np.isin(learning, missing, invert=True)] // k
    return Course(
        missing=missing,
        teach=missing[~(come | coming)],
        ready=ready,
        owners=np.concatenate([then[gains], some, then[turns]]),
        gaining=len(gains) + len(part),
        stray=np.setdiff1d(strange, ready),
    )


def _wide(owners: NDArray[np.int16], width: int) -> NDArray[np.int16]:
    out = np.full((len(owners), width), -1, np.int16)
    out[:, : owners.shape[1]] = owners
    return out


def _step(now: NDArray[np.int16], then: NDArray[np.int16], there: set[int]) -> list[int]:
    """The owners that are wanted and can be had, then those that hold out until the others are there."""
    owners = [int(s) for s in now if s >= 0]
    wanted = [int(s) for s in then if s >= 0]
    held = [s for s in wanted if s in owners or s in there]
    rest = [s for s in owners if s not in wanted]
    return held + rest[: max(0, len(wanted) - len(held))]
