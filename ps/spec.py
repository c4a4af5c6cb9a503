"""What a table is: `TableSpec`, its optimizer and its initializer, as frozen values.

Specs are plain data. They travel in the view (`to_plain`), are compared for equality ("creating the same
spec again is a no-op"), and say nothing about where rows live.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ps.errors import RequestError

DIM_MAX = 4096
NAME_MAX = 128
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]*")

Placement = Literal["sharded", "whole"]
Absent = Literal["initial", "zeros", "default"]
ABSENT_CODES: dict[str, int] = {"zeros": 0, "default": 1, "initial": 2}
"""How an id without a row is answered, as it travels in a share."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise RequestError(message)


def _number(owner: str, name: str, value: object, low: float, high: float = math.inf) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    _require(good, f"{owner}.{name} is {value!r}; it must be a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class SGD:
    """w -= lr * (g + weight_decay * w). No state."""

    lr: float = 0.01
    weight_decay: float = 0.0
    clip: float = 0.0
    kind: str = field(default="sgd", init=False)

    def state_width(self, dim: int) -> int:
        """Floats of optimizer state that a row of `dim` values carries."""
        return 0


@dataclass(frozen=True)
class Adagrad:
    """Element-wise Adagrad (Duchi 2011), as `torch.optim.Adagrad`: s += g^2; w -= lr * g / (sqrt(s) + eps)."""

    lr: float = 0.01
    eps: float = 1e-10
    initial_accumulator: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0
    kind: str = field(default="adagrad", init=False)

    def state_width(self, dim: int) -> int:
        """One accumulator for each value."""
        return dim


@dataclass(frozen=True)
class RowWiseAdagrad:
    """Adagrad with one accumulator a row (FBGEMM's exact_rowwise_adagrad): s += mean(g^2)."""

    lr: float = 0.01
    eps: float = 1e-8
    initial_accumulator: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0
    kind: str = field(default="rowwise_adagrad", init=False)

    def state_width(self, dim: int) -> int:
        """One accumulator for the whole row."""
        return 1


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma 2015), bias-corrected by the row's own push count.

    Equal to `torch.optim.SparseAdam` when every row is touched in every step.
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0
    kind: str = field(default="adam", init=False)

    def state_width(self, dim: int) -> int:
        """First and second moment of each value, then the row's own count of steps."""
        return 2 * dim + 1


@dataclass(frozen=True)
class FTRL:
    """FTRL-Proximal (McMahan et al. 2013, "Ad Click Prediction", algorithm 1): z and n for each value."""

    alpha: float = 0.05
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    clip: float = 0.0
    kind: str = field(default="ftrl", init=False)

    def state_width(self, dim: int) -> int:
        """z, then n, for each value."""
        return 2 * dim


