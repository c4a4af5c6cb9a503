"""Frames: how one message is laid out as bytes, and how embring's own values are laid out in a message.

    offset  size  field
    0       4     magic, b"EMBR"
    4       2     version (u16), 1
    6       2     flags (u16), 0: no flag is defined
    8       4     header length (u32)
    12      8     body length (u64)
    20      ...   header: MessagePack [op, request, fields, [[name, dtype, shape], ...]]
    ...     ...   body: the arrays, raw, one behind another, each beginning at a multiple of 64 bytes of the body

Everything is little-endian. An array's place follows from the ones before it, and the body ends with the last array's
last byte, so a header describes exactly one body length: both are compared before the body is allocated.
Nothing here reads or writes a socket, and nothing is ever unpickled.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from hashring.view import View
from ps.errors import ERRORS, EmbringError, RequestError, SlotsLost, WrongView
from ps.share import FEATURE_COLUMNS, PullShare, PushShare

Buffer = bytes | bytearray | memoryview
"""What frames are read from and written to."""

MAGIC = b"EMBR"
VERSION = 1
PREFIX = struct.Struct("<4sHHIQ")
ALIGNMENT = 64

JOIN_MAX = 32 * 1024
"""Frames up to this many bytes leave as one buffer: joining them costs less than a vectored write does."""

_CODES = ("|u1", "|i1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
DTYPES = {code: np.dtype(code) for code in _CODES}
"""Every type that an array in a frame may have, by its code in the header."""
_INT32 = DTYPES["<i4"]
_CODE_OF = {dtype: code for code, dtype in DTYPES.items()}

_GAPS = [bytes(n) for n in range(ALIGNMENT)]

LENGTH_MAX = 2**30
"""No side of an array is this long. Two of them and 8 bytes stay below what numpy can count, in empty arrays too."""

MESSAGE_MAX = 2000
"""Characters of an error message that travel."""

SLOTS_NAMED_MAX = 64
"""Lost slots that an error names."""


class FrameError(RequestError):
    """Bytes that are no frame of this protocol, or one beyond a limit: the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What one frame may hold; checked before anything is allocated.

    header_max: bytes of the header. More costs memory and time (about 10 ms a MiB) for whoever decodes it.
    body_max: bytes of all arrays. Less refuses bigger batches, more lets one peer claim more memory.
    arrays_max: arrays in one frame.
    """

    header_max: int = 1024 * 1024
    body_max: int = 256 * 1024 * 1024
    arrays_max: int = 512


LIMITS = FrameLimits()
"""What both sides allow each other unless told otherwise."""

HANDSHAKE_LIMITS = FrameLimits(header_max=4096, body_max=0, arrays_max=0)
"""What a peer may send before both sides have accepted each other."""


@dataclass(slots=True)
class Message:
    """One request or reply. `op` of a reply is "ok", "error" or (in the handshake) "welcome".

    request: chosen by the caller, and repeated in the reply. fields: small plain data. arrays: by name, C-contiguous.
    size: bytes of the arrays, in a message that was received.
    """

    op: str
    request: int
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    size: int = 0


Places = dict[str, tuple[np.dtype[Any], list[int], int]]
"""Where the arrays of a body lie, by name: dtype, shape, offset."""


def encode(message: Message, limits: FrameLimits = LIMITS) -> list[Buffer]:
    """The frame of a message, as buffers to be written in order; arrays of a big frame are not copied.

    Raises FrameError for an array type that does not travel, or a message beyond the limits.
    """
    chunks: list[Any] = [b""]
    described = []
    at = 0
    for name, given in message.arrays.items():
        array = given if given.flags.c_contiguous else np.ascontiguousarray(given)
        code = _CODE_OF.get(array.dtype)
        if code is None:
            raise FrameError(f"array {name!r} has dtype {array.dtype}; it must be one of {', '.join(DTYPES)}")
        described.append((name, code, array.shape))
        size = array.nbytes
        if size:
            if gap := -at % ALIGNMENT:
                chunks.append(_GAPS[gap])
            chunks.append(array)
            at += gap + size
    header = msgpack.packb((message.op, message.request, message.fields, described))
    _check_sizes(len(header), at, limits)
    if len(described) > limits.arrays_max:
        raise FrameError(f"the message has {len(described)} arrays; the limit is {limits.arrays_max}")
    chunks[0] = PREFIX.pack(MAGIC, VERSION, 0, len(header), at) + header
    if len(chunks[0]) + at <= JOIN_MAX:
        return [b"".join(chunks)]
    return [memoryview(chunk).cast("B") for chunk in chunks]


def _check_sizes(header: int, body: int, limits: FrameLimits) -> None:
    if header > limits.header_max:
        raise FrameError(f"the frame's header has {header} bytes; the limit is {limits.header_max}")
    if body > limits.body_max:
        raise FrameError(f"the frame's arrays have {body} bytes; the limit is {limits.body_max}")


def decode_prefix(data: Buffer, offset: int, limits: FrameLimits) -> tuple[int, int]:
    """(header length, body length) of the frame that begins at `offset`; FrameError where they break a limit."""
    magic, version, flags, header, body = PREFIX.unpack_from(data, offset)
    if magic == MAGIC and version == VERSION and flags == 0 < header <= limits.header_max and body <= limits.body_max:
        return header, body
    check_magic(magic)
    if version != VERSION:
        raise FrameError(f"the frame has version {version}; this side speaks version {VERSION}")
    if flags:
        raise FrameError(f"the frame has flags {flags:#06x}; none is defined")
    if header == 0:
        raise FrameError("the frame's header has 0 bytes; it must have at least one")
    _check_sizes(header, body, limits)
    raise FrameError("the frame's prefix is malformed")


def check_magic(begin: bytes) -> None:
    """FrameError unless the first bytes (up to 4 of them) can begin a frame."""
    if begin[:4] != MAGIC[: len(begin)]:
        raise FrameError(f"the connection carries {bytes(begin[:4])!r} where a frame begins with {MAGIC!r}")


def decode_header(header: Buffer, body: int, limits: FrameLimits) -> tuple[Message, Places]:
    """The message without its arrays, and their places in a body of `body` bytes.

    Raises FrameError unless the header describes exactly such a body.
    """
    try:
        plain = msgpack.unpackb(header)
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        raise FrameError(f"the frame's header is not MessagePack: {type(error).__name__}") from None
    if type(plain) is not list or len(plain) != 4:
        raise FrameError("the frame's header must be [op, request, fields, arrays]")
    op, request, fields, described = plain
    if type(op) is not str or not 1 <= len(op) <= 32:
        raise FrameError("the frame's op must be text of 1 to 32 characters")
    if type(request) is not int or not 0 <= request < 2**63:
        raise FrameError(f"the frame's request is {str(request)[:40]}; it must be 0 to 2**63-1")
    if type(fields) is not dict:
        raise FrameError("the frame's fields must be a map")
    for key in fields:
        if type(key) is not str:
            raise FrameError("the frame's fields must be a map from text")
    if type(described) is not list or len(described) > limits.arrays_max:
        raise FrameError(f"the frame must list at most {limits.arrays_max} arrays")
    places, end = _places(described)
    if end != body:
        raise FrameError(f"the frame's body has {body} bytes; its arrays take {end}")
    return Message(op, request, fields, {}, body), places


def _places(described: list[Any]) -> tuple[Places, int]:
    """The place of each array, and where the last one ends."""
    places: Places = {}
    end = 0
    for entry in described:
        if type(entry) is not list or len(entry) != 3:
            raise FrameError("an array of the frame must be described as [name, dtype, shape]")
        name, code, shape = entry
        if type(name) is not str or not 1 <= len(name) <= 64 or name in places:
            raise FrameError(f"array name {str(name)[:70]!r} of the frame must be text of 1 to 64 characters, once")
        dtype = DTYPES.get(code) if type(code) is str else None
        if dtype is None:
            known = ", ".join(DTYPES)
            raise FrameError(f"array {name!r} of the frame has dtype {str(code)[:20]!r}; it must be one of {known}")
        if type(shape) is not list or len(shape) > 3:
            raise FrameError(f"array {name!r} of the frame has a shape that is not up to 3 sizes")
        size = dtype.itemsize
        for length in shape:
            if type(length) is not int or not 0 <= length < LENGTH_MAX:
                raise FrameError(f"array {name!r} of the frame has a size that is not 0 to {LENGTH_MAX - 1}")
            size *= length
        if size:
            end += -end % ALIGNMENT
        places[name] = (dtype, shape, end)
        end += size
    return places, end


def body_buffer(size: int) -> memoryview:
    """Memory for a body of `size` bytes, to be received into."""
    return np.empty(size, np.uint8).data


def assemble(message: Message, places: Places, body: Buffer) -> Message:
    """The message with its arrays, which are views into `body`."""
    for name, (dtype, shape, offset) in places.items():
        # A body of no bytes has no memory that a view could point into.
        message.arrays[name] = np.ndarray(shape, dtype, body, offset) if message.size else np.empty(shape, dtype)
    return message


def pack_plain(plain: object) -> NDArray[np.uint8]:
    """Plain data that may outgrow a header (views, listings), as an array."""
    return np.frombuffer(msgpack.packb(plain), np.uint8)


def unpack_plain(array: NDArray[Any]) -> Any:
    """The inverse of `pack_plain`; RequestError where the bytes are not MessagePack."""
    try:
        return msgpack.unpackb(array.tobytes(), strict_map_key=False)
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError, TypeError) as error:
        raise RequestError(f"packed data of {array.nbytes} bytes is not MessagePack: {type(error).__name__}") from None


# -- fields and arrays, one by one ------------------------------------------------------------------------------------


def whole(fields: Mapping[str, Any], name: str, low: int = 0, high: int = 2**63 - 1, default: int | None = None) -> int:
    """A whole-number field in [low, high]; RequestError naming it otherwise. Without a default it is required."""
    value = fields.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name} is {str(value)[:40]}; it must be a whole number from {low} to {high}")
    return value


def text(fields: Mapping[str, Any], name: str, longest: int = 1024, default: str | None = None) -> str:
    """A text field of at most `longest` characters; RequestError naming it otherwise."""
    value = fields.get(name, default)
    if not isinstance(value, str) or len(value) > longest:
        raise RequestError(f"{name} must be text of at most {longest} characters")
    return value


def vector(arrays: Mapping[str, NDArray[Any]], name: str, dtype: str) -> NDArray[Any]:
    """A required one-dimensional array of exactly this type code; RequestError naming it otherwise."""
    array = arrays.get(name)
    if array is None:
        raise RequestError(f"array {name!r} is missing")
    if array.ndim != 1 or array.dtype != DTYPES[dtype]:
        raise RequestError(f"array {name!r} is {array.dtype.str}{array.shape}; it must be {dtype}, one-dimensional")
    return array


# -- shares -----------------------------------------------------------------------------------------------------------


def _features(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The arrays that both kinds of share have, by their types; a store checks what is in them."""
    features = arrays.get("features")
    if features is None:
        raise RequestError("array 'features' is missing")
    if features.ndim != 2 or features.dtype != _INT32 or features.shape[1] != FEATURE_COLUMNS:
        raise RequestError(
            f"array 'features' is {features.dtype.str}{features.shape}; it must be <i4, {FEATURE_COLUMNS} columns wide"
        )
    return {
        "features": features,
        "ids": vector(arrays, "ids", "<i8"),
        "offsets": vector(arrays, "offsets", "<i8") if "offsets" in arrays else None,
        "weights": vector(arrays, "weights", "<f4") if "weights" in arrays else None,
    }


