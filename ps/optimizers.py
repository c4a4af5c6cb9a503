"""From an optimizer's settings to the columns and kernels that apply them.

Tables of one arena share the kind of optimizer (hence one kernel and one width of state), each with its own settings:
a row of `float64[codes, 8]` a table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ps.kernels import optimize
from ps.spec import FTRL, SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad


@dataclass(frozen=True, slots=True)
class Rule:
    """How rows of one kind of optimizer change.

    step(rows, codes, sums, settings, scale, values, state) applies one push; begin(rows, codes, settings, column,
    values, state) sets the state of new rows, `column` naming the setting that fills it (-1: zeros).
    """

    step: Callable[..., None]
    begin: Callable[..., None]
    column: int = -1


RULES: dict[str, Rule] = {
    "sgd": Rule(optimize.sgd, optimize.begin_filled),
    "adagrad": Rule(optimize.adagrad, optimize.begin_filled, optimize.B),
    "rowwise_adagrad": Rule(optimize.rowwise_adagrad, optimize.begin_filled, optimize.B),
    "adam": Rule(optimize.adam, optimize.begin_filled),
    "ftrl": Rule(optimize.ftrl, optimize.begin_ftrl),
}


def settings_of(optimizer: Optimizer) -> NDArray[np.float64]:
    """float64[8]: the settings in the kernels' columns (lr, weight decay, clip, then three of the optimizer's own)."""
    match optimizer:
        case SGD(lr, decay, clip):
            row = [lr, decay, clip]
        case Adagrad(lr, eps, start, decay, clip) | RowWiseAdagrad(lr, eps, start, decay, clip):
            row = [lr, decay, clip, eps, start]
        case Adam(lr, beta1, beta2, eps, decay, clip):
            row = [lr, decay, clip, eps, beta1, beta2]
        case FTRL(alpha, beta, l1, l2, clip):
            row = [alpha, 0.0, clip, beta, l1, l2]
    out = np.zeros(optimize.SETTINGS)
    out[: len(row)] = row
    return out
