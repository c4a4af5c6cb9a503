"""Tensors of the Open Inference Protocol <-> the router's columns; what both front doors share.

One input tensor is one column: BYTES, INT64 or FP32, with shape [rows], [rows, 1], or [rows, width] (FP32 only). A
multi-valued column is two inputs: `name`, all values end to end, and `name.offsets`, INT64[rows + 1]: row b holds
values[offsets[b] : offsets[b + 1]]. Prepared ids are named and shaped as the model's metadata says, in the same way.

The one output is `scores`, FP32[rows]. BYTES travel raw as a little-endian uint32 length before each string.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ps import RequestError
from router.columns import BYTES, DTYPES, FP32, INT64, BytesColumn, Column

OUTPUT = "scores"
"""Name of the output tensor."""

OFFSETS = ".offsets"
"""Ending of the input that holds the offsets of a multi-valued column."""

NUMBERS: Mapping[str, np.dtype] = {INT64: np.dtype("<i8"), FP32: np.dtype("<f4")}
"""Wire dtypes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may be; beyond it the doors answer with RequestError, before scoring.

    rows_max: rows of a batch. Higher lets one request hold the router longer; 1 or more.
    values_max: values of one input, all rows together, which bounds multi-valued inputs.
    inputs_max: input tensors.
    bytes_max: bytes of a request as received (and after decompression). Each request in flight may take so much memory.
    """

    rows_max: int = 65_536
    values_max: int = 4_194_304
    inputs_max: int = 1_024
    bytes_max: int = 64 << 20


shown = reprlib.repr
"""A client's value as an error shows it: short, whatever its length and depth."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input as received: `data` is raw little-endian bytes, or a flat sequence of values."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | Sequence[object] | NDArray[np.generic]


@njit(cache=True, nogil=True)
def split_strings(raw, buffer, offsets):  # type: ignore[no-untyped-def]
    """Take uint32 lengths out of raw uint8[m]: strings end to end in buffer, ends in offsets int64[n + 1].

    Returns the number of bytes consumed, -1 where a string reaches beyond the end.
    """
    at, out, m = 0, 0, len(raw)
    offsets[0] = 0
    for i in range(len(offsets) - 1):
        if at + 4 > m:
            return -1
        length = raw[at] | raw[at + 1] << 8 | raw[at + 2] << 16 | np.int64(raw[at + 3]) << 24
        at += 4
        if length > m - at:
            return -1
        for k in range(length):
            buffer[out + k] = raw[at + k]
        at, out = at + length, out + length
        offsets[i + 1] = out
    return at


def warmup() -> None:
    """Compile the kernel, or load it from numba's cache."""
    raw_strings(b"\x01\x00\x00\x00a", 1, "warm-up")


def raw_strings(raw: bytes | memoryview, n: int, name: str) -> BytesColumn:
    """n strings out of raw bytes; RequestError where the lengths do not fill the bytes exactly."""
    if 4 * n > len(raw):
        raise RequestError(f"input {name!r} has {len(raw)} bytes; {n} strings take at least {4 * n}")
    buffer, offsets = np.empty(len(raw) - 4 * n, np.uint8), np.zeros(n + 1, np.int64)
    used = split_strings(np.frombuffer(raw, np.uint8), buffer, offsets) if n else 0
    if used != len(raw):
        raise RequestError(f"input {name!r} has {len(raw)} bytes, which its {n} strings and their lengths do not fill")
    return BytesColumn(buffer, offsets)


def columns(tensors: Iterable[Tensor], limits: Limits) -> dict[str, Column]:
    """Checked columns by name; RequestError names the input and what is allowed."""
    found: dict[str, Column] = {}
    for number, tensor in enumerate(tensors, start=1):
        if not tensor.name:
            raise RequestError(f"input {number} of the request has no name; the model's metadata names its inputs")
        if tensor.name in found:
            raise RequestError(f"input {tensor.name!r} is given twice; each input comes once")
        if len(found) == limits.inputs_max:
            raise RequestError(f"the request has more than {limits.inputs_max} inputs, which is the most allowed")
        found[tensor.name] = Column(_values(tensor, limits))
    offsets = [name for name in found if name.endswith(OFFSETS)]
    for name in offsets:
        of, ends = name.removesuffix(OFFSETS), found.pop(name)
        if of not in found:
            raise RequestError(f"input {name!r} has no values: input {of!r} is missing")
        if ends.dtype != INT64:
            raise RequestError(f"input {name!r} has datatype {ends.dtype}; it must be {INT64}")
        found[of] = Column.of(found[of].values, ends.values, f"input {of!r}")  # type: ignore[arg-type]
    for name, column in found.items():
        if column.rows > limits.rows_max:
            raise RequestError(f"input {name!r} has {column.rows} rows; {limits.rows_max} are the most allowed")
    if not found:
        raise RequestError("the request has no inputs; the model's metadata names them")
    return found


