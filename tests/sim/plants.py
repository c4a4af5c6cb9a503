"""Bugs to be found: each patches behaviour for the length of a run, and the simulation must see it.

`PLANTS[name](patch)` plants a bug; `patch(owner, attribute, replacement)` is undone afterwards. The product knows
nothing of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

import hashring.planner
import hashring.tables
import ps.client.request
import ps.failover.machine
import ps.replication.backup
import ps.replication.machine
import ps.replication.primary
import ps.replication.verify
import ps.slots
import ps.store.absorption
import ps.store.fork
import ps.store.holdings
import ps.store.stream
import ps.window
import tests.sim.checkpoints
import tests.sim.cluster
import tests.sim.controller
import tests.sim.server
import tests.sim.subscriber
from hashring.planner import Reassign
from ps.client.request import PushRequest
from ps.client.verbs import Verbs
from ps.errors import Overloaded
from ps.failover.machine import Append, Deliver, Failover
from ps.kernels import replicate, window
from ps.kernels.replicate import COPIED, COPY, STREAM
from ps.replication import ADMISSION, HELD, LESSON
from ps.replication.backup import TAKEN, Backup
from ps.replication.machine import Replication
from ps.replication.members import ADMITTED, ASKED, OWNER
from ps.replication.primary import Primary
from ps.rowblock import RowBlock
from ps.share import BAGS
from ps.slots import SlotTable, Tombstones
from ps.store import Store, transfer
from ps.window import ClientEntries, ClientTable

Patch = Callable[[Any, str, Any], None]

PLANTS: dict[str, Callable[[Patch], None]] = {}


def plant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    """Register a bug under its function's name."""
    PLANTS[function.__name__] = function
    return function


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is there inside the block; "" plants none."""
    undo: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, attribute: str, new: Any) -> None:
        undo.append((owner, attribute, owner.__dict__[attribute]))
        setattr(owner, attribute, new)

    try:
        if name:
            PLANTS[name](patch)
        yield
    finally:
        for owner, attribute, old in reversed(undo):
            setattr(owner, attribute, old)


# -- exactly once


@plant
def last_sequence_only(patch: Patch) -> None:
    """A slot remembers the last sequence of a client, and takes any earlier one for seen."""

    def decide(touched: Any, sequence: int, last: Any, mask: Any, verdicts: Any) -> tuple[int, int]:
        seen = last[touched] >= sequence
        verdicts[touched] = np.where(seen, window.SEEN, window.NEW)
        return int((~seen).sum()), 0

    patch(window, "decide", decide)


@plant
def window_not_shifted(patch: Patch) -> None:
    """The bits of a window stay where they are when a newer sequence comes."""
    real = window.number

    def number(touched: Any, sequence: int, verdicts: Any, last: Any, mask: Any, positions: Any) -> None:
        before = mask[touched].copy()
        real(touched, sequence, verdicts, last, mask, positions)
        ahead = last[touched] == sequence
        mask[touched[ahead]] = before[ahead] | np.uint64(1)

    patch(window, "number", number)


@plant
def duplicate_answered_at_once(patch: Patch) -> None:
    """A push that was seen before is acknowledged without waiting for the other owners."""
    real = Primary.hold

    def hold(self: Any, token: Any, slots: Any, positions: Any, fields: Any) -> None:
        if fields.get("seen") and not fields.get("applied"):
            self.answer(token, fields)
        else:
            real(self, token, slots, positions, fields)

    patch(Primary, "hold", hold)


@plant
def answered_before_replicas(patch: Patch) -> None:
    """Every push is acknowledged as soon as the primary has it."""
    patch(Primary, "hold", lambda self, token, slots, positions, fields: self.answer(token, fields))


@plant
def slot_in_two_frames(patch: Patch) -> None:
    """A client sends the ids of one slot in two frames under one sequence."""
    real = PushRequest.split

    def split(self: Any, *arguments: Any) -> Any:
        calls = []
        for call in real(self, *arguments):
            ids = call.arrays["ids"]
            features = call.arrays["features"]
            if len(features) != 1 or len(ids) < 2 or "offsets" in call.arrays or "rows" not in call.arrays:
                calls.append(call)
                continue
            rows = call.arrays["rows"].reshape(len(ids), -1)
            for k, part in enumerate((slice(0, 1), slice(1, None))):
                line = features.copy()
                line[0, BAGS] = len(ids[part])
                some = {"ids": ids[part], "rows": rows[part].reshape(-1), "features": line}
                calls.append(replace(call, key=call.key + 100 * k, arrays={**call.arrays, **some}))
        return calls

    patch(PushRequest, "split", split)


@plant
def resent_under_a_new_sequence(patch: Patch) -> None:
    """A client gives every retry a sequence of its own."""
    real_split, real_once = PushRequest.split, Verbs._send_once

    def send_once(self: Any, request: Any, until: float) -> Any:
        request.fresh = self.window
        return real_once(self, request, until)

    def split(self: Any, *arguments: Any) -> Any:
        if getattr(self, "tried", False) and hasattr(self, "fresh") and not self.fresh.full:
            self.sequence = self.fresh.open()
            self.fresh._undecided.discard(self.sequence)
        self.tried = True
        return real_split(self, *arguments)

    patch(Verbs, "_send_once", send_once)
    patch(PushRequest, "split", split)


@plant
def forgotten_by_each_for_itself(patch: Patch) -> None:
    """Idle clients are forgotten by every owner by its own clock, without a number."""

    def tick_forget(self: Any) -> None:
        for client in self.store.held.clients.idle():
            w = self.store.held.clients.window(client)
            w.last[:], w.mask[:] = 0, 0

    patch(Primary, "forget_idle", tick_forget)


@plant
def forgotten_too_early(patch: Patch) -> None:
    """Clients are forgotten while they may still retry."""
    patch(ClientTable, "idle", lambda self: [c for c, used in self._used.items() if used <= self.clock() - 0.02])


# -- blocks


@plant
def positions_without_terms(patch: Patch) -> None:
    """A new primary goes on counting where it stood, and backups skip what they take for old."""

    def open_term(self: Any, slots: Any, positions: Any) -> None:
        self.positions[slots] += 1

    real = Store.absorb

    def absorb(self: Any, block: RowBlock, replace_clients: bool = False, allowed: Any = None) -> Any:
        taken = real(self, block, replace_clients, allowed)
        return taken | ((block.last <= self.held.slots.positions[block.slots]) & (block.full == 0))

    patch(SlotTable, "_open", open_term)
    patch(Store, "absorb", absorb)
    patch(Backup, "_verdicts", lambda self, sender, slots, positions: np.full(len(slots), TAKEN, np.uint8))


@plant
def base_not_compared(patch: Patch) -> None:
    """A block is taken wherever the copy stands."""
    real = ps.store.absorption._acceptable

    def acceptable(held: Any, block: RowBlock) -> Any:
        return real(held, replace(block, base=np.where(block.full > 0, block.base, held.slots.positions[block.slots])))

    patch(ps.store.absorption, "_acceptable", acceptable)


@plant
def confirmed_without_being_taken(patch: Patch) -> None:
    """A backup says that it took what it did not."""
    real = Backup._absorb

    def absorb(self: Any, *arguments: Any) -> Any:
        real(self, *arguments)
        return {}, {}

    patch(Backup, "_absorb", absorb)


def _without_clients(block: RowBlock) -> RowBlock:
    return replace(block, clients=ClientEntries.none(len(block.slots)))


@plant
def windows_not_streamed(patch: Patch) -> None:
    """Blocks of changes leave the client's window out."""
    real = ps.store.stream.cut

    def cut(*arguments: Any) -> Any:
        block = real(*arguments)
        return block and _without_clients(block)

    patch(ps.store.stream, "cut", cut)