def _share_arrays(share: PullShare | PushShare) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"features": share.features, "ids": share.ids}
    if share.offsets is not None:
        arrays["offsets"] = share.offsets
    if share.weights is not None:
        arrays["weights"] = share.weights
    return arrays


def pull_message(share: PullShare) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(fields, arrays) of a pull."""
    return {}, _share_arrays(share)


def pull_share(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> PullShare:
    """The share of a pull; RequestError in one sentence where its arrays are of other types."""
    return PullShare(**_features(arrays))


def push_message(share: PushShare) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(fields, arrays) of a push, an assignment or a deletion."""
    fields = {"client": share.client, "sequence": share.sequence, "kind": share.kind, "lr_scale": share.lr_scale}
    return fields, {**_share_arrays(share), "rows": share.rows}


def push_share(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> PushShare:
    """The share of a push; RequestError in one sentence where a field or the type of an array is not as it must be."""
    kind = fields.get("kind")
    if kind not in ("push", "assign", "delete"):
        raise RequestError(f'kind is {str(kind)[:40]!r}; it must be "push", "assign" or "delete"')
    lr_scale = fields.get("lr_scale", 1.0)
    if not isinstance(lr_scale, int | float) or not 0.0 <= lr_scale < math.inf:
        raise RequestError(f"lr_scale is {str(lr_scale)[:40]}; it must be a finite number from 0 on")
    common = _features(arrays)
    if kind != "push" and (common["offsets"] is not None or common["weights"] is not None):
        raise RequestError(f"{kind} takes single ids; offsets and weights go with a push")
    return PushShare(
        client=whole(fields, "client", 0, 2**64 - 1),
        sequence=whole(fields, "sequence", 1),
        kind=kind,
        rows=vector(arrays, "rows", "<f4"),
        lr_scale=float(lr_scale),
        **common,
    )


# -- views and errors -------------------------------------------------------------------------------------------------


def view_message(view: View) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(fields, arrays) of a view."""
    return {"view_epoch": view.epoch}, {"view": _packed(view)}


@lru_cache(maxsize=4)
def _packed(view: View) -> NDArray[np.uint8]:
    """A view goes to every server, in the same bytes."""
    return pack_plain(view.to_plain())


def view_of(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> View:
    """The view of a message; RequestError where it is malformed or breaks an invariant of views."""
    plain = unpack_plain(vector(arrays, "view", "|u1"))
    try:
        view = View.from_plain(plain)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RequestError(f"the view is malformed: {type(error).__name__}: {error}") from None
    return view


def error_fields(error: EmbringError) -> dict[str, Any]:
    """The fields of the reply that carries an error."""
    fields: dict[str, Any] = {"error": error.code, "message": str(error)[:MESSAGE_MAX]}
    if isinstance(error, WrongView):
        fields["error_epoch"] = error.epoch
    if isinstance(error, SlotsLost):
        fields["slots"] = list(error.slots[:SLOTS_NAMED_MAX])
    return fields


def raise_error(fields: Mapping[str, Any]) -> None:
    """Raise the error that a reply carries, in its own class."""
    cls = ERRORS.get(str(fields.get("error")), EmbringError)
    message = str(fields.get("message", "the server gave no reason"))
    error = cls(message)
    if issubclass(cls, WrongView):
        epoch = fields.get("error_epoch")
        error = cls(message, epoch if type(epoch) is int else 0)
    elif issubclass(cls, SlotsLost):
        slots = fields.get("slots")
        error = cls(message, [s for s in slots if type(s) is int] if isinstance(slots, list) else ())
    error.answered = True
    raise error
