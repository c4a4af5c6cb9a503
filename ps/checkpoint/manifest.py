"""What a checkpoint says of itself: its manifest, as values and as bytes. The layout stands at the top of
ps.checkpoint.files."""

import struct
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from hashring.view import SLOTS_MAX
from ps.checkpoint.codec import MALFORMED, pack, unpack
from ps.checkpoint.storage import CheckpointError
from ps.errors import RequestError
from ps.rowblock import TERM_SHIFT
from ps.spec import TableSpec
from ps.wire import text, whole

FORMAT = 2
MAGIC = b"EMBRCKPT"

TERM_MAX = 2**23 - 2**20
"""Of a restored checkpoint: a term is the upper 23 bits of a position, and a million views can follow."""

NUMBER_MAX = 2**24 - 1
"""Of tables and groups: a restore has arrays over the numbers of tables."""

_HEAD = struct.Struct("<8sIIQ")
_BLOCK_COLUMNS = (("file", "<i4"), ("size", "<i8"), ("rows", "<i8"), ("xxh3", "<u8"))
_WHOLE = {
    "cluster": 2**64 - 1, "epoch": TERM_MAX, "term_max": TERM_MAX, "parent_checksum": 2**64 - 1, "full": SLOTS_MAX,
    "checksum": 2**64 - 1,
}  # fmt: skip
"""The whole numbers of a manifest, each with the highest that it can be."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a file: which one, how long, how many rows, XXH3-64. It begins where the one before it ends."""

    file: int
    size: int
    rows: int
    xxh3: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    cluster, epoch, fingerprint: of the view it was taken under. term_max: the highest term of a position in it; a
    restore goes above. tables: [number, name, group, spec]. groups: [number, placement, replicas, first, slots].
    slots, positions int64[k]: the watermark, where each slot stood. parent: name of the checkpoint that this one is an
    increment to, "" for a full one; parent_checksum: of that one's manifest. full: slots that it holds whole. models:
    versions of the dense models that were served with these rows, by name, where that was told.
    checksum: of this manifest, by which an increment names it.
    """

    name: str
    created: str
    cluster: int
    epoch: int
    fingerprint: str
    term_max: int
    tables: list[list[Any]]
    groups: list[list[Any]]
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    parent: str = ""
    parent_checksum: int = 0
    full: int = 0
    models: dict[str, str] = field(default_factory=dict)
    blocks: tuple[Block, ...] = field(default=(), repr=False)
    checksum: int = 0

    @property
    def rows(self) -> int:
        """Rows in all blocks."""
        return sum(b.rows for b in self.blocks)

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(b.size for b in self.blocks)

    @property
    def files(self) -> dict[str, list[Block]]:
        """Files by name, each with its blocks in order."""
        out: dict[str, list[Block]] = {}
        for block in self.blocks:
            out.setdefault(file_name(block.file), []).append(block)
        return out

    def check(self) -> "Manifest":
        """Return self, or raise RequestError naming what cannot be restored, its value and what is allowed.

        Other errors (ps.checkpoint.codec.MALFORMED) mean that a field is no such thing at all.
        """
        for name in ("name", "created", "fingerprint", "parent"):
            text(vars(self), name)
        for name, high in _WHOLE.items():
            _whole(name, getattr(self, name), 0, high)
        for told in (*self.models, *self.models.values()):
            text({"models": told}, "models")
        if datetime.fromisoformat(self.created).tzinfo is None:
            raise RequestError(f"created is {self.created!r}; it must have a time zone")
        self._check_groups()
        self._check_tables()
        if len(self.slots) != len(self.positions):
            raise RequestError(f"{len(self.slots)} slots have {len(self.positions)} positions")
        _within("slots", self.slots, SLOTS_MAX)
        _within("positions", self.positions, (self.term_max + 1) << TERM_SHIFT)
        for name, end in (("file", 10_000), ("size", 2**62), ("rows", 2**62)):
            _within(name, np.array([getattr(b, name) for b in self.blocks], np.int64), end)
        return self

    def _check_groups(self) -> None:
        _numbered("group", [group[0] for group in self.groups])
        end = 0
        for number, _, _, first, slots in sorted(self.groups, key=lambda group: group[3]):
            _whole(f"the first slot of group {number}", first, end, SLOTS_MAX - 1)  # behind the group before it
            _whole(f"slots of group {number}", slots, 1, SLOTS_MAX - first)
            if slots & (slots - 1):
                raise RequestError(f"group {number} has {slots} slots; it must have a power of two")
            end = first + slots

    def _check_tables(self) -> None:
        _numbered("table", [entry[0] for entry in self.tables])
        places = {number: (placement, replicas) for number, placement, replicas, _, _ in self.groups}
        for _, name, group, plain in self.tables:
            spec = TableSpec.from_plain(plain)
            if spec.name != name:
                raise RequestError(f"table {name!r} has the specification of {spec.name!r}")
            if places.get(group) != (spec.placement, spec.replicas):
                raise RequestError(
                    f"table {name!r} has placement and replicas {(spec.placement, spec.replicas)}; "
                    f"its group {group} has {places.get(group)}"
                )
        _once("table", [entry[1] for entry in self.tables])


def _whole(what: str, value: Any, low: int, high: int) -> None:
    whole({what: value}, what, low, high)


def _numbered(what: str, numbers: list[int]) -> None:
    for number in numbers:
        _whole(f"{what} number", number, 0, NUMBER_MAX)
    _once(f"{what} number", numbers)


def _once(what: str, values: list[Any]) -> None:
    seen = set[Any]()
    for value in values:
        if value in seen:
            raise RequestError(f"{what} {value!r} comes twice")
        seen.add(value)


def _within(name: str, column: NDArray[Any], end: int) -> None:
    if len(bad := column[(column < 0) | (column >= end)]):
        raise RequestError(f"{name} has a {bad[0]}; every one must be from 0 to {end - 1}")


def file_name(number: int) -> str:
    """The name of a file of blocks."""
    return f"{number:04}.blocks"


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest."""
    plain = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name != "checksum"}
    plain["blocks"] = _packed([np.array([getattr(b, n) for b in manifest.blocks], t) for n, t in _BLOCK_COLUMNS])
    for name in ("slots", "positions"):
        plain[name] = _packed([np.asarray(plain[name], "<i8")])
    body = msgpack.packb(plain)
    begin = _HEAD.pack(MAGIC, FORMAT, len(body), 0)[:16]
    return begin + struct.pack("<Q", xxhash.xxh3_64_intdigest(begin + body)) + body


