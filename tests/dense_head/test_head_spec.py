"""HeadSpec: what it accepts, what it refuses, and its JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dense_head import HeadError, HeadFeature, HeadSpec

TWO = (HeadFeature("user", "user", 4), HeadFeature("item", "item", 4, "mean"))


@given(
    st.sampled_from(["mlp", "dlrm", "deepfm", "two_branch"]),
    st.integers(0, 5),
    st.lists(st.integers(1, 9), max_size=3),
    st.sampled_from(["relu", "none"]),
)
def test_json_round_trip(kind: str, dense: int, hidden: list[int], activation: str) -> None:
    spec = HeadSpec(kind, TWO, dense, tuple(hidden), activation=activation).check()
    assert HeadSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "resnet"}, "kind is 'resnet'; it must be one of mlp"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"dense": -1}, "dense is -1"),
        ({"dense": True}, "dense is True"),
        ({"hidden": [0]}, "a width in hidden is 0"),
        ({"hidden": 3}, "hidden is 3; it must be a list"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"features": []}, "no features"),
        ({"features": 1}, "features of a head are 1"),
        ({"features": [{"name": "a", "table": "a"}]}, "feature 1 of the head is incomplete"),
        ({"features": [{"name": "a", "table": "a", "dim": 4, "size": 2}]}, "unknown key 'size'"),
        ({"features": [{"name": "a", "table": "a", "dim": 4, "pooling": "min"}]}, "pooling of feature 'a' is 'min'"),
        ({"features": [{"name": "a", "table": "a", "dim": 4}] * 2}, "feature 'a' is listed twice"),
        ({"features": [{"name": "a", "table": "", "dim": 4}]}, "feature 'a' has table ''"),
        (
            {"features": [{"name": "a", "table": "t", "dim": 4}, {"name": "b", "table": "t", "dim": 8}]},
            "'a' and 'b' share table 't'",
        ),
        ({"kind": "deepfm", "features": [{"name": "a", "table": "a", "dim": 1}]}, "dim of a deepfm head is 1"),
        ({"kind": "dlrm", "features": [{"name": "a", "table": "a", "dim": 4}]}, "has one vector"),
        (
            {"kind": "dlrm", "features": [{"name": n, "table": n, "dim": d} for n, d in (("a", 4), ("b", 8))]},
            r"dims \[4, 8\]; they must be equal",
        ),
        ({"dense_hidden": [4]}, "dense_hidden is set for a mlp head"),
        ({"sparse_hidden": [4]}, "sparse_hidden is set for a mlp head"),
    ],
)
def test_refusals_name_the_value(change: dict, says: str) -> None:
    plain = {**json.loads(HeadSpec("mlp", TWO).to_json()), **change}
    with pytest.raises(HeadError, match=says):
        HeadSpec.from_json(json.dumps(plain))


@pytest.mark.parametrize("text", ["", "{", "[]", '"mlp"', '{"kind": "mlp"}'])
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(HeadError):
        HeadSpec.from_json(text)
