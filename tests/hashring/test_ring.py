"""The order of preference against a walk along uhashring's points."""

import numpy as np
import pytest
from uhashring import HashRing

from hashring.ring import distances


def preferences(names: list[str], slots: int) -> np.ndarray:
    """The servers of each slot in the order in which the ring meets them."""
    return np.argsort(distances(names, slots), axis=1)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], [f"s{i}" for i in range(9)]])
def test_preferences_walk_the_ring_clockwise(names: list[str]) -> None:
    slots = 128
    placed = [(point >> 64, name) for point, name in HashRing(nodes=names, vnodes=160).get_points()]
    order = preferences(names, slots)
    for slot in range(slots):
        start = slot * (2**64 // slots)
        walk = [n for at, n in placed if at >= start] + [n for at, n in placed if at < start]
        assert [names[i] for i in order[slot]] == list(dict.fromkeys(walk))


def test_a_new_server_leaves_the_others_in_order() -> None:
    before = preferences(["a", "b", "c"], 256)
    after = preferences(["a", "b", "c", "d"], 256)
    assert (np.array([row[row != 3] for row in after]) == before).all()


def test_no_servers_no_preference() -> None:
    assert preferences([], 8).shape == (8, 0)
