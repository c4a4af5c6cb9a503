"""Members of slots when a view is installed, against going slot by slot."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hashring.planner import CreateTable, Enlist, plan
from hashring.view import Server, View
from ps.kernels.replicate import COPY, IDLE, OWNER, STREAM
from ps.replication.members import LEARNERS, Members

SLOTS, SERVERS, ME = 16, 4, 0


def view_with(owners: np.ndarray) -> View:
    view = plan(View.empty(1, slot_bits=4), Enlist(tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(SERVERS))))
    view = plan(view, CreateTable("t", {}, replicas=2))
    group = view.groups[0]
    return replace(view, groups=(replace(group, owners=owners.astype(np.int16)),))


@st.composite
def owner_lists(draw: st.DrawFn) -> np.ndarray:
    copies = draw(st.integers(1, 3))
    lists = [draw(st.permutations(range(SERVERS)))[: draw(st.integers(0, copies))] for _ in range(SLOTS)]
    return np.array([[*owners, *[-1] * (copies - len(owners))] for owners in lists])


@given(owner_lists(), owner_lists(), st.data())
def test_what_is_known_goes_on_with_the_term(first: np.ndarray, second: np.ndarray, data: st.DataObject) -> None:
    numbers = np.array([-1, 0, 1, 2, -1], np.int16)  # this server has no link to itself; the last is for "no owner"
    before = Members.of(view_with(first), ME, numbers, Members(0, 0), np.zeros(SLOTS, np.bool_))
    mine = np.flatnonzero(first[:, 0] == ME)
    for peer in range(3):
        taught = before.add_learner(
            mine[np.array(data.draw(st.lists(st.booleans(), min_size=len(mine), max_size=len(mine))), bool)], peer
        )
        before.modes[taught, before.column_of(taught, peer)] = COPY
        before.acked[taught, before.column_of(taught, peer)] = 7
    same = np.array(data.draw(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS)), np.bool_)
    same &= first[:, 0] == second[:, 0]
    lost = data.draw(st.sampled_from([None, 0, 1, 2]))
    living = np.where(numbers == lost, -1, numbers).astype(np.int16) if lost is not None else numbers
    after = Members.of(view_with(second), ME, living, before, same)
    n = second.shape[1] - 1
    assert after.peers.shape == (SLOTS, n + LEARNERS)
    for slot in range(SLOTS):
        expected = dict[int, tuple[int, int]]()  # peer: (mode, acknowledged)
        if second[slot, 0] == ME and same[slot]:
            for c in range(before.peers.shape[1]):
                peer, learner = int(before.peers[slot, c]), c >= before.owner_columns
                if peer >= 0 and (c < n or learner) and not (learner and peer == lost):
                    expected[peer] = int(before.modes[slot, c]), int(before.acked[slot, c])
        elif second[slot, 0] == ME:
            peers = [int(living[s]) for s in second[slot, 1:]]
            expected = {peer: (STREAM, -1) for peer in peers if peer >= 0}
            assert (after.ranks[slot, :n] == OWNER).all()
        told = {
            int(p): (int(m), int(a))
            for p, m, a in zip(after.peers[slot], after.modes[slot], after.acked[slot], strict=True)
            if p >= 0
        }
        assert told == expected
        assert (after.modes[slot, n:][after.peers[slot, n:] < 0] == IDLE).all()
    assert after.any == (after.peers >= 0).any()
    assert after.learning == (after.peers[:, n:] >= 0).any()
