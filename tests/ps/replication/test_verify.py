"""Copies are compared at one position: what differs is named, what cannot be compared is never called different."""

from dataclasses import replace

import numpy as np
import pytest

from hashring.planner import CreateTable, DropTable, Renew, Withdraw, plan
from hashring.tokens import tokens
from ps.errors import RequestError
from ps.replication import ADMISSION, COMPLAINT, ReplicationLimits, Send
from tests.ps.replication.test_machine import IDS, SPEC, Trio

SLOTS = np.arange(4)
ROWS = list(range(60))


def filled(limits: ReplicationLimits | None = None, owners: tuple[int, ...] = (0, 1)) -> Trio:
    trio = Trio(limits, owners)
    trio.push(1, 1, ROWS)
    trio.deliver()
    return trio


def slot_of(id_: int) -> int:
    return int(tokens(np.array([id_]), SPEC.seed)[0]) >> 62


def corrupt(trio: Trio, server: int, id_: int) -> int:
    """Change one value behind the back of the server; its slot."""
    store = trio.machines[server].store
    arena = store.held.registry.arenas[0]
    row = arena.find(np.array([slot_of(id_)], np.int32), np.zeros(1, np.int32), np.array([id_]))[0]
    arena.values[row, 0] += 1
    return slot_of(id_)


def verify(trio: Trio, slots: np.ndarray = SLOTS, start: int = 0, repair: bool = False) -> dict:
    trio.answers.pop("verify", None)
    trio.machines[1].verify("verify", slots, start, repair)
    trio.deliver()
    return trio.answers["verify"]  # type: ignore[return-value]


def test_equal_copies_are_equal_and_counted() -> None:
    trio = filled(owners=(0, 1, 2))
    assert verify(trio) == {"done": 4, "cursor": 0, "compared": 8, "different": [], "skipped": []}
    assert trio.machines[1].verified == (8, 0)


@pytest.mark.parametrize("id_", [0, 7, 33])
def test_a_copy_that_differs_is_named_with_its_owner(id_: int) -> None:
    trio = filled(owners=(0, 1, 2))
    slot = corrupt(trio, 3, id_)
    found = verify(trio)
    assert found["different"] == [[slot, 3, "s2", False]]
    assert (found["compared"], found["skipped"]) == (8, [])
    assert trio.kinds(1) == {}  # to name is not to complain


def test_pushes_on_their_way_make_no_difference() -> None:
    trio = filled()
    trio.push(1, 2, IDS)  # before: in the stream ahead of the digests
    trio.machines[1].verify("verify", SLOTS)
    trio.push(1, 3, IDS)  # after: not in them
    assert "verify" not in trio.answers
    trio.deliver()
    assert trio.answers["verify"] == {"done": 4, "cursor": 0, "compared": 4, "different": [], "skipped": []}


def test_a_block_that_was_not_taken_is_not_compared() -> None:
    trio = filled()
    trio.push(1, 2, [0])
    trio.wires[(1, 2)].clear()
    found = verify(trio)
    assert (found["compared"], found["different"], found["skipped"]) == (3, [], [slot_of(0)])


def test_a_broken_connection_ends_the_wait() -> None:
    trio = filled()
    trio.down = {2}
    trio.machines[1].verify("verify", SLOTS)
    trio.collect()
    assert "verify" not in trio.answers
    trio.machines[1].broken(2, trio.wires[(1, 2)][0].link)
    trio.wires.clear()
    found = verify(trio)  # and nothing is asked before it is mended
    assert (found["compared"], found["skipped"]) == (0, [0, 1, 2, 3])
    trio.down = set()
    trio.tick(1)
    trio.deliver()
    assert verify(trio)["compared"] == 4


def test_a_late_digest_of_an_older_connection_is_refused() -> None:
    trio = filled()
    trio.machines[1].verify("verify", SLOTS)
    trio.collect()
    late = trio.wires[(1, 2)].pop()
    trio.machines[1].broken(2, late.link)
    trio.tick(1)
    trio.push(1, 2, IDS)
    trio.deliver()
    with pytest.raises(Exception, match="after connection"):
        trio.machines[2].request(late.op, late.fields, late.arrays)


def test_by_another_view_nothing_is_compared() -> None:
    """A table that one server has dropped already has no rows there; the terms are the same."""
    trio = filled()
    two = plan(trio.view, CreateTable("u", replace(SPEC, name="u").to_plain(), replicas=2))
    trio.install(two, 1, 2)
    trio.deliver()
    assert verify(trio)["compared"] == 4
    trio.install(plan(two, DropTable("t")), 2)
    found = verify(trio)
    assert (found["compared"], found["different"], found["skipped"]) == (0, [], [0, 1, 2, 3])
    trio = filled()
    trio.install(plan(trio.view, Renew(SLOTS)), 2)
    found = verify(trio)
    assert (found["compared"], found["different"]) == (0, [])


def test_a_server_compares_only_what_it_is_primary_of() -> None:
    trio = filled()
    trio.machines[2].verify("backup", SLOTS)
    trio.deliver()
    assert trio.answers["backup"]["skipped"] == [0, 1, 2, 3]  # type: ignore[index]
    alone = filled(owners=(0,))
    assert verify(alone) == {"done": 4, "cursor": 0, "compared": 0, "different": [], "skipped": []}
    assert verify(alone, SLOTS[:0])["done"] == 0


