"""The invariants, looked at whenever something changes. Numbers I1 to I12 are those of the protocol's review:

    I1 owners of the newest logged view hold every acknowledged push    I2 a position names one content
    I3 epochs, terms, positions only grow; one opener a term            I4 no copy holds a push twice
    I5 owners are equal at rest          I6 a subscriber equals the primary      I7 no incomplete copy is read
    I8 a pull sees what was acknowledged before      I9 who is not in its view answers nothing
    I10 limits hold                      I11 all is decided and level at the end  I12 a refused request changes nothing

A push adds 1 to a column of its own in every row that it names: a lost one is a 0 that should be 1, a doubled one a 2.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hashring.view import View
from ps.errors import PerhapsApplied
from ps.kernels.replicate import COPY
from ps.replication import Refuse
from ps.rowblock import TERM_SHIFT
from ps.share import TABLE, PullReply, PullShare
from ps.slots import OWNER
from tests.sim.world import Violation

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.server import Server


class Checks:
    """What is known to be true of a run so far."""

    def __init__(self, cluster: "Cluster") -> None:
        self.cluster, self.world = cluster, cluster.world
        self.contents: dict[tuple[int, int, int], int] = {}
        self.tables = {table.number for table in cluster.log.newest.tables}
        self.openers: dict[tuple[int, int], int] = {}
        self.acked: dict[tuple[int, int], np.ndarray] = {}
        self.tried: dict[tuple[int, int], np.ndarray] = {}
        self.slot_of: dict[tuple[int, int], int] = {}
        self.exported: dict[int, int] = {}

    def fail(self, message: str) -> None:
        raise Violation(message)

    # -- contents

    def content(self, server: "Server", slot: int) -> dict[int, int]:
        """A number of everything that a slot holds of each table that the server knows: rows, versions, times; under 0
        of its windows."""
        held = server.store.held
        one = np.array([slot])
        bounds = held.slots.bounds(one)
        out = {e.number: 0 for e in held.registry.entries.values() if e.first <= slot < e.first + e.slots}
        for arena in held.registry.arenas:
            found = arena.collect(one, *bounds)
            if not len(found.ids):
                continue
            numbers = arena.numbers[found.codes]
            order = np.lexsort((found.ids, numbers))
            rows, numbers, ids = found.rows[order], numbers[order], found.ids[order]
            values, meta, state = arena.values[rows], arena.meta[rows], arena.state[rows]
            if values.max(initial=0) > 1:
                at = np.argwhere(values > 1)[0]
                self.fail(f"I4: slot {slot} of {server.name} holds push {at[1]} twice in id {ids[at[0]]}")
            edges = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
            for a, b in pairwise(edges):
                parts = (array[a:b].tobytes() for array in (ids, meta, values, state))
                out[numbers.item(a)] = hash(tuple(parts))
        windows = sorted(
            (client, last, w.mask.item(slot))
            for client, w in held.clients._windows.items()
            if (last := w.last.item(slot))
        )
        out[0] = hash(tuple(windows))
        return {table: number for table, number in out.items() if not table or table in self.tables}

    def moved(self, server: "Server", slots: np.ndarray) -> None:
        """These slots of a server changed."""
        held = server.store.held
        for slot in slots.tolist():
            if slot in held.slots.filling:
                continue
            position = int(held.slots.positions[slot])
            for table, content in self.content(server, slot).items():
                if self.contents.setdefault((slot, position, table), content) != content:
                    self.fail(
                        f"I2: slot {slot} position {show(position)} names two contents of "
                        f"{f'table {table}' if table else 'its windows'} (seen at {server.name})"
                    )
            self.world.counts["changes"] += 1

    def installed(self, server: "Server", before: View | None, view: View) -> None:
        """A server judges by a newer view."""
        held = server.store.held
        if before is not None and view.epoch <= before.epoch:
            self.fail(f"I3: {server.name} went from epoch {before.epoch} to {view.epoch}")
        named = held.slots.named[: view.slots_total]
        for slot in np.flatnonzero(held.slots.roles[: view.slots_total] >= OWNER).tolist():
            if slot in held.slots.filling:
                self.fail(f"I7: {server.name} reads slot {slot}, which is incomplete")
            if before is None or slot >= before.slots_total or held.slots.positions[slot]:
                continue
            if not any(o >= 0 and before.servers[o].incarnation == server.incarnation for o in before.owners()[slot]):
                self.fail(f"I7: {server.name} became an owner of slot {slot} without ever having a copy")
        opened = np.flatnonzero(named == 2)
        fresh = opened if before is None else opened[self._renewed(before, view)[opened]]
        for slot in fresh.tolist():
            key = (slot, int(view.terms()[slot]))
            if self.openers.setdefault(key, server.incarnation) != server.incarnation:
                self.fail(f"I3: slot {slot} term {key[1]} was opened by two servers")
        self.moved(server, fresh)

    def _renewed(self, before: View, view: View) -> np.ndarray:
        out = np.ones(view.slots_total, bool)
        out[: before.slots_total] = before.terms() != view.terms()[: before.slots_total]
        return out

    def rows_of(self, server: "Server", slot: int) -> dict[tuple[int, int], bytes]:
        """(table, id) -> values of a slot."""
        held, one = server.store.held, np.array([slot])
        out = {}
        for arena in held.registry.arenas:
            found = arena.collect(one, *held.slots.bounds(one))
            for code, id_, row in zip(found.codes.tolist(), found.ids.tolist(), found.rows.tolist(), strict=True):
                out[(int(arena.numbers[code]), id_)] = arena.values[row].tobytes()
        return out

    # -- pushes and pulls

    def begin(self, table: int, ids: list[int], column: int) -> None:
        """A push is about to be sent."""
        for id_ in ids:
            self._columns(self.tried, table, id_)[column] = True

    def lost(self, slots: set[int]) -> None:
        """All owners of slots are dead: nothing is promised of them."""
        for key in [key for key in self.acked if self.slot_of[key] in slots]:
            del self.acked[key]

    def restored(self, slots: set[int], floor: dict[tuple[int, int], np.ndarray]) -> None:
        """Slots are back as a checkpoint has them, which holds at least what was acknowledged before it."""
        for key, columns in floor.items():
            if self.slot_of[key] in slots and key[0] in self.tables:
                self.acked[key] = columns.copy()

    def acknowledge(self, table: int, ids: list[int], column: int, begun: float) -> None:
        """A push was acknowledged: every owner of the newest logged view must hold it.

        Not where the slot was lost, or restored since it was begun: the acknowledgement may be of what is lost.
        """
        if table not in self.tables:
            return
        back = self.cluster.keeper.restored_at
        places = {id_: self.cluster.slot_of(table, id_) for id_ in ids}
        ids = [i for i in ids if places[i] not in self.cluster.lost and begun >= back.get(places[i], 0.0)]
        for id_ in ids:
            self._columns(self.acked, table, id_)[column] = True
        self._owners_hold([(table, id_) for id_ in ids], f"push {column}")

    def _columns(self, what: dict[tuple[int, int], np.ndarray], table: int, id_: int) -> np.ndarray:
        key = (table, id_)
        if key not in what:
            what[key] = np.zeros(self.cluster.columns, bool)
        if key not in self.slot_of:
            self.slot_of[key] = self.cluster.slot_of(table, id_)
        return what[key]

    def logged(self, view: View, before: View) -> None:
        """A view is in the log."""
        if view.epoch != before.epoch + 1:
            self.fail(f"I3: epoch {view.epoch} was logged after {before.epoch}")
        if any((group.owners[:, 0] < 0).any() for group in view.groups):
            self.fail(f"I7: a slot of epoch {view.epoch} has no owner")
        self.tables = {table.number for table in view.tables}
        groups = {table.number: table.group for table in before.tables}
        moved = {t.number for t in view.tables if groups.get(t.number, t.group) != t.group}
        back = self.cluster.keeper.restored_at
        for key in [key for key in self.slot_of if key[0] in moved]:
            old, self.slot_of[key] = self.slot_of[key], self.cluster.slot_of(*key)
            if old in back:
                back[self.slot_of[key]] = back[old]
        for what in (self.acked, self.tried):
            for key in [key for key in what if key[0] not in self.tables]:
                del what[key]
        changed = np.flatnonzero(self._renewed(before, view))
        keys = [key for key in self.acked if self.slot_of[key] in set(changed.tolist())]
        self._owners_hold(keys, f"view {view.epoch}")

    def _owners_hold(self, keys: list[tuple[int, int]], why: str) -> None:
        view = self.cluster.log.newest
        for key in keys:
            slot = self.slot_of[key]
            for owner in view.owners()[slot].tolist():
                server = self.cluster.by_incarnation.get(view.servers[owner].incarnation) if owner >= 0 else None
                if server is None or not server.alive:
                    continue
                row = self.row(server, *key)
                missing = np.flatnonzero(self.acked[key] & (row != 1))
                if len(missing):
                    self.fail(
                        f"I1 ({why}): {server.name}, owner of slot {slot} in epoch {view.epoch}, has "
                        f"{row[missing[0]]:g} times acknowledged push {missing[0]} in id {key[1]}"
                    )

    def row(self, server: "Server", table: int, id_: int) -> np.ndarray:
        """The row of an id at a server, zeros where there is none."""
        registry = server.store.held.registry
        entry = registry.entries.get(table)
        if entry is None:
            return np.zeros(self.cluster.columns, np.float32)
        arena = registry.arenas[entry.arena]
        slot = registry.slots_of(table, np.array([id_]))
        row = int(arena.find(slot, np.array([entry.code], np.int32), np.array([id_]))[0])
        if row < 0:
            return np.zeros(self.cluster.columns, np.float32)
        out: np.ndarray = arena.values[row, : self.cluster.columns]
        return out

    def decided(self, server: "Server", token: object, before: np.ndarray) -> None:
        """I12: a push that is refused as not applied has changed nothing."""
        refused = [a for a in server.machine._primary.out if isinstance(a, Refuse) and a.token == token]
        if refused and not isinstance(refused[0].error, PerhapsApplied):
            after = server.store.held.slots.positions[: len(before)]
            if (after != before).any():
                self.fail(f"I12: {server.name} refused a push ({refused[0].error}) after applying it")

    def pulled(self, server: "Server", share: PullShare, reply: PullReply) -> None:
        """A server answers a pull of single ids of one table."""
        view = server.view
        assert view is not None
        if all(s.incarnation != server.incarnation for s in view.servers):
            self.fail(f"I9: {server.name} answers, and is not in its view")
        mine = next(i for i, s in enumerate(view.servers) if s.incarnation == server.incarnation)
        slots = server.store.held.registry.slots_of(int(share.features[0, TABLE]), share.ids)
        for id_, slot in zip(share.ids.tolist(), slots.tolist(), strict=True):
            if not (view.owners()[slot] == mine).any():
                self.fail(f"I7: {server.name} answers a pull of id {id_}, whose slot it does not own")
        newest = self.cluster.log.newest
        me = next((i for i, s in enumerate(newest.servers) if s.incarnation == server.incarnation), -2)
        rows = reply.rows.reshape(len(share.ids), -1)
        for id_, row in zip(share.ids.tolist(), rows, strict=True):
            key = (int(share.features[0, TABLE]), id_)
            if key in self.acked and (newest.owners()[self.slot_of[key]] == me).any():
                missing = np.flatnonzero(self.acked[key] & (row[: self.cluster.columns] != 1))
                if len(missing):
                    self.fail(f"I8: a pull at {server.name} does not see acknowledged push {missing[0]} of id {id_}")

    def limits(self, server: "Server") -> None:
        """I10, now and then; and that no copy was found to differ from its primary's, which would break I2."""
        machine = server.machine
        if machine.verified[1]:
            self.fail(f"I2: {server.name} finds that a copy differs from its own at the same position")
        for link in machine._primary.links.values():
            if link.bulk_bytes > 2 * machine.limits.bulk_bytes_max + 300_000:
                self.fail(f"I10: {link.bulk_bytes} bytes of copies are on their way from {server.name}")
            if link.bytes > machine.limits.queue_bytes_max + 200_000:
                self.fail(f"I10: {link.bytes} bytes of changes are on their way from {server.name}")
        if len(server.store.held.clients) > server.store.limits.clients_max:
            self.fail(f"I10: {server.name} remembers {len(server.store.held.clients)} clients")

    # -- at rest

    def resting(self) -> str:
        """Empty where all is level and whole, else what is not yet."""
        view = self.cluster.log.newest
        if self.cluster.lost:
            return f"slots {sorted(self.cluster.lost)} are lost"
        if view.move is not None:
            return f"{view.move} is not over"
        for client in self.cluster.clients:
            if client.undecided:
                return f"{client.name} has {client.undecided} pushes undecided"
        owners = view.owners()
        alive = sum(s.alive for s in view.servers)
        for group in view.groups:
            wanted = min(alive, int(group.replicas)) if group.replicas != "all" else alive
            for slot in range(group.first, group.first + group.slots):
                there = [self.cluster.by_incarnation.get(view.servers[o].incarnation) for o in owners[slot] if o >= 0]
                if len(there) < wanted:
                    return f"slot {slot} has {len(there)} owners of {wanted}"
                if any(s is None or not s.alive or s.view is None or s.view.epoch < view.epoch for s in there):
                    return f"an owner of slot {slot} is dead or behind"
                positions = {int(s.store.held.slots.positions[slot]) for s in there if s is not None}
                if len(positions) > 1:
                    return f"owners of slot {slot} stand at {sorted(map(show, positions))}"
                primary = there[0]
                assert primary is not None
                members = primary.machine.members
                if (members.peers[slot, members.owner_columns :] >= 0).any():
                    return f"slot {slot} has a learner"
                if (members.modes[slot] == COPY).any():
                    return f"slot {slot} is being copied"
        return self.cluster.subscriber.behind()

    def end(self) -> None:
        """I4, I5 at rest."""
        view = self.cluster.log.newest
        for slot in range(view.slots_total):
            owners = [self.cluster.by_incarnation[view.servers[o].incarnation] for o in view.owners()[slot] if o >= 0]
            if any(self.content(s, slot) != self.content(owners[0], slot) for s in owners[1:]):
                self.fail(f"I5: owners of slot {slot} differ at rest")
        self._owners_hold(list(self.acked), "at rest")
        self.world.counts["copies compared"] = sum(s.machine.verified[0] for s in self.cluster.by_incarnation.values())
        self.cluster.subscriber.check()
        for key, tried in self.tried.items():
            owner = self.cluster.by_incarnation[view.servers[view.owners()[self.slot_of[key], 0]].incarnation]
            row = self.row(owner, *key)
            if (row[~tried] != 0).any():
                self.fail(f"I4: id {key[1]} holds a push that nobody sent")


def show(position: int) -> str:
    """A position as (term, counter)."""
    return f"({position >> TERM_SHIFT},{position & (2**TERM_SHIFT - 1)})"
