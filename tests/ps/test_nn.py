"""ps.nn.EmbeddingBag against torch.nn.EmbeddingBag and SGD, over a client that is a table in this process."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ps
from ps.nn import EmbeddingBag

ROWS, DIM, LR = 11, 3, 0.5


class TableClient:
    """One table under SGD with rate LR, in plain loops. Counts its pushes."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows.copy()
        self.pushes: list[np.ndarray] = []

    def pull(self, name: str, ids: np.ndarray, absent: str | None = None) -> np.ndarray:
        return self.rows[ids]

    def pull_bags(self, bags: Mapping[str, Any], mode: str = "sum", absent: str | None = None) -> dict:
        out = {}
        for name, (ids, offsets, *rest) in bags.items():
            weights = rest[0] if rest else np.ones(len(ids), np.float32)
            pooled = np.zeros((len(offsets) - 1, DIM), np.float32)
            for b in range(len(pooled)):
                span = slice(offsets[b], offsets[b + 1])
                count = max(1, offsets[b + 1] - offsets[b]) if mode == "mean" else 1
                pooled[b] = (self.rows[ids[span]] * weights[span, None]).sum(0) / count
            out[name] = pooled
        return out

    def push(self, name: str, ids: np.ndarray, grads: np.ndarray, lr_scale: float = 1.0) -> None:
        if not np.isfinite(grads).all():
            raise ps.RequestError("a gradient is not finite")
        self.pushes.append(np.array(ids))
        for i, grad in zip(ids, grads, strict=True):
            self.rows[i] -= LR * lr_scale * grad

    def push_bags(self, bags: Mapping, grads: Mapping, mode: str = "sum", lr_scale: float = 1.0) -> None:
        for name, (ids, offsets, *rest) in bags.items():
            weights = rest[0] if rest else np.ones(len(ids), np.float32)
            counts = np.diff(offsets)
            each = np.repeat(grads[name], counts, axis=0) * weights[:, None]
            if mode == "mean":
                each = each / np.repeat(counts, counts)[:, None]
            self.push(name, ids, each.astype(np.float32), lr_scale)


def pair(mode: str, **more: Any) -> tuple[TableClient, EmbeddingBag, torch.nn.EmbeddingBag]:
    torch.manual_seed(4)
    local = torch.nn.EmbeddingBag(ROWS, DIM, mode=mode, include_last_offset=more.get("include_last_offset", False))
    client = TableClient(local.weight.detach().numpy())
    return client, EmbeddingBag(client, "item", mode, **more), local  # type: ignore[arg-type]


bags_of_ids = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=1, max_size=5)


