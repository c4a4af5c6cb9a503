"""The tables of a server as arrays, so that a request for many tables is planned without a loop over them."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import token_seed
from hashring.view import Table, View
from ps.arena import Arena, ArenaKey
from ps.errors import RequestError
from ps.kernels import as_input
from ps.kernels import index as ix
from ps.ragged import check_offsets
from ps.share import MAX, PullShare, PushShare
from ps.spec import ABSENT_CODES, TableSpec

# Columns of the registry's array, one line a table, sorted by number.
NUMBER, ARENA, CODE, SEED, BITS, FIRST, DIM = range(7)


@dataclass(frozen=True, slots=True)
class TableEntry:
    """A table as this server holds it: its number, specification, arena (and number of it) and code there."""

    number: int
    spec: TableSpec
    arena: int
    code: int
    seed: int
    first: int
    slots: int
    bits: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A share ready for kernels: plan int64[F, PLAN_COLUMNS], arenas int64[F], floats of all rows, checked inputs."""

    plan: NDArray[np.int64]
    arenas: NDArray[np.int64]
    floats: int
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32]

    def of(self, arena: int) -> NDArray[np.int64]:
        """The lines of the features that live in one arena."""
        return self.plan if (self.arenas == arena).all() else np.ascontiguousarray(self.plan[self.arenas == arena])


