"""Feature preparation against a second implementation in plain Python, and every refusal."""

import math
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import ConfigError, RequestError
from router.columns import BytesColumn, Column, load_columns, save_columns, take_rows
from router.features import FeaturePrep, Prepared

MASK = 2**64 - 1


def signed(x: int) -> int:
    return struct.unpack("<q", struct.pack("<Q", x & MASK))[0]


def slow_fold(h: int, value: int) -> int:
    """splitmix64's output from a state with the value mixed in."""
    x = ((h + 0x9E3779B97F4A7C15) & MASK) ^ (value & MASK)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_string(raw: bytes) -> int:
    return signed(xxhash.xxh64_intdigest(raw, seed=0))


def slow_values(spec: dict, cell: object) -> list:
    """The values of one row of one input: split, then truncated."""
    if spec.get("split"):
        values = [piece for piece in cell.split(spec["split"].encode()) if piece]
    elif spec.get("ragged"):
        values = list(cell)
    else:
        return [cell]
    limit = spec.get("values_max", 1024)
    return values[:limit] if spec.get("keep", "first") == "first" else values[max(0, len(values) - limit) :]


def slow_modulo(x: int, buckets: int) -> int:
    return (x & MASK) % buckets if buckets else signed(x)


def slow_feature(spec: dict, values: list[list]) -> list:
    """Ids, or dense numbers, of one row."""
    kind, buckets = spec["kind"], spec.get("buckets", 0)
    if kind == "id":
        return values[0]
    if kind == "hash":
        if all(isinstance(v, bytes) for v in values[0]):
            prefix = spec.get("prefix", 0)
            return [slow_modulo(slow_string(v[:prefix] if prefix else v), buckets) for v in values[0]]
        return [slow_modulo(slow_fold(0, v), buckets) for v in values[0]]
    if kind == "bucketise":
        bounds = spec["boundaries"]
        return [len(bounds) + 1 if math.isnan(v) else sum(b <= v for b in bounds) for v in values[0]]
    if kind == "cross":
        folded = [0]
        for column in values:
            tokens = [slow_string(v) if isinstance(v, bytes) else v for v in column]
            folded = [slow_fold(h, t) for h in folded for t in tokens]
        return [slow_modulo(h, buckets) for h in folded[: spec.get("values_max", 1024)]]
    x = float(values[0][0])
    if math.isnan(x):
        return [0.0]
    return [math.log1p(max(x, 0.0))] if kind == "log" else [(x - spec.get("shift", 0.0)) * spec.get("scale", 1.0)]


INPUTS = [
    {"name": "user", "dtype": "INT64"},
    {"name": "city", "dtype": "BYTES"},
    {"name": "price", "dtype": "FP32"},
    {"name": "tags", "dtype": "BYTES", "split": "|", "values_max": 3},
    {"name": "seen", "dtype": "INT64", "ragged": True, "values_max": 4, "keep": "last"},
    {"name": "words", "dtype": "BYTES", "ragged": True, "values_max": 2},
    {"name": "prices", "dtype": "FP32", "ragged": True},
]
FEATURES = [
    {"name": "user", "kind": "id", "inputs": ["user"], "table": "user"},
    {"name": "user_hash", "kind": "hash", "inputs": ["user"], "table": "hashed"},
    {"name": "user_bucket", "kind": "hash", "inputs": ["user"], "table": "hashed", "buckets": 97},
    {"name": "city", "kind": "hash", "inputs": ["city"], "table": "city"},
    {"name": "city_prefix", "kind": "hash", "inputs": ["city"], "table": "city", "prefix": 2, "buckets": 1000},
    {"name": "price_band", "kind": "bucketise", "inputs": ["price"], "table": "band", "boundaries": [-1.5, 0, 2.25]},
    {"name": "user_band", "kind": "bucketise", "inputs": ["user"], "table": "band", "boundaries": [0, 10]},
    {"name": "tags", "kind": "hash", "inputs": ["tags"], "table": "tags", "pooling": "mean"},
    {"name": "seen", "kind": "id", "inputs": ["seen"], "table": "seen", "pooling": "max"},
    {"name": "words", "kind": "hash", "inputs": ["words"], "table": "words"},
    {"name": "bands", "kind": "bucketise", "inputs": ["prices"], "table": "bands", "boundaries": [1.0]},
    {"name": "user_city", "kind": "cross", "inputs": ["user", "city"], "table": "cross"},
    {"name": "seen_tags", "kind": "cross", "inputs": ["seen", "tags", "words"], "table": "cross", "values_max": 7},
    {"name": "small", "kind": "cross", "inputs": ["tags", "user"], "table": "cross", "buckets": 5},
    {"name": "log_price", "kind": "log", "inputs": ["price"]},
    {"name": "log_user", "kind": "log", "inputs": ["user"]},
    {"name": "price", "kind": "dense", "inputs": ["price"], "shift": 1.5, "scale": 0.25},
]
PREP = FeaturePrep.from_plain({"input": INPUTS, "feature": FEATURES})

