"""The ring: how near each server is to a slot, and so every slot's order of preference, from the points of `uhashring`.

Only the planner asks, and only when it places a slot anew: nobody calls the ring per id.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from uhashring import HashRing

POINTS = 160
"""Places of each server on the ring."""


@lru_cache(maxsize=4)
def _distances(servers: tuple[str, ...], slots: int, points: int) -> NDArray[np.int32]:
    number = {name: i for i, name in enumerate(servers)}
    placed = HashRing(nodes=list(servers), vnodes=points).get_points()  # (128-bit point, name), ascending
    tokens = np.array([point >> 64 for point, _ in placed], np.uint64)
    owner = np.array([number[name] for _, name in placed], np.int16)
    starts = np.arange(slots, dtype=np.uint64) * np.uint64(2**64 // slots)
    at = np.searchsorted(tokens, starts)
    out = np.empty((slots, len(servers)), np.int32)
    for i in range(len(servers)):
        own = np.flatnonzero(owner == i)
        following = np.searchsorted(own, at)
        wrapped = following == len(own)
        out[:, i] = np.where(wrapped, own[0] + len(owner), own[following % len(own)]) - at
    out.flags.writeable = False
    return out


def distances(servers: Sequence[str], slots: int, points: int = POINTS) -> NDArray[np.int32]:
    """int32[slots, len(servers)]: points between a slot's first token and each server's first point, clockwise.

    servers: unique names. slots: a power of two, at least 2. points: places of each server on the ring. No two servers
    are equally far, and adding a server never changes which of two others is nearer.
    """
    if not servers:
        return np.empty((slots, 0), np.int32)
    return _distances(tuple(servers), slots, points)
