"""The replication machine of a server, event by event: three machines, and a shell that carries what they send."""

from dataclasses import replace

import numpy as np
import pytest

from hashring.planner import CreateTable, DropTable, Fail, Reassign, Renew, Withdraw, plan
from hashring.view import View
from ps.errors import NotApplied, Overloaded, PerhapsApplied, RequestError, WrongView
from ps.replication import (
    ADMISSION,
    COMPLAINT,
    LESSON,
    Answer,
    Forward,
    Refuse,
    Replication,
    ReplicationLimits,
    Send,
    SendView,
)
from ps.spec import SGD, Initializer, TableSpec
from ps.store import Store
from tests.ps.store_helpers import LIMITS, push_share, view_of

SPEC = TableSpec("t", 2, SGD(lr=1.0), Initializer(0.0, 0.0), replicas=2)


class Trio:
    """Servers 1, 2 and 3 (or more); every slot is owned by 1 and 2. What they send waits in `wires` until it is
    delivered."""

    def __init__(
        self, limits: ReplicationLimits | None = None, owners: tuple[int, ...] = (0, 1), servers: int = 3
    ) -> None:
        numbers = tuple(range(1, servers + 1))
        view = view_of([SPEC], slot_bits=2, servers=numbers)
        self.view = self.owned_by(view, *owners)
        self.machines = {i: Replication(Store(i, LIMITS), limits) for i in numbers}
        self.wires: dict[tuple[int, int], list] = {}
        self.answers: dict[object, object] = {}
        self.down: set[int] = set()
        self.sent: list = []
        for i in (*numbers[1:], 1):
            self.machines[i].install(self.view)
        self.deliver()

    @staticmethod
    def owned_by(view: View, *owners: int) -> View:
        return plan(view, Reassign(np.arange(4), np.tile(np.array([owners], np.int16), (4, 1))))

    def collect(self) -> None:
        for i, machine in self.machines.items():
            for action in machine.actions():
                if isinstance(action, Answer):
                    self.answers[action.token] = action.fields
                elif isinstance(action, Refuse):
                    self.answers[action.token] = action.error
                else:
                    self.sent.append((i, action))
                    self.wires.setdefault((i, action.peer), []).append(action)

    def deliver(self) -> None:
        """Until nothing moves; what is sent to a server that is down stays on its wire."""
        while True:
            self.collect()
            ready = [(wire, queue) for wire, queue in self.wires.items() if queue and wire[1] not in self.down]
            if not ready:
                return
            (source, target), queue = ready[0]
            self._carry(source, target, queue.pop(0))

    def _carry(self, source: int, target: int, action: Send | SendView | Forward) -> None:
        sender, receiver = self.machines[source], self.machines[target]
        fields: dict = {}
        arrays: dict = {}
        view = None
        error = None
        try:
            if isinstance(action, SendView):
                receiver.install(action.view)
            elif isinstance(action, Forward):
                receiver.push(("forwarded", target), action.share, action.acks, action.only, action.at)
                self.deliver()
                fields = self.answers.pop(("forwarded", target))  # type: ignore[assignment]
            elif action.op == "view":
                view = receiver.store.view
            else:
                fields, arrays = receiver.request(action.op, action.fields, action.arrays)
        except NotApplied as caught:
            error = caught
        fields = {**fields, "epoch": receiver.store.epoch}
        sender.replied(target, action.link, action.number, fields, arrays, error, view)

    def push(self, at: int, sequence: int, ids: list[int], token: object = None, **more: object) -> object:
        token = token or ("push", sequence)
        share = push_share(sequence, [1], [ids], np.full((len(ids), 2), -1.0))
        self.machines[at].push(token, share, **more)  # type: ignore[arg-type]
        self.collect()
        return token

    def install(self, view: View, *servers: int) -> None:
        self.view = view
        for i in servers:
            self.machines[i].install(view)
        self.collect()

    def tick(self, *servers: int, times: int = 1) -> None:
        for i in servers:
            machine = self.machines[i]
            for _ in range(times):
                machine.tick((machine._last or 0.0) + 0.05)
        self.collect()

    def kinds(self, at: int) -> dict[int, set[int]]:
        """{kind: slots} of what a server tells the controller."""
        s = self.machines[at].standing()
        return {k: set(s.slots[s.kinds == k].tolist()) for k in set(s.kinds.tolist())}

    def equal(self, *servers: int) -> None:
        slots = np.arange(4)
        first = self.machines[servers[0]].store
        for i in servers[1:]:
            other = self.machines[i].store
            assert (first.watermark(slots) == other.watermark(slots)).all()
            assert (first.digest(slots) == other.digest(slots)).all()


