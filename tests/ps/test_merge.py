"""The merge kernels against torch.nn.functional.embedding_bag, over shares answered by a slow, plain server."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels.merge import MAX, MEAN, SUM, finish, first_not_finite, gather, merge
from ps.kernels.split import CHOOSE, PIECES, ROWS
from ps.share import BAGS
from tests.ps.test_split import Request, share_of


def row(f: int, i: int, dim: int) -> np.ndarray:
    """The row of id i in table f: small whole numbers, so that float32 sums are exact in any order."""
    return np.array([(i * 7 + f * 3 + k * 5) % 11 - 5 for k in range(dim)], np.float32)


def answer(request: Request, result, s: int, dims: list[int], modes: list[int]) -> np.ndarray:
    """A server's reply: the sum or maximum of each share bag."""
    flat = [np.empty(0, np.float32)]
    for f, dim in enumerate(dims):
        for bag in share_of(result, s, f, request.weighted):
            rows = np.array([weight * row(f, i, dim) for i, weight in bag], np.float32)
            flat.append(rows.max(0) if modes[f] == MAX else rows.sum(0, dtype=np.float32))
    return np.concatenate(flat)


@st.composite
def pooled_requests(draw):
    features = draw(st.integers(1, 3))
    servers = draw(st.integers(1, 4))
    modes = draw(st.lists(st.sampled_from((SUM, MEAN, MAX)), min_size=features, max_size=features))
    one_bag = st.lists(st.integers(-9, 9), max_size=8)
    bags = draw(st.lists(st.lists(one_bag, max_size=8), min_size=features, max_size=features))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    readers = rng.integers(0, servers, (64 + features, 1)).astype(np.int16)
    policy = draw(st.lists(st.sampled_from((CHOOSE, ROWS, PIECES)), min_size=features, max_size=features))
    weighted = all(m == SUM for m in modes) and draw(st.booleans())
    request = Request(bags, [False] * features, readers, servers, policy, weighted)
    return request, modes, draw(st.lists(st.integers(1, 20), min_size=features, max_size=features))


def geometry(request: Request, dims: list[int], modes: list[int]):
    counts = np.diff(request.starts) * np.array(dims)
    places = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return int(counts.sum()), places, np.array(dims, np.int64), np.array(modes, np.uint8)


@settings(max_examples=150)
@given(pooled_requests())
def test_merged_replies_equal_torch_embedding_bag(drawn):
    request, modes, dims = drawn
    result = request.split()
    size, places, dims_, modes_ = geometry(request, dims, modes)
    out = np.full(size, np.nan, np.float32)
    touched = np.zeros(int(request.starts[-1]), np.uint8)
    for s in range(request.servers):
        edges = slice(result.starts[2, s], result.starts[2, s + 1])
        weights = result.edge_weight[edges] if request.weighted else result.edge_weight
        merge(
            answer(request, result, s, dims, modes), result.features[s], result.edges[s], result.edge_bag[edges],
            result.edge_row[edges], weights, request.starts, places, dims_, modes_, touched, out,
        )  # fmt: skip
    finish(request.offsets, request.starts, places, dims_, modes_, touched, out)
    name = {SUM: "sum", MEAN: "mean", MAX: "max"}
    for f, dim in enumerate(dims):
        first, last = request.starts[f], request.starts[f + 1]
        bounds = request.offsets[first : last + 1]
        ids = request.ids[bounds[0] : bounds[-1]]
        weight = torch.from_numpy(np.stack([row(f, i, dim) for i in range(-9, 10)]))
        pooled = out[places[f] : places[f] + (last - first) * dim].reshape(-1, dim)
        expected = torch.nn.functional.embedding_bag(
            torch.from_numpy(ids + 9),
            weight,
            torch.from_numpy(bounds - bounds[0]),
            mode=name[modes[f]],
            include_last_offset=True,
            per_sample_weights=(
                torch.from_numpy(request.weights[bounds[0] : bounds[-1]]) if request.weighted else None
            ),
        )
        np.testing.assert_allclose(pooled, expected.numpy(), rtol=1e-6)


@settings(max_examples=100)
@given(pooled_requests())
def test_gathered_gradients_sum_to_those_of_each_id(drawn):
    request, modes, dims = drawn
    modes = [SUM if m == MAX else m for m in modes]
    result = request.split()
    size, places, dims_, modes_ = geometry(request, dims, modes)
    grads = np.random.default_rng(0).integers(-5, 6, size).astype(np.float32)
    sent: dict = {}
    for s in range(request.servers):
        edges = slice(result.starts[2, s], result.starts[2, s + 1])
        weights = result.edge_weight[edges] if request.weighted else result.edge_weight
        rows = np.full(int((result.features[s, :, BAGS] * dims_).sum()), np.nan, np.float32)
        gather(
            grads, result.features[s], result.edges[s], result.edge_bag[edges], result.edge_row[edges], weights,
            request.offsets, request.starts, places, dims_, modes_, False, rows,
        )  # fmt: skip
        at = 0
        for f, dim in enumerate(dims):
            for bag in share_of(result, s, f, request.weighted):
                for i, weight in bag:
                    sent[f, i] = sent.get((f, i), 0) + weight * rows[at : at + dim]
                at += dim
    expected: dict = {}
    for f, dim in enumerate(dims):
        for b, bag in enumerate(request.bags[f]):
            g = request.starts[f] + b
            grad = grads[places[f] + b * dim : places[f] + (b + 1) * dim]
            for k, i in enumerate(bag):
                weight = request.weights[request.offsets[g] + k] if request.weighted else 1.0
                share = grad / np.float32(len(bag)) if modes[f] == MEAN else grad
                expected[f, i] = expected.get((f, i), 0) + weight * share
    assert sent.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(sent[key], value, rtol=1e-4, atol=1e-5)


def test_of_duplicates_in_an_assignment_the_last_wins():
    readers = np.zeros((65, 1), np.int16)
    request = Request([[[7], [8], [7], [7]]], [False], readers, 1, [ROWS])
    result = request.split()
    rows = np.empty(2, np.float32)
    gather(
        np.array([1, 2, 3, 4], np.float32), result.features[0], result.edges[0], result.edge_bag, result.edge_row,
        result.edge_weight, request.offsets, request.starts, np.zeros(1, np.int64), np.ones(1, np.int64),
        np.zeros(1, np.uint8), True, rows,
    )  # fmt: skip
    assert result.ids[:2].tolist() == [7, 8]
    assert rows.tolist() == [4, 2]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 4095, 4096, 9999])
def test_the_first_value_that_is_not_finite_is_found(bad, at):
    values = np.full(10000, np.finfo(np.float32).max, np.float32)
    values[::3] *= -1
    assert first_not_finite(values) == -1
    values[at] = bad
    values[9999] = np.nan
    assert first_not_finite(values) == at