Optimizer = SGD | Adagrad | RowWiseAdagrad | Adam | FTRL
OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": Adam,
    "ftrl": FTRL,
}
_POSITIVE = {"alpha", "eps"}


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise RequestError, naming the setting, unless every setting of the optimizer is in its range."""
    if not isinstance(optimizer, tuple(OPTIMIZERS.values())):
        raise RequestError(f"optimizer is {optimizer!r}; it must be one of {', '.join(sorted(OPTIMIZERS))}")
    owner = type(optimizer).__name__
    for f in fields(optimizer):
        if f.name == "kind":
            continue
        value = getattr(optimizer, f.name)
        high = 1.0 - 1e-9 if f.name in ("beta1", "beta2") else 1e30
        _number(owner, f.name, value, 1e-30 if f.name in _POSITIVE else 0.0, high)


@dataclass(frozen=True)
class Initializer:
    """The initial row: a pure function of (seed, id), uniform in [low, high); constant where low == high.

    Computed in integer arithmetic and one multiplication, so that it is bit-equal on every CPU
    (ps/kernels gives the formula).
    """

    low: float = -0.01
    high: float = 0.01

    def check(self) -> None:
        """Raise RequestError unless low <= high and both are finite."""
        for name in ("low", "high"):
            _number("Initializer", name, getattr(self, name), -1e30, 1e30)
        _require(self.low <= self.high, f"Initializer.low is {self.low!r}; it must not exceed high ({self.high!r})")


@dataclass(frozen=True)
class TableSpec:
    """A named set of rows of one width.

    name: 1..128 characters of letters, digits and `_ . - /`.
    dim: values in a row, 1..4096 (float32).
    seed: of the table's tokens and initial rows, 0..2**63-1.
    placement: "sharded" over the slots of its group, or "whole" (all rows on one server, or R).
    replicas: owners of each slot, 1..64, or "all".
    absent: what an id without a row answers, unless the pull says otherwise.
    default: the vector of absent="default", `dim` values (empty = zeros).
    """

    name: str
    dim: int
    optimizer: Optimizer = field(default_factory=Adagrad)
    initializer: Initializer = field(default_factory=Initializer)
    seed: int = 0
    placement: Placement = "sharded"
    replicas: int | Literal["all"] = 1
    absent: Absent = "initial"
    default: tuple[float, ...] = ()

    def check(self) -> "TableSpec":
        """Return self, or raise RequestError naming the field, its value and what is allowed."""
        named = isinstance(self.name, str) and len(self.name) <= NAME_MAX and _NAME.fullmatch(self.name)
        _require(
            bool(named),
            f"table name is {self.name!r}; it must be 1 to {NAME_MAX} letters, digits or _ . - / (no . - / first)",
        )
        _require(_whole(self.dim, 1, DIM_MAX), f"dim of table {self.name!r} is {self.dim!r}; it must be 1 to {DIM_MAX}")
        _require(
            _whole(self.seed, 0, 2**63 - 1), f"seed of table {self.name!r} is {self.seed!r}; it must be 0 to 2**63-1"
        )
        _require(
            self.placement in ("sharded", "whole"),
            f'placement of table {self.name!r} is {self.placement!r}; it must be "sharded" or "whole"',
        )
        _require(
            self.replicas == "all" or _whole(self.replicas, 1, 64),
            f'replicas of table {self.name!r} is {self.replicas!r}; it must be 1 to 64, or "all"',
        )
        _require(
            self.absent in ABSENT_CODES,
            f'absent of table {self.name!r} is {self.absent!r}; it must be "initial", "zeros" or "default"',
        )
        _require(
            len(self.default) in (0, self.dim) and all(math.isfinite(v) for v in self.default),
            f"default of table {self.name!r} has {len(self.default)} values; it must have {self.dim}, finite, or none",
        )
        check_optimizer(self.optimizer)
        _require(
            isinstance(self.initializer, Initializer),
            f"initializer of table {self.name!r} is {self.initializer!r}; it must be an Initializer (low, high)",
        )
        self.initializer.check()
        return self

    def to_plain(self) -> dict[str, object]:
        """As plain data: what the view carries and a checkpoint keeps."""
        return {**asdict(self), "default": list(self.default)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, object]) -> "TableSpec":
        """The inverse of `to_plain`; unknown keys and optimizers are refused with RequestError."""
        data: dict[str, Any] = dict(plain)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        _require(not unknown, f"table specification has an unknown key {', '.join(map(repr, unknown))}")
        try:
            if isinstance(data.get("optimizer"), Mapping):
                data["optimizer"] = optimizer_from_plain(data["optimizer"])
            if isinstance(data.get("initializer"), Mapping):
                data["initializer"] = Initializer(**data["initializer"])
            data["default"] = tuple(data.get("default", ()))
            return cls(**data).check()
        except TypeError as error:
            raise RequestError(f"table specification is malformed: {error}") from None


def optimizer_from_plain(plain: Mapping[str, object]) -> Optimizer:
    """An optimizer from {"kind": ..., settings}; raises RequestError on an unknown kind or setting."""
    data = dict(plain)
    kind = data.pop("kind", None)
    cls = OPTIMIZERS.get(str(kind))
    if cls is None:
        raise RequestError(f"optimizer kind is {kind!r}; it must be one of {', '.join(sorted(OPTIMIZERS))}")
    known = {f.name for f in fields(cls) if f.init}
    unknown = sorted(set(data) - known)
    names = ", ".join(map(repr, unknown))
    _require(not unknown, f"optimizer {kind} has no setting {names}; it has {', '.join(sorted(known))}")
    optimizer = cls(**data)  # type: ignore[arg-type]
    check_optimizer(optimizer)
    return optimizer


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