class Registry:
    """Tables by number, and the arenas that hold their rows."""

    def __init__(self, slots_max: int, memory_max: int) -> None:
        self._slots_max, self._memory_max = slots_max, memory_max
        self.arenas: list[Arena] = []
        self._by_key: dict[ArenaKey, int] = {}
        self.entries: dict[int, TableEntry] = {}
        self._columns = np.empty((0, 7), np.int64)

    def arena(self, key: ArenaKey) -> int:
        """The number of the arena for such rows, made where there is none yet."""
        if key not in self._by_key:
            self._by_key[key] = len(self.arenas)
            self.arenas.append(Arena(key, self._slots_max, self._memory_max))
        return self._by_key[key]

    def find_arena(self, dim: int, optimizer: str) -> Arena | None:
        """The arena for such rows, or None."""
        number = self._by_key.get(ArenaKey(dim, optimizer))
        return None if number is None else self.arenas[number]

    def install(self, view: View) -> None:
        """Make, alter and drop tables as the view says. Rows of dropped tables are freed."""
        groups = {g.number: g for g in view.groups}
        wanted = {t.number: t for t in view.tables}
        for number in sorted(self.entries.keys() - wanted.keys()):
            self._remove(self.entries.pop(number))
        for _, table in sorted(wanted.items()):
            group = groups[table.group]
            bits = view.slot_bits if group.placement == "sharded" else 0
            self._take(table, group.first, len(group.terms), bits)
        lines = [
            (e.number, e.arena, e.code, int(np.uint64(e.seed).astype(np.int64)), e.bits, e.first, e.spec.dim)
            for _, e in sorted(self.entries.items())
        ]
        self._columns = np.array(lines, np.int64).reshape(-1, 7)

    def _take(self, table: Table, first: int, count: int, bits: int) -> None:
        spec = TableSpec.from_plain(table.spec)
        known = self.entries.get(table.number)
        if known is None:
            arena, seed = self.arena(ArenaKey(spec.dim, spec.optimizer.kind)), token_seed(spec.seed)
            code = self.arenas[arena].add_table(table.number, spec, seed, bits, first)
            self.entries[table.number] = TableEntry(table.number, spec, arena, code, seed, first, count, bits)
        elif known.spec != spec:
            old = known.spec
            if (old.dim, old.optimizer.kind, old.seed) != (spec.dim, spec.optimizer.kind, spec.seed):
                raise RequestError(
                    f"table {spec.name!r} keeps its dim, seed and kind of optimizer; only settings can be altered"
                )
            self.arenas[known.arena].set_spec(known.code, spec)
            self.entries[table.number] = replace(known, spec=spec)

    def _remove(self, entry: TableEntry) -> None:
        numbers = np.arange(entry.first, entry.first + entry.slots)
        starts = np.zeros(len(numbers), np.uint64)
        if entry.bits:
            starts = np.arange(entry.slots).astype(np.uint64) << np.uint64(64 - entry.bits)
        self.arenas[entry.arena].remove_table(entry.code, numbers, starts, np.full(len(numbers), entry.bits, np.int64))

    def entry(self, number: int) -> TableEntry:
        """A table by number; RequestError where the view has none."""
        entry = self.entries.get(number)
        if entry is None:
            raise RequestError(f"table number {number} is unknown; the view has {len(self.entries)} tables")
        return entry

    def codes(self, tables: NDArray[np.int32], arena: Arena) -> NDArray[np.int32]:
        """The arena's codes of table numbers int32[n]; RequestError where one is unknown or lives elsewhere."""
        at = self._lookup(tables)
        if (self._columns[at, ARENA] != self.arenas.index(arena)).any():
            raise RequestError("a row block holds rows of a table of another width or optimizer")
        return self._columns[at, CODE].astype(np.int32)

    def _lookup(self, tables: NDArray[np.int32]) -> NDArray[np.int64]:
        known = self._columns[:, NUMBER]
        at = np.searchsorted(known, tables)
        bad = at == len(known)
        bad[~bad] = known[at[~bad]] != tables[~bad]
        if bad.any():
            number = int(tables[np.flatnonzero(bad)[0]])
            raise RequestError(f"table number {number} is unknown; the view has {len(known)} tables")
        return at

    def plan(self, share: PullShare | PushShare) -> Planned:
        """Check a share whole (RequestError in one sentence) and lay it out for the kernels."""
        features = len(share.tables)
        bags = np.asarray(share.bags, np.int64)
        ids = as_input(share.ids, np.int64)
        if bags.shape != (features,) or (bags < 0).any() or ids.ndim != 1:
            raise RequestError(
                f"a share of {features} features has bags {bags.tolist()[:8]}; it must count those of each"
            )
        at = self._lookup(np.asarray(share.tables))
        ends = np.cumsum(bags)
        total = int(ends[-1]) if features else 0
        offsets, weights = np.empty(0, np.int64), np.empty(0, np.float32)
        if share.offsets is not None:
            offsets = as_input(share.offsets, np.int64)
            if len(offsets) != total + 1:
                raise RequestError(f"offsets has {len(offsets)} entries; {total} bags need {total + 1}")
            check_offsets(offsets, len(ids))
        elif total != len(ids):
            raise RequestError(f"a share without offsets has {len(ids)} ids; its features count {total}")
        if share.weights is not None:
            weights = as_input(share.weights, np.float32)
            if share.offsets is None or weights.shape != ids.shape or not np.isfinite(weights).all():
                raise RequestError("weights must be finite, one for each id, and need offsets")
        columns = self._columns[at]
        floats = bags * columns[:, DIM]
        plan = np.empty((features, ix.PLAN_COLUMNS), np.int64)
        plan[:, [ix.P_CODE, ix.P_SEED, ix.P_BITS, ix.P_FIRST]] = columns[:, [CODE, SEED, BITS, FIRST]]
        plan[:, ix.P_BAGS], plan[:, ix.P_BAGS_END] = ends - bags, ends
        plan[:, ix.P_IDS] = offsets[ends - bags] if len(offsets) else ends - bags
        plan[:, ix.P_IDS_END] = offsets[ends] if len(offsets) else ends
        plan[:, ix.P_OUT] = np.cumsum(floats) - floats
        plan[:, ix.P_MODE] = plan[:, ix.P_ABSENT] = 0
        if isinstance(share, PullShare):
            _reading(share, plan)
        return Planned(plan, columns[:, ARENA], int(floats.sum()), ids, offsets, weights)


def _reading(share: PullShare, plan: NDArray[np.int64]) -> None:
    features = len(plan)
    if np.shape(share.modes) != (features,) or np.shape(share.absent) != (features,):
        raise RequestError(f"a pull of {features} features must give a mode and an absent code for each")
    plan[:, ix.P_MODE], plan[:, ix.P_ABSENT] = share.modes, share.absent
    if (plan[:, ix.P_MODE] > MAX).any() or (plan[:, ix.P_ABSENT] > max(ABSENT_CODES.values())).any():
        raise RequestError("a pull's modes must be 0 (sum) or 1 (max), and its absent codes 0 to 2")
    if share.weights is not None and (plan[:, ix.P_MODE] == MAX).any():
        raise RequestError("weights go with sums; a maximum takes none")
