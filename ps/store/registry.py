"""The tables of a server as arrays, so that a request for many tables is planned without a loop over them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import token_seed
from hashring.view import Group, Table, View
from ps.arena import Arena, ArenaKey
from ps.errors import RequestError
from ps.kernels import as_input
from ps.kernels import index as ix
from ps.kernels.plan import (
    BAD_BAGS,
    BAD_OFFSETS,
    BAD_TABLE,
    BAD_TOTAL,
    GOOD,
    TABLE_COLUMNS,
    codes_of,
    lay_out,
)
from ps.ragged import check_offsets
from ps.share import ABSENT, BAGS, FEATURE_COLUMNS, MAX, MODE, TABLE, PullShare, PushShare
from ps.spec import TableSpec

NO_OFFSETS = np.empty(0, np.int64)
NO_WEIGHTS = np.empty(0, np.float32)


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
    plain: Mapping[str, object]


@dataclass(slots=True)
class Planned:
    """A share ready for kernels: plan int64[F, PLAN_COLUMNS], floats of all rows, checked inputs."""

    plan: NDArray[np.int64]
    floats: int
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def arenas(self) -> list[int]:
        """Numbers of the arenas that the features live in, each once."""
        return sorted(set(self.plan[:, ix.P_ARENA].tolist()))

    def of(self, arena: int) -> NDArray[np.int64]:
        """The lines of the features that live in one arena."""
        mine = self.plan[:, ix.P_ARENA] == arena
        return self.plan if mine.all() else np.ascontiguousarray(self.plan[mine])


class Registry:
    """Tables by number, and the arenas that hold their rows."""

    def __init__(self, slots_max: int, memory_max: int, shared: bool = False) -> None:
        self._slots_max, self._memory_max, self._shared = slots_max, memory_max, shared
        self.arenas: list[Arena] = []
        self._by_key: dict[ArenaKey, int] = {}
        self.entries: dict[int, TableEntry] = {}
        self._columns = np.empty((0, TABLE_COLUMNS), np.int64)

    def arena(self, key: ArenaKey) -> int:
        """The number of the arena for such rows, made where there is none yet."""
        if key not in self._by_key:
            self._by_key[key] = len(self.arenas)
            self.arenas.append(Arena(key, self._slots_max, self._memory_max, self._shared))
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
            self._take(table, groups[table.group])
        lines = [
            (e.number, e.arena, e.code, int(np.uint64(e.seed).astype(np.int64)), e.bits, e.first, e.spec.dim)
            for _, e in sorted(self.entries.items())
        ]
        self._columns = np.array(lines, np.int64).reshape(-1, TABLE_COLUMNS)

    def elsewhere(self, view: View) -> list[tuple[TableEntry, Group]]:
        """Tables that the view has in other slots than those they are in here, with their groups."""
        known = ((self.entries.get(t.number), view.group(t.group)) for t in view.tables)
        return [(entry, group) for entry, group in known if entry is not None and entry.first != group.first]

    def relocate(self, entry: TableEntry, group: Group) -> None:
        """A table lies in the slots of another group from now on."""
        bits = group.slots.bit_length() - 1
        self.arenas[entry.arena].relocate(entry.code, group.first, bits)
        self.entries[entry.number] = replace(entry, first=group.first, slots=group.slots, bits=bits)

    def slots_of(self, number: int, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """The slot of each id of a table, int32[n]."""
        entry = self.entries[number]
        return self.arenas[entry.arena].slots_of(np.full(len(ids), entry.code, np.int32), ids)

    def _take(self, table: Table, group: Group) -> None:
        known = self.entries.get(table.number)
        if known is not None and known.plain == table.spec:
            return
        spec = TableSpec.from_plain(table.spec)
        if known is None:
            arena, seed = self.arena(ArenaKey(spec.dim, spec.optimizer.kind)), token_seed(spec.seed)
            bits = group.slots.bit_length() - 1
            code = self.arenas[arena].add_table(table.number, spec, seed, bits, group.first)
            self.entries[table.number] = TableEntry(
                table.number, spec, arena, code, seed, group.first, group.slots, bits, table.spec
            )
        elif known.spec != spec:
            old = known.spec
            if (old.dim, old.optimizer.kind, old.seed) != (spec.dim, spec.optimizer.kind, spec.seed):
                raise RequestError(
                    f"table {spec.name!r} keeps its dim, seed and kind of optimizer; only settings can be altered"
                )
            self.arenas[known.arena].set_spec(known.code, spec)
            self.entries[table.number] = replace(known, spec=spec, plain=table.spec)

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
        codes = np.empty(len(tables), np.int32)
        bad = codes_of(tables, self.arenas.index(arena), self._columns, codes)
        if bad >= 0:
            self.entry(int(tables[bad]))
            raise RequestError("a row block holds rows of a table of another width or optimizer")
        return codes

    def plan(self, share: PullShare | PushShare) -> Planned:
        """Check a share whole (RequestError in one sentence) and lay it out for the kernels."""
        pooled = share.offsets is not None
        features = as_input(share.features, np.int32)
        ids = as_input(share.ids, np.int64)
        offsets = as_input(share.offsets, np.int64) if share.offsets is not None else NO_OFFSETS
        if features.ndim != 2 or features.shape[1] != FEATURE_COLUMNS or ids.ndim != 1 or offsets.ndim != 1:
            raise RequestError(
                f"a share has features int32[F, {FEATURE_COLUMNS}] and flat ids and offsets; this one has shapes "
                f"{features.shape}, {ids.shape} and {offsets.shape}"
            )
        lines = np.empty((len(features), ix.PLAN_COLUMNS), np.int64)
        rule, floats = lay_out(features, len(ids), pooled, offsets, self._columns, lines)
        if rule != GOOD:
            self._refuse(rule, floats, features, ids, offsets)
        weights = NO_WEIGHTS
        if share.weights is not None:
            weights = as_input(share.weights, np.float32)
            _check_weights(weights, ids, pooled, features)
        return Planned(lines, floats, ids, offsets, weights)

    def _refuse(
        self, rule: int, at: int, features: NDArray[np.int32], ids: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> None:
        """Say in one sentence which rule of a share is broken."""
        if rule == BAD_BAGS:
            raise RequestError(f"feature {at} has {features[at, BAGS]} bags; every count must be 0 or more")
        if rule == BAD_TOTAL and len(offsets):
            raise RequestError(f"offsets has {len(offsets)} entries; {at} bags need {at + 1}")
        if rule == BAD_TOTAL:
            raise RequestError(f"the share has {len(ids)} ids; its features count {at}")
        if rule == BAD_OFFSETS:
            check_offsets(offsets, len(ids))
        if rule == BAD_TABLE:
            number = features[at, TABLE]
            raise RequestError(f"table number {number} is unknown; the view has {len(self._columns)} tables")
        raise RequestError(
            f"feature {at} has mode {features[at, MODE]} and absent code {features[at, ABSENT]}; modes are 0 (sum) or "
            "1 (max), absent codes 0 to 2"
        )


def _check_weights(
    weights: NDArray[np.float32], ids: NDArray[np.int64], pooled: bool, features: NDArray[np.int32]
) -> None:
    if not pooled or weights.shape != ids.shape or not np.isfinite(weights).all():
        raise RequestError("weights must be finite, one for each id, and need offsets")
    if (features[:, MODE] == MAX).any():
        raise RequestError("weights go with sums; a maximum takes none")
