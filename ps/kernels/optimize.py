"""Optimizer steps: one row-wise kernel a kind. `ps/optimizers.py` says which settings stand in which column.

Every kernel: rows int32[u] (distinct), codes int32[u], sums float32[u, d] (gradients summed over duplicates),
settings float64[codes, 8], scale (of the learning rate, this push only), values float32[r, d], state float32[r, w].

Order of the parts, as torch: first the gradient is clipped (its row's L2 norm to `clip`, as
torch.nn.utils.clip_grad_norm_ does with all of a tensor), then weight decay is added (L2: g += weight_decay * w), then
the optimizer's own formula.
"""

import numpy as np
from numpy.typing import NDArray

from ps.kernels import inline, kernel, prefetch, u64
from ps.kernels.pool import LINE

LR, DECAY, CLIP, A, B, C = range(6)
SETTINGS = 8
_AHEAD = 8


@inline
def _ask(matrix: NDArray[np.float32], rows: NDArray[np.int32], i: int) -> None:
    if i + _AHEAD < len(rows):
        w = matrix.shape[1]
        for j in range(0, w, LINE):
            prefetch(matrix, np.int64(rows[i + _AHEAD]) * w + j)


@inline
def _gradient(g: NDArray[np.float32], w: NDArray[np.float32], decay: float, clip: float) -> None:
    """Clip and decay the row's gradient in place."""
    if clip > 0.0:
        square = 0.0
        for j in range(len(g)):
            square += np.float64(g[j]) * np.float64(g[j])
        if square > clip * clip:
            factor = np.float32(clip / np.sqrt(square))
            for j in range(len(g)):
                g[j] *= factor
    if decay > 0.0:
        part = np.float32(decay)
        for j in range(len(g)):
            g[j] += part * w[j]


