"""The client window against a set of everything ever seen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import Overloaded
from ps.kernels import window as win
from ps.window import CLIENT_IDLE_S, ClientEntries, ClientTable


@given(st.lists(st.integers(1, 200), max_size=80))
def test_window_equals_a_set(sequences: list[int]) -> None:
    last, mask, positions = np.zeros(3, np.int64), np.zeros(3, np.uint64), np.zeros(3, np.int64)
    verdicts, touched = np.zeros(3, np.uint8), np.array([1])
    seen: set[int] = set()
    for sequence in sequences:
        new, old = win.decide(touched, sequence, last, mask, verdicts)
        if max(seen, default=0) - sequence >= win.WINDOW:
            assert (new, old, verdicts[1]) == (0, 1, win.TOO_OLD)
            continue
        assert (new, old) == (int(sequence not in seen), 0)
        before = int(positions[1])
        win.number(touched, sequence, verdicts, last, mask, positions)
        assert positions[1] - before == new
        seen.add(sequence)
        assert last[1] == max(seen)
    assert positions.tolist() == [0, positions[1], 0]


@given(st.lists(st.integers(0, 9), max_size=30))
def test_touch_names_each_slot_once(slots: list[int]) -> None:
    marks, out = np.zeros(10, np.int32), np.empty(len(slots), np.int64)
    for stamp in (1, 2):
        n = win.touch(np.array(slots, np.int32), stamp, marks, out)
        assert out[:n].tolist() == list(dict.fromkeys(slots))


def test_entries_travel_by_slot() -> None:
    table, other = ClientTable(100, 10), ClientTable(100, 10)
    for client, slots in ((7, [1, 2]), (2**64 - 1, [2, 50])):
        window = table.of(client)
        window.last[slots], window.mask[slots] = client % 1000 + 1, 3
    slots = np.array([50, 2, 3])
    entries = table.entries(slots)
    assert entries.offsets.tolist() == [0, 1, 3, 3]
    assert set(entries.clients[1:].tolist()) == {7, 2**64 - 1}
    other.put(slots, entries)
    assert other.entries(np.arange(100)).clients.tolist() == [7, 2**64 - 1, 2**64 - 1]
    other.clear(np.array([2]))
    assert other.entries(np.arange(100)).offsets[-1] == 1
    assert len(ClientTable(10, 1).entries(np.array([1])).clients) == 0
    assert not ClientTable(10, 1).room_for(np.array([1, 2], np.uint64))
    assert isinstance(entries, ClientEntries)


def test_only_an_idle_client_makes_room_for_a_new_one() -> None:
    now = [0.0]
    table = ClientTable(10, 2, clock=lambda: now[0])
    table.of(1).last[3] = 5
    now[0] = 100.0
    table.of(2)
    now[0] = CLIENT_IDLE_S - 1
    with pytest.raises(Overloaded, match="client 3 is one too many"):
        table.of(3)
    assert table.of(1).last[3] == 5  # used again: it is the other one that falls idle
    now[0] = CLIENT_IDLE_S + 100
    table.of(3)
    assert len(table) == 2
    assert table.of(1).last[3] == 5
    assert not table.room_for(np.array([2], np.uint64))
