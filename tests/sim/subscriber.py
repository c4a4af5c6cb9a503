"""A delta subscriber: rows that are kept equal to the cluster's by exports since its watermark, slot by slot."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from hashring.view import View
from ps.errors import NotApplied, WrongView
from ps.rowblock import TERM_SHIFT, RowBlock
from ps.wire import Message
from tests.sim.network import Connection
from tests.sim.process import Process, frame, unframe

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

ASK_S = 0.2


def owned_slots(view: View) -> list[int]:
    """Slots that have a group, and so owners."""
    return np.flatnonzero(view.owners()[:, 0] >= 0).tolist()


class Subscriber(Process):
    """Asks whom it takes for a slot's primary, and applies what comes."""

    def __init__(self, cluster: "Cluster") -> None:
        super().__init__(cluster, "subscriber")
        self.positions: defaultdict[int, int] = defaultdict(int)
        self.rows: defaultdict[int, dict[tuple[int, int], bytes]] = defaultdict(dict)
        self.exported: defaultdict[int, set[int]] = defaultdict(set)
        self.asked: dict[tuple[Connection, int], tuple[int, int]] = {}
        self.numbers = 0
        self.targets: Any = None
        self.every(ASK_S, self.ask)

    def ask(self) -> None:
        """Ask for the changes of one slot; by an older view now and then, as somebody who has not heard yet."""
        rng, newest = self.world.rng, self.cluster.log.newest
        views = [self.cluster.log.views.get(newest.epoch - back) for back in range(4)]
        known = [v for v in views if v is not None and v.slots_total == newest.slots_total]
        view = newest if rng.random() < 0.7 else rng.choice(known)
        owned = owned_slots(view)
        changed = [slot for slot in owned if self._moved(slot)]
        slot = rng.choice(changed if changed and rng.random() < 0.9 else owned)
        self.ask_for(slot, view.servers[self.choose(view.owners()[slot].tolist())].incarnation)

    def _moved(self, slot: int) -> bool:
        """Whether some copy of a slot stands elsewhere than what is known here."""
        held = (s.store.held.slots.positions.item(slot) for s in self.cluster.running())
        return any(position != self.positions[slot] for position in held)

    def choose(self, owners: list[int]) -> int:
        """Whom to ask: the primary."""
        return owners[0]

    def ask_for(self, slot: int, incarnation: int) -> None:
        try:
            target = self.cluster.reach(self.cluster.name_of(incarnation), incarnation)
        except (WrongView, NotApplied):
            return
        connection = self.cluster.network.connect(self, target)
        self.numbers += 1
        self.asked[(connection, self.numbers)] = (slot, self.positions[slot])
        arrays = {"slots": np.array([slot])}
        if self.positions[slot]:
            arrays["positions"] = np.array([self.positions[slot]])
        request = Message("export", self.numbers, {"cluster": self.cluster.log.newest.cluster}, arrays)
        connection.send(self, frame(request))

    def message(self, connection: Connection, data: bytes) -> None:
        reply = unframe(data)
        slot, since = self.asked.pop((connection, reply.request), (-1, 0))
        if slot < 0 or reply.op != "ok" or since != self.positions[slot]:
            return
        block = RowBlock.from_arrays(reply.fields["block"], reply.arrays)
        rows = self.rows[slot]
        if block.full[0]:
            rows.clear()
        for s in block.sections:
            for table, id_, values in zip(s.tables.tolist(), s.ids.tolist(), s.values, strict=True):
                rows[(table, id_)] = values.tobytes()
            for table, id_ in zip(s.gone_tables.tolist(), s.gone_ids.tolist(), strict=True):
                rows.pop((table, id_), None)
        self.positions[slot] = int(block.last[0])
        self.exported[slot].add(self.positions[slot])
        self.world.counts["whole exports" if block.full[0] else "deltas"] += 1

    def disconnected(self, connection: Connection) -> None:
        for key in [key for key in self.asked if key[0] is connection]:
            del self.asked[key]

    def forget(self, slots: set[int]) -> None:
        """Slots went back to a checkpoint: what was exported of them since is void, and was said to be."""
        for slot in slots:
            self.exported[slot].clear()

    def behind(self) -> str:
        """Empty where every slot is as its primary has it; asks for the others."""
        view = self.cluster.log.newest
        for slot in owned_slots(view):
            primary = self.cluster.by_incarnation[view.servers[view.owners()[slot, 0]].incarnation]
            if self.positions[slot] != int(primary.store.held.slots.positions[slot]):
                self.ask_for(slot, primary.incarnation)
                return f"the subscriber is behind in slot {slot}"
        return ""

    def _on_lineage(self, held: Any, slot: int) -> None:
        """Every position that was ever exported is one that the slot's history went through."""
        one = np.array([slot])
        line = [*held.slots.lineage(one)[0].tolist(), int(held.slots.positions[slot])]
        lasts = {position >> TERM_SHIFT: position for position in line}
        oldest = min(lasts)
        for position in sorted(self.exported[slot]):
            term = position >> TERM_SHIFT
            if term >= oldest and position > lasts.get(term, -1):
                self.cluster.checks.fail(
                    f"I6: position ({term},{position & 2**40 - 1}) of slot {slot} was exported and is on no lineage"
                )

    def check(self) -> None:
        """I6: what it holds is what the primaries hold, and what it was told was true for good."""
        view = self.cluster.log.newest
        homes = {table.number: view.group(table.group) for table in view.tables}
        for slot in owned_slots(view):
            primary = self.cluster.by_incarnation[view.servers[view.owners()[slot, 0]].incarnation]
            self._on_lineage(primary.store.held, slot)
            here = {number for number, home in homes.items() if home.first <= slot < home.first + home.slots}
            mine = {entry for entry in self.rows[slot].items() if entry[0][0] in here}
            different = sorted({key for key, _ in mine ^ set(self.cluster.checks.rows_of(primary, slot).items())})
            if different:
                self.cluster.checks.fail(f"I6: a subscriber at the same position differs in slot {slot}: {different}")