IDS = list(range(12))


def test_a_push_is_answered_when_every_owner_holds_it() -> None:
    trio = Trio()
    token = trio.push(1, 1, IDS)
    assert token not in trio.answers
    trio.deliver()
    assert trio.answers[token] == {"applied": 4, "seen": 0, "rows_new": 12}
    trio.equal(1, 2)
    blocks = [a for i, a in trio.sent if i == 1 and isinstance(a, Send) and "0.ids" in a.arrays]
    assert len(blocks) == 1  # for all slots of the push


def test_how_far_other_owners_are_behind() -> None:
    trio = Trio()
    machine = trio.machines[1]
    trio.tick(1)
    assert machine.lag == (0, 0.0)
    trio.down = {2}
    for sequence in (1, 2, 3):
        trio.push(1, sequence, IDS)
    trio.tick(1, times=4)
    changes, seconds = machine.lag
    assert (changes, round(seconds, 2)) == (3, 0.2)
    trio.down = set()
    trio.deliver()
    trio.tick(1)
    assert machine.lag == (0, 0.0)
    assert trio.machines[2].lag[0] == 0  # it is no primary


def test_a_retry_waits_like_the_first_try() -> None:
    trio = Trio()
    first = trio.push(1, 1, IDS)
    again = trio.push(1, 1, IDS, token="again")
    assert not {first, again} & trio.answers.keys()
    trio.deliver()
    assert trio.answers["again"] == {"applied": 0, "seen": 4, "rows_new": 0}


def test_acks_of_the_primary_wait_for_nobody() -> None:
    trio = Trio()
    trio.down = {2}
    token = trio.push(1, 1, IDS, acks="primary")
    assert trio.answers[token] == {"applied": 4, "seen": 0, "rows_new": 12}


def test_an_owner_hands_a_push_to_the_primary_once() -> None:
    trio = Trio()
    token = trio.push(2, 1, IDS)
    trio.deliver()
    assert trio.answers[token] == {"applied": 4, "seen": 0, "rows_new": 12}
    trio.equal(1, 2)
    stranger = trio.push(3, 2, IDS)
    assert isinstance(trio.answers[stranger], WrongView)
    forwarded = trio.push(2, 3, IDS, only=np.arange(4), epoch=trio.view.epoch)
    assert isinstance(trio.answers[forwarded], WrongView)
    older = trio.push(1, 4, IDS, only=np.arange(4), epoch=trio.view.epoch - 1)
    assert "were forwarded by epoch" in str(trio.answers[older])
    assert (trio.machines[1].store.watermark(np.arange(4)) & 1023 == 1).all()  # nothing of it was applied


def test_a_push_that_was_handed_to_a_primary_that_hangs_is_given_back_when_another_takes_over() -> None:
    trio = Trio()
    trio.down = {1}
    token = trio.push(2, 1, IDS)
    trio.deliver()
    assert token not in trio.answers
    trio.install(replace(trio.view, epoch=trio.view.epoch + 1), 2, 3)
    assert token not in trio.answers  # the primary is the same
    trio.install(plan(trio.view, Withdraw({trio.view.servers[0].name: np.arange(4)})), 2, 3)
    assert isinstance(trio.answers.pop(token), PerhapsApplied)
    (forward,) = (a for i, a in trio.sent if i == 2 and isinstance(a, Forward))
    trio.machines[2].replied(1, forward.link, forward.number, {"applied": 4}, {})
    trio.collect()
    assert token not in trio.answers  # what the old one says in the end counts no more
    again = trio.push(2, 1, IDS, token="again")
    assert trio.answers[again]["applied"] == 4


def test_a_push_of_several_primaries_is_decided_part_by_part() -> None:
    trio = Trio()
    mixed = plan(trio.view, Reassign(np.array([0, 1]), np.array([[1, 0], [1, 0]], np.int16)))
    trio.install(mixed, 1, 2, 3)
    trio.deliver()
    token = trio.push(2, 1, IDS)
    trio.deliver()
    assert trio.answers[token] == {"applied": 4, "seen": 0, "rows_new": 12}
    trio.equal(1, 2)