@given(bags_of_ids, st.sampled_from(["sum", "mean", "max"]), st.booleans(), st.booleans())
def test_a_training_step_is_that_of_torch(bags: list[list[int]], mode: str, last: bool, weighted: bool) -> None:
    client, remote, local = pair(mode, include_last_offset=last)
    ids = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
    offsets = torch.tensor(np.cumsum([0] + [len(bag) for bag in bags])[: len(bags) + last])
    weights = torch.linspace(0.5, 2, len(ids)) if weighted and mode == "sum" else None
    target = torch.randn(len(bags), DIM, generator=torch.Generator().manual_seed(len(ids)))
    optimizer = torch.optim.SGD(local.parameters(), LR)
    for _ in range(2):
        optimizer.zero_grad()
        expected, found = local(ids, offsets, weights), remote(ids, offsets, weights)
        torch.testing.assert_close(found, expected)
        (expected - target).square().sum().backward()
        optimizer.step()
        (found - target).square().sum().backward()
    np.testing.assert_allclose(client.rows, local.weight.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_ids_of_two_dimensions_are_bags_of_one_length() -> None:
    _, remote, local = pair("mean")
    ids = torch.tensor([[1, 2, 2], [0, 5, 9]])
    torch.testing.assert_close(remote(ids), local(ids))


def test_the_push_is_sent_in_backward_and_again_over_a_retained_graph() -> None:
    client, remote, _ = pair("sum")
    out = remote(torch.tensor([1, 2]), torch.tensor([0]))
    assert not client.pushes
    out.sum().backward(retain_graph=True)
    assert len(client.pushes) == 1
    out.sum().backward()
    assert len(client.pushes) == 2
    (remote(torch.tensor([[1]])) + remote(torch.tensor([[2]]))).sum().backward()
    assert [list(ids) for ids in client.pushes[2:]] in ([[1], [2]], [[2], [1]])


def test_no_gradient_no_push() -> None:
    client, remote, _ = pair("sum")
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        assert not remote(ids).requires_grad
    assert not remote.eval()(ids).requires_grad
    assert remote.train()(ids).requires_grad
    assert not client.pushes
    assert list(remote.parameters()) == []
    assert remote.state_dict() == {}


def test_deferred_gradients_are_one_push_scaled_or_forgotten() -> None:
    client, remote, _ = pair("mean", deferred=True)
    before = client.rows.copy()
    for ids in ([[1, 2]], [[2, 3]]):
        (remote(torch.tensor(ids)).sum() * 8.0).backward()
    assert not client.pushes
    remote.step(grad_scale=1 / 8.0)
    assert [list(ids) for ids in client.pushes] == [[1, 2, 2, 3]]
    moved = before - client.rows
    np.testing.assert_allclose(moved[1:4, 0], LR * np.array([0.5, 1.0, 0.5]), rtol=1e-5)
    remote.step()
    remote(torch.tensor([[1]])).sum().backward()
    remote.discard()
    remote.step()
    assert len(client.pushes) == 1


def test_deferred_with_and_without_weights() -> None:
    client, remote, _ = pair("sum", deferred=True)
    before = client.rows.copy()
    remote(torch.tensor([[1, 2]]), per_sample_weights=torch.tensor([[2.0, 3.0]])).sum().backward()
    remote(torch.tensor([[4]])).sum().backward()
    remote.step()
    np.testing.assert_allclose((before - client.rows)[[1, 2, 4], 0], LR * np.array([2, 3, 1]), rtol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_an_overflow_comes_out_of_backward_and_changes_nothing(mode: str) -> None:
    client, remote, _ = pair(mode)
    before = client.rows.copy()
    with pytest.raises(ps.RequestError, match="not finite"):
        (remote(torch.tensor([[1]])).sum() * float("inf")).backward()
    np.testing.assert_array_equal(client.rows, before)


def test_lr_scale_is_passed_on() -> None:
    client, remote, _ = pair("sum", lr_scale=0.5)
    before = client.rows.copy()
    remote(torch.tensor([[1]])).sum().backward()
    np.testing.assert_allclose(before[1] - client.rows[1], LR * 0.5, rtol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    _, remote, _ = pair("mean")
    with pytest.raises(ps.RequestError, match="mode is 'min'"):
        EmbeddingBag(remote.client, "item", "min")  # type: ignore[arg-type]
    with pytest.raises(ps.RequestError, match="1 dimensions without offsets"):
        remote(torch.tensor([1]))
    with pytest.raises(ps.RequestError, match="come with mode 'mean'"):
        remote(torch.tensor([[1]]), per_sample_weights=torch.ones(1, 1))
    _, remote, _ = pair("sum")
    with pytest.raises(ps.RequestError, match="needs a gradient"):
        remote(torch.tensor([[1]]), per_sample_weights=torch.ones(1, 1, requires_grad=True))
    with pytest.raises(ps.RequestError, match=r"shape \(1,\); it must be \(1, 1\)"):
        remote(torch.tensor([[1]]), per_sample_weights=torch.ones(1))
    with pytest.raises(ps.RequestError, match="falls from 2 to 1"):
        remote(torch.tensor([1, 2]), torch.tensor([0, 2, 1]))
