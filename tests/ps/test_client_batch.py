"""The gateway: what users hand in, and one clear sentence for what is wrong with it."""

import subprocess
import sys

import numpy as np
import pytest

import ps
from ps.client.batch import absent_code, bags_batch, modes_of, ragged_batch, rows_batch
from ps.client.places import where
from ps.errors import ConfigError, RequestError
from ps.kernels.merge import MAX, MEAN, SUM
from ps.runtime import Runtime, runtime_path, write_runtime


def test_tables_are_joined_feature_behind_feature():
    batch = bags_batch({"a": ([1, 2, 3], [0, 1, 3]), "b": (np.array([9], np.int32), (0, 0, 1, 1), [0.5])})
    assert batch.names == ("a", "b")
    assert batch.ids.tolist() == [1, 2, 3, 9]
    assert batch.starts.tolist() == [0, 2, 5]
    assert batch.offsets.tolist() == [0, 1, 3, 3, 4, 4]
    assert batch.weights.tolist() == [1, 1, 1, 0.5]
    assert batch.weighted == {"b"}


def test_a_ragged_batch_may_name_a_table_twice():
    batch = ragged_batch(["a", "a"], ps.RaggedIds.of([1, 2, 3], [0, 1, 1, 2, 3], features=2))
    assert batch.starts.tolist() == [0, 2, 4]
    with pytest.raises(RequestError, match="3 tables were given for 2 features"):
        ragged_batch(["a", "b", "c"], ps.RaggedIds.of([1], [0, 0, 1], features=2))


def test_read_only_ids_are_taken_and_every_int64_is_an_id():
    ids = np.array([-(2**63), 2**63 - 1, 0])
    ids.flags.writeable = False
    assert rows_batch("a", ids).ids.flags.writeable
    assert rows_batch("a", [2**64 - 1][:0]).ids.size == 0
    assert rows_batch("a", np.array([2**64 - 1], np.uint64)).ids.tolist() == [-1]


@pytest.mark.parametrize("start", [0, 3, 7])
@pytest.mark.parametrize("stop", [3, 7, 11])
def test_a_part_of_a_batch_holds_some_bags_of_some_features(start, stop):
    offsets = {"a": [0, 2, 2, 5], "b": [0, 1, 4, 4, 6, 7], "c": [0, 0, 1, 2]}
    ids = {"a": [1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10, 11, 12], "c": [13, 14]}
    batch = bags_batch({name: (ids[name], offsets[name]) for name in offsets})
    bags = [(name, ids[name][x:y]) for name in offsets for x, y in zip(offsets[name], offsets[name][1:], strict=False)]
    part = batch.part(start, max(start, stop))
    found = []
    for f, name in enumerate(part.names):
        for g in range(part.starts[f], part.starts[f + 1]):
            found.append((name, part.ids[part.offsets[g] : part.offsets[g + 1]].tolist()))
    assert found == bags[start:stop]


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        ({"a": ([1, 2, 3], [0, 2, 1, 3])}, "offsets of table 'a' falls from 2 to 1 at index 2"),
        ({"b": ([1], [0, 1]), "a": ([1, 2, 3], [1, 3])}, "offsets of table 'a' begins with 1"),
        ({"a": ([1, 2, 3], [0, 4])}, "offsets of table 'a' ends with 4; it must end with the number of ids, 3"),
        ({"a": ([1, 2, 3], [0, 9, 3])}, "offsets of table 'a' falls from 9 to 3 at index 2"),
        ({"a": ([1, 2, 3], [])}, "offsets of table 'a' has shape"),
        ({"a": ([1, 2], [0, 1, 2]), "b": ([], [])}, "offsets of table 'b' has shape"),
        (
            {"a": (np.array([1]), np.array([0, 1])), "b": (np.array([True]), np.array([0, 1]))},
            "ids of table 'b' has dtype bool",
        ),
        ({"a": ([1.5], [0, 1])}, "ids of table 'a' has dtype float64"),
        ({"a": ([[1]], [0, 1])}, "ids of table 'a' has shape"),
        ({"a": [1, 2, 3, 4]}, "table 'a' was given no"),
        ({"a": ([1, 2], [0, 2], [1.0])}, r"weights of table 'a' have shape \(1,\); it must be \(2,\)"),
        ({"a": ([1, 2], [0, 2], [1.0, np.nan])}, r"weights\[1\] of table 'a' is nan"),
        ([("a", [1])], "bags is a list"),
    ],
)
def test_bad_bags_meet_one_clear_sentence(bags, message):
    with pytest.raises(RequestError, match=message):
        bags_batch(bags)