@plant
def windows_not_copied(patch: Patch) -> None:
    """A learner's copy leaves the client table out."""
    real = Store.copy
    patch(Store, "copy", lambda self, *arguments: (_without_clients(b) for b in real(self, *arguments)))


@plant
def deletions_not_streamed(patch: Patch) -> None:
    """Blocks of changes leave deleted ids out."""
    real = ps.store.stream.cut

    def cut(held: Any, pushes: Any, *arguments: Any) -> Any:
        return real(held, [replace(applied, erased=[]) for applied in pushes], *arguments)

    patch(ps.store.stream, "cut", cut)


@plant
def rows_of_the_last_push_alone(patch: Patch) -> None:
    """A block of several pushes brings the rows of the last one."""
    real = ps.store.stream.cut

    def cut(held: Any, pushes: Any, *arguments: Any) -> Any:
        return real(held, [*(replace(applied, written=[]) for applied in pushes[:-1]), pushes[-1]], *arguments)

    patch(ps.store.stream, "cut", cut)


@plant
def window_of_the_last_client_alone(patch: Patch) -> None:
    """A block of several clients' pushes brings the window of the last one."""
    real = ps.store.stream.cut

    def cut(held: Any, pushes: Any, *arguments: Any) -> Any:
        return real(held, [replace(applied, client=pushes[-1].client) for applied in pushes], *arguments)

    patch(ps.store.stream, "cut", cut)