@kernel
def sgd(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    sums: NDArray[np.float32],
    settings: NDArray[np.float64],
    scale: float,
    values: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """w -= lr * g."""
    for i in range(len(rows)):
        _ask(values, rows, i)
        s, g, w = settings[codes[i]], sums[i], values[rows[i]]
        _gradient(g, w, s[DECAY], s[CLIP])
        lr = np.float32(s[LR] * scale)
        for j in range(len(g)):
            w[j] -= lr * g[j]


@kernel
def adagrad(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    sums: NDArray[np.float32],
    settings: NDArray[np.float64],
    scale: float,
    values: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """n += g^2; w -= lr * g / (sqrt(n) + eps), as torch.optim.Adagrad (Duchi et al. 2011). A = eps, B = initial n."""
    for i in range(len(rows)):
        _ask(values, rows, i)
        _ask(state, rows, i)
        s, g, w, n = settings[codes[i]], sums[i], values[rows[i]], state[rows[i]]
        _gradient(g, w, s[DECAY], s[CLIP])
        lr, eps = np.float32(s[LR] * scale), np.float32(s[A])
        for j in range(len(g)):
            n[j] += g[j] * g[j]
            w[j] -= lr * g[j] / (np.sqrt(n[j]) + eps)


@kernel
def rowwise_adagrad(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    sums: NDArray[np.float32],
    settings: NDArray[np.float64],
    scale: float,
    values: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """n += mean(g^2); w -= lr / (sqrt(n) + eps) * g, as FBGEMM's exact_rowwise_adagrad. A = eps, B = initial n."""
    for i in range(len(rows)):
        _ask(values, rows, i)
        _ask(state, rows, i)
        s, g, w, n = settings[codes[i]], sums[i], values[rows[i]], state[rows[i]]
        _gradient(g, w, s[DECAY], s[CLIP])
        square = np.float32(0.0)
        for j in range(len(g)):
            square += g[j] * g[j]
        n[0] += square / np.float32(len(g))
        step = np.float32(s[LR] * scale) / (np.sqrt(n[0]) + np.float32(s[A]))
        for j in range(len(g)):
            w[j] -= step * g[j]


@kernel
def adam(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    sums: NDArray[np.float32],
    settings: NDArray[np.float64],
    scale: float,
    values: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """Adam (Kingma and Ba 2015, algorithm 1 in the form of its section 2), corrected by the row's own count of steps.

    state: m, then v, then the count. A = eps, B = beta1, C = beta2.
    """
    for i in range(len(rows)):
        _ask(values, rows, i)
        _ask(state, rows, i)
        s, g, w, mv = settings[codes[i]], sums[i], values[rows[i]], state[rows[i]]
        _gradient(g, w, s[DECAY], s[CLIP])
        d = len(g)
        t = np.float64(mv[2 * d]) + 1.0
        mv[2 * d] = np.float32(t)
        fix = np.sqrt(1.0 - s[C] ** t)
        step = np.float32(s[LR] * scale * fix / (1.0 - s[B] ** t))
        eps, keep1, keep2 = np.float32(s[A]), np.float32(s[B]), np.float32(s[C])
        new1, new2 = np.float32(1.0 - s[B]), np.float32(1.0 - s[C])
        # torch.optim.SparseAdam adds eps to sqrt(v) before the bias correction; so do we
        for j in range(d):
            mv[j] = keep1 * mv[j] + new1 * g[j]
            mv[u64(d + j)] = keep2 * mv[u64(d + j)] + new2 * g[j] * g[j]
            w[j] -= step * mv[j] / (np.sqrt(mv[u64(d + j)]) + eps)


@kernel
def ftrl(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    sums: NDArray[np.float32],
    settings: NDArray[np.float64],
    scale: float,
    values: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """FTRL-Proximal (McMahan et al. 2013, algorithm 1). state: z, then n. A = beta, B = l1, C = l2; LR is alpha.

    `scale` multiplies the gradient where it enters z, and not n: with l1 = l2 = 0 that scales the step exactly.
    Scaling alpha would rescale every weight learned so far, since w is a function of z, n and alpha.
    """
    for i in range(len(rows)):
        _ask(values, rows, i)
        _ask(state, rows, i)
        s, g, w, zn = settings[codes[i]], sums[i], values[rows[i]], state[rows[i]]
        _gradient(g, w, 0.0, s[CLIP])
        alpha, beta, l1, l2 = np.float32(s[LR]), np.float32(s[A]), np.float32(s[B]), np.float32(s[C])
        factor = np.float32(scale)
        d = len(g)
        for j in range(d):
            n = zn[d + j]
            more = n + g[j] * g[j]
            zn[j] += factor * g[j] - (np.sqrt(more) - np.sqrt(n)) / alpha * w[j]
            zn[d + j] = more
            z = zn[j]
            if abs(z) <= l1:
                w[j] = np.float32(0.0)
            else:
                shrunk = z - l1 if z > 0 else z + l1
                w[j] = -shrunk / ((beta + np.sqrt(more)) / alpha + l2)


@kernel
def begin_filled(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    settings: NDArray[np.float64],
    column: int,
    values: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """State of a new row: filled with one setting (column -1: with zeros)."""
    for i in range(len(rows)):
        start = np.float32(0.0) if column < 0 else np.float32(settings[codes[i], column])
        for j in range(state.shape[1]):
            state[rows[i], j] = start


@kernel
def begin_ftrl(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    settings: NDArray[np.float64],
    column: int,
    values: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """State of a new FTRL row: n = 0, and the z from which w follows, else the first step would forget w."""
    d = values.shape[1]
    for i in range(len(rows)):
        s, w, zn = settings[codes[i]], values[rows[i]], state[rows[i]]
        slope = np.float32(s[A] / s[LR] + s[C])
        for j in range(d):
            l1 = np.float32(s[B]) if w[j] > 0 else -np.float32(s[B])
            zn[j] = np.float32(0.0) if w[j] == 0 else -w[j] * slope - l1
            zn[d + j] = np.float32(0.0)


def warmup() -> None:
    """Compile this module's kernels."""
    rows, sums, settings = np.zeros(1, np.int32), np.zeros((1, 2), np.float32), np.ones((1, SETTINGS))
    for step, width in ((sgd, 0), (adagrad, 2), (rowwise_adagrad, 1), (adam, 5), (ftrl, 4)):
        step(rows, rows, sums, settings, 1.0, sums.copy(), np.zeros((1, width), np.float32))
    begin_filled(rows, rows, settings, A, sums, sums.copy())
    begin_ftrl(rows, rows, settings, A, sums, np.zeros((1, 4), np.float32))