def test_full_queues_refuse_before_anything_is_applied() -> None:
    trio = Trio(ReplicationLimits(queue_bytes_max=1500))
    trio.down = {2}
    trio.push(1, 1, IDS)
    before = trio.machines[1].store.watermark(np.arange(4))
    token = trio.push(1, 2, IDS)
    assert isinstance(trio.answers[token], Overloaded)
    assert (trio.machines[1].store.watermark(np.arange(4)) == before).all()
    trio.down = set()
    trio.deliver()
    token = trio.push(1, 2, IDS)
    trio.deliver()
    assert trio.answers[token] == {"applied": 4, "seen": 0, "rows_new": 0}


def test_what_is_pushed_while_a_backup_is_busy_leaves_as_one_block() -> None:
    trio = Trio()
    trio.sent.clear()
    trio.down = {2}
    tokens = [trio.push(1, sequence, IDS[:sequence]) for sequence in range(1, 6)]
    assert [action.op for _, action in trio.sent] == ["replicate"]
    trio.down = set()
    trio.deliver()
    blocks = [action.arrays for _, action in trio.sent]
    assert len(blocks) == 2
    assert len(blocks[1]["0.ids"]) == 5  # each row once, of the four pushes that waited
    assert (blocks[1]["last"] - blocks[1]["base"]).max() == 4
    assert all(trio.answers[token]["applied"] for token in tokens)
    trio.equal(1, 2)


def test_deletions_and_big_pushes_do_not_wait() -> None:
    trio = Trio(ReplicationLimits(block_bytes_max=1000))
    trio.sent.clear()
    trio.down = {2}
    trio.push(1, 1, IDS[:2])
    trio.push(1, 2, IDS[:2])
    assert len(trio.sent) == 1
    trio.machines[1].push("gone", push_share(3, [1], [IDS[:1]], np.empty((0, 2)), "delete"))
    trio.collect()
    assert len(trio.sent) == 3
    trio.push(1, 4, IDS)
    assert len(trio.sent) == 4
    trio.down = set()
    trio.deliver()
    trio.equal(1, 2)


def test_what_waits_leaves_before_rows_move_and_before_the_next_view() -> None:
    trio = Trio()
    trio.sent.clear()
    trio.down = {2}
    for sequence in (1, 2):
        trio.push(1, sequence, IDS)
    trio.machines[1].flush()
    trio.collect()
    assert len(trio.sent) == 2
    trio.push(1, 3, IDS)
    trio.install(plan(trio.view, Renew(np.arange(4))), 1)
    assert [getattr(action, "op", "view") for _, action in trio.sent] == ["replicate"] * 3 + ["view", "replicate"]
    trio.down = set()
    trio.deliver()
    trio.equal(1, 2)


def test_a_broken_connection_forgets_what_waited_for_it() -> None:
    trio = Trio()
    trio.down = {2}
    tokens = [trio.push(1, sequence, IDS) for sequence in (1, 2)]
    link = trio.machines[1]._primary.by_index[0]
    assert link.unsent
    assert link.owed > link.bytes
    trio.wires.clear()
    trio.machines[1].broken(2, link.number)
    assert not link.unsent
    assert link.owed == 0
    trio.down = set()
    trio.tick(1)
    trio.deliver()
    assert all(trio.answers[token]["applied"] == 4 for token in tokens)
    trio.equal(1, 2)


def test_below_owners_min_pushes_are_refused() -> None:
    trio = Trio(ReplicationLimits(owners_min=2))
    trio.install(plan(trio.view, Withdraw({"s1": np.array([2])})), 1, 2)
    token = trio.push(1, 1, IDS)
    assert isinstance(trio.answers[token], NotApplied)
    assert "owners" in str(trio.answers[token])


def test_what_a_broken_connection_lost_is_made_up_for() -> None:
    trio = Trio()
    trio.push(1, 1, IDS)
    lost = trio.wires[(1, 2)]
    late = lost.pop(0)
    lost.clear()
    trio.machines[1].broken(2, late.link)
    token = trio.push(1, 2, IDS[:3])
    trio.tick(1)
    trio.deliver()
    assert token in trio.answers
    assert ("push", 1) in trio.answers
    trio.equal(1, 2)
    with pytest.raises(NotApplied, match="after connection"):
        trio.machines[2].request(late.op, late.fields, late.arrays)


