"""Tensors <-> columns, against plainly written twins; every refusal names the input."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps import RequestError
from router.columns import BytesColumn
from router.oip_codec import Limits, Tensor, check_outputs, columns, raw_strings

LIMITS = Limits(rows_max=100, values_max=400, inputs_max=8)


def raw_of(strings: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(s)) + s for s in strings)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_raw_strings_come_back(strings: list[bytes]) -> None:
    assert raw_strings(raw_of(strings), len(strings), "x").to_list() == strings


@given(st.binary(max_size=40), st.integers(0, 12))
def test_any_bytes_are_strings_or_one_error(raw: bytes, n: int) -> None:
    expected, rest = [], raw
    for _ in range(n):
        if len(rest) < 4 or len(rest) - 4 < struct.unpack("<I", rest[:4])[0]:
            expected = None
            break
        length = struct.unpack("<I", rest[:4])[0]
        expected.append(rest[4 : 4 + length])
        rest = rest[4 + length :]
    if expected is not None and not rest:
        assert raw_strings(raw, n, "x").to_list() == expected
    else:
        with pytest.raises(RequestError, match="'x'"):
            raw_strings(raw, n, "x")


def test_a_length_beyond_four_gibibytes_is_refused() -> None:
    with pytest.raises(RequestError, match="'x'"):
        raw_strings(b"\xff\xff\xff\xffab", 1, "x")


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), max_size=20), st.booleans())
def test_ragged_values_and_offsets_become_one_column(rows: list[list[int]], raw: bool) -> None:
    values = [v for row in rows for v in row]
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row))
    given_ = [("genres", values), ("genres.offsets", offsets)]
    tensors = [
        Tensor(name, "INT64", (len(v),), np.array(v, "<i8").tobytes() if raw else v) for name, v in reversed(given_)
    ]
    found = columns(tensors, LIMITS)
    assert list(found) == ["genres"]
    assert found["genres"].values.tolist() == values
    assert found["genres"].offsets.tolist() == offsets


def test_types_and_shapes() -> None:
    found = columns(
        [
            Tensor("a", "BYTES", (2, 1), ["é", b"b"]),
            Tensor("b", "INT64", (2, 1), np.array([5, -6], "<i8").tobytes()),
            Tensor("c", "FP32", (2,), [1, 2.5]),
            Tensor("d", "FP32", (2, 3), np.arange(6, dtype="<f4").tobytes()),
            Tensor("e", "FP32", (2, 3), [1, 2, 3, 4, 5, 6]),
        ],
        LIMITS,
    )
    assert isinstance(found["a"].values, BytesColumn)
    assert found["a"].values.to_list() == ["é".encode(), b"b"]
    assert (found["b"].values.tolist(), found["b"].values.dtype) == ([5, -6], np.int64)
    assert (found["c"].values.tolist(), found["c"].values.dtype) == ([1, 2.5], np.float32)
    assert found["d"].values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["e"].values.shape == (2, 3)
    for name in "bcd":
        assert found[name].values.flags.writeable
        assert found[name].values.flags.aligned


I8 = np.array([1, 2], "<i8").tobytes()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([], "no inputs"),
        ([Tensor("x", "INT64", (2,), I8)] * 2, "'x' is given twice"),
        ([Tensor("x", "INT32", (2,), b"")], "datatype 'INT32'; it must be"),
        ([Tensor("x", "INT\n", (2,), b"")], "datatype 'INT.n'; it must be"),
        ([Tensor("x", "", (2,), b"")], "none"),
        ([Tensor("x", "INT64", (3,), I8)], "16 bytes.*takes 24"),
        ([Tensor("x", "INT64", (), I8)], r"shape \[\]"),
        ([Tensor("x", "INT64", (1, 2), I8)], "an INT64 input has .*offsets"),
        ([Tensor("x", "BYTES", (1, 2), I8)], "a BYTES input has .*offsets"),
        ([Tensor("x", "FP32", (1, 1, 4), I8)], r"shape \[1, 1, 4\]"),
        ([Tensor("x", "INT64", (-2,), I8)], r"shape \[-2\]"),
        ([Tensor("x", "FP32", (2, 2**62), I8)], "400 values are the most"),
        ([Tensor("x", "FP32", (-1, -4), I8)], r"shape \[-1, -4\]"),
        ([Tensor("x", "INT64", (101,), list(range(101)))], "101 rows; 100"),
        ([Tensor("x", "INT64", (401,), list(range(401)))], r"shape \[401\]; 400 values"),
        ([Tensor("x", "FP32", (0, 2**80), b"")], "400 values are the most"),
        ([Tensor("x", "FP32", (10**3000, 10**3000), b"")], "400 values are the most"),
        ([Tensor("x", "INT64", (2,), I8), Tensor("", "INT64", (2,), I8)], "input 2 of the request has no name"),
        ([Tensor("x", "INT64", (2,), [1, 2.0])], "2.0"),
        ([Tensor("x", "INT64", (1,), [True])], "True"),
        ([Tensor("x", "INT64", (1,), [2**63])], "range"),
        ([Tensor("x", "FP32", (1,), [10**400])], "range"),
        ([Tensor("x", "FP32", (1,), ["1"])], "'1'"),
        ([Tensor("x", "FP32", (1,), [None])], "None"),
        ([Tensor("x", "FP32", (1,), [[1]])], r"\[1\]"),
        ([Tensor("x", "BYTES", (1,), [1])], "holds 1"),
        ([Tensor("x", "BYTES", (1,), ["\ud800"])], "UTF-8"),
        ([Tensor("x", "BYTES", (2,), ["a"])], "1 values.*takes 2"),
        ([Tensor("x.offsets", "INT64", (2,), I8)], "'x' is missing"),
        ([Tensor("x", "INT64", (2,), I8), Tensor("x.offsets", "FP32", (2,), [0, 2])], "FP32"),
        ([Tensor("x", "INT64", (2,), I8), Tensor("x.offsets", "INT64", (3,), [0, 2, 1])], "falls from 2 to 1"),
        ([Tensor("x", "INT64", (2,), I8), Tensor("x.offsets", "INT64", (2,), [1, 2])], "begins with 1"),
        ([Tensor("x", "INT64", (2,), I8), Tensor("x.offsets", "INT64", (2,), [0, 3])], "ends with 3"),
        ([Tensor(str(i), "INT64", (2,), I8) for i in range(9)], "more than 8 inputs"),
    ],
)
def test_refusals_are_one_sentence(tensors: list[Tensor], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        columns(tensors, LIMITS)
    assert "\n" not in str(caught.value)


def test_only_scores_can_be_asked_for() -> None:
    check_outputs(["scores"])
    with pytest.raises(RequestError, match=r"'probability'.*'scores'"):
        check_outputs(["scores", "probability"])
    with pytest.raises(RequestError, match="'scores' is asked for twice"):
        check_outputs(["scores", "scores"])