@plant
def deletion_behind_what_waits(patch: Patch) -> None:
    """Ids are deleted while a block with their rows waits to be cut, and wait with it."""
    real = Primary._flush

    def flush(self: Any, link: Any) -> None:
        if link.streaming < self.limits.blocks_max:
            real(self, link)

    patch(Primary, "_flush", flush)


@plant
def rows_of_one_arena_only(patch: Patch) -> None:
    """A repair brings the rows of the first arena alone."""
    real = ps.store.fork.repair

    def repair(*arguments: Any) -> Any:
        block = real(*arguments)
        return replace(block, sections=block.sections[:1])

    patch(ps.store.fork, "repair", repair)


# -- forks


@plant
def nothing_undone(patch: Patch) -> None:
    """The fork exchange does not name what the other copy changed since."""

    def undone(held: Any, slots: Any, some: Any, forks: Any) -> Any:
        return ps.store.fork.Undone(np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(len(slots) + 1, np.int64))

    patch(ps.store.fork, "_undone", undone)


@plant
def repair_keeps_windows(patch: Patch) -> None:
    """A repair sets windows, and leaves those that it does not name."""
    real = Store.absorb

    def absorb(self: Any, block: RowBlock, replace_clients: bool = False, allowed: Any = None) -> Any:
        return real(self, _without_clients(block) if replace_clients else block, False, allowed)

    patch(Store, "absorb", absorb)


@plant
def deletions_not_repaired(patch: Patch) -> None:
    """Deletions are left out of the fork exchange."""
    real = ps.store.fork.repair

    def repair(*arguments: Any) -> Any:
        block = real(*arguments)
        bare = []
        for s in block.sections:
            no = np.empty(0, np.int64)
            bare.append(
                replace(
                    s, gone_ids=no, gone_tables=no.astype(np.int32), gone_versions=no, gone_offsets=s.gone_offsets * 0
                )
            )
        return replace(block, sections=tuple(bare))

    patch(ps.store.fork, "repair", repair)


@plant
def fork_too_new(patch: Patch) -> None:
    """The later of the two last positions of a common term is taken for the fork."""

    def forks(mine: Any, ml: Any, mo: Any, theirs: Any, tl: Any, to: Any, out: Any) -> None:
        for s in range(len(out)):
            a = {int(p) >> 40: int(p) for p in (*ml[mo[s] : mo[s + 1]][::-1], mine[s])}
            b = {int(p) >> 40: int(p) for p in (*tl[to[s] : to[s + 1]][::-1], theirs[s])}
            common = max(a.keys() & b.keys(), default=None)
            out[s] = (0 if mine[s] == 0 else -1) if common is None else min(int(mine[s]), max(a[common], b[common]))

    patch(replicate, "forks", forks)


