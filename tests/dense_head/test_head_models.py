"""Each head against a twin that is written sample by sample and pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense_head import HeadError, HeadFeature, HeadSpec, build


def make(kind: str, features: int, dim: int, dense: int, **more: object) -> tuple[HeadSpec, torch.nn.Module]:
    torch.manual_seed(features * 100 + dim * 10 + dense)
    spec = HeadSpec(kind, tuple(HeadFeature(f"f{i}", f"t{i}", dim) for i in range(features)), dense, (5, 3), **more)
    return spec, build(spec).eval()


def batch(spec: HeadSpec, rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    embeddings = {name: torch.randn(rows, dim) for name, dim in spec.dims.items()}
    return embeddings, torch.randn(rows, spec.dense) if spec.dense else None


def layers(sequence: torch.nn.Sequential, x: np.ndarray) -> np.ndarray:
    """An MLP by hand: linear layers and relu."""
    for layer in sequence:
        if isinstance(layer, torch.nn.Linear):
            x = layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()
        else:
            assert isinstance(layer, torch.nn.ReLU)
            x = np.maximum(x, 0)
    return x


def slow(spec: HeadSpec, module: torch.nn.Module, vectors: list[np.ndarray], dense: np.ndarray | None) -> float:
    """One sample's logit, in plain loops."""
    if spec.kind == "mlp":
        return layers(module.top, np.concatenate([*vectors, *([dense] if spec.dense else [])]))[0]
    if spec.kind == "dlrm":
        below = [layers(module.bottom, dense)] if spec.dense else []
        everything = below + vectors
        products = [everything[i] @ everything[j] for i in range(len(everything)) for j in range(i)]
        return layers(module.top, np.concatenate([*below, np.array(products, np.float32)]))[0]
    logit = sum(v[0] for v in vectors)
    for i in range(len(vectors)):
        for j in range(i):
            logit += vectors[i][1:] @ vectors[j][1:]
    if spec.dense:
        logit += layers([module.linear], dense)[0]
    deep = np.concatenate([*(v[1:] for v in vectors), *([dense] if spec.dense else [])])
    return logit + layers(module.deep, deep)[0]


@given(
    st.sampled_from(["mlp", "dlrm", "deepfm"]),
    st.integers(2, 5),
    st.integers(2, 6),
    st.integers(0, 4),
    st.integers(1, 4),
)
def test_heads_equal_their_slow_twins(kind: str, features: int, dim: int, dense: int, rows: int) -> None:
    spec, module = make(kind, features, dim, dense)
    embeddings, columns = batch(spec, rows)
    logits = module(embeddings, columns).detach().numpy()
    assert logits.shape == (rows,)
    for row in range(rows):
        vectors = [embeddings[name][row].numpy() for name in spec.dims]
        expected = slow(spec, module, vectors, None if columns is None else columns[row].numpy())
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_two_branch_is_the_network_of_the_adult_example() -> None:
    features = tuple(HeadFeature(f"c{i}", f"c{i}", 8) for i in range(8))
    spec = HeadSpec("two_branch", features, 5, (256, 128), (16,), (128,), "none")
    module = build(spec).eval()
    shapes = [tuple(m.weight.shape) for m in module.modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(shapes) == sorted([(16, 5), (128, 64), (256, 144), (128, 256), (1, 128)])
    assert [m.num_features for m in module.modules() if isinstance(m, torch.nn.BatchNorm1d)] == [128, 16]
    assert not [m for m in module.modules() if isinstance(m, torch.nn.ReLU)]
    embeddings, dense = batch(spec, 3)
    sparse = module.sparse(torch.cat(list(embeddings.values()), 1))
    expected = module.top(torch.cat([sparse, module.dense(dense)], 1))[:, 0]
    torch.testing.assert_close(module(embeddings, dense), expected)


def test_a_head_of_every_width_of_table() -> None:
    spec = HeadSpec("mlp", (HeadFeature("a", "a", 3), HeadFeature("b", "b", 5)), 0, ())
    module = build(spec)
    assert module({"a": torch.zeros(2, 3), "b": torch.zeros(2, 5)}, None).shape == (2,)


def test_wrong_inputs_are_named() -> None:
    spec, module = make("mlp", 2, 3, 2)
    embeddings, dense = batch(spec, 2)
    with pytest.raises(HeadError, match="lack 'f1'"):
        module({"f0": embeddings["f0"]}, dense)
    with pytest.raises(HeadError, match="hold 'more'"):
        module({**embeddings, "more": embeddings["f0"]}, dense)
    with pytest.raises(HeadError, match="dense has 0 columns; the head takes 2"):
        module(embeddings, None)
