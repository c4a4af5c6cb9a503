"""Routing: what a client derives from one view, as arrays that the split kernel takes.

Immutable: a newer view makes a new `Routing`, and a request under way keeps the one it began an attempt with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashring.columns import any_of
from hashring.tokens import token_seed
from hashring.view import View
from ps.errors import RequestError
from ps.share import SUM, features_of
from ps.spec import ABSENT_CODES, TableSpec

SHAPES_MAX = 256
"""Combinations of tables whose arrays are kept; a program asks for a few."""


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table as the client needs it: slots [first, first + 2**bits) belong to its group."""

    number: int
    spec: TableSpec
    first: int
    bits: int


@dataclass(frozen=True, slots=True)
class Features:
    """The tables of a request, one a feature, as arrays[F]; `seeds`, `firsts` and `shifts` as in kernels/split.py.

    lines int32[F, 4]: as in a share, of sums, and of absent ids that answer as their table says.
    zeros: uint8[F], which stands for CHOOSE as a policy and for SUM as a mode. Nobody writes into these arrays.
    covering: servers each of which answers for every slot of these tables. single: no slot of them has a second reader.
    """

    names: tuple[str, ...]
    lines: NDArray[np.int32]
    dims: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    firsts: NDArray[np.int64]
    shifts: NDArray[np.uint64]
    dim_list: tuple[int, ...]
    zeros: NDArray[np.uint8]
    covering: frozenset[int]
    single: bool


class Routing:
    """Tables, readers and primaries of one view.

    readers int16[slots, C]: the living owners of each slot (indexes of view.servers), -1 behind the last.
    first_readers int16[slots, 1]: the first of them, who is the only one where tables have one copy.
    primaries int16[slots, 1]: who takes pushes; -1 where every owner is dead.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.epoch = view.epoch
        self.servers = view.servers
        self.tables: Mapping[str, TableInfo] = {t.name: self._table(t.group, t.number, t.spec) for t in view.tables}
        self.primaries = np.where(view.lost(), np.int16(-1), view.owners()[:, 0]).reshape(-1, 1)
        self.readers = self._readers(frozenset(i for i, s in enumerate(view.servers) if not s.alive))
        self.first_readers = np.ascontiguousarray(self.readers[:, :1])
        self._without: dict[frozenset[int], NDArray[np.int16]] = {}
        self._pushed_to: dict[frozenset[int], NDArray[np.int16]] = {frozenset(): self.primaries}
        self._features: dict[tuple[str, ...], Features] = {}

    def _table(self, group_number: int, number: int, spec: Mapping[str, object]) -> TableInfo:
        group = self.view.group(group_number)
        return TableInfo(number, TableSpec.from_plain(spec), group.first, group.slots.bit_length() - 1)

    def _readers(self, left_out: frozenset[int]) -> NDArray[np.int16]:
        """Owners without some servers; a slot that would have none keeps its living ones."""
        owners = self.view.owners()
        dead = np.array([not s.alive for s in self.servers] + [True])
        if not left_out and not dead[:-1].any():
            # -1 is behind them already. A view's own arrays are read-only, which is another type to a kernel.
            return owners.copy()
        out = np.array([i in left_out for i in range(len(self.servers))] + [True]) | dead
        hidden = out[owners]
        hidden = np.where(hidden.all(axis=1, keepdims=True), dead[owners], hidden)
        order = np.argsort(hidden, axis=1, kind="stable")
        kept = np.take_along_axis(np.where(hidden, np.int16(-1), owners), order, axis=1)
        width = max(1, int((kept >= 0).sum(axis=1).max(initial=0)))
        return np.ascontiguousarray(kept[:, :width])

    def readers_without(self, left_out: frozenset[int]) -> NDArray[np.int16]:
        """`readers`, where servers that lately failed are asked only for slots that nobody else has."""
        if not left_out:
            return self.readers
        if left_out not in self._without:
            self._without[left_out] = self._readers(left_out)
        return self._without[left_out]

    def pushed_to(self, left_out: frozenset[int]) -> NDArray[np.int16]:
        """`primaries`, but where the primary lately failed the next owner that did not: it hands the push on."""
        if left_out not in self._pushed_to:
            next_in_line = self.readers_without(left_out)[:, :1]
            failed = np.isin(self.primaries, list(left_out)) & (next_in_line >= 0)
            self._pushed_to[left_out] = np.where(failed, next_in_line, self.primaries)
        return self._pushed_to[left_out]

    def table(self, name: str) -> TableInfo:
        """The table of this name, or RequestError naming those there are."""
        info = self.tables.get(name)
        if info is None:
            known = ", ".join(sorted(self.tables)[:20]) or "none yet"
            raise RequestError(f"unknown table {name!r}; the tables are: {known}")
        return info

    def features(self, names: tuple[str, ...]) -> Features:
        """The arrays of a request's tables, made once for each combination."""
        known = self._features.get(names)
        if known is None:
            if len(self._features) >= SHAPES_MAX:
                self._features.clear()
            known = self._features[names] = _features(names, [self.table(name) for name in names], self.readers)
        return known


def _features(names: tuple[str, ...], tables: Sequence[TableInfo], readers: NDArray[np.int16]) -> Features:
    slots = np.unique([(t.first, t.first + 2**t.bits) for t in tables], axis=0) if tables else ()
    everywhere = [readers[first:end] for first, end in slots]
    some = set(everywhere[0][0].tolist()) - {-1} if everywhere else set()
    dims = tuple(t.spec.dim for t in tables)
    return Features(
        names,
        features_of([t.number for t in tables], [0] * len(tables), SUM, [ABSENT_CODES[t.spec.absent] for t in tables]),
        np.array(dims, np.int64),
        np.array([token_seed(t.spec.seed) for t in tables], np.uint64),
        np.array([t.first for t in tables], np.int64),
        np.array([64 - t.bits for t in tables], np.uint64),
        dims,
        np.zeros(len(tables), np.uint8),
        frozenset(s for s in some if all(any_of(part == s).all() for part in everywhere)),
        all((part[:, 1:] < 0).all() for part in everywhere),
    )