@plant
def forgotten_deletions_ignored(patch: Patch) -> None:
    """A fork is repaired although deletions since then are no longer remembered."""
    real = ps.store.fork.find

    def find(held: Any, slots: Any, *arguments: Any) -> Any:
        kept = held.slots.horizon[slots].copy()
        held.slots.horizon[slots] = 0
        try:
            return real(held, slots, *arguments)
        finally:
            held.slots.horizon[slots] = kept

    patch(ps.store.fork, "find", find)
    patch(ps.replication.primary, "tellable", lambda held, slots, forks: np.ones(len(slots), bool))
    patch(Tombstones, "of", _short_memory(Tombstones.of))


def _short_memory(real: Any) -> Any:
    def of(self: Any, slots: Any, since: Any) -> Any:
        where, tables, ids, versions = real(self, slots, since)
        keep = np.arange(len(ids)) >= len(ids) - 1
        return where[keep], tables[keep], ids[keep], versions[keep]

    return of


# -- learners


@plant
def admitted_learner_dropped(patch: Patch) -> None:
    """A primary drops a silent learner that was promised as an owner."""

    def drop(self: Any, link: Any) -> None:
        slots, columns = self.members.where(link.index)
        free = self.members.ranks[slots, columns] <= ADMITTED
        self.members.drop(slots[free], columns[free])
        self.release()

    patch(Primary, "drop_learner", drop)


@plant
def admitted_learner_not_waited_for(patch: Patch) -> None:
    """Answers wait for owners alone."""

    def first_behind(slots: Any, positions: Any, start: int, peers: Any, ranks: Any, acked: Any) -> int:
        for i in range(start, len(slots)):
            s = slots[i]
            if ((peers[s] >= 0) & (ranks[s] >= OWNER) & (acked[s] < positions[i])).any():
                return i
        return len(slots)

    patch(replicate, "first_behind", first_behind)


@plant
def admitted_before_it_is_level(patch: Patch) -> None:
    """A learner is admitted with its copy's last part, and never waited for."""
    admitted_learner_not_waited_for(patch)

    def advance(self: Any, link: Any, slots: Any) -> None:
        m = self.members
        columns = m.column_of(slots, link.index)
        some = columns >= m.owner_columns
        m.ranks[slots[some], columns[some]] = ADMITTED

    patch(Primary, "_advance", advance)


@plant
def incomplete_learner_admitted(patch: Patch) -> None:
    """A learner is admitted with the first part of its copy."""
    real = Primary.taken

    def taken(self: Any, link: Any, flight: Any, verdicts: Any, view: Any) -> None:
        if flight.bulk and not flight.complete:
            m = self.members
            columns = m.column_of(flight.slots, link.index)
            some = columns >= m.owner_columns
            m.ranks[flight.slots[some], columns[some]] = ADMITTED
            m.acked[flight.slots[some], columns[some]] = flight.positions[some]
        real(self, link, flight, verdicts, view)

    patch(Primary, "taken", taken)


@plant
def learner_promoted_unadmitted(patch: Patch) -> None:
    """The controller names learners as owners while they are still copied to."""
    real = Failover._reports
    patch(
        Failover,
        "_reports",
        lambda self, *kinds, **how: [
            *real(self, *kinds, **how),
            *(real(self, LESSON, HELD) if ADMISSION in kinds else []),
        ],
    )


@plant
def admissions_of_an_old_term(patch: Patch) -> None:
    """The controller heeds what was admitted in a term that is over."""
    real = Replication.standing
    kept: dict[Any, Any] = {}

    def standing(self: Any) -> Any:
        now = real(self)
        old = kept.get(id(self))
        if old is not None and self.store.view is not None and len(old.kinds) and not len(now.kinds):
            return replace(old, terms=self.store.view.terms()[old.slots])
        if (now.kinds == ADMISSION).any():
            kept[id(self)] = now
        return now

    patch(Replication, "standing", standing)


def _hear_old_connections(patch: Patch, of: Callable[[dict[str, Any]], bool]) -> None:
    real = Backup.request

    def request(self: Any, op: str, fields: Any, arrays: Any) -> Any:
        if of(arrays):
            fields = {**fields, "link": max(fields["link"], self._heard.get(fields["from"], 0))}
        return real(self, op, fields, arrays)

    patch(Backup, "request", request)


