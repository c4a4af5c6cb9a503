"""`embring predict`: rows of a file become columns, and scores come back in their order."""

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.cli_predict import columns_of, read_rows
from ps.errors import ConfigError, RequestError

INPUTS = [
    {"name": "user", "datatype": "INT64", "shape": [-1]},
    {"name": "city", "datatype": "BYTES", "shape": [-1]},
    {"name": "price", "datatype": "FP32", "shape": [-1]},
    {"name": "seen", "datatype": "INT64", "shape": [-1]},
    {"name": "seen.offsets", "datatype": "INT64", "shape": [-1]},
]
ROWS = [
    {"user": 7, "city": "Lyon", "price": 1.5, "seen": [3, 4], "ignored": None},
    {"user": -1, "city": "", "price": 2, "seen": []},
]


def test_csv_and_json_lines_give_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "rows.csv").write_text("user,city,price,seen\n7,Lyon,1.5,3|4\n-1,,2,\n")
    for name in ("rows.jsonl", "rows.csv"):
        columns = columns_of(read_rows(tmp_path / name), INPUTS)
        assert list(columns) == ["user", "city", "price", "seen"]
        assert columns["user"].values.tolist() == [7, -1]
        assert columns["city"].values.to_list() == [b"Lyon", b""]
        assert columns["price"].values.dtype == np.float32
        assert columns["price"].values.tolist() == [1.5, 2.0]
        assert columns["seen"].values.tolist() == [3, 4]
        assert columns["seen"].offsets.tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": "x"}, "row 2: user is 'x'; the model takes INT64"),
        ({"user": 1.5}, "row 2: user is 1.5; the model takes INT64"),
        ({"user": True}, "row 2: user is True"),
        ({"user": 2**63}, "row 2: user is 9223372036854775808"),
        ({"city": 5}, "row 2: city is 5; the model takes BYTES"),
        ({"seen": 5}, "row 2: seen is 5; it must be a list"),
        ({"seen": ["a"]}, "row 2: seen is 'a'"),
    ],
)
def test_a_wrong_cell_is_named(change: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        columns_of([ROWS[0], {**ROWS[1], **change}], INPUTS)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(RequestError, match="row 2 has no 'price', which the model takes as FP32"):
        columns_of([ROWS[0], {"user": 1, "city": "x", "seen": []}], INPUTS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"a": 1}\n[1]\n', "line 2 is no JSON object"),
        ("rows.jsonl", '{"a": 1}\n{"a"\n', "line 2 is no JSON"),
        ("rows.csv", "a,b\n1,2\n1\n", "line 3 has another number of cells"),
        ("rows.csv", "a,b\n1,2,3\n", "line 2 has another number of cells"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", r"rows\.jsonl has no rows: each line must be a JSON object$"),
        ("rows.jsonl", b"\n \n", r"rows\.jsonl has no rows"),
        ("rows.jsonl", b"\xff\x00\x9c", r"rows\.jsonl cannot be read: 'utf-8' codec"),
        ("rows.csv", b"", r"rows\.csv has no rows below its line of names$"),
        ("rows.csv", b"a,b\n", r"rows\.csv has no rows below its line of names$"),
        ("rows.csv", b"\x01\x02\x03", r"rows\.csv has no rows below"),
        ("rows.csv", b"a\n" + b"x" * 200_000, r"rows\.csv cannot be read: field larger than"),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_rows(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read"):
        read_rows(tmp_path / "none.jsonl")