def test_modes_and_what_goes_with_weights():
    batch = bags_batch({"a": ([1], [0, 1]), "b": ([1], [0, 1], [2.0])})
    assert modes_of(batch, "sum").tolist() == [SUM, SUM]
    assert modes_of(batch, {"a": "max", "b": "sum", "other": "mean"}).tolist() == [MAX, SUM]
    assert modes_of(bags_batch({"a": ([1], [0, 1])}), "mean").tolist() == [MEAN]
    with pytest.raises(RequestError, match='weights go with "sum" only'):
        modes_of(batch, "mean")
    with pytest.raises(RequestError, match="mode of table 'a' is 'avg'"):
        modes_of(batch, "avg")
    with pytest.raises(RequestError, match="mode has no entry for table 'b'"):
        modes_of(batch, {"a": "sum"})
    with pytest.raises(RequestError, match="absent is 'nothing'"):
        absent_code("nothing")


def test_where_the_cluster_is(monkeypatch, tmp_path):
    monkeypatch.delenv("EMBRING_TOKEN", raising=False)
    monkeypatch.delenv("EMBRING_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="no cluster is known here"):
        where(None, None, None)
    (tmp_path / "token").write_text("from the file\n")
    write_runtime(Runtime(("tcp:h:3",), str(tmp_path / "token")))
    found, token, tls = where(None, None, None)
    assert (found(), token, tls) == (("tcp:h:3",), "from the file", None)
    write_runtime(Runtime(("tcp:h:4",), str(tmp_path / "token")))
    assert found() == ("tcp:h:4",)
    runtime_path().unlink()
    assert found() == ("tcp:h:3",)
    write_runtime(Runtime(("tcp:h:3",), str(tmp_path / "token")))
    assert where(None, "mine", None)[1] == "mine"
    monkeypatch.setenv("EMBRING_ADDRESS", "h:1, unix:/p")
    assert where(None, None, None) == (("h:1", "unix:/p"), "", None)
    monkeypatch.setenv("EMBRING_TOKEN", "from the environment")
    assert where(None, None, None)[1] == "from the environment"
    assert where("x:1,y:2", None, None)[0] == ("x:1", "y:2")
    for bad in ("", "nowhere", ["h:x"]):
        with pytest.raises(ConfigError):
            where(bad, "t", None)


def test_the_exported_names_are_these():
    assert set(ps.__all__) == {
        "connect", "Client", "AsyncClient", "PushHandle", "RowRange", "TableSpec", "SGD", "Adagrad",
        "RowWiseAdagrad", "Adam", "FTRL", "Initializer", "RaggedIds", "hash_strings", "EmbringError", "RequestError",
        "MemoryFull", "ConfigError", "AuthError", "WrongView", "NotApplied", "Overloaded", "PerhapsApplied",
        "SlotsLost",
    }  # fmt: skip
    for name in ps.__all__:
        assert getattr(ps, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ps.nonsense


def test_a_client_needs_neither_ray_nor_grpc_nor_torch():
    code = (
        "import sys, ps\n"
        "assert not {'numpy', 'numba'} & set(sys.modules), 'import ps is lazy'\n"
        "ps.connect, ps.AsyncClient, ps.TableSpec, ps.hash_strings\n"
        "print(sorted({'ray', 'grpc', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("addresses", "token", "message"),
    [
        (5, "t", "addresses is 5; it must be texts"),
        ([b"host:80"], "t", "it must be texts"),
        ("http://host:80", "t", "address 'http://host:80' is none"),
        ("host:80", "t" * 1025, "the token must be a text of at most 1024 characters"),
        ("host:80", "\ud800", "the token must be a text"),
        ("host:80", b"t", "the token must be a text"),
    ],
)
def test_what_is_no_address_or_token_is_said_at_once(addresses, token, message):
    with pytest.raises(ConfigError, match=message):
        ps.connect(addresses, token)
