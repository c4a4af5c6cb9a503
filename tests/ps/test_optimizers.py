"""Optimizers against torch's own, and against written-out formulas with clipping, decay and a scaled rate."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import RequestError
from ps.kernels import optimize
from ps.optimizers import RULES, settings_of
from ps.spec import FTRL, OPTIMIZERS, SGD, Adagrad, Adam, Initializer, Optimizer, RowWiseAdagrad, TableSpec
from tests.ps.naive_store import begin_state, step
from tests.ps.store_helpers import pull_share, push_share, store_of, view_of

N, DIM, STEPS = 20, 5, 12
Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


@pytest.mark.parametrize(
    ("ours", "theirs", "sparse"),
    [
        (SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3), False),
        (SGD(lr=0.3, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.1), False),
        (Adagrad(lr=0.2), lambda p: torch.optim.Adagrad(p, lr=0.2), False),
        (
            Adagrad(lr=0.2, initial_accumulator=0.3, weight_decay=0.1),
            lambda p: torch.optim.Adagrad(p, lr=0.2, initial_accumulator_value=0.3, weight_decay=0.1),
            False,
        ),
        (Adam(lr=0.05), lambda p: torch.optim.SparseAdam(p, lr=0.05), True),
    ],
)
def test_every_row_touched_in_every_step_equals_torch(ours: Optimizer, theirs: Make, sparse: bool) -> None:
    rng = np.random.default_rng(3)
    start = rng.normal(size=(N, DIM)).astype(np.float32)
    store = store_of(view_of([TableSpec("t", DIM, ours)]))
    store.push(push_share(1, [1], [list(range(N))], start, kind="assign"))
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = theirs([weight])
    for k in range(STEPS):
        g = rng.normal(size=(N, DIM)).astype(np.float32)
        store.push(push_share(2 + k, [1], [list(range(N))], g))
        weight.grad = torch.from_numpy(g.copy())
        if sparse:
            weight.grad = weight.grad.to_sparse(1)
        optimizer.step()
    mine = store.pull(pull_share([1], [list(range(N))])).rows.reshape(N, DIM)
    np.testing.assert_allclose(mine, weight.detach().numpy(), rtol=1e-5, atol=1e-6)


POSITIVE = st.floats(0.01, 1.0)
MAYBE = st.one_of(st.just(0.0), st.floats(0.01, 1.0))


@st.composite
def optimizers(draw: st.DrawFn) -> Optimizer:
    kind = draw(st.sampled_from(sorted(OPTIMIZERS)))
    clip = draw(MAYBE)
    if kind == "ftrl":
        return FTRL(draw(POSITIVE), draw(st.floats(0.1, 2.0)), draw(MAYBE), draw(MAYBE), clip)
    if kind == "adam":
        betas = draw(st.floats(0, 0.95)), draw(st.floats(0.5, 0.999))
        return Adam(draw(POSITIVE), *betas, eps=1e-4, weight_decay=draw(MAYBE), clip=clip)
    if kind == "sgd":
        return SGD(draw(POSITIVE), draw(MAYBE), clip)
    cls = Adagrad if kind == "adagrad" else RowWiseAdagrad
    return cls(draw(POSITIVE), 1e-4, draw(MAYBE), draw(MAYBE), clip)


@settings(max_examples=150)
@given(optimizers(), st.integers(0, 2**32), st.floats(0.1, 2.0))
def test_kernels_equal_the_formulas(optimizer: Optimizer, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    d = 3
    values = rng.normal(size=(4, d)).astype(np.float32)
    state = np.full((4, optimizer.state_width(d)), 9.0, np.float32)
    rule, columns = RULES[optimizer.kind], np.stack([np.zeros(optimize.SETTINGS), settings_of(optimizer)])
    rows, codes = np.array([2, 0], np.int32), np.ones(2, np.int32)
    untouched = values[[1, 3]].tobytes(), state[[1, 3]].tobytes()
    rule.begin(rows, codes, columns, rule.column, values, state)
    slow = {r: (values[r].astype(np.float64), begin_state(optimizer, values[r].astype(np.float64))) for r in (2, 0)}
    for _ in range(4):
        g = rng.normal(size=(2, d)).astype(np.float32)
        rule.step(rows, codes, g.copy(), columns, scale, values, state)
        for k, r in enumerate((2, 0)):
            w, s = slow[r]
            slow[r] = step(optimizer, w, s, g[k], scale), s
    for r in (2, 0):
        np.testing.assert_allclose(values[r], slow[r][0], rtol=2e-3, atol=2e-4)
    assert (values[[1, 3]].tobytes(), state[[1, 3]].tobytes()) == untouched


def test_an_ftrl_row_goes_on_from_its_initial_values_and_from_assigned_ones() -> None:
    spec = TableSpec("t", 4, FTRL(alpha=0.5, l1=0.1), Initializer(0.5, 0.75))
    store = store_of(view_of([spec]))
    promised = store.pull(pull_share([1], [[1]])).rows
    store.push(push_share(1, [1], [[1]], np.zeros(4)))
    np.testing.assert_allclose(store.pull(pull_share([1], [[1]])).rows, promised, rtol=1e-5)
    store.push(push_share(2, [1], [[1]], np.array([1.0, -2.0, 0.0, 3.0]), kind="assign"))
    store.push(push_share(3, [1], [[1]], np.zeros(4)))
    np.testing.assert_allclose(store.pull(pull_share([1], [[1]])).rows, [1.0, -2.0, 0.0, 3.0], rtol=1e-5)


def test_settings_of_one_arena_differ_by_table_and_change_with_the_spec() -> None:
    specs = [TableSpec("a", 2, SGD(lr=1.0), Initializer(0, 0)), TableSpec("b", 2, SGD(lr=0.5), Initializer(0, 0))]
    store = store_of(view_of(specs))
    store.push(push_share(1, [1, 2], [[7], [7]], np.ones(4), lr_scale=0.5))
    assert store.pull(pull_share([1, 2], [[7], [7]])).rows.tolist() == [-0.5, -0.5, -0.25, -0.25]


def test_rowwise_adagrad_is_fbgemms_formula() -> None:
    store = store_of(view_of([TableSpec("t", 4, RowWiseAdagrad(lr=0.1, eps=1e-8), Initializer(0, 0))]))
    g = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    store.push(push_share(1, [1], [[1]], g))
    np.testing.assert_allclose(store.pull(pull_share([1], [[1]])).rows, -0.1 * g / np.sqrt(7.5), rtol=1e-6)


@pytest.mark.parametrize("initializer", ["zeros", None, 0.1, {"low": 0.0}])
def test_what_is_no_initializer_is_named(initializer):
    with pytest.raises(RequestError, match=r"initializer of table 't' is .*; it must be an Initializer"):
        TableSpec("t", 4, SGD(), initializer).check()