def check_outputs(names: Iterable[str]) -> None:
    """RequestError where a requested output is not `scores`, or is asked for twice."""
    for number, name in enumerate(names, start=1):
        if name != OUTPUT:
            raise RequestError(f"output {name!r} is unknown; the model gives {OUTPUT!r}")
        if number > 1:
            raise RequestError(f"output {name!r} is asked for twice; each output comes once")


def _values(tensor: Tensor, limits: Limits) -> NDArray[np.int64] | NDArray[np.float32] | BytesColumn:
    if tensor.datatype not in DTYPES:
        datatype = shown(tensor.datatype) if tensor.datatype else "none"
        raise RequestError(f"input {tensor.name!r} has datatype {datatype}; it must be one of {', '.join(DTYPES)}")
    shape = _shape(tensor, limits)
    n = math.prod(shape)
    raw = isinstance(tensor.data, bytes | memoryview)
    if tensor.datatype == BYTES:
        return raw_strings(tensor.data, n, tensor.name) if raw else _strings(tensor, n)  # type: ignore[arg-type]
    dtype = NUMBERS[tensor.datatype]
    if raw:
        if len(tensor.data) != n * dtype.itemsize:
            raise RequestError(
                f"input {tensor.name!r} has {len(tensor.data)} bytes; its shape {list(tensor.shape)} "
                f"of {tensor.datatype} takes {n * dtype.itemsize}"
            )
        # A copy: aligned, and writeable as the kernels of feature preparation were compiled for.
        return np.frombuffer(tensor.data, dtype).reshape(shape).copy()  # type: ignore[arg-type]
    return _numbers(tensor, n).reshape(shape)


def _shape(tensor: Tensor, limits: Limits) -> tuple[int, ...]:
    """The shape as a column has it: [rows] or, for FP32, [rows, width] with a width above 1."""
    shape, wide = tensor.shape, tensor.datatype == FP32
    if len(shape) not in (1, 2) or min(shape) < 0 or (len(shape) == 2 and shape[1] != 1 and not wide):
        allowed = "[rows], [rows, 1]" + (" or [rows, width]" if wide else "; multi-values come with offsets")
        kind = f"{'a' if tensor.datatype == BYTES else 'an'} {tensor.datatype}"
        raise RequestError(f"input {tensor.name!r} has shape {shown(list(shape))}; {kind} input has {allowed}")
    if math.prod(shape) > limits.values_max or max(shape) > limits.values_max:  # 0 x 2**80 is none, and no array either
        raise RequestError(
            f"input {tensor.name!r} has shape {shown(list(shape))}; {limits.values_max} values are the most allowed"
        )
    return shape[:1] if shape[1:] == (1,) else shape


def _count(tensor: Tensor, n: int) -> None:
    if len(tensor.data) != n:
        raise RequestError(
            f"input {tensor.name!r} has {len(tensor.data)} values; its shape {list(tensor.shape)} takes {n}"
        )


def _strings(tensor: Tensor, n: int) -> BytesColumn:
    _count(tensor, n)
    for value in tensor.data:
        if not isinstance(value, str | bytes):
            raise RequestError(f"input {tensor.name!r} holds {shown(value)}; a BYTES input holds strings")
    try:
        return BytesColumn.of(tensor.data)  # type: ignore[arg-type]
    except UnicodeEncodeError as error:
        raise RequestError(f"input {tensor.name!r} holds text that UTF-8 cannot encode: {error.reason}") from None


def _numbers(tensor: Tensor, n: int) -> NDArray[np.int64] | NDArray[np.float32]:
    _count(tensor, n)
    if isinstance(tensor.data, np.ndarray):
        return tensor.data.astype(NUMBERS[tensor.datatype], copy=False)
    if n == 0:
        return np.empty(0, NUMBERS[tensor.datatype])
    whole = tensor.datatype == INT64
    allowed = (int,) if whole else (int, float)
    for value in tensor.data:
        if isinstance(value, bool) or not isinstance(value, allowed):
            numbers = "whole numbers" if whole else "numbers"
            raise RequestError(f"input {tensor.name!r} holds {shown(value)}; {tensor.datatype} takes {numbers}")
    try:
        with np.errstate(over="ignore"):
            return np.array(tensor.data, NUMBERS[tensor.datatype])
    except OverflowError:
        raise RequestError(f"input {tensor.name!r} holds a number beyond the range of {tensor.datatype}") from None
