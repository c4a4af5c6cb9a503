"""Memory: what is reserved, what a row costs, and what comes back."""

import os

import numpy as np
import pytest

from ps.errors import RequestError
from ps.memory import Reservation, physical_memory
from ps.spec import SGD, Adagrad, TableSpec
from ps.store import Store, StoreLimits
from tests.ps.store_helpers import all_rows, every_slot, push_share, store_of, view_of

LIMITS = StoreLimits(memory_max=2**30, slots_max=2**16)
N = 60_000


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_reservation_costs_address_space_until_it_is_written() -> None:
    before = resident()
    memory = Reservation((2**28, 16), np.float32)  # 16 GiB
    assert resident() - before < 2**24
    memory.array[: 2**20] = 1.0
    assert resident() - before >= 2**26
    memory.release(0, 2**26)
    assert resident() - before < 2**25
    assert not memory.array[: 2**20].any()


def test_a_reservation_beyond_the_address_space_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot reserve"):
        Reservation((2**60,), np.float64)
    with pytest.raises(RequestError, match="cannot reserve"):
        Reservation((2**70,), np.float64)


def test_physical_memory_is_that_of_the_machine_or_less() -> None:
    assert 2**28 < physical_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fill(store: Store, n: int, dim: int, table: int = 1, first: int = 0) -> None:
    for low in range(0, n, 10_000):
        ids = list(range(low, low + 10_000))
        store.push(push_share(first + 10**6 * table + low, [table], [ids], np.ones((10_000, dim), np.float32)))


@pytest.mark.parametrize("placement", ["sharded", "whole"])
def test_a_row_costs_little_beside_its_values_and_state(placement: str) -> None:
    specs = [
        TableSpec("wide", 64, Adagrad(), placement=placement),  # type: ignore[arg-type]
        TableSpec("narrow", 16, SGD(), placement=placement),  # type: ignore[arg-type]
    ]
    store = store_of(view_of(specs, slot_bits=6), limits=LIMITS)
    fill(store, N, 64, 1)
    wide, _ = (store.held.registry.arenas[a].bytes_used() for a in (0, 1))
    assert wide / N <= 1.25 * 512
    fill(store, N, 16, 2)
    narrow = store.held.registry.arenas[1].bytes_used()
    assert narrow / N - 64 <= 41


def test_memory_comes_back_after_deletions_while_requests_go_on() -> None:
    store = store_of(view_of([TableSpec("t", 64, Adagrad())]), limits=LIMITS)
    fill(store, N, 64)
    full, used = resident(), store.statistics().bytes_used
    keep = set(range(0, N, 10))
    gone = [i for i in range(N) if i not in keep]
    store.push(push_share(9_000_001, [1], [gone], np.empty(0), kind="delete"))
    before, rows = store.digest(every_slot(store)), all_rows(store, 1)
    steps, sequence = 0, 10**8
    while store.compact(work_max=300):
        steps += 1
        if steps % 3 == 0:
            late = 10**7 + steps
            store.push(push_share(sequence, [1], [[late]], np.ones(64)))
            store.push(push_share(sequence + 1, [1], [[late]], np.empty(0), kind="delete"))
        assert steps < 1_000
    assert steps > 5
    assert store.statistics().bytes_used < 0.2 * used
    assert full - resident() > 0.5 * N * 512
    assert (store.digest(every_slot(store)) == before).all()
    after = all_rows(store, 1)
    assert after.keys() == keep
    assert all((after[i] == rows[i]).all() for i in keep)
    fill(store, 10_000, 64, first=10**9)  # what came back is used again
    assert store.statistics().rows >= 10_000
    assert not store.compact()
