"""The training step against autograd by hand, and the measures against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense_head import HeadError, HeadFeature, HeadSpec, TrainStep, auc, build, log_loss

SPEC = HeadSpec("deepfm", (HeadFeature("a", "a", 4), HeadFeature("b", "b", 4)), 2, (6,))


def arrays(rows: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    embeddings = {name: rng.normal(size=(rows, 4)).astype(np.float32) for name in ("a", "b")}
    return embeddings, rng.normal(size=(rows, 2)).astype(np.float32), rng.integers(0, 2, rows).astype(np.float32)


def test_gradients_are_those_of_the_mean_loss() -> None:
    torch.manual_seed(1)
    module = build(SPEC)
    embeddings, dense, labels = arrays(7)
    loss, grads = TrainStep(module)(embeddings, dense, labels)
    for name in ("a", "b"):
        for at in ((0, 0), (6, 3)):
            moved = {k: v.astype(np.float64) for k, v in embeddings.items()}
            losses = []
            for step in (1e-4, -1e-4):
                moved[name] = embeddings[name].astype(np.float64)
                moved[name][at] += step
                inputs = {k: torch.tensor(v) for k, v in moved.items()}
                logits = build_double(module)(inputs, torch.tensor(dense, dtype=torch.float64))
                scores = torch.sigmoid(logits).detach().numpy()
                losses.append(-np.mean(labels * np.log(scores) + (1 - labels) * np.log(1 - scores)))
            np.testing.assert_allclose(grads[name][at], (losses[0] - losses[1]) / 2e-4, rtol=1e-3, atol=1e-6)
    assert loss == pytest.approx(np.mean(losses), rel=1e-3)


def build_double(module: torch.nn.Module) -> torch.nn.Module:
    twin = build(SPEC)
    twin.load_state_dict(module.state_dict())
    return twin.double()


def test_weights_step_with_an_optimizer_and_keep_gradients_without() -> None:
    torch.manual_seed(2)
    module = build(SPEC)
    before = [p.detach().clone() for p in module.parameters()]
    embeddings, dense, labels = arrays(5)
    TrainStep(module)(embeddings, dense, labels)
    held = [p.grad.clone() for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    TrainStep(module, torch.optim.SGD(module.parameters(), 0.5))(embeddings, dense, labels)
    for old, grad, new in zip(before, held, module.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - 0.5 * grad)


def test_a_loss_falls_when_steps_are_taken() -> None:
    torch.manual_seed(3)
    module = build(SPEC)
    embeddings, dense, _ = arrays(64)
    labels = (dense[:, 0] + embeddings["a"][:, 1] > 0).astype(np.float32)
    step = TrainStep(module, torch.optim.Adam(module.parameters(), 0.02))
    losses = [step(embeddings, dense, labels)[0] for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_buffers_are_reused_in_place() -> None:
    module = build(SPEC)
    step = TrainStep(module)
    step(*arrays(3))
    places = [p.grad.data_ptr() for p in module.parameters()]
    step(*arrays(3, seed=1))
    assert places == [p.grad.data_ptr() for p in module.parameters()]


def test_shapes_are_checked() -> None:
    step = TrainStep(build(SPEC))
    embeddings, dense, labels = arrays(4)
    with pytest.raises(HeadError, match=r"labels have shape \(3,\); it must be \(4,\)"):
        step(embeddings, dense, labels[:3])
    with pytest.raises(HeadError, match="embedding 'b' has 3 rows where the first embedding has 4"):
        step({**embeddings, "b": embeddings["b"][:3]}, dense, labels)
    with pytest.raises(HeadError, match="two-dimensional"):
        step({**embeddings, "b": embeddings["b"][0]}, dense, labels)
    with pytest.raises(HeadError, match="no embeddings"):
        step({}, dense, labels)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=40))
def test_auc_counts_pairs(rows: list[tuple[bool, int]]) -> None:
    labels, scores = np.array([float(y) for y, _ in rows]), np.array([s / 4 for _, s in rows])
    if len(set(labels)) < 2:
        with pytest.raises(HeadError, match="both are needed"):
            auc(labels, scores)
        return
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert auc(labels, scores) == pytest.approx(wins / (len(positive) * len(negative)))


def test_log_loss() -> None:
    assert log_loss([1, 0], [0.8, 0.4]) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert log_loss([0.0], [1.0]) < 20
    with pytest.raises(HeadError, match="must be equal"):
        log_loss([1], [0.5, 0.5])
    with pytest.raises(HeadError, match="not finite"):
        log_loss([1], [float("nan")])
