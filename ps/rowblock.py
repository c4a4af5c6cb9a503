"""RowBlock: the only shape in which rows leave or enter a server, columnar over many slots.

A block lists slots; each is absorbed whole or not at all. Per slot it names the position it starts from (`base`) and
the one it leads to (`last`), the client entries and the lineage; then one section an arena holds rows and deleted ids,
grouped by slot through offsets. Optimizers and widths appear only as the section's key.

Invariants, checked by `RowBlock.check` where a block enters, and trusted inside:
  1. slots are distinct, 0 to 2**31 - 1; every per-slot array has one entry a slot.
  2. every offsets array has one entry more than there are slots, begins with 0, never falls, ends with its length.
  3. last >= base; part >= 0; a slot that is not full has base > 0 or begins the slot's history.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.errors import RequestError
from ps.kernels import as_input, replicate
from ps.ragged import check_offsets, kept
from ps.spec import DIM_MAX, OPTIMIZERS
from ps.window import ClientEntries

TERM_SHIFT = 40
"""A position is term << 40 | counter."""

LINEAGE = 16
"""Terms that a lineage goes back."""


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far changes have been seen: a position of each slot, in one cluster. slots int64[k], positions int64[k]."""

    cluster: int
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]

    def of(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of these slots, 0 where the watermark does not know one."""
        rising = bool((self.slots[1:] > self.slots[:-1]).all())
        order = slice(None) if rising else np.argsort(self.slots, kind="stable")
        known = self.slots[order]
        if not len(known):
            return np.zeros(len(slots), np.int64)
        at = np.minimum(np.searchsorted(known, slots), len(known) - 1)
        return np.where(known[at] == slots, self.positions[order][at], 0)


@dataclass(frozen=True, slots=True)
class Section:
    """Rows of one arena.

    ids int64[n], tables int32[n], offsets int64[s + 1], values float32[n, dim], state float32[n, w],
    meta int64[n, 2] (version; time << 32 | pushes).
    gone_ids int64[g], gone_tables int32[g], gone_versions int64[g], gone_offsets int64[s + 1]: deleted ids.
    """

    dim: int
    optimizer: str
    ids: NDArray[np.int64]
    tables: NDArray[np.int32]
    offsets: NDArray[np.int64]
    values: NDArray[np.float32]
    state: NDArray[np.float32]
    meta: NDArray[np.int64]
    gone_ids: NDArray[np.int64]
    gone_tables: NDArray[np.int32]
    gone_versions: NDArray[np.int64]
    gone_offsets: NDArray[np.int64]

    @classmethod
    def room(cls, dim: int, optimizer: str, state_width: int, offsets: NDArray[np.int64]) -> "Section":
        """A section whose offsets[-1] rows are still to be written, without deletions."""
        n = int(offsets[-1])
        return cls(
            dim=dim,
            optimizer=optimizer,
            ids=np.empty(n, np.int64),
            tables=np.empty(n, np.int32),
            offsets=offsets,
            values=np.empty((n, dim), np.float32),
            state=np.empty((n, state_width), np.float32),
            meta=np.empty((n, 2), np.int64),
            gone_ids=np.empty(0, np.int64),
            gone_tables=np.empty(0, np.int32),
            gone_versions=np.empty(0, np.int64),
            gone_offsets=np.zeros(len(offsets), np.int64),
        )


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows of `s` slots.

    slots, base, last int64[s]. full uint8[s]: the slot's whole content (what was there before is replaced), else the
    changes after base. part int32[s]: 0, or which part of a slot too big for one block; final uint8[s]: its last part,
    with which the slot stands at `last`. copy: number of this copy, so that two overlapping copies never mix.
    lineage int64[l] with lineage_offsets int64[s + 1]: last positions of earlier terms, newest first.
    clients: windows of the slots (of a full slot all, else those to be set).
    """

    cluster: int
    copy: int
    slots: NDArray[np.int64]
    base: NDArray[np.int64]
    last: NDArray[np.int64]
    full: NDArray[np.uint8]
    part: NDArray[np.int32]
    final: NDArray[np.uint8]
    lineage: NDArray[np.int64]
    lineage_offsets: NDArray[np.int64]
    clients: ClientEntries
    sections: tuple[Section, ...]

    @property
    def rows(self) -> int:
        """Rows in the block."""
        return sum(len(section.ids) for section in self.sections)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.to_arrays()[1].values())

    def select(self, keep: NDArray[np.bool_]) -> "RowBlock":
        """The same block with only some of its slots, bool[s]."""
        lineage, lineage_offsets = ragged_select(self.lineage, self.lineage_offsets, keep)
        own = {name: getattr(self, name)[keep] for name in ("slots", "base", "last", "full", "part", "final")}
        return replace(
            self,
            **own,
            lineage=lineage,
            lineage_offsets=lineage_offsets,
            clients=self.clients.select(keep),
            sections=tuple(_select_section(section, keep) for section in self.sections),
        )

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Fields (plain scalars) and named arrays: what a frame or a file carries. Nothing is copied."""
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in _SLOT_ARRAYS}
        arrays |= {f"clients.{f.name}": getattr(self.clients, f.name) for f in fields(ClientEntries)}
        for i, section in enumerate(self.sections):
            arrays |= {f"{i}.{name}": getattr(section, name) for name in _SECTION_ARRAYS}
        plain = {"cluster": self.cluster, "copy": self.copy}
        return {**plain, "sections": [[s.dim, s.optimizer] for s in self.sections]}, arrays

    @classmethod
    def from_arrays(cls, plain: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "RowBlock":
        """The inverse of `to_arrays`, checked; RequestError in one sentence where an invariant is broken."""
        try:
            sections = tuple(
                Section(int(dim), str(kind), **{n: _take(arrays, f"{i}.{n}", t) for n, t in _SECTION_ARRAYS.items()})
                for i, (dim, kind) in enumerate(plain["sections"])
            )
            clients = ClientEntries(**{n: _take(arrays, f"clients.{n}", t) for n, t in _CLIENT_ARRAYS.items()})
            own = {n: _take(arrays, n, t) for n, t in _SLOT_ARRAYS.items()}
            block = cls(int(plain["cluster"]), int(plain["copy"]), clients=clients, sections=sections, **own)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"this is not a row block: {type(error).__name__} {error}") from None
        block.check()
        return block

    def check(self) -> None:
        """Raise RequestError unless the invariants hold."""
        s = len(self.slots)
        for name in ("slots", "base", "last", "full", "part", "final"):
            _shape(name, getattr(self, name), (s,))
        rule = replicate.rule_of(self.slots, self.base, self.last, self.part)
        if rule == replicate.BAD_SLOTS:
            raise RequestError("slots of a row block must be distinct, from 0 to 2**31 - 1")
        if rule == replicate.LEADS_BACK:
            raise RequestError("a row block must not lead back: base >= 0, last >= base and part >= 0")
        _offsets("lineage_offsets", self.lineage_offsets, s, len(self.lineage))
        _offsets("clients.offsets", self.clients.offsets, s, len(self.clients.clients))
        for name in ("last", "mask"):
            _shape(f"clients.{name}", getattr(self.clients, name), self.clients.clients.shape)
        for section in self.sections:
            _check_section(section, s)


_SLOT_ARRAYS: dict[str, type] = {
    "slots": np.int64,
    "base": np.int64,
    "last": np.int64,
    "full": np.uint8,
    "part": np.int32,
    "final": np.uint8,
    "lineage": np.int64,
    "lineage_offsets": np.int64,
}
_CLIENT_ARRAYS: dict[str, type] = {"clients": np.uint64, "last": np.int64, "mask": np.uint64, "offsets": np.int64}
_SECTION_ARRAYS: dict[str, type] = {
    "ids": np.int64,
    "tables": np.int32,
    "offsets": np.int64,
    "values": np.float32,
    "state": np.float32,
    "meta": np.int64,
    "gone_ids": np.int64,
    "gone_tables": np.int32,
    "gone_versions": np.int64,
    "gone_offsets": np.int64,
}


def ragged_select(
    values: NDArray[Any], offsets: NDArray[np.int64], keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The values of the kept lists, and their offsets."""
    at, out = kept(offsets, keep)
    return values.take(at, 0), out


