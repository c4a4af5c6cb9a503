"""A server's store: the rows of its slots, read by pulls and changed by numbered pushes.

Everything here runs on one thread (the server's data thread), so that each request is atomic on its server and needs
no lock. Nothing here knows of sockets, Ray or other servers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashring.view import SLOTS_MAX, View
from ps.errors import RequestError
from ps.kernels import as_input, index, merge, optimize, pool, update
from ps.kernels import window as win
from ps.memory import physical_memory, reserve
from ps.rowblock import RowBlock, Watermark
from ps.share import TABLE, PullReply, PullShare, PushReply, PushShare
from ps.shared import Latch
from ps.slots import NONE, OWNER, PRIMARY, SlotTable, Tombstones
from ps.store import absorption, fork, stream, transfer
from ps.store.changes import NO_SLOTS, NOTHING_APPLIED, Applied, Changed, Forgotten, Streams
from ps.store.holdings import Holdings
from ps.store.registry import Planned, Registry
from ps.store.regroup import regroup
from ps.window import ClientTable, ClientWindow

_MEMORY_SHARE = 0.7
_NAMED_MAX = 5
_KINDS = ("push", "assign", "delete")


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits of one server.

    memory_max: bytes of rows and their directory; beyond it new rows are refused. 0: 70 % of the memory of this host.
    clients_max: clients that are remembered; a push of one more is refused as Overloaded.
    slots_max: slot numbers, of all groups ever made (address space only). deletions_max: deletions remembered for
    incremental exports; older ones make an export send whole slots. shared: processes of this host may map what a pull
    reads (ps/shared.py).
    """

    memory_max: int = 0
    clients_max: int = 256
    slots_max: int = SLOTS_MAX
    deletions_max: int = 2**18
    shared: bool = False


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Counts since the start, and what is held now. bytes_used counts rows and directory against memory_max."""

    epoch: int
    slots_owned: int
    slots_primary: int
    rows: int
    rows_by_table: dict[str, int]
    bytes_used: int
    memory_max: int
    clients: int
    pulls: int
    ids_pulled: int
    ids_absent: int
    pushes: int
    pushes_seen: int
    rows_new: int


class Store:
    """Rows in memory, by view. `incarnation` is this process's random number, by which a view names it."""

    def __init__(
        self, incarnation: int, limits: StoreLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.incarnation = incarnation
        self.limits = limits or StoreLimits()
        slots_max, memory_max = self.limits.slots_max, self.limits.memory_max or int(physical_memory() * _MEMORY_SHARE)
        self.held = Holdings(
            slots=SlotTable(slots_max, self.limits.shared),
            registry=Registry(slots_max, memory_max, self.limits.shared),
            clients=ClientTable(slots_max, self.limits.clients_max),
            tombstones=Tombstones(self.limits.deletions_max),
            memory_max=memory_max,
            latch=Latch(incarnation, self.limits.shared),
            clock=clock,
        )
        self._marks = np.zeros(slots_max, np.int32)
        self._verdicts = np.zeros(slots_max, np.uint8)
        self._local: NDArray[np.int32] = reserve((slots_max,), np.int32, huge=False)
        self._stamp = 0
        self._counts = dict.fromkeys(("pulls", "ids_pulled", "ids_absent", "pushes", "pushes_seen", "rows_new"), 0)

    @property
    def view(self) -> View | None:
        """The newest view installed, None before the first."""
        return self.held.view

    @property
    def epoch(self) -> int:
        """Epoch of the installed view, 0 before the first."""
        return self.held.epoch

    # -- view

    def install(self, view: View) -> None:
        """Judge by a newer view from now on (an older one is ignored).

        Tables are made, altered and dropped, or brought to other slots; a slot of which this server is newly primary
        opens its term; what the view no longer names here is freed. RequestError for a view of another cluster.
        """
        held = self.held
        if not self._newer(view):
            return
        self.regroup(view)
        with held.latch:
            if held.slots.filling:
                held.free(held.slots.abandoned(view, self.incarnation))
            gone = held.slots.install(view, self.incarnation)
            if len(gone):
                held.free(gone)
            before = dict(held.registry.entries)
            held.registry.install(view)
            if before != held.registry.entries:
                held.latch.renew()
            held.view = view

    def regroup(self, view: View) -> NDArray[np.int64]:
        """The first step of `install`, which takes it where nobody else did: bring tables to the slots that a newer
        view has them in (see `ps.store.regroup`). Returns the slots that they have left, int64[k]."""
        if not self._newer(view):
            return NO_SLOTS
        with self.held.latch:
            left = regroup(self.held, view)
            if len(left):
                self.held.latch.renew()
        return left

    def _newer(self, view: View) -> bool:
        """Whether a view is newer than the present one; RequestError where it is of another cluster."""
        now = self.held.view
        if now is not None and (view.cluster, view.slot_bits) != (now.cluster, now.slot_bits):
            raise RequestError(f"the view is of cluster {view.cluster}; this server is of cluster {now.cluster}")
        return now is None or view.epoch > now.epoch

    # -- pull

    def pull(self, share: PullShare, floats_max: int = 2**62) -> PullReply:
        """Rows or pooled bags. It never writes: an absent id is answered as the share says, and counted.

        RequestError for a malformed share, an unknown table, or rows of more than `floats_max` floats (before anything
        is allocated for them); WrongView where a slot is not owned here.
        """
        work = self.held.registry.plan(share)
        if work.floats > floats_max:
            raise RequestError(
                f"the rows asked for have {4 * work.floats} bytes; one reply has at most {4 * floats_max}: ask in parts"
            )
        out = np.empty(work.floats, np.float32)
        absent = 0
        for number in work.arenas:
            arena = self.held.registry.arenas[number]
            bad, missing = pool.pull(
                work.plan, number, share.offsets is not None, work.offsets, work.weights, work.ids,
                self.held.slots.roles, OWNER, arena.index.directory, arena.index.nodes, arena.index.entries,
                arena.values, arena.initial, arena.defaults, out,
            )  # fmt: skip
            if bad >= 0:
                raise self.held.wrong_view(bad, OWNER)
            absent += missing
        self._counts["pulls"] += 1
        self._counts["ids_pulled"] += len(work.ids)
        self._counts["ids_absent"] += absent
        return PullReply(out, absent)

    def _find(self, work: Planned, role: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Slots and rows of a push's ids, int32[n] each; WrongView unless every slot has the role here."""
        slots, rows = np.empty(len(work.ids), np.int32), np.empty(len(work.ids), np.int32)
        for number in work.arenas:
            found = self.held.registry.arenas[number].index
            bad = index.find(
                work.plan, number, work.ids, self.held.slots.roles, role,
                found.directory, found.nodes, found.entries, slots, rows,
            )  # fmt: skip
            if bad >= 0:
                raise self.held.wrong_view(int(slots[bad]), role)
        return slots, rows

    # -- push

    def push(self, share: PushShare) -> PushReply:
        """Apply a push, assign or delete once: checked whole, then decided slot by slot, numbered, applied.

        Slots that have seen the sequence are skipped. Refused whole: RequestError (malformed, unknown table, NaN or
        infinity, a sequence more than 64 behind), MemoryFull, Overloaded (too many clients), WrongView.
        """
        return self.apply(share).reply

    assign = push
    delete = push

    def apply(
        self,
        share: PushShare,
        admit: Callable[[NDArray[np.int64], NDArray[np.uint8]], None] | None = None,
        only: NDArray[np.int64] | None = None,
    ) -> Applied:
        """`push`, with what it changed.

        admit: called with the touched slots and their verdicts (by slot number) before anything is changed, where
        anything will be; may raise. only: slots int64[k] to be decided here; every other one is left alone (another
        server is primary of it).
        """
        work = self.held.registry.plan(share)
        values = _check_push(share, work)
        slots, rows = self._find(work, PRIMARY if only is None else NONE)
        if not len(work.ids):
            return NOTHING_APPLIED
        touched = self._touched(slots)
        window = self._window(share.client)
        new, old = win.decide(touched, share.sequence, window.last, window.mask, self._verdicts)
        if only is not None:
            touched, new, old = self._narrowed(touched, only)
        if old:
            raise RequestError(
                f"sequence {share.sequence} of client {share.client} is {win.WINDOW} or more behind the newest"
            )
        if not new:
            self._counts["pushes_seen"] += 1
            return Applied(PushReply(0, len(touched), 0), touched, NO_SLOTS, NO_SLOTS, [], [])
        if admit is not None:
            admit(touched, self._verdicts)
        changes = [self._change(a, work, slots, rows) for a in work.arenas]
        if share.kind != "delete":
            self._check_memory(changes)
        changed = touched if new == len(touched) else touched[self._verdicts[touched] == win.NEW]
        before = self.held.slots.positions[changed]
        win.number(touched, share.sequence, self._verdicts, window.last, window.mask, self.held.slots.positions)
        with self.held.latch:
            made = sum(self._apply(change, share, work, values) for change in changes)
        self._counts["pushes"] += 1
        self._counts["pushes_seen"] += new < len(touched)
        self._counts["rows_new"] += made
        reply = PushReply(new, len(touched) - new, made)
        rows_kept, gone = (changes, []) if share.kind != "delete" else ([], changes)
        return Applied(reply, touched, changed, before, rows_kept, gone, share.client)

    def _window(self, client: int) -> ClientWindow:
        """The client's windows; idle clients make room where there is none (Overloaded where none is idle)."""
        if not self.held.clients.has_room(client):
            self.forget(self.held.clients.idle())
        return self.held.clients.of(client)

    def _narrowed(self, touched: NDArray[np.int64], only: NDArray[np.int64]) -> tuple[NDArray[np.int64], int, int]:
        """The touched slots to be decided here, how many are new and too old; the others' verdict becomes: seen."""
        mine = np.isin(touched, only)
        self._verdicts[touched[~mine]] = win.SEEN
        touched = touched[mine]
        self.held.require(touched, PRIMARY)
        verdicts = self._verdicts[touched]
        return touched, int(np.count_nonzero(verdicts == win.NEW)), int(np.count_nonzero(verdicts == win.TOO_OLD))

    def slots_of(self, share: PushShare) -> NDArray[np.int64]:
        """The distinct slots that a share touches, wherever they are owned."""
        slots, _ = self._find(self.held.registry.plan(share), NONE)
        return self._touched(slots)

    def _touched(self, slots: NDArray[np.int32]) -> NDArray[np.int64]:
        self._stamp += 1
        if self._stamp == 2**31 - 1:
            self._marks[:] = 0
            self._stamp = 1
        out = np.empty(len(slots), np.int64)
        return out[: win.touch(slots, self._stamp, self._marks, out)]

    def _change(self, number: int, work: Planned, slots: NDArray[np.int32], rows: NDArray[np.int32]) -> Changed:
        """What a push changes in one arena: its distinct ids, in slots that have not seen it."""
        plan = work.of(number)
        n = int((plan[:, index.P_IDS_END] - plan[:, index.P_IDS]).sum())
        scratch = np.zeros(1 << max(1, (2 * n - 1).bit_length()), np.int32)
        inverse = np.empty(len(work.ids), np.int32)
        first, codes = np.empty(n, np.int32), np.empty(n, np.int32)
        u = update.dedupe(plan, work.ids, slots, self._verdicts, scratch, inverse, first, codes)
        first = first[:u]
        return Changed(
            self.held.registry.arenas[number], plan, inverse, codes[:u], work.ids[first], slots[first], rows[first],
            np.empty(u, np.int64),
        )  # fmt: skip

    def _check_memory(self, changes: list[Changed]) -> None:
        new = [int(np.count_nonzero(c.rows < 0)) for c in changes]
        self.held.check_memory(sum(new), sum(c.arena.bytes_needed(n) for c, n in zip(changes, new, strict=True)))

    def _apply(self, change: Changed, share: PushShare, work: Planned, values: NDArray[np.float32]) -> int:
        """Write one arena's part of a push; returns how many rows were made."""
        arena, now = change.arena, int(self.held.clock())
        positions = self.held.slots.positions
        if share.kind == "delete":
            gone = arena.erase(change.slots, change.codes, change.ids)
            where = change.slots[gone].astype(np.int64)
            tables = arena.numbers[change.codes[gone]]
            self.held.tombstones.add(where, tables, change.ids[gone], positions[where], self.held.slots.horizon)
            self.held.deleted += len(where)
            return 0
        absent = np.flatnonzero(change.rows < 0)
        if share.kind == "assign":
            arena.insert(change.slots, change.codes, change.ids, change.rows)
            arena.meta[change.rows[absent]] = 0
            update.overwrite(change.plan, change.inverse, change.rows, values, arena.values)
            arena.begin_state(change.rows, change.codes)
        else:
            arena.create(change.slots, change.codes, change.ids, change.rows)
            sums = _summed(change, work, values)
            arena.rule.step(change.rows, change.codes, sums, arena.settings, share.lr_scale, arena.values, arena.state)
        arena.stamp(change.rows, change.slots, positions, now, int(share.kind == "push"))
        np.take(positions, change.slots, out=change.versions)
        return len(absent)

    # -- slots

    def export(
        self, slots: NDArray[np.int64], since: Watermark | None = None, rows_max: int = 65_536
    ) -> Iterator[RowBlock]:
        """Blocks with all that slots hold, or (since) all that changed after a watermark (see transfer.export)."""
        return transfer.export(self.held, np.asarray(slots, np.int64), since, rows_max)

    def absorb(
        self, block: RowBlock, replace_clients: bool = False, allowed: NDArray[np.bool_] | None = None
    ) -> NDArray[np.bool_]:
        """Take a block, each slot whole or not at all: which were taken, bool[s]; see `ps.store.absorb`."""
        with self.held.latch:
            return absorption.absorb(self.held, block, replace_clients, allowed)

    # -- replication

    def cut(self, pushes: Sequence[Applied], members: Streams, peer: int) -> RowBlock | None:
        """What the last pushes changed, for one peer that it is streamed to: see `ps.store.stream.cut`."""
        return stream.cut(self.held, pushes, members, peer, self._local)

    def opening(self, slots: NDArray[np.int64], base: NDArray[np.int64]) -> RowBlock:
        """The empty block that opens the slots' terms: from where they stood to where they stand, with the lineage."""
        return stream.opening(self.held, slots, base)

    def copy(self, slots: NDArray[np.int64], number: int, rows_max: int) -> Iterator[RowBlock]:
        """Blocks with all that slots hold, as copy `number` (see transfer.export)."""
        return transfer.export(self.held, slots, None, rows_max, number)

    def forks(
        self,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        lineage: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> fork.Forks:
        """How the copies here and those of another server part: see `ps.store.fork.find`."""
        return fork.find(self.held, slots, positions, lineage, offsets)

    def repair(
        self, slots: NDArray[np.int64], base: NDArray[np.int64], forks: NDArray[np.int64], undone: fork.Undone
    ) -> RowBlock:
        """What brings copies at `base`, which part at `forks`, to where the slots stand: see `ps.store.fork.repair`."""
        return fork.repair(self.held, slots, base, forks, undone)

    def forget(self, clients: list[int]) -> Forgotten:
        """Forget clients in the slots of which this server is primary, as a change of each: see `ps.store.stream`."""
        return stream.forget(self.held, clients)

    def drop(self, slots: NDArray[np.int64]) -> None:
        """Free copies of slots that the view does not name here; RequestError for one that it does."""
        slots = np.asarray(slots, np.int64)
        named = slots[self.held.slots.named[slots] > 0]
        if len(named):
            raise RequestError(f"slot {named[0]} is owned here in epoch {self.epoch}; only a view takes it away")
        with self.held.latch:
            self.held.free(slots)

    def digest(self, slots: NDArray[np.int64], low: int = 0, last: int = 2**64 - 1) -> NDArray[np.uint64]:
        """A hash of each slot's rows (tables, ids, values, state), uint64[k]: equal contents, equal digest.

        Only rows whose tokens lie in [low, last] count.
        """
        slots = np.asarray(slots, np.int64)
        out = np.zeros(len(slots), np.uint64)
        starts, bits = self.held.slots.bounds(slots)
        for arena in self.held.registry.arenas:
            arena.digest(arena.collect(slots, starts, bits, low=low, last=last), out)
        return out

    def watermark(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each slot stands, int64[k]; 0 where nothing ever was."""
        return self.held.slots.positions[np.asarray(slots, np.int64)]

    def range(
        self,
        table: int,
        start: int = 0,
        stop: int | None = None,
        rows_max: int = 65_536,
        slots: NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Every row of a table whose token is in [start, stop) (None: the ring's end).

        slots: of these alone. Yields (ids int64[k], rows float32[k, dim]), k mostly up to rows_max; each part's tokens
        are beyond those of the part before, and in no order within it. Pushes may come in
        between: a row that is there throughout comes exactly once. WrongView where a slot of them is not owned here.
        """
        return transfer.token_range(self.held, table, start, stop, rows_max, slots)

    def compact(self, work_max: int = 4096) -> bool:
        """One bounded step of giving freed memory back; True while there is more to do. Call when idle."""
        end = self.view.slots_total if self.view else 0
        with self.held.latch:
            more = [arena.compact(end, work_max) for arena in self.held.registry.arenas]
        return any(more)

    def statistics(self) -> StoreStatistics:
        """A frozen record of counts and sizes."""
        entries, arenas = self.held.registry.entries.values(), self.held.registry.arenas
        return StoreStatistics(
            epoch=self.epoch,
            slots_owned=int(np.count_nonzero(self.held.slots.named[: self._slots_end()])),
            slots_primary=int(np.count_nonzero(self.held.slots.named[: self._slots_end()] == PRIMARY)),
            rows=sum(a.rows_live for a in arenas),
            rows_by_table={e.spec.name: arenas[e.arena].rows_of(e.code) for e in entries},
            bytes_used=self.held.bytes_used(),
            memory_max=self.held.memory_max,
            clients=len(self.held.clients),
            **self._counts,
        )

    def _slots_end(self) -> int:
        return self.view.slots_total if self.view else 0


def _summed(change: Changed, work: Planned, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The gradient of each distinct id, float32[u, dim], which the optimizer may change in place."""
    u, dim = len(change.ids), change.arena.key.dim
    modified = change.arena.settings[change.plan[:, index.P_CODE], optimize.DECAY : optimize.CLIP + 1].any()
    if u == len(work.ids) and len(values) == u * dim and not len(work.offsets) and not modified:
        return values.reshape(u, dim)  # every id once, as clients send them: no sum and no copy
    sums = np.zeros((u, dim), np.float32)
    update.sum_gradients(change.plan, work.offsets, work.weights, change.inverse, values, sums)
    return sums


def _check_push(share: PushShare, work: Planned) -> NDArray[np.float32]:
    """The share's rows, checked: shape by the tables, every float finite, identity in range."""
    if share.kind not in _KINDS:
        raise RequestError(f"kind is {share.kind!r}; it must be one of {', '.join(_KINDS)}")
    if not 0 <= share.client < 2**64 or not 1 <= share.sequence < 2**62:
        raise RequestError(
            f"client {share.client} or sequence {share.sequence} is out of range; a sequence begins with 1"
        )
    if share.kind != "push" and share.offsets is not None:
        raise RequestError(f"{share.kind} takes ids one by one, without offsets")
    if not (0 <= share.lr_scale < 1e30):
        raise RequestError(f"lr_scale is {share.lr_scale}; it must be a number from 0 to 1e30")
    rows = as_input(share.rows, np.float32).reshape(-1)
    needed = 0 if share.kind == "delete" else work.floats
    if len(rows) != needed:
        raise RequestError(f"rows has {len(rows)} floats; the tables of this {share.kind} need {needed}")
    if merge.first_not_finite(rows) >= 0:
        _refuse_not_finite(share, work, rows)
    return rows


def _refuse_not_finite(share: PushShare, work: Planned, rows: NDArray[np.float32]) -> None:
    """Name the rows that hold a NaN or an infinity (only met once a push is known to be bad)."""
    at = np.flatnonzero(~np.isfinite(rows))
    feature = int(np.searchsorted(work.plan[:, index.P_OUT], at[0], side="right")) - 1
    start, end = work.plan[feature, index.P_BAGS], work.plan[feature, index.P_BAGS_END]
    ends = np.append(work.plan[1:, index.P_OUT], len(rows))
    dim = (ends[feature] - work.plan[feature, index.P_OUT]) // max(end - start, 1)
    inside = at[at < ends[feature]] - work.plan[feature, index.P_OUT]
    named = np.unique(inside // max(dim, 1))
    more = f" and {len(named) - _NAMED_MAX} more" if len(named) > _NAMED_MAX else ""
    raise RequestError(
        f"rows {', '.join(map(str, named[:_NAMED_MAX]))}{more} of feature {feature} (table number "
        f"{share.features[feature, TABLE]}) hold a NaN or an infinity ({rows[at[0]]}); "
        f"the whole {share.kind} is refused"
    )