int64s = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(width=32, allow_infinity=False)
strings = st.binary(max_size=40)
cells = st.fixed_dictionaries(
    {
        "user": int64s,
        "city": strings,
        "price": floats,
        "tags": st.lists(st.sampled_from([b"", b"a", b"bc", b"a|b", b"\xff\x00"]), max_size=6).map(b"|".join),
        "seen": st.lists(int64s, max_size=7),
        "words": st.lists(strings, max_size=4),
        "prices": st.lists(floats, max_size=3),
    }
)


def columns_of(rows: list[dict]) -> dict[str, Column]:
    columns = {}
    for spec in INPUTS:
        name, cellular = spec["name"], [row[spec["name"]] for row in rows]
        if spec.get("ragged"):
            columns[name] = Column.of_lists(cellular, spec["dtype"])
        elif spec["dtype"] == "BYTES":
            columns[name] = Column.of(BytesColumn.of(cellular))
        else:
            columns[name] = Column.of(np.array(cellular, np.int64 if spec["dtype"] == "INT64" else np.float32))
    return columns


@settings(max_examples=150)
@given(st.lists(cells, max_size=6))
def test_every_kind_agrees_with_plain_python(rows: list[dict]) -> None:
    prepared = PREP.prepare(columns_of(rows))
    by_name = {spec["name"]: spec for spec in INPUTS}
    dense = []
    for spec in FEATURES:
        expected = [slow_feature(spec, [slow_values(by_name[i], row[i]) for i in spec["inputs"]]) for row in rows]
        if spec["kind"] in ("log", "dense"):
            dense.append([row[0] for row in expected])
            continue
        ids, offsets = prepared.bags[spec["name"]]
        assert ids.dtype == offsets.dtype == np.int64
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected, spec["name"]
    assert prepared.dense.shape == (len(rows), 3)
    assert prepared.dense.dtype == np.float32
    np.testing.assert_allclose(prepared.dense, np.array(dense, np.float64).T.reshape(-1, 3), rtol=1e-6)


@settings(max_examples=30)
@given(st.lists(cells, min_size=1, max_size=5), st.integers(0, 4))
def test_batches_joined_are_the_batch_prepared_at_once(rows: list[dict], cut: int) -> None:
    whole, head, tail = (PREP.prepare(columns_of(part)) for part in (rows, rows[:cut], rows[cut:]))
    joined = Prepared.join([head, tail])
    assert joined.rows == len(rows)
    np.testing.assert_array_equal(joined.dense, whole.dense)
    for name, (ids, offsets) in whole.bags.items():
        np.testing.assert_array_equal(joined.bags[name][0], ids)
        np.testing.assert_array_equal(joined.bags[name][1], offsets)


@settings(max_examples=30)
@given(st.lists(cells, min_size=1, max_size=4))
def test_prepared_ids_are_taken_as_they_are(rows: list[dict]) -> None:
    prepared = PREP.prepare(columns_of(rows))
    columns = {f"ids:{name}": Column.of(ids, offsets) for name, (ids, offsets) in prepared.bags.items()}
    again = PREP.prepare({**columns, "dense": Column.of(prepared.dense)})
    np.testing.assert_array_equal(again.dense, prepared.dense)
    for name, (ids, offsets) in prepared.bags.items():
        np.testing.assert_array_equal(again.bags[name][0], ids)
        np.testing.assert_array_equal(again.bags[name][1], offsets)


