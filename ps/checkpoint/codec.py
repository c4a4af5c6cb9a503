"""A row block as it lies in a file: rows raw, as they travel; all that is counted by slots packed small.

An increment touches most slots with about one row each, so what a block says of each slot (positions, lineage, client
windows, deletions) would outweigh the rows. Packed it takes some ten bytes a slot: columns are written as differences
where they rise together, their bytes transposed (first all lowest bytes, then the next), and deflated.

The layout stands at the top of ps.checkpoint.files.
"""

import zlib
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ps.checkpoint.storage import CheckpointError
from ps.errors import RequestError
from ps.rowblock import RowBlock
from ps.wire import PREFIX, Buffer, FrameLimits, Message, assemble, body_buffer, decode_header, decode_prefix, encode

LIMITS = FrameLimits(header_max=2**20, body_max=2**30)
"""Of one block in a file."""

MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError, zlib.error)
"""How decoding ends where bytes fit their checksum and are nothing that embring writes."""

_LEVEL = 1
_DTYPES = {code: np.dtype(code) for code in ("|u1", "<i4", "<i8", "<u8")}
_ROWS = ("ids", "tables", "values", "state", "meta")
"""What of a section stays raw: it is most of a block, and hardly gets smaller."""


def pack(columns: Sequence[NDArray[Any]]) -> bytes:
    """One-dimensional arrays of numbers, transposed by bytes and deflated; `unpack` needs their dtypes and lengths."""
    planes = [np.ascontiguousarray(c).view(np.uint8).reshape(len(c), c.dtype.itemsize).T.tobytes() for c in columns]
    return zlib.compress(b"".join(planes), _LEVEL)


def unpack(packed: bytes | memoryview, described: Sequence[Sequence[Any]]) -> list[NDArray[Any]]:
    """The inverse of `pack`; described: (dtype, length) of each. Raises ValueError where it does not fit."""
    wanted = [(_DTYPES[str(code)], int(length)) for code, length in described]
    size = sum(dtype.itemsize * length for dtype, length in wanted)
    inflate = zlib.decompressobj()
    data = inflate.decompress(packed, size + 1)
    if len(data) != size or not inflate.eof:
        raise ValueError(f"{len(data)} bytes were packed where {size} are described")
    out, at = [], 0
    for dtype, length in wanted:
        planes = np.frombuffer(data, np.uint8, dtype.itemsize * length, at).reshape(dtype.itemsize, length)
        out.append(np.ascontiguousarray(planes.T).reshape(-1).view(dtype))
        at += dtype.itemsize * length
    return out


def encode_block(block: RowBlock) -> list[Buffer]:
    """The block as buffers to be written one behind another; its rows are not copied."""
    plain, arrays = block.to_arrays()
    arrays["last"] = block.last - block.base  # small, where the positions themselves are not
    packed, described, raw = [], [], {}
    for name, array in arrays.items():
        if name.rpartition(".")[2] in _ROWS:
            raw[name] = array
            continue
        if name.endswith("offsets"):
            array = np.diff(array)
        packed.append(array)
        described.append([name, array.dtype.str, len(array)])
    columns = np.frombuffer(pack(packed), np.uint8)
    fields = {**plain, "packed": described}
    return encode(Message("block", 0, fields, {"packed": columns, **raw}), LIMITS)


def read_frame(file: IO[bytes], size: int) -> tuple[list[Buffer], Message]:
    """The bytes and the message of a frame of `size` bytes, read from here on; big arrays are read into place.

    Raises CheckpointError where the bytes are no such frame, or end too soon. Nothing in it may be believed before its
    checksum was compared.
    """
    prefix = _read(file, PREFIX.size)
    try:
        header_size, body_size = decode_prefix(prefix, 0, LIMITS)
        if PREFIX.size + header_size + body_size != size:
            raise RequestError("its length is another")
        header = _read(file, header_size)
        body = body_buffer(body_size)
        _fill(file, body)
        message, places = decode_header(header, body_size, LIMITS)
    except RequestError as error:
        raise CheckpointError(str(error)) from None
    return [prefix, header, body], assemble(message, places, body)


def decode_block(message: Message) -> RowBlock:
    """The block of a frame, checked. Raises CheckpointError where it is none."""
    fields, arrays = message.fields, message.arrays
    try:
        described = fields["packed"]
        columns = unpack(arrays["packed"].data, [d[1:] for d in described])
        named = dict(zip((str(d[0]) for d in described), columns, strict=True))
        for name in [n for n in named if n.endswith("offsets")]:
            named[name] = np.concatenate([[0], np.cumsum(named[name])]).astype(np.int64)
        named["last"] = named["last"] + named["base"]
        return RowBlock.from_arrays(fields, {**arrays, **named})
    except (*MALFORMED, RequestError) as error:
        raise CheckpointError(f"this is not a row block: {type(error).__name__} {error}") from None


def _read(file: IO[bytes], size: int) -> bytes:
    data = bytearray(size)
    _fill(file, memoryview(data))
    return bytes(data)


def _fill(file: Any, into: memoryview) -> None:
    while len(into):
        got = file.readinto(into)
        if not got:
            raise CheckpointError(f"the file ends {len(into)} bytes too soon")
        into = into[got:]
