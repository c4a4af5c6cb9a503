"""An arena: the rows of all tables of one width and one kind of optimizer.

Matrices that share a row number (values, state, metadata) and a directory (ps/kernels/index.py) that leads from
(table, id) to it. Slots are numbered through all groups, so one kernel call serves every table of the arena.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ps.errors import RequestError
from ps.kernels import index as ix
from ps.kernels import pool, scan, update
from ps.memory import Reservation, reserve
from ps.optimizers import RULES, settings_of
from ps.spec import OPTIMIZERS, TableSpec

TABLES_MAX = 4096
"""Tables of one arena at a time."""

ENTRY_BYTES = 16
META_BYTES = 16
COMPACT_FROM = 0.1
"""A compaction begins when this part of the rows ever used is free."""

_COMPACT_ROWS_MIN = 2**14
_CHUNK_BYTES = ix.CHUNK_ENTRIES * ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class ArenaKey:
    """What the rows of an arena have in common."""

    dim: int
    optimizer: str
    dtype: str = "float32"

    @property
    def state_width(self) -> int:
        """Floats of optimizer state in a row."""
        return OPTIMIZERS[self.optimizer]().state_width(self.dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: values, state, metadata (its directory entry apart)."""
        return 4 * (self.dim + self.state_width) + META_BYTES


@dataclass(frozen=True, slots=True)
class Entries:
    """What some slots hold: ids int64[n], codes int32[n], rows int32[n], tokens uint64[n], offsets int64[s + 1]."""

    ids: NDArray[np.int64]
    codes: NDArray[np.int32]
    rows: NDArray[np.int32]
    tokens: NDArray[np.uint64]
    offsets: NDArray[np.int64]


_NO_ENTRIES = (np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.uint64))


