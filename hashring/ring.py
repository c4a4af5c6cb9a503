"""The ring: every slot's order of preference of servers, from the points of `uhashring`.

Only the planner asks, and only when it places a slot anew: nobody calls the ring per id.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from uhashring import HashRing

POINTS = 160


@lru_cache(maxsize=16)
def _preferences(servers: tuple[str, ...], slots: int, points: int) -> NDArray[np.int16]:
    ring = HashRing(nodes=list(servers), vnodes=points)
    number = {name: i for i, name in enumerate(servers)}
    placed = ring.get_points()  # (128-bit point, name), ascending
    tokens = np.array([point >> 64 for point, _ in placed], np.uint64)
    owner = np.array([number[name] for _, name in placed], np.int16)
    starts = (np.arange(slots, dtype=np.uint64)) * np.uint64(2**64 // slots)
    at = np.searchsorted(tokens, starts)
    # Walking clockwise from a slot, a server's rank follows from the distance to its first point.
    distance = np.empty((slots, len(servers)), np.int64)
    for i in range(len(servers)):
        own = np.flatnonzero(owner == i)
        following = np.searchsorted(own, at)
        wrapped = following == len(own)
        distance[:, i] = np.where(wrapped, own[0] + len(owner), own[following % len(own)]) - at
    order = np.argsort(distance, axis=1, kind="stable").astype(np.int16)
    order.flags.writeable = False
    return order


def preferences(servers: Sequence[str], slots: int, points: int = POINTS) -> NDArray[np.int16]:
    """int16[slots, len(servers)]: for each slot the servers (by index) in the order in which the ring meets them.

    servers: unique names. slots: a power of two up to 2**32. points: places of each server on the ring.
    """
    if not servers:
        return np.empty((slots, 0), np.int16)
    return _preferences(tuple(servers), slots, points)