@plant
def old_connection_heard(patch: Patch) -> None:
    """What a broken connection still had in its buffers is taken after a new one has begun."""
    _hear_old_connections(patch, lambda arrays: True)


@plant
def overlapping_copies_not_numbered(patch: Patch) -> None:
    """Two copies to one learner have the same number.

    Alone this is harmless, for parts of an old copy come by an old connection, or in an old term, and neither is heard:
    so later parts (which a number would tell from the new copy's) are heard by whatever connection they come.
    """
    _hear_old_connections(patch, lambda arrays: bool("part" in arrays and arrays["part"].any()))
    real = Store.copy
    patch(Store, "copy", lambda self, slots, number, rows_max: real(self, slots, 1, rows_max))


@plant
def part_cut_by_a_live_cursor(patch: Patch) -> None:
    """The last part of a copy does not repeat what changed since the first."""
    real = transfer._section

    def section(held: Any, arena: Any, slots: Any, base: Any, began: Any, part: Any) -> Any:
        return real(held, arena, slots, base, held.slots.positions[slots], part)

    patch(transfer, "_section", section)


# -- views and controllers


@plant
def log_overwrites(patch: Patch) -> None:
    """The view log takes an epoch that is there already."""

    def create(self: Any, view: Any) -> bool:
        self.views[view.epoch] = view
        return True

    patch(tests.sim.controller.Log, "create", create)


@plant
def delivered_before_it_is_logged(patch: Patch) -> None:
    """Servers hear of a view before it is in the log."""
    real = Failover._append

    def append(self: Any, change: Any, token: Any = None) -> bool:
        done = real(self, change, token)
        for action in [a for a in self.out if isinstance(a, Append)]:
            self.out += [Deliver(i, action.view) for i in self.servers]
        return done

    patch(Failover, "_append", append)


@plant
def same_incarnation_after_a_restart(patch: Patch) -> None:
    """A restarted process goes by the incarnation of the one before it."""

    def restart(self: Any, name: str) -> None:
        old = [s for s in self.by_incarnation.values() if s.name == name][-1]
        self.dead = [i for i in self.dead if i != old.incarnation]
        server = self.by_incarnation[old.incarnation] = tests.sim.cluster.Server(self, name, old.incarnation)
        server.install(self.log.newest)

    patch(tests.sim.cluster.Cluster, "_restart", restart)


@plant
def last_owner_withdrawn(patch: Patch) -> None:
    """A falsely suspected server leaves the slots of which it is the last owner, which go to somebody else."""
    real = Failover._silence

    def silence(self: Any) -> bool:
        gone = ps.failover.machine.silent(self.servers, self.limits.pings_max)
        others = [i for i, s in enumerate(self.view.servers) if s.alive and s.incarnation not in gone]
        mine = [i for i, s in enumerate(self.view.servers) if s.incarnation in gone]
        owners = self.view.owners()
        last = np.flatnonzero(np.isin(owners[:, 0], mine) & ((owners >= 0).sum(axis=1) == 1))
        if len(last) and others:
            return bool(self._append(Reassign(last, np.full((len(last), 1), others[0], np.int16))))
        return bool(real(self))

    patch(Failover, "_silence", silence)


@plant
def owner_dropped_by_its_primary(patch: Patch) -> None:
    """A primary goes on without a silent owner, and without a view that says so."""

    def drop(self: Any, link: Any) -> None:
        slots, columns = self.members.where(link.index)
        self.members.drop(slots, columns)
        self.release()

    patch(Primary, "drop_learner", drop)


@plant
def answered_on_losing_office(patch: Patch) -> None:
    """Pushes that wait are acknowledged when their slot gets another primary."""

    def end_waits(self: Any, left: Any) -> None:
        for wait in self._primary.waits:
            self._primary.answer(wait.token, wait.fields)
        self._primary.waits = []

    patch(Replication, "_end_waits", end_waits)


@plant
def former_owner_reads(patch: Patch) -> None:
    """A copy that is kept beyond its ownership answers pulls."""
    real = SlotTable.install

    def install(self: Any, view: Any, incarnation: int) -> Any:
        before = self.roles[: view.slots_total].copy()
        gone = real(self, view, incarnation)
        self.roles[: view.slots_total] = np.maximum(self.roles[: view.slots_total], np.minimum(before, 1))
        return gone

    patch(SlotTable, "install", install)