def test_a_new_primary_undoes_what_only_the_old_one_has() -> None:
    trio = Trio()
    trio.push(1, 1, IDS)
    trio.deliver()
    trio.down = {2, 3}
    tail = trio.push(1, 2, [0, 100])
    trio.wires[(1, 2)].clear()
    view = trio.owned_by(trio.view, 1)
    trio.install(view, 2)
    trio.down = set()
    trio.push(2, 3, [1, 2])
    trio.deliver()
    again = trio.owned_by(view, 1, 0)
    trio.install(again, 2, 1)
    trio.deliver()
    assert isinstance(trio.answers[tail], PerhapsApplied)
    trio.equal(1, 2)
    retried = trio.push(2, 2, [0, 100])
    trio.deliver()
    assert trio.answers[retried]["applied"] > 0  # type: ignore[index]
    trio.equal(1, 2)


@pytest.mark.parametrize(
    "broken",
    [
        {"slots": np.array([-1])},
        {"slots": np.array([2**40])},
        {"slots": np.zeros(1)},
        {"positions": np.zeros(2, np.int64)},
        {"offsets": np.array([0, 5])},
        {"lineage": np.zeros((1, 1), np.int64)},
    ],
)
def test_a_malformed_fork_is_refused_in_a_sentence(broken: dict) -> None:
    whole = {"slots": np.array([1]), "positions": np.array([1 << 40]), "lineage": np.empty(0, np.int64)}
    arrays = {**whole, "offsets": np.zeros(2, np.int64), **broken}
    with pytest.raises(RequestError, match="fork"):
        Trio().machines[2].request("fork", {"from": 1, "link": 1}, arrays)


def test_a_request_of_no_server_is_refused() -> None:
    with pytest.raises(RequestError, match="comes from no server"):
        Trio().machines[2].request("fork", {}, {})


def test_a_block_of_an_older_term_is_refused_and_the_view_fetched() -> None:
    trio = Trio()
    trio.install(plan(trio.view, Renew(np.arange(4))), 2)
    token = trio.push(1, 1, IDS)
    trio.deliver()
    trio.tick(1)
    trio.deliver()
    assert trio.machines[1].store.epoch == trio.view.epoch
    assert token in trio.answers
    trio.equal(1, 2)


def test_an_owner_that_is_behind_is_handed_the_view() -> None:
    trio = Trio()
    trio.install(plan(trio.view, Renew(np.arange(4))), 1)
    trio.deliver()
    assert trio.machines[2].store.epoch == trio.view.epoch
    trio.push(1, 1, IDS)
    trio.deliver()
    trio.equal(1, 2)


def test_a_silent_owner_is_complained_of_and_time_counts_by_ticks() -> None:
    trio = Trio()
    trio.down = {2}
    trio.tick(1)
    trio.push(1, 1, IDS)
    trio.machines[1].tick(1000.0)  # it was stopped for long: that is no silence of others
    assert COMPLAINT not in trio.kinds(1)
    trio.tick(1, times=12)
    assert trio.kinds(1)[COMPLAINT] == {0, 1, 2, 3}
    trio.install(plan(trio.view, Withdraw({"s1": np.arange(4)})), 1)
    assert trio.answers[("push", 1)]
    assert trio.kinds(1) == {}


def test_a_learner_is_copied_to_admitted_and_waited_for() -> None:
    trio = Trio(ReplicationLimits(copy_bytes=64, bulk_bytes_max=600))
    trio.push(1, 1, list(range(60)))
    trio.deliver()
    trio.down = {3}
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    trio.collect()
    assert trio.kinds(1) == {LESSON: {0, 1, 2, 3}}
    quick = trio.push(1, 2, IDS)
    trio.deliver()
    assert quick in trio.answers  # nobody waits for a learner that is not level
    trio.down = set()
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    trio.equal(1, 2, 3)
    trio.down = {3}
    token = trio.push(1, 3, IDS)
    trio.deliver()
    assert token not in trio.answers
    trio.tick(1, times=20)
    assert token not in trio.answers  # it was promised as an owner
    assert trio.kinds(1)[COMPLAINT] == {0, 1, 2, 3}
    trio.down = set()
    trio.deliver()
    assert token in trio.answers
    trio.install(trio.owned_by(trio.view, 2, 0), 1, 3, 2)
    trio.deliver()
    trio.equal(1, 3)