def test_repair_has_the_owner_leave_and_return_by_a_full_copy() -> None:
    trio = filled()
    slot = corrupt(trio, 2, 7)
    assert verify(trio, repair=True)["different"] == [[slot, 2, "s1", True]]
    assert trio.kinds(1) == {COMPLAINT: {slot}}
    token = trio.push(1, 2, [7])
    trio.deliver()
    assert token not in trio.answers
    one = np.array([slot])
    trio.install(plan(trio.view, Withdraw({"s1": one})), 1, 2)
    trio.deliver()
    assert token in trio.answers
    trio.sent.clear()
    trio.machines[1].learn(one, 2, trio.view.epoch)  # its copy stands on the lineage, and is not to be trusted
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {slot}}
    assert any(a.arrays["full"].any() for _, a in trio.sent if isinstance(a, Send) and "full" in a.arrays)
    trio.equal(1, 2)
    trio.install(trio.owned_by(trio.view, 0, 1), 1, 2)
    trio.deliver()
    assert verify(trio)["compared"] == 4
    # What was copied anew is trusted again: it needs only what it missed.
    trio.install(plan(trio.view, Withdraw({"s1": one})), 1, 2)
    trio.push(1, 3, [7])
    trio.sent.clear()
    trio.machines[1].learn(one, 2, trio.view.epoch)
    trio.deliver()
    assert [a.op for _, a in trio.sent if isinstance(a, Send) and "0.ids" in a.arrays] == ["repair"]


def test_a_difference_of_an_older_term_is_not_complained_of() -> None:
    trio = filled()
    slot = corrupt(trio, 2, 7)
    trio.machines[1].verify("verify", SLOTS, 0, True)
    trio.collect()
    wire = trio.wires[(1, 2)]
    action = wire.pop(0)
    fields, arrays = trio.machines[2].request(action.op, action.fields, action.arrays)
    trio.install(plan(trio.view, Renew(SLOTS)), 1)
    trio.machines[1].replied(2, action.link, action.number, {**fields, "epoch": 1}, arrays)
    trio.collect()
    assert trio.answers["verify"]["different"] == [[slot, 2, "s1", False]]  # type: ignore[index]
    assert COMPLAINT not in trio.kinds(1)


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("id_", [0, 7, 33])
def test_parts_of_bounded_rows_cover_every_slot(rows: int, id_: int) -> None:
    trio = filled(ReplicationLimits(verify_rows=rows))
    slot = corrupt(trio, 2, id_)
    left, start, parts = SLOTS, 0, 0
    different = set()
    while len(left):
        found = verify(trio, left, start)
        assert found["done"] or found["cursor"]
        assert not found["skipped"]
        different |= {(s, peer) for s, peer, *_ in found["different"]}
        left, start, parts = left[found["done"] :], found["cursor"], parts + 1
    assert different == {(slot, 2)}
    covered: dict[int, list[tuple[int, int]]] = {s: [] for s in range(4)}
    for _, action in trio.sent:
        if isinstance(action, Send) and action.op == "digest":
            for s in action.arrays["slots"].tolist():
                covered[s].append((max(action.fields["low"], s << 62), min(action.fields["last"], (s + 1 << 62) - 1)))
    for s, intervals in covered.items():
        assert [low for low, _ in intervals] == [s << 62, *(last + 1 for _, last in intervals[:-1])]
        assert intervals[-1][1] == (s + 1 << 62) - 1
    assert parts >= 60 // (rows + 1)


def test_a_start_outside_of_the_slot_is_refused() -> None:
    with pytest.raises(RequestError, match="outside of slot 2"):
        filled().machines[1].verify("verify", SLOTS[2:], 5)


@pytest.mark.parametrize("rows", [10, 1000])
def test_the_sweep_goes_round_by_itself_and_counts(rows: int) -> None:
    trio = filled(ReplicationLimits(verify_slots_per_s=10, verify_rows=rows))
    slot = corrupt(trio, 2, 7)
    for _ in range(60):
        trio.tick(1)
        trio.deliver()
    asked = [int(a.arrays["slots"][0]) for _, a in trio.sent if isinstance(a, Send) and a.op == "digest"]
    assert set(asked) == {0, 1, 2, 3}
    assert 20 <= len(asked) <= 31
    compared, different = trio.machines[1].verified
    assert compared == len(asked)
    assert 1 <= different <= asked.count(slot)
    assert trio.kinds(1) == {}


def test_the_sweep_waits_for_its_answer_and_survives_the_loss_of_it() -> None:
    trio = filled(ReplicationLimits(verify_slots_per_s=10))
    trio.down = {2}
    trio.tick(1, times=50)
    assert len(trio.wires[(1, 2)]) == 1
    trio.machines[1].broken(2, trio.wires[(1, 2)].pop().link)
    trio.down = set()
    for _ in range(10):
        trio.tick(1)
        trio.deliver()
    assert trio.machines[1].verified[0] > 0


@pytest.mark.parametrize(
    "broken",
    [
        {"slots": np.array([-1])},
        {"slots": np.array([2**40])},
        {"slots": np.zeros(1)},
        {"slots": np.zeros((1, 1), np.int64)},
        {"positions": np.zeros(2, np.int64)},
        {"digests": np.zeros(1, np.int64)},
        {"low": -1},
        {"last": 2**64},
        {"low": 5, "last": 4},
        {"low": None},
    ],
)
def test_a_malformed_digest_is_refused_in_a_sentence(broken: dict) -> None:
    arrays = {"slots": np.array([1]), "positions": np.array([1]), "digests": np.zeros(1, np.uint64)}
    fields = {"from": 1, "link": 1, "at": 1, "low": 0, "last": 9}
    arrays |= {k: v for k, v in broken.items() if k in arrays}
    fields |= {k: v for k, v in broken.items() if k in fields}
    with pytest.raises(RequestError, match="digest"):
        Trio().machines[2].request("digest", fields, arrays)