# -- moves of servers, and tables


@plant
def changes_missed_behind_a_copy(patch: Patch) -> None:
    """A learner is streamed to only once its copy is confirmed, and takes a block wherever it stands.

    Alone the first is harmless: the next block's base tells, and the fork brings what was missed.
    """
    taken, pump = Primary.taken, Primary.pump

    def confirmed(self: Any, link: Any, flight: Any, verdicts: Any, view: Any) -> None:
        if flight.bulk and flight.complete:
            columns = self.members.column_of(flight.slots, link.index)
            known = columns >= 0
            slots, columns = flight.slots[known], columns[known]
            late = self.members.modes[slots, columns] == COPY
            self.members.modes[slots[late], columns[late]] = STREAM
        taken(self, link, flight, verdicts, view)

    def pumped(self: Any, link: Any) -> None:
        slots, columns = self.members.where(link.index)
        copying = self.members.modes[slots, columns] == COPY
        pump(self, link)
        slots, columns = slots[copying], columns[copying]
        begun = self.members.modes[slots, columns] == STREAM
        self.members.modes[slots[begun], columns[begun]] = COPY

    patch(Primary, "taken", confirmed)
    patch(Primary, "pump", pumped)
    base_not_compared(patch)


@plant
def rested_copy_taken_for_level(patch: Patch) -> None:
    """What changed while a copy rested is not asked for: it is believed to be where its primary is."""
    wake = Primary.wake

    def woken(self: Any, link: Any) -> None:
        if not link.round and self.copies.gathered(link, self.by_index):
            slots, columns = self.members.where(link.index)
            rested = self.members.modes[slots, columns] == COPIED
            slots, columns = slots[rested], columns[rested]
            self.members.acked[slots, columns] = self.store.held.slots.positions[slots]
        wake(self, link)

    patch(Primary, "wake", woken)


@plant
def copies_rest_for_ever(patch: Patch) -> None:
    """Slots that were copied while servers join or leave are not brought up to date."""
    patch(Primary, "wake", lambda self, link: None)


@plant
def copy_over_old_rows(patch: Patch) -> None:
    """A whole copy is written over what a former owner still has, which is not emptied first."""
    patch(ps.store.absorption, "_reset", lambda held, slots: held.clients.clear(slots))


@plant
def copied_slot_tells_older_deletions(patch: Patch) -> None:
    """Whoever was given a slot whole believes that it knows of deletions from before."""
    real = ps.store.absorption._close

    def close(held: Any, *arguments: Any) -> None:
        before = held.slots.horizon.copy()
        real(held, *arguments)
        held.slots.horizon[:] = before

    patch(ps.store.absorption, "_close", close)


@plant
def former_primary_takes_pushes(patch: Patch) -> None:
    """Who was primary goes on taking pushes while it keeps its copy, and answers them at once."""
    real = SlotTable.install

    def install(self: Any, view: Any, incarnation: int) -> Any:
        before = self.roles[: view.slots_total].copy()
        gone = real(self, view, incarnation)
        kept = (before == 2) & (self.positions[: view.slots_total] > 0)
        kept[gone] = False
        self.roles[: view.slots_total][kept] = 2
        return gone

    patch(SlotTable, "install", install)


@plant
def learners_of_an_aborted_move_kept(patch: Patch) -> None:
    """Learners that nobody wants any more are not let go."""
    real = ps.failover.machine.course
    nothing = np.empty(0, np.int64)
    patch(ps.failover.machine, "course", lambda *arguments: replace(real(*arguments), stray=nothing))


@plant
def leaver_gone_before_its_slots_are(patch: Patch) -> None:
    """A server leaves the view, and its process ends, with the slots that it has."""
    patch(Failover, "_over", lambda self, ahead: self.view.move is not None)
    real = hashring.planner._end

    def end(view: Any) -> Any:
        if view.move is None or view.move.kind == "join":
            return real(view)
        after = hashring.planner._without(view, view.move.names)
        groups = tuple(
            replace(g, owners=np.take_along_axis(g.owners, np.argsort(g.owners < 0, axis=1, kind="stable"), axis=1))
            for g in after.groups
        )
        return replace(after, groups=groups, move=None)

    patch(hashring.planner, "_end", end)