class Arena:
    """Rows of one `ArenaKey`.

    values float32[r, dim], state float32[r, w], meta int64[r, 2] (version; time << 32 | pushes). shared: the memory
    that a pull reads, which other processes may map (ps/shared.py).
    """

    def __init__(self, key: ArenaKey, slots_max: int, memory_max: int, shared: bool = False) -> None:
        self.key = key
        self.rule = RULES[key.optimizer]
        rows_max = min(memory_max // key.row_bytes + 2**16, 2**31 - 1)
        chunks_max = memory_max // _CHUNK_BYTES + 2 * ix.CLASSES
        self._values = Reservation((rows_max, key.dim), np.float32, shared=shared)
        self._state = Reservation((rows_max, key.state_width), np.float32)
        self._meta = Reservation((rows_max, 2), np.int64)
        self._entries = Reservation((chunks_max * ix.CHUNK_ENTRIES, 2), np.int64, shared=shared)
        directory = Reservation((slots_max,), np.int64, huge=False, shared=shared)
        nodes = Reservation((rows_max // 1024 + 1024, 16), np.int64, huge=False, shared=shared)
        self.shared = {"directory": directory, "nodes": nodes, "entries": self._entries, "values": self._values}
        self.values, self.state, self.meta = self._values.array, self._state.array, self._meta.array
        heap = np.zeros(ix.HEAP_FIELDS, np.int64)
        heap[ix.TARGET], heap[ix.PEAK] = 2**62, -1
        self.index = ix.Index(
            directory=directory.array,
            nodes=nodes.array,
            entries=self._entries.array,
            codes=np.zeros((TABLES_MAX, ix.CODE_COLUMNS), np.int64),
            heap=heap,
            free_rows=reserve((rows_max,), np.int32, huge=False),
            free_chunks=np.zeros(chunks_max, np.int32),
            class_count=np.zeros(ix.CLASSES, np.int64),
            class_chunks=reserve((ix.CLASSES, chunks_max), np.int32, huge=False),
        )
        self.settings = np.zeros((TABLES_MAX, 8))
        self.initial = np.zeros((TABLES_MAX, 2))
        self.defaults = np.zeros((TABLES_MAX, key.dim), np.float32)
        self.numbers = np.full(TABLES_MAX, -1, np.int32)
        self._compact_slot = 0

    # -- tables

    def add_table(self, number: int, spec: TableSpec, seed: int, bits: int, first: int) -> int:
        """Give a table a code; seed is its uint64 token seed, bits and first say where its slots are."""
        free = np.flatnonzero(self.numbers < 0)
        if not len(free):
            raise RequestError(
                f"table {spec.name!r} is one too many: {TABLES_MAX} tables may share width and optimizer"
            )
        code = int(free[0])
        self.numbers[code] = number
        self.index.codes[code] = (np.uint64(seed).astype(np.int64), bits, first, 0)
        self.set_spec(code, spec)
        return code

    def set_spec(self, code: int, spec: TableSpec) -> None:
        """Take a table's settings; the next push and pull follow them."""
        low = float(np.float32(spec.initializer.low))
        self.settings[code] = settings_of(spec.optimizer)
        self.initial[code] = (low, float(np.float32(spec.initializer.high)) - low)
        self.defaults[code] = np.asarray(spec.default, np.float32) if spec.default else 0.0

    def remove_table(
        self, code: int, slots: NDArray[np.int64], starts: NDArray[np.uint64], bits: NDArray[np.int64]
    ) -> None:
        """Free the rows that a table has in slots (all of its own), and its code."""
        held = self.collect(slots, starts, bits, code)
        self.erase(np.repeat(slots, np.diff(held.offsets)).astype(np.int32), held.codes, held.ids)
        self.numbers[code] = -1

    def detach(
        self, code: int, slots: NDArray[np.int64], low: int, last: int, kept: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Take the rows of a table with tokens in [low, last] out of consecutive slots: (ids, rows), for `attach`.

        Those of slots that are not `kept` are deleted. All of a table must be detached before any is attached: the
        directory finds the owner of a segment by where an entry in it belongs.
        """
        bits, first = (int(self.index.codes[code, column]) for column in (ix.BITS, ix.FIRST))
        starts = (slots - first).astype(np.uint64) << np.uint64(64 - bits) if bits else np.zeros(1, np.uint64)
        found = self.collect(slots, starts, np.full(len(slots), bits, np.int64), code, low, last)
        counts = np.diff(found.offsets)
        old, stay = np.repeat(slots, counts).astype(np.int32), np.repeat(kept, counts)
        self.erase(old[~stay], found.codes[~stay], found.ids[~stay])
        scan.detach_many(old[stay], found.codes[stay], found.ids[stay], self.index)
        return found.ids[stay], found.rows[stay]

    def attach(self, code: int, ids: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
        """Put rows that were detached into the slots that their table has now; what is in the rows stays as it is."""
        codes = np.full(len(ids), code, np.int32)
        scan.attach_many(self.slots_of(codes, ids), codes, ids, rows, self.index)

    def relocate(self, code: int, first: int, bits: int) -> None:
        """Ids of a table are looked for in other slots from now on."""
        self.index.codes[code, [ix.BITS, ix.FIRST]] = bits, first

    def rows_of(self, code: int) -> int:
        """Rows of one table."""
        return int(self.index.codes[code, ix.ROWS])

    # -- rows

    @property
    def rows_live(self) -> int:
        """Rows in use."""
        return int(self.index.heap[ix.LIVE])

    def bytes_used(self) -> int:
        """Bytes of rows ever used (and not given back), segments and nodes."""
        heap = self.index.heap
        segments = int((self.index.class_count * ix.CAPACITY).sum()) * ENTRY_BYTES
        return int(heap[ix.HIGH]) * self.key.row_bytes + segments + int(heap[ix.NODES]) * 128

    def bytes_needed(self, rows_new: int) -> int:
        """Bytes by which `rows_new` more rows would raise `bytes_used`, roughly from above."""
        fresh = max(0, rows_new - int(self.index.heap[ix.FREE]))
        return fresh * self.key.row_bytes + rows_new * 2 * ENTRY_BYTES

    def insert(
        self, slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64], rows: NDArray[np.int32]
    ) -> None:
        """Make a row for each distinct (code, id) whose rows[i] is -1; fills rows. The caller writes all of them."""
        scan.insert_many(slots, codes, ids, self.index, rows)

    def create(
        self, slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64], rows: NDArray[np.int32]
    ) -> None:
        """Make a row, with initial values and state, for each distinct (code, id) whose rows[i] is -1; fills rows."""
        absent = np.flatnonzero(rows < 0)
        if not len(absent):
            return
        self.insert(slots, codes, ids, rows)
        seeds = np.ascontiguousarray(self.index.codes[:, ix.SEED])
        new, new_codes = rows[absent], codes[absent]
        pool.initial_rows(ids[absent], seeds, new_codes, new, self.initial, self.values)
        self.meta[new] = 0
        self.begin_state(new, new_codes)

    def begin_state(self, rows: NDArray[np.int32], codes: NDArray[np.int32]) -> None:
        """Set the optimizer state of rows as a new row with their present values has it."""
        self.rule.begin(rows, codes, self.settings, self.rule.column, self.values, self.state)

    def erase(self, slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Delete (code, id) pairs; which of them were there, bool[n]."""
        gone = np.zeros(len(ids), np.uint8)
        scan.erase_many(slots, codes, ids, self.index, gone)
        return gone.view(np.bool_)

    def find(self, slots: NDArray[np.int32], codes: NDArray[np.int32], ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Rows of (code, id) pairs whose slots are known, int32[n]; -1 where there is none."""
        rows = np.empty(len(ids), np.int32)
        ix.find_pairs(slots, codes, ids, self.index, rows)
        return rows

    def slots_of(self, codes: NDArray[np.int32], ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """The slot of each (code, id) pair, int32[n]."""
        slots = np.empty(len(ids), np.int32)
        ix.slots_of(codes, ids, self.index.codes, slots)
        return slots

    def codes_of(self, tables: NDArray[np.int32]) -> NDArray[np.int32]:
        """Codes of table numbers int32[n]; -1 where the table is not of this arena."""
        if not len(tables):
            return np.empty(0, np.int32)
        order = np.argsort(self.numbers, kind="stable").astype(np.int32)
        known = self.numbers[order]
        at = np.minimum(np.searchsorted(known, tables), len(known) - 1)
        return np.where(known[at] == tables, order[at], np.int32(-1)).astype(np.int32)

    # -- slots

    def counts(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows that each slot holds here, int64[s]."""
        out = np.zeros(len(slots), np.int64)
        scan.count_rows(slots, self.index, out)
        return out

    def collect(
        self,
        slots: NDArray[np.int64],
        starts: NDArray[np.uint64],
        bits: NDArray[np.int64],
        code: int = -1,
        low: int = 0,
        last: int = 2**64 - 1,
    ) -> Entries:
        """What slots hold, of one table (or all: -1), with tokens in [low, last]."""
        n = int(self.counts(slots).sum())
        if not n:
            return Entries(*_NO_ENTRIES, np.zeros(len(slots) + 1, np.int64))
        found = Entries(
            np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.uint64),
            np.zeros(len(slots) + 1, np.int64),
        )  # fmt: skip
        n = scan.collect(
            slots, starts, bits, code, np.uint64(low), np.uint64(last), self.index,
            found.ids, found.codes, found.rows, found.tokens, found.offsets,
        )  # fmt: skip
        return Entries(found.ids[:n], found.codes[:n], found.rows[:n], found.tokens[:n], found.offsets)

    def drop(self, slots: NDArray[np.int64]) -> None:
        """Free all that slots hold."""
        scan.drop_slots(slots, self.index)

    def digest(self, found: Entries, out: NDArray[np.uint64]) -> None:
        """Add a hash of each slot's rows to out uint64[s], the same in any order."""
        scan.digest(
            found.ids, self.numbers[found.codes], found.rows, found.offsets,
            self.values.view(np.uint32), self.state.view(np.uint32), out,
        )  # fmt: skip

    def stamp(
        self, rows: NDArray[np.int32], slots: NDArray[np.int32], positions: NDArray[np.int64], now: int, pushes: int
    ) -> None:
        """Note that rows changed: version from their slot's position, time now, so many pushes more."""
        update.stamp(rows, slots, positions, now, pushes, self.meta)

    # -- memory

    def compact(self, slots_end: int, work_max: int) -> bool:
        """One bounded step of giving memory back; True while there is more to do.

        Rows at the end move into free ones below; when every slot below `slots_end` was seen, the tail is released.
        Requests may come between steps.
        """
        heap = self.index.heap
        if heap[ix.TARGET] == 2**62 and not self._compact_begin():
            return False
        old, new = np.empty(work_max, np.int32), np.empty(work_max, np.int32)
        self._compact_slot, moves = scan.compact(self._compact_slot, slots_end, work_max, self.index, old, new)
        old, new = old[:moves], new[:moves]
        for matrix in (self.values, self.state, self.meta):
            matrix[new] = matrix[old]
        if self._compact_slot < slots_end:
            return True
        self._compact_end()
        return False

    def _compact_begin(self) -> bool:
        heap, free = self.index.heap, self.index.free_rows
        if heap[ix.FREE] < max(_COMPACT_ROWS_MIN, COMPACT_FROM * heap[ix.HIGH]):
            return False
        heap[ix.TARGET], heap[ix.PEAK], self._compact_slot = heap[ix.LIVE], -1, 0
        held = free[: heap[ix.FREE]]
        held[:] = np.sort(held)[::-1]  # the lowest are taken first
        return True

    def _compact_end(self) -> None:
        heap, key = self.index.heap, self.key
        before, high = int(heap[ix.HIGH]), int(max(heap[ix.TARGET], heap[ix.PEAK] + 1))
        free = self.index.free_rows[: heap[ix.FREE]]
        kept = free[free < high]
        self.index.free_rows[: len(kept)] = kept
        heap[ix.FREE], heap[ix.HIGH], heap[ix.TARGET] = len(kept), high, 2**62
        for memory, width in (
            (self._values, 4 * key.dim),
            (self._state, 4 * key.state_width),
            (self._meta, META_BYTES),
        ):
            memory.release(high * width, before * width)
        for chunk in self.index.free_chunks[: heap[ix.CHUNKS_FREE]]:
            self._entries.release(int(chunk) * _CHUNK_BYTES, (int(chunk) + 1) * _CHUNK_BYTES)
