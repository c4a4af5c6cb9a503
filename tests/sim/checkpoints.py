"""Checkpoints of a run, the loss of every owner of a slot, and its restore: what an administrator would do by hand.

A checkpoint is the whole export of every slot, one after another while pushes go on. Then now and then all owners of a
slot are killed at once. What was acknowledged there since the checkpoint is lost, as was said it would be; what was
acknowledged before it began is not, and no push is ever applied twice.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hashring.view import View
from ps.checkpoint.save import stale
from ps.controller.restore import Restore, conclude, prepare
from ps.errors import NotApplied, RequestError, WrongView
from ps.rowblock import TERM_SHIFT, RowBlock
from ps.wire import Message
from tests.sim.network import Connection
from tests.sim.process import Process, frame, unframe

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

STEP_S = 0.05
PATIENCE_S = 1.5
"""Seconds after which what was not answered is asked for again, from the beginning."""

LOSSES_MAX = 2

UNHEARD = -1
"""Stands for the slot of a request whose answer nobody waits for."""


@dataclass
class Checkpoint:
    """blocks: of each slot. floor: what had been acknowledged when it was begun, by (table, id)."""

    view: View
    floor: dict[tuple[int, int], np.ndarray]
    blocks: dict[int, RowBlock]

    def manifest(self) -> dict[str, Any]:
        """As a restore is told of it."""
        view = self.view
        return {
            "cluster": view.cluster,
            "term_max": max(int(block.last[0]) >> TERM_SHIFT for block in self.blocks.values()),
            "tables": [[t.number, t.name, t.group, dict(t.spec)] for t in view.tables],
            "groups": [[g.number, g.placement, g.replicas, g.first, g.slots] for g in view.groups],
        }


def places(view: View) -> set[tuple[int, int]]:
    """The tables of a view, and the groups that they are in."""
    return {(table.number, table.group) for table in view.tables}


def only(block: RowBlock, tables: Collection[int]) -> RowBlock:
    """The block of one slot without rows of other tables, which were dropped since."""
    sections = []
    for s in block.sections:
        keep = np.isin(s.tables, list(tables))
        arrays = {name: getattr(s, name)[keep] for name in ("ids", "tables", "values", "state", "meta")}
        if keep.any():
            sections.append(replace(s, offsets=np.array([0, keep.sum()]), **arrays))
    return replace(block, sections=tuple(sections))


class Keeper(Process):
    """Saves, kills, restores."""

    def __init__(self, cluster: "Cluster", calm: bool = False) -> None:
        super().__init__(cluster, "keeper")
        rng = self.world.rng
        self.losses = rng.choice((0, 0, 1, LOSSES_MAX))
        if cluster.faults.aims_at("absorb arrives"):
            self.losses = LOSSES_MAX
        if calm:
            self.losses = 0
        self.saved: Checkpoint | None = None
        self.restored_at: dict[int, float] = {}
        self._saving: Checkpoint | None = None
        self._restore: Restore | None = None
        self._left: set[int] = set()
        self._asked: dict[tuple[Connection, int], int] = {}
        self._numbers = 0
        self._until = 0.0
        if self.losses:
            self.every(STEP_S, self.tick)
            self.world.at(rng.uniform(0.3, 2.0), self.save)

    def save(self) -> None:
        """Begin a checkpoint; the one before holds until this one is whole."""
        view, acked = self.cluster.log.newest, self.cluster.checks.acked
        self._saving = Checkpoint(view, {key: columns.copy() for key, columns in acked.items()}, {})
        self._asked.clear()

    def tick(self) -> None:
        """Go on with what is under way."""
        view = self.cluster.log.newest
        if self.cluster.lost:
            self._bring_back(view)
        elif self._saving is not None and self.cluster.faults.active:
            if places(view) != places(self._saving.view):
                self.saved = None  # of other tables, or of such in other slots
                self.save()
            self._collect(view)

    def _send(self, incarnation: int, op: str, slot: int, fields: dict[str, Any], arrays: dict[str, Any]) -> None:
        try:
            target = self.cluster.reach(self.cluster.name_of(incarnation), incarnation)
        except (WrongView, NotApplied):
            return
        connection = self.cluster.network.connect(self, target)
        self._numbers += 1
        self._asked[(connection, self._numbers)] = slot
        connection.send(self, frame(Message(op, self._numbers, fields, arrays)))

    # -- saving

    def _collect(self, view: View) -> None:
        assert self._saving is not None
        owners = view.owners()
        missing = [s for s in np.flatnonzero(owners[:, 0] >= 0).tolist() if s not in self._saving.blocks]
        if not missing:
            self.saved, self._saving = self._saving, None
            self.world.counts["checkpoints"] += 1
            self.world.at(self.world.rng.uniform(0.2, 3.0), self._lose)
            return
        slot = self.world.rng.choice(missing)
        if slot not in self._asked.values() or self.world.chance(0.1):
            self._send(view.servers[owners[slot, 0]].incarnation, "export", slot, {}, {"slots": np.array([slot])})

    def message(self, connection: Connection, data: bytes) -> None:
        reply = unframe(data)
        slot = self._asked.pop((connection, reply.request), -1)
        if slot < 0 or reply.op != "ok":
            return
        if "taken" in reply.arrays:
            self._left.discard(slot) if reply.arrays["taken"].all() else None
        elif self._saving is not None:
            block = RowBlock.from_arrays(reply.fields["block"], reply.arrays)
            if not stale(block, self._saving.view).any():
                self._saving.blocks[slot] = block

    def disconnected(self, connection: Connection) -> None:
        for key in [key for key in self._asked if key[0] is connection]:
            del self._asked[key]

    # -- losing

    def _lose(self) -> None:
        """Kill all owners of a slot at once."""
        cluster, rng = self.cluster, self.world.rng
        view = cluster.log.newest
        if not cluster.faults.active or self.saved is None or cluster.lost:
            return
        if places(view) != places(self.saved.view):
            return
        owners = view.owners()
        slot = rng.choice(np.flatnonzero(owners[:, 0] >= 0).tolist())
        names = {view.servers[o].incarnation for o in owners[slot].tolist() if o >= 0}
        if len(cluster.running()) <= len(names):
            return
        self.losses -= 1
        self.world.counts["losses"] += 1
        self.world.say(f"LOSS of slot {slot}")
        for server in [s for s in cluster.running() if s.incarnation in names]:
            cluster.crash(server)
        cluster.mourn()
        self._restore, self._until = None, self.world.now + PATIENCE_S

    # -- restoring

    def _bring_back(self, view: View) -> None:
        """One step of a restore; where it does not go on, it is begun again."""
        if self._restore is not None and self._left and self.world.now < self._until:
            slot = self.world.rng.choice(sorted(self._left))
            if slot not in self._asked.values() or self.world.chance(0.1):
                assert self.saved is not None
                fields, arrays = only(self.saved.blocks[slot], self._restore.tables).to_arrays()
                final = self._restore.final
                owner = final.servers[final.owners()[slot, 0]].incarnation
                told = {"block": fields, "term": self._restore.first.epoch}
                self._send(owner, "absorb", slot, told, arrays)
                if self.world.chance(0.3):  # once more, held up on its way: perhaps until the restore is over
                    self.world.at(self.world.between(0.0, 0.6), self._send, owner, "absorb", UNHEARD, told, arrays)
        elif self._restore is not None and not self._left and self.world.now < self._until:
            restore, self._restore, self._until = self._restore, None, self.world.now + PATIENCE_S
            self.cluster.changes.wish(lambda now: conclude(now, restore), "restore concluded")
        elif self.world.now >= self._until and view.lost().any():
            self._until = self.world.now + PATIENCE_S
            self._asked.clear()
            self._restore = None
            self.cluster.changes.wish(self._planned, "restore begun")

    def _planned(self, view: View) -> View | None:
        """At its turn: what goes where, and the view that it begins with."""
        assert self.saved is not None
        try:
            restore = prepare(view, self.saved.manifest(), replace_tables=False, accept_loss=True)
        except RequestError:
            return None  # nothing is lost by this controller's view
        self._restore, self._left = restore, set(restore.wanted) & self.saved.blocks.keys()
        return restore.first

    def concluded(self, slots: set[int]) -> None:
        """A view names owners of slots that were lost."""
        assert self.saved is not None
        for slot in slots:
            self.restored_at[slot] = self.world.now
        self.world.counts["restores"] += 1
        here = self.cluster.checks.slot_of
        floor = {key: columns for key, columns in self.saved.floor.items() if here[key] in self.saved.blocks}
        self.cluster.checks.restored(slots, floor)
        if self._saving is not None:  # of these it may have what was restored, not what was there when it began
            kept = {key: columns for key, columns in self._saving.floor.items() if here[key] not in slots}
            self._saving.floor = kept | {key: c for key, c in floor.items() if here[key] in slots}
        self.cluster.subscriber.forget(slots)
        if self.losses:
            self.world.at(self.world.rng.uniform(0.5, 3.0), self.save)
