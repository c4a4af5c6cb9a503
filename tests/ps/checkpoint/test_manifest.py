"""Manifests: whatever fits its checksum is checked before a cluster hears of it, and refused in one sentence."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
from typer.testing import CliRunner

from deploy.cli import app
from ps.checkpoint.files import MANIFEST, survey
from ps.checkpoint.manifest import (
    FORMAT,
    MAGIC,
    TERM_MAX,
    Block,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from ps.checkpoint.retention import prune, verify
from ps.checkpoint.storage import CheckpointError, Storage
from ps.spec import SGD, TableSpec
from tests.ps.checkpoint.loopback import LoopCluster, without_sockets

__all__ = ["without_sockets"]
pytestmark = pytest.mark.usefixtures("without_sockets")

ITEM = TableSpec("item", 2, SGD(lr=1.0), seed=3)
GOOD = Manifest(
    "a", "2026-01-01T00:00:00+00:00", 2**63 - 1, 3, "f", 7, [[1, "item", 2, ITEM.to_plain()]],
    [[2, "sharded", 1, 0, 64]], np.arange(5), np.arange(5) << 40 | 3, "parent", 2**64 - 1, 4, {"ctr": "7"},
    (Block(0, 10, 2, 2**64 - 1),),
)  # fmt: skip


def test_a_manifest_keeps_everything() -> None:
    read = decode_manifest(encode_manifest(GOOD), "x")
    assert replace(read, slots=GOOD.slots, positions=GOOD.positions, checksum=0) == GOOD
    assert (read.slots == GOOD.slots).all()
    assert (read.positions == GOOD.positions).all()
    with pytest.raises(CheckpointError, match="does not begin as one"):
        decode_manifest(b"{}" * 20, "x")


def forged(body: bytes) -> bytes:
    """A manifest of any body, whose checksum fits."""
    begin = struct.pack("<8sII", MAGIC, FORMAT, len(body))
    return begin + struct.pack("<Q", xxhash.xxh3_64_intdigest(begin + body)) + body


def spec(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["tables"][0][3].update(changes)


def group(at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["groups"][0].__setitem__(at, value)


def table(at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["tables"][0].__setitem__(at, value)


def column(name: str, *described: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain.update({name: [[list(d) for d in described], plain[name][1]]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (spec(ttl_s=86400), r"cannot be restored: table specification has an unknown key 'ttl_s'$"),
        (spec(dim=10**9), r"cannot be restored: dim of table 'item' is 1000000000; it must be 1 to 4096$"),
        (spec(name="user"), "table 'item' has the specification of 'user'"),
        (spec(replicas=2), r"has placement and replicas \('sharded', 2\); its group 2 has \('sharded', 1\)$"),
        (lambda plain: plain["tables"][0][3].pop("replicas") and plain["groups"][0].__setitem__(2, "all"), "its group"),
        (lambda plain: plain["tables"].append(plain["tables"][0]), "table number 1 comes twice$"),
        (lambda plain: plain["tables"].append([2, *plain["tables"][0][1:]]), "table 'item' comes twice$"),
        (table(0, 2**40), "table number is 1099511627776; it must be a whole number from 0 to 16777215"),
        (table(2, 5), "its group 5 has None"),
        (group(4, 63), "group 2 has 63 slots; it must have a power of two"),
        (group(4, 2**40), "slots of group 2 is 1099511627776; it must be a whole number from 1 to"),
        (group(3, -64), "the first slot of group 2 is -64; it must be a whole number from 0"),
        (
            lambda plain: plain["groups"].append([3, "sharded", 1, 32, 64]),
            "the first slot of group 3 is 32; it must be .* from 64",
        ),
        ({"term_max": 2**62}, f"term_max is 4611686018427387904; it must be a whole number from 0 to {TERM_MAX}"),
        ({"term_max": "x"}, "term_max is x; it must be a whole number"),
        ({"term_max": 3}, r"positions has a 4398046511107; every one must be from 0 to 4398046511103$"),
        ({"models": {"ctr": 7}}, "models must be text"),
        ({"created": 5}, "created must be text"),
        ({"created": "2026-01-01T00:00:00"}, "created is '2026-01-01T00:00:00'; it must have a time zone"),
        ({"created": "yesterday"}, "damaged: ValueError Invalid isoformat string: 'yesterday'"),
        ({"models": None}, "damaged: TypeError"),
        ({"tables": None}, "damaged: TypeError"),
        ({"surprise": 1}, "damaged: TypeError"),
        (column("slots", ("<i8", 2**62)), "damaged: OverflowError"),
        (column("slots", ("<i8", -5)), "damaged: ValueError"),
        (column("slots", ("<i8", 4)), "damaged: ValueError"),
        (lambda plain: plain["blocks"].__setitem__(1, b"\0garbage"), "damaged: error"),
        (lambda plain: plain.clear(), "damaged: KeyError 'blocks'"),
    ],
)
def test_what_fits_its_checksum_and_no_cluster_is_refused(change: Any, sentence: str) -> None:
    plain = msgpack.unpackb(encode_manifest(GOOD)[24:])
    plain.update(change) if isinstance(change, dict) else change(plain)
    with pytest.raises(CheckpointError, match=f"^x .*{sentence}"):
        decode_manifest(forged(msgpack.packb(plain)), "x")


@pytest.mark.parametrize("body", [b"", b"\x07", b"\xc1", b"\x91" * 2000, msgpack.packb({1: 2})])
def test_a_body_that_is_no_manifest_is_damaged(body: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^x is damaged: "):
        decode_manifest(forged(body), "x")


def test_one_that_cannot_be_restored_is_in_the_way_of_nothing_else(tmp_path: Path) -> None:
    """A later embring wrote it: nothing of the cluster is dropped for it, and the next save stands on another."""
    storage, cluster = Storage(tmp_path), LoopCluster(2)
    cluster.create(ITEM)
    cluster.push("item", list(range(40)), np.ones((40, 2)))
    for name in ("a", "b"):
        cluster.save(storage, name)
    path = tmp_path / "b" / MANIFEST
    plain = msgpack.unpackb(path.read_bytes()[24:])
    spec(ttl_s=5)(plain)
    path.write_bytes(forged(msgpack.packb(plain)))
    sentence = f"{path} cannot be restored: table specification has an unknown key 'ttl_s'"
    rows, epoch = cluster.rows("item"), cluster.view.epoch
    with pytest.raises(CheckpointError, match=f"^{sentence}$"):
        cluster.restore(storage, name="b", replace_tables=True)
    assert (cluster.rows("item"), cluster.view.epoch) == (rows, epoch)
    assert [str(error) for error in survey(storage)[1]] == [sentence]
    assert [c.problems for c in verify(storage)] == [(sentence,), ()]
    listed = CliRunner().invoke(app, ["checkpoint", "list", str(tmp_path)])
    assert (listed.exit_code, listed.stdout.split()[0]) == (1, "a")
    assert cluster.save(storage, "c", incremental=True).parent == "a"
    assert prune(storage, 1, 1) == []