@plant
def table_number_used_again(patch: Patch) -> None:
    """A new table gets the number of one that was dropped."""
    real = hashring.planner.create

    def create(view: Any, change: Any) -> Any:
        lowest = min(set(range(1, view.next_table + 1)) - {t.number for t in view.tables})
        after = real(replace(view, next_table=lowest), change)
        return replace(after, next_table=max(view.next_table, after.next_table))

    patch(hashring.planner, "create", create)


@plant
def refused_for_good_by_an_older_view(patch: Patch) -> None:
    """A server that has not heard of a new table refuses a push of it for good."""
    patch(tests.sim.server, "judged_by", lambda mine, asked, error: error)


# -- tables that get other slots


@plant
def windows_not_inherited(patch: Patch) -> None:
    """A table's own slots have not seen what its old ones have."""
    patch(ClientTable, "inherit", lambda self, sources, slots: None)


@plant
def positions_not_inherited(patch: Patch) -> None:
    """A table's own slots begin at nothing, with the rows of the old ones in them."""
    patch(SlotTable, "inherit", lambda self, sources, slots: None)


@plant
def deletions_left_behind(patch: Patch) -> None:
    """Deletions stay in the slots that their table has left."""
    patch(Tombstones, "move", lambda self, table, slots_of: None)


@plant
def old_slots_keep_their_term(patch: Patch) -> None:
    """The slots that a table leaves go on in their term, and a push that waits for them as well is answered once they
    are held. Either rule alone mostly makes up for the other: an acknowledgement of the old term counts for nothing."""
    real = hashring.tables._part

    def part(view: Any, group: Any, some: Any, change: Any) -> Any:
        after = real(view, group, some, change)
        kept = tuple(replace(g, terms=group.terms) if g.number == group.number else g for g in after.groups)
        return replace(after, groups=kept)

    patch(hashring.tables, "_part", part)
    end_waits = Replication._end_waits
    patch(Replication, "_end_waits", lambda self, left: end_waits(self, left[:0]))


# -- refusals and exports


@plant
def queue_checked_after_applying(patch: Patch) -> None:
    """A push that is too much for a queue is refused when it was applied already."""
    real = Primary._stream

    def stream(self: Any, applied: Any) -> None:
        real(self, applied)
        if any(link.bytes > 4000 for link in self.by_index):
            raise Overloaded("the queue is full")

    patch(Primary, "_stream", stream)


@plant
def applied_before_it_is_checked(patch: Patch) -> None:
    """A part of a push is applied before the rest is found to be another primary's."""
    real = Store.apply

    def apply(self: Any, share: Any, admit: Any = None, only: Any = None) -> Any:
        if only is None and share.offsets is None and len(share.features) == 1 and self.view is not None:
            slots = self.slots_of(share)
            mine = slots[self.held.slots.roles[slots] == 2]
            if 0 < len(mine) < len(slots):
                real(self, share, admit, mine)
        return real(self, share, admit, only)

    patch(Store, "apply", apply)


@plant
def exported_from_any_owner_unchecked(patch: Patch) -> None:
    """Backups export, and a watermark off the lineage gets the changes since."""
    patch(tests.sim.subscriber.Subscriber, "choose", lambda self, owners: owners[-1] if owners[-1] >= 0 else owners[0])
    real = ps.slots.SlotTable.on_lineage
    patch(ps.slots.SlotTable, "on_lineage", lambda self, slots, since: real(self, slots, since) | (since > 0))
    holdings, exports = ps.store.holdings.Holdings, tests.sim.server.Server._export
    require = holdings.require

    def export(self: Any, *arguments: Any) -> None:
        holdings.require = lambda self, slots, role: require(self, slots, min(role, 1))  # type: ignore[method-assign]
        try:
            exports(self, *arguments)
        finally:
            holdings.require = require  # type: ignore[method-assign]

    patch(tests.sim.server.Server, "_export", export)