def test_features_of_one_table_are_pulled_together_and_told_apart() -> None:
    rows = [
        {"user": i, "city": b"x%d" % i, "price": 1.0, "tags": b"a", "seen": [], "words": [], "prices": []}
        for i in (1, 2)
    ]
    prepared = PREP.prepare(columns_of(rows))
    ids, offsets = PREP.by_table(prepared)["city"]
    assert len(offsets) == 2 * 2 + 1
    assert ids.tolist() == prepared.bags["city"][0].tolist() + prepared.bags["city_prefix"][0].tolist()
    sizes = {table: len(names) * 2 for table, names in PREP.tables.items()}
    pooled = {table: np.arange(n * 3, dtype=np.float32).reshape(n, 3) for table, n in sizes.items()}
    split = PREP.by_feature(pooled)
    assert split["city"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert split["city_prefix"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert set(split) == {spec.name for spec in PREP.bag_features}


def test_golden_ids_never_change() -> None:
    """Trained rows stand under these ids: a change here loses every model."""
    plain = {
        "input": [{"name": "s", "dtype": "BYTES"}, {"name": "i", "dtype": "INT64"}],
        "feature": [
            {"name": "hs", "kind": "hash", "inputs": ["s"], "table": "a"},
            {"name": "hi", "kind": "hash", "inputs": ["i"], "table": "b"},
            {"name": "c", "kind": "cross", "inputs": ["s", "i"], "table": "c"},
        ],
    }
    prepared = FeaturePrep.from_plain(plain).prepare({"s": Column.of(["a"]), "i": Column.of([7])})
    assert {name: ids.tolist() for name, (ids, _) in prepared.bags.items()} == GOLDEN


GOLDEN = {"hs": [-3292477735350538661], "hi": [-621772950581698083], "c": [-4791423621099305625]}


def good_columns() -> dict[str, Column]:
    return columns_of(
        [{"user": 1, "city": b"x", "price": 1.0, "tags": b"a|b", "seen": [1], "words": [b"w"], "prices": [1.0]}] * 2
    )


BAD_REQUESTS = {
    "missing": ({"city": None}, "'city' is missing"),
    "extra": ({"colour": Column.of([1, 2])}, "'colour' is unknown"),
    "dtype": ({"price": Column.of([1, 2])}, "'price' has datatype INT64; it must be FP32"),
    "rows": ({"city": Column.of(["x"])}, "'city' has 1 rows where the first input has 2"),
    "no offsets": ({"seen": Column.of([1, 2])}, "'seen' is multi-valued"),
    "offsets": ({"user": Column.of([1, 2], [0, 1, 2])}, "'user' has one value a row"),
    "width": ({"price": Column.of(np.ones((2, 3), np.float32))}, r"'price' has shape \[2, 3\]; it must be \[2, 1\]"),
    "infinite": ({"price": Column.of(np.array([1, np.inf], np.float32))}, "'price' is infinite in row 1"),
    "mixed": ({"ids:user": Column.of([1, 2])}, "'ids:user_hash' is missing"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_meet_one_sentence(case: str) -> None:
    change, message = BAD_REQUESTS[case]
    columns = {name: column for name, column in {**good_columns(), **change}.items() if column is not None}
    with pytest.raises(RequestError, match=message) as caught:
        PREP.prepare(columns)
    assert "\n" not in str(caught.value)


def test_a_value_that_scaling_takes_out_of_float32_is_refused() -> None:
    spec = {"name": "x", "kind": "dense", "inputs": ["x"], "scale": 2.0}
    prep = FeaturePrep.from_plain({"input": [{"name": "x", "dtype": "FP32"}], "feature": [spec]})
    assert prep.prepare({"x": Column.of(np.array([1.5, np.nan], np.float32))}).dense.tolist() == [[3], [0]]
    with pytest.raises(RequestError, match="'x' is too large in row 1; scaled by 2 it must be within float32"):
        prep.prepare({"x": Column.of(np.array([1, -3e38], np.float32))})


def test_prepared_values_are_finite() -> None:
    prepared = PREP.prepare(good_columns())
    columns = {f"ids:{name}": Column.of(*bags) for name, bags in prepared.bags.items()}
    prepared.dense[1, 0] = np.nan
    with pytest.raises(RequestError, match="input 'dense' is not finite in row 1"):
        PREP.prepare({**columns, "dense": Column.of(prepared.dense)})


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        ([1, 2, 3], [0, 2, 1, 3], "x: offsets falls from 2 to 1"),
        ([1, 2, 3], [1, 3], "begins with 1"),
        ([1, 2, 3], [0, 2], "ends with 2"),
        ([1, 2, 3], [], "shape"),
        ([[1, 2], [3, 4]], None, r"shape \(2, 2\)"),
        ([True, False], None, "dtype bool"),
        ([1, "a"], None, None),
        ([None, "a"], None, "flat list"),
    ],
)
def test_bad_columns_meet_one_sentence(values: list, offsets: list | None, message: str | None) -> None:
    if message is None:
        assert Column.of(values, offsets, "x").dtype == "BYTES"  # numpy reads [1, "a"] as strings
        return
    with pytest.raises(RequestError, match=message):
        Column.of(values, offsets, "x")


def one(**change: object) -> dict:
    """A declaration of one input and one feature, with keys of either changed ("in_" marks the input's)."""
    source = {"name": "x", "dtype": "BYTES", **{k[3:]: v for k, v in change.items() if k.startswith("in_")}}
    feature = {"name": "x", "kind": "hash", "inputs": ["x"], "table": "t"}
    feature |= {k: v for k, v in change.items() if not k.startswith("in_")}
    return {"input": [source], "feature": [{k: v for k, v in feature.items() if v is not None}]}


BAD_DECLARATIONS = {
    "unknown key": (one(colour=1), "unknown key 'colour'"),
    "unknown kind": (one(kind="hsah"), "kind is 'hsah'; it must be one of id, hash"),
    "unknown dtype": (one(in_dtype="INT32"), "dtype is 'INT32'"),
    "wrong type": (one(buckets="many"), "buckets is 'many'; it must be a whole number"),
    "switch for number": (one(buckets=True), "buckets is True"),
    "out of range": (one(buckets=-1), "buckets is -1; it must be 0 to"),
    "no table": (one(table=None), "needs a table"),
    "table of dense": (one(kind="dense", in_dtype="FP32"), "takes no table"),
    "kind and dtype": (one(kind="id"), "made of 'x' of BYTES; a id takes INT64"),
    "unknown input": (one(inputs=["y"]), "'y', which is no declared input"),
    "cross of one": (one(kind="cross"), "has 1 inputs; a cross takes 2 to 3"),
    "boundaries": (one(kind="bucketise", in_dtype="FP32", boundaries=[2, 1]), "rising"),
    "no boundaries": (one(kind="bucketise", in_dtype="FP32"), "rising"),
    "foreign setting": (one(scale=2.0), "sets scale; only kind dense"),
    "split": (one(in_split="||"), "one ASCII character"),
    "missing name": ({"input": [{"dtype": "BYTES"}], "feature": []}, "lacks the key 'name'"),
    "nothing": ({}, "declares no input"),
    "other table": ({"model": {}}, "may only have"),
    "kept name": (one(in_name="dense", inputs=["dense"]), "kept for prepared ids"),
}


@pytest.mark.parametrize("case", BAD_DECLARATIONS)
def test_bad_declarations_name_the_key(case: str) -> None:
    plain, message = BAD_DECLARATIONS[case]
    with pytest.raises(ConfigError, match=message):
        FeaturePrep.from_plain(plain)


def test_declarations_that_only_together_are_wrong() -> None:
    plain = one()
    plain["feature"].append({"name": "x", "kind": "hash", "inputs": ["x"], "table": "t"})
    with pytest.raises(ConfigError, match="feature 'x' is declared twice"):
        FeaturePrep.from_plain(plain)
    plain["feature"][1] |= {"name": "y", "pooling": "max"}
    with pytest.raises(ConfigError, match="pools table 't' by max"):
        FeaturePrep.from_plain(plain)
    plain = one()
    plain["input"].append({"name": "z", "dtype": "INT64"})
    with pytest.raises(ConfigError, match="'z' is used by no feature"):
        FeaturePrep.from_plain(plain)


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        FeaturePrep.load(tmp_path)
    (tmp_path / "features.toml").write_text("[[input")
    with pytest.raises(ConfigError, match="cannot be read"):
        FeaturePrep.load(tmp_path)


def test_columns_survive_a_file_and_refuse_another(tmp_path: Path) -> None:
    columns, labels = good_columns(), np.array([0, 1], np.float32)
    save_columns(tmp_path / "rows.npz", columns, labels=labels)
    loaded, arrays = load_columns(tmp_path / "rows.npz")
    np.testing.assert_array_equal(arrays["labels"], labels)
    before, after = PREP.prepare(columns), PREP.prepare(loaded)
    for name, (ids, offsets) in before.bags.items():
        np.testing.assert_array_equal(after.bags[name][0], ids)
        np.testing.assert_array_equal(after.bags[name][1], offsets)
    (tmp_path / "bad.npz").write_bytes((tmp_path / "rows.npz").read_bytes()[:100])
    with pytest.raises(RequestError, match="holds no columns"):
        load_columns(tmp_path / "bad.npz")


@settings(max_examples=30)
@given(st.lists(cells, min_size=1, max_size=5), st.data())
def test_rows_taken_are_the_rows_asked_for(rows: list[dict], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    taken = PREP.prepare(take_rows(columns_of(rows), np.array(index, np.int64)))
    chosen = PREP.prepare(columns_of([rows[i] for i in index]))
    for name, (ids, offsets) in chosen.bags.items():
        np.testing.assert_array_equal(taken.bags[name][0], ids)
        np.testing.assert_array_equal(taken.bags[name][1], offsets)
