"""The exports that a server has under way, each asked for part by part."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.errors import NotApplied, RequestError
from ps.rowblock import RowBlock, Watermark
from ps.store import Store
from ps.wire import Message, vector, whole

EXPORT_ROWS = 16_384
"""Rows in one part, at most."""

EXPORTS_MAX = 16
"""Exports open at once; the one that was asked for a part longest ago makes room."""


@dataclass(slots=True)
class _Export:
    """Its blocks, and the number of the next part."""

    blocks: Iterator[RowBlock]
    part: int = 0


class Exports:
    """Begins exports and goes on with them. part_bytes: rows in one part, about."""

    def __init__(self, store: Store, part_bytes: int) -> None:
        self._store, self._part_bytes = store, part_bytes
        self._open: dict[int, _Export] = {}
        self._number = 0

    def part(self, request: Message, slots: NDArray[np.int64] | None) -> tuple[dict[str, Any], RowBlock] | None:
        """The next part of an export (slots: of a new one), with the fields by which to ask for the one after it.

        None where there is none any more. Raises RequestError; NotApplied for an export that does not stand there.
        """
        if slots is not None:
            while len(self._open) >= EXPORTS_MAX:
                self._open.pop(next(iter(self._open)))
            since = _since(request, slots)
            self._number += 1
            cursor, export = self._number, _Export(iter(self._store.export(slots, since, self._rows())))
        else:
            cursor = whole(request.fields, "cursor")
            found = self._open.pop(cursor, None)
            if found is None or found.part != whole(request.fields, "part"):
                raise NotApplied(f"export {cursor} does not stand at that part here; begin it again")
            export = found
        block = next(export.blocks, None)
        if block is None:
            return None
        export.part += 1
        # Entered anew, so that the first of the dictionary is the one asked for longest ago.
        self._open[cursor] = export
        return {"cursor": cursor, "part": export.part}, block

    def _rows(self) -> int:
        widest = max((arena.key.row_bytes for arena in self._store.held.registry.arenas), default=1)
        return max(1, min(EXPORT_ROWS, self._part_bytes // widest))


def _since(request: Message, slots: NDArray[np.int64]) -> Watermark | None:
    if "positions" not in request.arrays:
        return None
    cluster = whole(request.fields, "cluster", 0, 2**64 - 1)
    positions = vector(request.arrays, "positions", "<i8")
    if len(positions) != len(slots):
        raise RequestError(f"there are {len(positions)} positions of {len(slots)} slots; each has one")
    return Watermark(cluster, slots, positions)