@plant
def exported_before_it_is_safe_unchecked(patch: Patch) -> None:
    """Exports leave before all owners hold them, and a watermark off the lineage gets the changes since."""
    real = ps.slots.SlotTable.on_lineage
    patch(ps.slots.SlotTable, "on_lineage", lambda self, slots, since: real(self, slots, since) | (since > 0))
    patch(Replication, "hold", lambda self, token, slots, positions: self._primary.answer(token, {}))


# -- checkpoints and restores


@plant
def restored_slot_keeps_its_term(patch: Patch) -> None:
    """A restore gives slots an owner in the term that they were lost in: positions are used again."""
    ends, begins = tests.sim.checkpoints.conclude, tests.sim.checkpoints.prepare
    lost: dict[int, Any] = {}

    def prepare(view: Any, *arguments: Any, **more: Any) -> Any:
        made = begins(view, *arguments, **more)
        lost[made.first.epoch] = view.terms()
        return made

    def conclude(view: Any, restore: Any) -> Any:
        after, terms = ends(view, restore), view.terms().copy()
        terms[restore.wanted] = lost[restore.first.epoch][restore.wanted]
        parts = (replace(g, terms=terms[g.first : g.first + g.slots]) for g in after.groups)
        return replace(after, groups=tuple(parts))

    patch(tests.sim.checkpoints, "prepare", prepare)
    patch(tests.sim.checkpoints, "conclude", conclude)


@plant
def restored_at_any_time(patch: Patch) -> None:
    """Blocks of a restore are taken whatever view and term the server is in: also late, by a slot's new owner."""

    def restore(self: Any, fields: Any, arrays: Any) -> Any:
        block = RowBlock.from_arrays(fields["block"], arrays)
        return {}, {"taken": self.store.absorb(block).astype(np.uint8)}

    patch(Backup, "restore", restore)


@plant
def restored_without_windows(patch: Patch) -> None:
    """A restore brings rows, and leaves out what the slots had seen of whom."""
    real = Backup.restore

    def restore(self: Any, fields: Any, arrays: Any) -> Any:
        plain, sent = _without_clients(RowBlock.from_arrays(fields["block"], arrays)).to_arrays()
        return real(self, {**fields, "block": plain}, sent)

    patch(Backup, "restore", restore)


@plant
def checkpoint_cut_through_a_push(patch: Patch) -> None:
    """The windows of an export are those from before the newest push, whose rows it has."""
    real = transfer._block

    def block(*arguments: Any) -> Any:
        made = real(*arguments)
        return replace(made, clients=replace(made.clients, mask=made.clients.mask & ~np.uint64(1)))

    patch(transfer, "_block", block)


@plant
def one_restored_to_many(patch: Patch) -> None:
    """A restored slot gets all its owners at once, of whom one alone was given its rows."""
    real = tests.sim.checkpoints.conclude

    def conclude(view: Any, restore: Any) -> Any:
        after = real(view, restore)
        alive = [i for i, s in enumerate(after.servers) if s.alive]
        groups = []
        for g in after.groups:
            owners = np.full((g.slots, max(2, g.owners.shape[1])), -1, np.int16)
            owners[:, : g.owners.shape[1]] = g.owners
            for at in range(g.slots):
                others = [i for i in alive if i not in owners[at]]
                if g.first + at in restore.wanted and others:
                    owners[at, 1] = others[0]
            groups.append(replace(g, owners=owners))
        return replace(after, groups=tuple(groups))

    patch(tests.sim.checkpoints, "conclude", conclude)


# -- comparing copies


@plant
def digests_of_another_position(patch: Patch) -> None:
    """An owner is asked while it is not streamed to, and compares its copy wherever that stands."""
    real = Backup._digest

    def digest(self: Any, sender: int, fields: Any, arrays: Any) -> Any:
        return real(self, sender, fields, {**arrays, "positions": self.store.watermark(arrays["slots"])})

    patch(Backup, "_digest", digest)
    patch(ps.replication.verify, "STREAM", ASKED)