def _packed(columns: list[NDArray[Any]]) -> list[Any]:
    return [[[c.dtype.str, len(c)] for c in columns], pack(columns)]


def decode_manifest(data: bytes, path: str) -> Manifest:
    """The manifest in these bytes of `path`, checked.

    Raises CheckpointError where they are damaged, of another format, or of what no cluster can take.
    """
    if len(data) < _HEAD.size or data[:8] != MAGIC:
        raise CheckpointError(f"{path} is damaged, or no manifest: it does not begin as one")
    _, version, length, checksum = _HEAD.unpack_from(data)
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of embring reads format {FORMAT}")
    body = data[_HEAD.size :]
    if len(body) != length or xxhash.xxh3_64_intdigest(data[:16] + body) != checksum:
        raise CheckpointError(f"{path} is damaged: it fails its checksum")
    try:
        plain = msgpack.unpackb(body)
        columns = unpack(*reversed(plain.pop("blocks")))
        for name in ("slots", "positions"):
            (plain[name],) = unpack(*reversed(plain[name]))
        blocks = tuple(Block(*line) for line in zip(*(c.tolist() for c in columns), strict=True))
        return Manifest(**plain, blocks=blocks, checksum=checksum).check()
    except RequestError as error:
        raise CheckpointError(f"{path} cannot be restored: {error}") from None
    except (*MALFORMED, msgpack.UnpackException) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from None