def test_copies_on_their_way_are_bounded_in_bytes() -> None:
    limits = ReplicationLimits(copy_bytes=64, bulk_bytes_max=1200)
    trio = Trio(limits)
    trio.push(1, 1, list(range(200)))
    trio.deliver()
    most = 0
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    for _ in range(3000):
        trio.collect()
        link = trio.machines[1]._primary.links[3]
        most = max(most, link.bulk_bytes)
        queue = trio.wires.get((1, 3), [])
        if not queue:
            break
        trio._carry(1, 3, queue.pop(0))
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    assert 0 < most < 1200 + 1500
    trio.equal(1, 3)


@pytest.mark.parametrize("busy", [1, 3])
def test_copies_slow_down_where_requests_wait_here_or_at_the_learner(busy: int) -> None:
    trio = Trio(ReplicationLimits(copy_bytes=64, bulk_bytes_max=400))
    pace = trio.machines[1]._primary.copies.pace
    trio.push(1, 1, list(range(200)))
    trio.deliver()
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    trio.collect()
    trio._carry(1, 3, trio.wires[1, 3].pop(0))  # the fork is answered: there is none
    assert trio.machines[1].copying
    pace.rate = before = 64 * 2**20
    for now in range(1, 9):
        for server in (1, 3):
            trio.machines[server].tick(now * 0.05, 0.02 if server == busy else 0.0)
        trio.collect()
        trio._carry(1, 3, trio.wires[1, 3].pop(0))  # a part is answered, the next one leaves
    assert trio.machines[1].copying
    assert pace.rate < before / 2
    link = trio.machines[1]._primary.links[3]
    known = link.late
    trio.machines[1].replied(3, link.number, 10**9, {}, {})  # an answer that says nothing of it, as one to a view
    assert link.late == known
    assert (known > 0) == (busy == 3)
    trio.deliver()
    assert not trio.machines[1].copying


def test_a_table_that_one_side_does_not_know_yet_is_no_error() -> None:
    trio = Trio()
    spec = replace(SPEC, name="u")
    view = plan(trio.view, CreateTable("u", spec.to_plain(), replicas=2))
    trio.install(view, 1)
    assert view.terms().tolist() == Trio().view.terms().tolist()
    trio.machines[1].push("new", push_share(1, [2], [IDS], np.full((12, 2), -1.0)))
    trio.deliver()
    assert "new" in trio.answers
    assert trio.machines[2].store.epoch == view.epoch
    trio.equal(1, 2)
    dropped = plan(view, DropTable("u"))
    trio.install(dropped, 2)
    trio.machines[1].push("late", push_share(2, [2], [IDS], np.full((12, 2), -1.0)))
    trio.deliver()
    trio.tick(1)
    trio.deliver()
    assert trio.machines[1].store.epoch == dropped.epoch
    assert "late" in trio.answers
    trio.equal(1, 2)


def test_an_admitted_learner_that_died_is_not_waited_for() -> None:
    trio = Trio()
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    trio.down = {3}
    token = trio.push(1, 1, IDS)
    trio.deliver()
    assert token not in trio.answers
    trio.install(plan(trio.view, Fail("s2")), 1, 2)
    trio.deliver()
    assert token in trio.answers


def test_a_silent_learner_is_dropped() -> None:
    trio = Trio()
    trio.down = {3}
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    trio.tick(1, times=15)
    assert trio.kinds(1) == {}
    token = trio.push(1, 1, IDS)
    trio.deliver()
    assert token in trio.answers


def test_a_lesson_of_an_older_epoch_is_not_begun() -> None:
    trio = Trio()
    epoch = trio.view.epoch
    trio.install(plan(trio.view, Renew(np.arange(4))), 1, 2, 3)
    trio.machines[1].learn(np.arange(4), 3, epoch)
    assert trio.kinds(1) == {}


def test_a_former_owner_needs_only_what_it_missed() -> None:
    trio = Trio()
    trio.push(1, 1, list(range(60)))
    trio.deliver()
    trio.install(plan(trio.view, Withdraw({"s1": np.arange(4)})), 1, 2)
    trio.push(1, 2, [7])
    trio.deliver()
    trio.sent.clear()
    trio.machines[1].learn(np.arange(4), 2, trio.view.epoch)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    brought = [a for _, a in trio.sent if isinstance(a, Send) and "0.ids" in a.arrays]
    assert [a.op for a in brought] == ["repair"]
    assert brought[0].arrays["0.ids"].tolist() == [7]
    trio.equal(1, 2)


