"""The sending side: pushes are applied, streamed to the other owners, and answered once all of them hold them."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.columns import count_of
from hashring.view import View
from ps.errors import EmbringError, NotApplied, Overloaded, PerhapsApplied
from ps.kernels import replicate
from ps.kernels.replicate import BEHIND, TAKEN
from ps.kernels.window import NEW
from ps.replication.actions import Action, Answer, Arrays, Forward, Refuse, ReplicationLimits, Send, SendView
from ps.replication.copies import Copies, row_bytes
from ps.replication.links import Flight, Link
from ps.replication.members import ADMITTED, ASKED, COPIED, COPY, HOPELESS, IDLE, JOINING, LEARNING, STREAM, Members
from ps.rowblock import TERM_SHIFT, RowBlock
from ps.share import PushShare
from ps.slots import PRIMARY
from ps.store import Store
from ps.store.changes import NO_SLOTS, Applied
from ps.store.fork import Undone, tellable

_SLOT_BYTES = 128
"""What an id and its slot take in a block beside the row, from above."""


@dataclass(slots=True)
class Wait:
    """An answer that waits until every slot is safe at its position; `at`: the first slot that may not be."""

    token: Hashable
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    fields: dict[str, Any]
    at: int = 0


class Primary:
    """Streams, positions of others, and answers that wait for them."""

    def __init__(self, store: Store, limits: ReplicationLimits) -> None:
        self.store = store
        self.limits = limits
        self.links: dict[int, Link] = {}
        self.by_index: list[Link] = []
        self.members = Members(0, 0)
        self.waits: list[Wait] = []
        self.out: list[Action] = []
        self.copies = Copies(store, limits)
        self._estimate = 0

    @property
    def _positions(self) -> NDArray[np.int64]:
        return self.store.held.slots.positions

    # -- pushes

    def push(self, token: Hashable, share: PushShare, acks: str, only: NDArray[np.int64] | None) -> None:
        """Apply, stream, and answer at once or when it is safe. Raises EmbringError where nothing was applied."""
        if not self.store.held.clients.has_room(share.client):
            self.forget_idle()
        if not self.members.any and self.limits.owners_min <= 1 and only is None:
            reply = self.store.push(share)
            self.answer(token, {"applied": reply.applied, "seen": reply.seen, "rows_new": reply.rows_new})
            return
        if share.kind == "delete":
            self.flush()  # rows of what is deleted may be taken by others before a block tells of them
        self._estimate = len(share.ids) * (row_bytes(self.store) + _SLOT_BYTES)
        applied = self.store.apply(share, self._admit, only)
        if len(applied.slots):
            if applied.erased:  # copies cannot rest for long: only so many deletions are remembered
                for index in self.members.rouse(applied.slots):
                    self.by_index[index].untidy = True
            self._stream(applied)
        reply = applied.reply
        fields = {"applied": reply.applied, "seen": reply.seen, "rows_new": reply.rows_new}
        if acks == "primary":
            self.answer(token, fields)
        else:
            self.hold(token, applied.touched, self._positions[applied.touched], fields)

    def _admit(self, touched: NDArray[np.int64], verdicts: NDArray[np.uint8]) -> None:
        """Refuse a push for which an owner is missing, or a queue too full, before anything is applied."""
        if self.limits.owners_min > 1:
            assert self.store.view is not None
            owners = count_of(self.store.view.owners()[touched] >= 0)
            if owners.min() < self.limits.owners_min:
                slot = touched[owners.argmin()]
                raise NotApplied(f"slot {slot} has {owners.min()} owners; pushes need {self.limits.owners_min}")
        full = [n for n in self.by_index if n.owed and n.owed + self._estimate > self.limits.queue_bytes_max]
        if full:
            for link in full:
                self.drop_learner(link)  # no push waits for who has fallen so far behind
            counts = np.zeros(len(self.by_index), np.int64)
            slots = touched[verdicts[touched] == NEW]
            replicate.count_peers(slots, self.members.peers, self.members.modes, counts)
            for link in full:
                if counts[link.index]:
                    raise Overloaded(f"{link.owed} bytes of changes are on their way to another owner; try again")

    def _stream(self, applied: Applied) -> None:
        """Send what a push changed to each peer that is not busy with blocks of earlier ones."""
        counts = np.zeros(len(self.by_index), np.int64)
        replicate.count_peers(applied.slots, self.members.peers, self.members.modes, counts)
        for index in np.flatnonzero(counts):
            link = self.by_index[index]
            link.unsent.append(applied)
            link.unsent_bytes += self._estimate
            if applied.erased or link.unsent_bytes > self.limits.block_bytes_max:
                self._flush(link)
            else:
                self.go_on(link)

    def go_on(self, link: Link) -> None:
        """Send what waits for a peer, as soon as that has taken what it was sent before."""
        if link.streaming < self.limits.blocks_max:
            self._flush(link)

    def flush(self) -> None:
        """Send all that waits for a peer."""
        for link in self.by_index:
            self._flush(link)

    def _flush(self, link: Link) -> None:
        """One block of all that pushes changed since the last: rows and slots of several are in it once.

        Before anything else that speaks of the same slots: blocks come in the order of positions.
        """
        if not link.unsent:
            return
        pushes, link.unsent, link.unsent_bytes = link.unsent, [], 0
        block = self.store.cut(pushes, self.members, link.index)
        if block is not None:
            self._send_block(link, block)

    def hold(
        self, token: Hashable, slots: NDArray[np.int64], positions: NDArray[np.int64], fields: dict[str, Any]
    ) -> None:
        """Answer once every owner, and every learner that is waited for, holds the slots at these positions."""
        wait = Wait(token, slots, positions, fields)
        if not self._safe(wait):
            self.waits.append(wait)

    def _safe(self, wait: Wait) -> bool:
        m = self.members
        wait.at = replicate.first_behind(wait.slots, wait.positions, wait.at, m.peers, m.ranks, m.acked)
        if wait.at < len(wait.slots):
            return False
        self.answer(wait.token, wait.fields)
        return True

    def release(self) -> None:
        """Answer what has become safe."""
        if self.waits:
            self.waits = [wait for wait in self.waits if not self._safe(wait)]

    def answer(self, token: Hashable, fields: dict[str, Any]) -> None:
        self.out.append(Answer(token, fields))

    def refuse(self, token: Hashable, error: EmbringError) -> None:
        self.out.append(Refuse(token, error))

    def forget_idle(self) -> None:
        """Forget idle clients, as a change that is streamed like any other."""
        clients = self.store.held.clients.idle()
        if not clients:
            return
        self.flush()
        block = self.store.forget(clients).block
        if block is None:
            return
        for link in self.by_index:
            column = self.members.column_of(block.slots, link.index)
            chosen = (column >= 0) & (self.members.modes[block.slots, np.maximum(column, 0)] == STREAM)
            if chosen.any():
                self._send_block(link, block.select(chosen))

    # -- sending

    def send(self, link: Link, op: str, flight: Flight, fields: dict[str, Any], arrays: Arrays) -> None:
        """Send a request, behind all that was sent before, or waits to be."""
        self._flush(link)
        number = link.depart(flight)
        fields = {"from": self.store.incarnation, "link": link.number, "at": self.store.epoch, **fields}
        self.out.append(Send(link.incarnation, link.number, number, op, fields, arrays))

    def _send_block(self, link: Link, block: RowBlock, op: str = "replicate", bulk: bool = False) -> None:
        fields, arrays = block.to_arrays()
        size = sum(array.nbytes for array in arrays.values())
        if size > self.store.held.block_max and not bulk:
            self._send_less(link, block, op)
            return
        flight = Flight(op, block.slots, block.last, size, bulk, bool(block.final.all()))
        if bulk:
            self.copies.bytes += size
            self.copies.rows += sum(len(section.ids) for section in block.sections)
            self.copies.pace.allowance -= size
        elif op == "repair" and self._unawaited(link, block.slots)[0]:  # a repair is all of such or of none
            self.copies.mended(link, block.slots, size)
        self.send(link, op, flight, {"block": fields}, arrays)

    def _send_less(self, link: Link, block: RowBlock, op: str) -> None:
        """No frame carries the block: its slots leave in two. One slot is to be copied anew, for a copy has parts."""
        half = len(block.slots) // 2
        if half:
            for some in (np.arange(len(block.slots)) < half, np.arange(len(block.slots)) >= half):
                self._send_block(link, block.select(some), op)
        else:
            self._unmendable(link, block.slots, self.members.column_of(block.slots, link.index))

    def send_view(self, link: Link, view: View) -> None:
        """Hand a view on, behind all that was sent before, or waits to be."""
        self._flush(link)
        number = link.depart(Flight("install", NO_SLOTS, NO_SLOTS))
        self.out.append(SendView(link.incarnation, link.number, number, view))

    def fetch_view(self, link: Link) -> None:
        """Ask a peer that knows a newer view for it."""
        if link.asked_for < link.epoch and not link.resting:
            link.asked_for = link.epoch
            self.send(link, "view", Flight("view", NO_SLOTS, NO_SLOTS), {}, {})

    def forward(self, link: Link, token: Hashable, share: PushShare, only: NDArray[np.int64], acks: str) -> None:
        """Hand slots of a push to their primary."""
        if link.resting:
            self.refuse(token, NotApplied("the primary of the slots cannot be reached from here"))
            return
        number = link.depart(Flight("push", only, NO_SLOTS, token=token))
        self.out.append(Forward(link.incarnation, link.number, number, share, only, self.store.epoch, acks))

    def open(self, slots: NDArray[np.int64], before: NDArray[np.int64], view: View) -> None:
        """Begin the terms of slots that stood at `before`: an empty block for each other owner."""
        m = self.members
        for link in self.by_index:
            mine = slots[m.column_of(slots, link.index) >= 0]
            if not len(mine):
                continue
            if link.resting:
                m.modes[mine, m.column_of(mine, link.index)] = IDLE
                link.untidy = True
                continue
            if link.epoch < view.epoch:
                self.send_view(link, view)
            self._send_block(link, self.store.opening(mine, before[mine]))

    def tidy(self, link: Link) -> None:
        """See to the slots that a peer is sent nothing of: what is level streams on, of the rest the fork is asked.

        Of copies that nobody waits for, a lot after another is.
        """
        m = self.members
        if link.resting:
            return
        self._flush(link)
        slots, columns = m.where(link.index)
        idle = m.modes[slots, columns] == IDLE
        slots, columns = slots[idle], columns[idle]
        level = m.acked[slots, columns] == self._positions[slots]
        late = np.flatnonzero(~level & (m.ranks[slots, columns] == LEARNING) & (m.acked[slots, columns] > 0))
        if len(late) and self.copies.may_mend(link):
            late = late[self.copies.lot(link, slots[late]) :]
        link.untidy, link.late_copies = False, len(late)
        slots, columns, level = (np.delete(array, late) for array in (slots, columns, level))
        m.modes[slots, columns] = np.where(level, STREAM, ASKED)
        self._advance(link, slots[level])  # it may be level by what was sent before it was asked: nothing else says so
        asked = slots[~level]
        if len(asked):
            positions = self._positions[asked]
            lineage, offsets = self.store.held.slots.lineage(asked)
            arrays: Arrays = {"slots": asked, "positions": positions, "lineage": lineage, "offsets": offsets}
            size = sum(array.nbytes for array in arrays.values())
            self.send(link, "fork", Flight("fork", asked, positions, size), {}, arrays)

    def _unawaited(self, link: Link, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Slots of which the peer is a learner that nobody waits for."""
        return self.members.ranks[slots, self.members.column_of(slots, link.index)] == LEARNING

    def drop_learner(self, link: Link) -> None:
        """A learner is no longer waited for nor sent anything, unless it was promised as an owner."""
        m = self.members
        slots, columns = m.where(link.index)
        free = m.ranks[slots, columns] <= JOINING
        if free.any():
            m.drop(slots[free], columns[free])
            link.copied_s = None
            self.release()

    def pump(self, link: Link) -> None:
        """Send parts of copies while not too much of them is on its way."""
        m = self.members
        if link.copies:
            self._flush(link)
        while link.copies and link.bulk_bytes < self.limits.bulk_bytes_max and not link.resting:
            if self.copies.pace.allowance <= 0:
                return
            try:
                block = next(link.copies[0], None)
            except EmbringError:  # a slot of it has another primary now, or was deleted from too fast: copied anew
                link.copies = []
                slots, columns = m.where(link.index)
                copying = m.modes[slots, columns] == COPY
                m.modes[slots[copying], columns[copying]] = IDLE
                link.untidy = True
                return
            if block is None:
                link.copies.pop(0)
                continue
            columns = m.column_of(block.slots, link.index)
            wanted = (columns >= 0) & (m.modes[block.slots, np.maximum(columns, 0)] == COPY)
            if not wanted.all():
                block = block.select(wanted)
                columns = columns[wanted]
            if not len(block.slots):
                continue
            if block.final.all():
                # What was cut into blocks at one moment may have changed since: the fork tells what is missing. While
                # servers join or leave it is asked once all are copied: to send each push there meanwhile, where few
                # of its slots are, would take as many messages as to an owner. Slots that lack a copy do not rest.
                rests = self.copies.may_rest(block.slots)
                level = block.last == self._positions[block.slots]
                m.modes[block.slots, columns] = np.where(rests, COPIED, np.where(level, STREAM, IDLE))
                link.untidy |= not (level | rests).all()
                if rests.any():
                    link.copied_s = link.copied_s or 0.0
            self._send_block(link, block, bulk=True)

    def wake(self, link: Link) -> None:
        """Bring slots that rested up to date, where no others are awaited, in two rounds.

        The first takes as long as the rate of copies makes it; after it they rest on, so that nothing is streamed to
        them meanwhile. The second, after which they are streamed to, has only what changed in the first.
        """
        if link.level if link.round else self.copies.gathered(link, self.by_index):
            link.round = (link.round + 1) % 3
            if link.round:
                link.copied_s, link.untidy = None, True
                self.members.rouse(*self.members.where(link.index))
                self.tidy(link)

    # -- what peers answer

    def taken(self, link: Link, flight: Flight, verdicts: NDArray[np.uint8] | None, view: View) -> None:
        """A block was answered; without verdicts all of it was taken."""
        m, slots, positions = self.members, flight.slots, flight.positions
        if verdicts is not None:
            good = verdicts == TAKEN
            slots, positions = slots[good], positions[good]
        link.refusals = 0
        if flight.complete:
            replicate.confirm(slots, positions, link.index, m.peers, m.acked)
            self._advance(link, slots)
        if verdicts is not None and len(slots) < len(flight.slots):
            self._set_back(link, flight.slots[~good])
            if (verdicts == BEHIND).any():
                self.send_view(link, view)
            self.tidy(link)
        elif flight.op == "repair" and link.late_copies:
            self.tidy(link)
        self.release()
        self.pump(link)
        self.wake(link)

    def set_back_asked(self, link: Link, slots: NDArray[np.int64]) -> None:
        """Slots whose fork the peer did not tell."""
        self._set_back(link, slots, (ASKED,))

    def _set_back(self, link: Link, slots: NDArray[np.int64], modes: tuple[int, ...] = (STREAM, COPY, COPIED)) -> None:
        """Slots of which the peer did not take what it was sent."""
        m = self.members
        columns = m.column_of(slots, link.index)
        known = columns >= 0
        slots, columns = slots[known], columns[known]
        again = np.isin(m.modes[slots, columns], modes)
        m.modes[slots[again], columns[again]] = IDLE
        link.untidy = True

    def refused(self, link: Link, flight: Flight) -> None:
        """A block was answered with an error: the peer cannot take it (it is full, or of another mind)."""
        link.refusals += 1
        self._set_back(link, flight.slots)

    def _advance(self, link: Link, slots: NDArray[np.int64]) -> None:
        """Learners that have their copy are waited for from then on, and admitted once they hold all from before."""
        m = self.members
        if not m.learning:
            return
        columns = m.column_of(slots, link.index)
        learners = columns >= m.owner_columns
        s, c = slots[learners], columns[learners]
        whole = (m.ranks[s, c] == LEARNING) & (m.modes[s, c] == STREAM)
        m.ranks[s[whole], c[whole]] = JOINING
        m.targets[s[whole], c[whole]] = self._positions[s[whole]]
        level = (m.ranks[s, c] == JOINING) & (m.acked[s, c] >= m.targets[s, c])
        m.ranks[s[level], c[level]] = ADMITTED

    def forked(self, link: Link, flight: Flight, arrays: Arrays, view: View) -> None:
        """A fork was told: repair what can be repaired, copy to learners what cannot."""
        self._flush(link)
        m, slots, verdicts = self.members, flight.slots, arrays["verdicts"]
        columns = m.column_of(slots, link.index)
        named = self.store.held.slots.named[slots] == PRIMARY
        same = named & (self._positions[slots] >> TERM_SHIFT == flight.positions >> TERM_SHIFT)
        asked = same & (columns >= 0) & (m.modes[slots, np.maximum(columns, 0)] == ASKED)
        later = asked & (verdicts != TAKEN)
        m.modes[slots[later], columns[later]] = IDLE
        if (asked & (verdicts == BEHIND)).any():
            self.send_view(link, view)
            self.tidy(link)
        link.untidy |= bool(later.any())
        now = np.flatnonzero(asked & (verdicts == TAKEN))
        forks, learner = arrays["forks"][now], columns[now] >= m.owner_columns
        good = (forks >= 0) & tellable(self.store.held, slots[now], forks) & ~(learner & (forks == 0))
        self._unmendable(link, slots[now[~good]], columns[now[~good]])
        self._repair_in_turn(link, flight.slots, columns, now[good], arrays)
        self.pump(link)

    def _unmendable(self, link: Link, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """Copies without a fork. A learner is copied to from the beginning, and not waited for until then; but one that
        was promised as an owner is not: a view may name it at any moment, and it would be incomplete."""
        m = self.members
        promised = m.ranks[slots, columns] >= ADMITTED
        m.modes[slots, columns] = np.where(promised, HOPELESS, COPY)
        slots, columns = slots[~promised], columns[~promised]
        if len(slots):
            m.ranks[slots, columns] = LEARNING
            m.acked[slots, columns] = -1
            self.copies.begin(link, slots)
            self.release()

    def _repair_in_turn(
        self, link: Link, slots: NDArray[np.int64], columns: NDArray[np.int64], some: NDArray[np.int64], told: Arrays
    ) -> None:
        """Repair owners, and learners that are waited for; of the others those whose turn it is: a copy from before
        that a learner still has comes with the rest of them."""
        m, base = self.members, told["forks"]
        unawaited = self._unawaited(link, slots[some])
        found = unawaited & (m.acked[slots[some], columns[some]] <= 0) & (told["positions"][some] == base[some])
        late = some[found]
        m.acked[slots[late], columns[late]] = base[late]
        m.modes[slots[late], columns[late]] = IDLE
        for mended in (some[~unawaited], some[unawaited & ~found]):
            self._repair(link, slots, columns, mended, told)
        if len(late):
            self.tidy(link)

    def _repair(
        self, link: Link, slots: NDArray[np.int64], columns: NDArray[np.int64], some: NDArray[np.int64], told: Arrays
    ) -> None:
        starts = told["undone.offsets"]
        for at in range(0, len(some), self.limits.repair_slots):
            part = some[at : at + self.limits.repair_slots]
            counts = np.diff(starts)[part]
            lines = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in part] or [NO_SLOTS])
            offsets = np.concatenate([[0], np.cumsum(counts)])
            undone = Undone(told["undone.tables"][lines], told["undone.ids"][lines], offsets)
            block = self.store.repair(slots[part], told["positions"][part], told["forks"][part], undone)
            rests = link.round == 1 and self._unawaited(link, slots[part])[0]
            self.members.modes[slots[part], columns[part]] = COPIED if rests else STREAM
            self._send_block(link, block, "repair")

    def lost(self, link: Link) -> None:
        """The connection broke: what was on its way is lost or not, and every slot of the peer is set back."""
        for flight in link.cut():
            if flight.token is not None:
                self.refuse(flight.token, PerhapsApplied("the connection to the other server broke"))
        slots, columns = self.members.where(link.index)
        moving = self.members.modes[slots, columns] != HOPELESS
        self.members.modes[slots[moving], columns[moving]] = IDLE