def _select_section(section: Section, keep: NDArray[np.bool_]) -> Section:
    out: dict[str, Any] = {}
    for offsets, names in (
        ("offsets", ("ids", "tables", "values", "state", "meta")),
        ("gone_offsets", ("gone_ids", "gone_tables", "gone_versions")),
    ):
        at, out[offsets] = kept(getattr(section, offsets), keep)
        for name in names:
            out[name] = getattr(section, name).take(at, 0)
    return replace(section, **out)


def _take(arrays: Mapping[str, NDArray[Any]], name: str, dtype: type) -> NDArray[Any]:
    array = arrays[name]
    if array.dtype != np.dtype(dtype):
        raise ValueError(f"{name} has dtype {array.dtype}; it must be {np.dtype(dtype)}")
    return as_input(array, dtype)


def _shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise RequestError(f"{name} of a row block has shape {array.shape}; it must be {shape}")


def _offsets(name: str, offsets: NDArray[np.int64], slots: int, n: int) -> None:
    _shape(name, offsets, (slots + 1,))
    if not replicate.even(offsets, n):
        check_offsets(offsets, n, f"{name} of a row block")


def _check_section(section: Section, slots: int) -> None:
    if section.optimizer not in OPTIMIZERS or not 1 <= section.dim <= DIM_MAX:
        raise RequestError(f"a row block names rows of {section.dim} values with optimizer {section.optimizer!r}")
    n, g = len(section.ids), len(section.gone_ids)
    width = OPTIMIZERS[section.optimizer]().state_width(section.dim)
    _shape("values", section.values, (n, section.dim))
    _shape("state", section.state, (n, width))
    _shape("meta", section.meta, (n, 2))
    _shape("tables", section.tables, (n,))
    _shape("gone_tables", section.gone_tables, (g,))
    _shape("gone_versions", section.gone_versions, (g,))
    _offsets("offsets", section.offsets, slots, n)
    _offsets("gone_offsets", section.gone_offsets, slots, g)
