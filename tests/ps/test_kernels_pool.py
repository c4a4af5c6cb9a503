"""Pooling against torch, of every width that takes another path through the vector code."""

import numpy as np
import pytest
import torch

from ps.spec import SGD, Initializer, TableSpec
from ps.store import Store
from tests.ps.store_helpers import pull_share, push_share, store_of, view_of

ROWS = 300
_STORES: dict[int, tuple[Store, np.ndarray]] = {}


def store_with_rows(dim: int) -> tuple[Store, np.ndarray]:
    """A table of ROWS assigned rows, and those rows."""
    if dim not in _STORES:
        store = store_of(view_of([TableSpec("t", dim, SGD(), Initializer(0, 0))]))
        rows = np.random.default_rng(dim).normal(size=(ROWS, dim)).astype(np.float32)
        store.push(push_share(1, [1], [list(range(ROWS))], rows, kind="assign"))
        _STORES[dim] = store, rows
    return _STORES[dim]


@pytest.mark.parametrize("dim", [1, 3, 16, 17, 33, 64, 80, 100, 130])
@pytest.mark.parametrize("mode", ["sum", "max", "weighted", "mean"])
def test_bags_equal_torch(dim: int, mode: str) -> None:
    store, rows = store_with_rows(dim)
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 7, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, ROWS, offsets[-1])  # with duplicates; some bags are empty
    weights = rng.normal(size=len(ids)).astype(np.float32) if mode == "weighted" else None
    share = pull_share(
        [1], [ids.tolist()], bags=[50], offsets=offsets.tolist(), modes=[int(mode == "max")],
        weights=None if weights is None else weights.tolist(),
    )  # fmt: skip
    out = store.pull(share).rows.reshape(50, dim)
    if mode == "mean":  # the client's last step
        out = out / np.maximum(lengths, 1)[:, None]
    expected = torch.nn.functional.embedding_bag(
        torch.from_numpy(ids),
        torch.from_numpy(rows),
        torch.from_numpy(offsets),
        mode="sum" if mode == "weighted" else mode,
        per_sample_weights=None if weights is None else torch.from_numpy(weights),
        include_last_offset=True,
    )
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_absent_ids_count_in_sums_and_maxima() -> None:
    store, rows = store_with_rows(3)
    ids = [0, 9999, 9999]  # bags [0, 9999], [9999], []
    offsets = [0, 2, 3, 3]
    share = pull_share([1], [ids], absent="zeros", bags=[3], offsets=offsets, modes=[1])
    reply = store.pull(share)
    assert reply.absent == 2
    expected = [np.maximum(rows[0], 0), np.zeros(3), np.zeros(3)]
    np.testing.assert_array_equal(reply.rows.reshape(3, 3), expected)


def test_no_bags_and_no_ids() -> None:
    store, _ = store_with_rows(16)
    assert store.pull(pull_share([], [])).rows.shape == (0,)
    assert store.pull(pull_share([1], [[]])).rows.shape == (0,)
    assert store.pull(pull_share([1], [[]], bags=[0], offsets=[0])).rows.shape == (0,)
    assert (store.pull(pull_share([1], [[]], bags=[2], offsets=[0, 0, 0])).rows == np.zeros(32)).all()


def test_a_reply_does_not_depend_on_what_else_is_held() -> None:
    """Pooling reads rows of the bags only: the same bits with 300 and with 20,300 rows held."""
    store = store_of(view_of([TableSpec("t", 64, SGD(), Initializer(-1, 1))]))
    store.push(push_share(1, [1], [list(range(300))], np.ones((300, 64))))
    share = pull_share([1], [list(range(300))], bags=[30], offsets=list(range(0, 301, 10)))
    before = store.pull(share).rows
    store.push(push_share(2, [1], [list(range(1000, 21_000))], np.ones((20_000, 64))))
    assert store.pull(share).rows.tobytes() == before.tobytes()