def test_an_owner_without_a_fork_is_to_leave() -> None:
    trio = Trio()
    trio.push(1, 1, IDS)
    trio.deliver()
    trio.machines[2].store.held.slots.positions[1] += 5 << 40
    token = trio.push(1, 2, IDS)
    trio.deliver()
    assert token not in trio.answers
    assert trio.kinds(1) == {COMPLAINT: {1}}


def test_a_promised_learner_is_not_copied_to_again() -> None:
    trio = Trio()
    trio.machines[1].learn(np.arange(4), 3, trio.view.epoch)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    trio.machines[3].store.held.slots.positions[1] += 5 << 40  # it has no fork any more
    trio.sent.clear()
    trio.push(1, 1, IDS)
    trio.deliver()
    assert not [a for _, a in trio.sent if isinstance(a, Send) and "full" in a.arrays and a.arrays["full"].any()]
    assert trio.kinds(1) == {ADMISSION: {0, 2, 3}, COMPLAINT: {1}}


def test_an_export_leaves_when_all_owners_hold_it() -> None:
    trio = Trio()
    trio.down = {2}
    trio.push(1, 1, IDS)
    block = next(iter(trio.machines[1].store.export(np.arange(4))))
    trio.machines[1].hold("export", block.slots, block.last)
    trio.collect()
    assert "export" not in trio.answers
    trio.down = set()
    trio.deliver()
    assert "export" in trio.answers


def test_waits_end_when_a_slot_gets_another_primary() -> None:
    trio = Trio()
    trio.down = {2}
    token = trio.push(1, 1, IDS)
    trio.install(trio.owned_by(trio.view, 1, 0), 1)
    assert isinstance(trio.answers[token], PerhapsApplied)


def test_without_other_owners_a_push_is_answered_at_once() -> None:
    trio = Trio(owners=(0,))
    token = trio.push(1, 1, IDS)
    assert trio.answers[token] == {"applied": 4, "seen": 0, "rows_new": 12}
    assert not any(isinstance(a, Send) for i, a in trio.sent if i == 1)


def test_links_of_servers_that_are_gone_leave_no_trace() -> None:
    """Every push looks at each link; a later server does not inherit what was known of an earlier one."""
    trio = Trio()
    machine = trio.machines[1]
    machine.learn(np.arange(4), 3, trio.view.epoch)
    trio.deliver()
    assert trio.kinds(1) == {ADMISSION: {0, 1, 2, 3}}
    view = trio.view
    for incarnation in (13, 23, 33):
        view = replace(
            view, epoch=view.epoch + 1,
            servers=tuple(replace(s, incarnation=incarnation) if s.name == "s2" else s for s in view.servers),
        )  # fmt: skip
        trio.install(view, 1, 2)
        trio.deliver()
        primary = machine._primary
        assert sorted(primary.links) == [2, incarnation]
        assert [link.index for link in primary.by_index] == [0, 1]
        assert all(primary.links[link.incarnation] is link for link in primary.by_index)
        assert trio.kinds(1) == {}
        token = trio.push(1, incarnation, IDS)
        trio.deliver()
        assert token in trio.answers
        machine.learn(np.arange(4), incarnation, view.epoch)
        assert trio.kinds(1) == {LESSON: {0, 1, 2, 3}}
        trio.collect()
        trio.wires.pop((1, incarnation))
    trio.equal(1, 2)


def test_a_push_that_is_given_up_is_answered_by_nobody_and_stays() -> None:
    trio = Trio()
    trio.down = {2}
    tokens = [trio.push(1, 1, IDS), trio.push(1, 2, IDS)]
    trio.machines[1].give_up({tokens[0]})
    trio.down = set()
    trio.deliver()
    assert tokens[0] not in trio.answers
    assert tokens[1] in trio.answers
    trio.equal(1, 2)
    again = trio.push(1, 1, IDS, token="again")
    trio.deliver()
    assert trio.answers[again] == {"applied": 0, "seen": 4, "rows_new": 0}


@pytest.mark.parametrize("given_up", [False, True])
def test_a_push_that_was_handed_on_and_given_up_is_answered_by_nobody(given_up: bool) -> None:
    trio = Trio()
    trio.down = {1}
    token = trio.push(2, 1, IDS)
    if given_up:
        trio.machines[2].give_up({token})
    trio.down = set()
    trio.deliver()
    assert (token in trio.answers) != given_up
    trio.equal(1, 2)
