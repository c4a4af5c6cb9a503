"""What a head is: `HeadSpec`, a frozen value that says which features it takes and how its layers are laid.

Features are named; each is pooled from the rows of a table, and several may share one table (an item and the items
seen before it). Pooling is a property of the table: features of one table share it, and their width.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

KINDS = ("mlp", "dlrm", "deepfm", "two_branch")
ACTIVATIONS = ("relu", "none")
POOLINGS = ("sum", "mean", "max")
DIM_MAX = 4096
WIDTH_MAX = 65536


class HeadError(ValueError):
    """A head, its inputs or its files are wrong: one sentence that names the value and what is allowed."""


@dataclass(frozen=True)
class HeadFeature:
    """One embedding that the head takes: its name, the table of its rows, its width and how a bag is pooled."""

    name: str
    table: str
    dim: int
    pooling: str = "sum"


@dataclass(frozen=True)
class HeadSpec:
    """A head, completely: `build(spec)` makes the same layers everywhere.

    kind: "mlp" (everything concatenated), "dlrm" (dot products of pairs), "deepfm" (factorisation machine beside an
        MLP), or "two_branch" (a dense and a sparse branch, each linear and batch-normalised, joined by an MLP).
    features: what it takes, in order; for dlrm and deepfm all of one width.
    dense: columns of the dense matrix, 0 if there is none.
    hidden: widths of the hidden layers of the (top) MLP, which ends in one logit.
    dense_hidden: dlrm: hidden layers of the bottom MLP, which ends in `dim`; two_branch: layers of the dense branch.
    sparse_hidden: two_branch: layers of the sparse branch.
    activation: between hidden layers: "relu" or "none".
    """

    kind: str
    features: tuple[HeadFeature, ...]
    dense: int = 0
    hidden: tuple[int, ...] = (64, 32)
    dense_hidden: tuple[int, ...] = ()
    sparse_hidden: tuple[int, ...] = ()
    activation: str = "relu"

    def check(self) -> "HeadSpec":
        """Return self, or raise HeadError naming the field, its value and what is allowed."""
        _among("kind", self.kind, KINDS)
        _among("activation", self.activation, ACTIVATIONS)
        _whole("dense", self.dense, 0, WIDTH_MAX)
        for name in ("hidden", "dense_hidden", "sparse_hidden"):
            for width in getattr(self, name):
                _whole(f"a width in {name}", width, 1, WIDTH_MAX)
        if not self.features:
            raise HeadError("a head has no features; it needs at least one")
        self._check_features()
        self._check_kind()
        return self

    def _check_features(self) -> None:
        twice = [name for name, count in Counter(f.name for f in self.features).items() if count > 1 or not name]
        if twice:
            raise HeadError(f"feature {twice[0]!r} is listed twice, or has no name")
        tables: dict[str, HeadFeature] = {}
        for feature in self.features:
            if not isinstance(feature.table, str) or not feature.table:
                raise HeadError(f"feature {feature.name!r} has table {feature.table!r}; it must name one")
            _whole(f"dim of feature {feature.name!r}", feature.dim, 1, DIM_MAX)
            _among(f"pooling of feature {feature.name!r}", feature.pooling, POOLINGS)
            first = tables.setdefault(feature.table, feature)
            if (first.dim, first.pooling) != (feature.dim, feature.pooling):
                raise HeadError(
                    f"features {first.name!r} and {feature.name!r} share table {feature.table!r}, "
                    "but not dim and pooling"
                )

    def _check_kind(self) -> None:
        dims = sorted({f.dim for f in self.features})
        if self.kind in ("dlrm", "deepfm") and len(dims) > 1:
            raise HeadError(f"features of a {self.kind} head have dims {dims}; they must be equal")
        if self.kind == "deepfm" and dims[0] < 2:
            raise HeadError("dim of a deepfm head is 1; it must be 2 or more, the first column being the linear weight")
        if self.kind == "dlrm" and len(self.features) + bool(self.dense) < 2:
            raise HeadError("a dlrm head has one vector; it needs two or more to interact")
        if self.dense_hidden and (self.kind not in ("dlrm", "two_branch") or not self.dense):
            raise HeadError(
                f"dense_hidden is set for a {self.kind} head with dense = {self.dense}; it has no such layers"
            )
        if self.sparse_hidden and self.kind != "two_branch":
            raise HeadError(f"sparse_hidden is set for a {self.kind} head; only two_branch has such layers")

    @property
    def dims(self) -> dict[str, int]:
        """Width of each feature's embedding, by feature, in order."""
        return {f.name: f.dim for f in self.features}

    def to_json(self) -> str:
        """As JSON text; `from_json` is the inverse."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "HeadSpec":
        """From JSON text; HeadError where it is malformed or has a key that is unknown."""
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise HeadError(f"head specification is no JSON: {error}") from None
        return cls.from_plain(plain)

    @classmethod
    def from_plain(cls, plain: object) -> "HeadSpec":
        """From plain data (a JSON object or a TOML table); HeadError where it is malformed or has an unknown key."""
        data = _known(cls, plain, "head specification")
        features = data.get("features")
        if not isinstance(features, list | tuple):
            raise HeadError(f"features of a head are {features!r}; they must be a list")
        data["features"] = tuple(_feature(one, i) for i, one in enumerate(features))
        for name in ("hidden", "dense_hidden", "sparse_hidden"):
            if name in data:
                if not isinstance(data[name], list | tuple):
                    raise HeadError(f"{name} is {data[name]!r}; it must be a list of widths")
                data[name] = tuple(data[name])
        try:
            return cls(**data).check()
        except TypeError as error:
            raise HeadError(f"head specification is incomplete: {error}") from None


def _feature(plain: object, at: int) -> HeadFeature:
    try:
        return HeadFeature(**_known(HeadFeature, plain, f"feature {at + 1} of the head"))
    except TypeError as error:
        raise HeadError(f"feature {at + 1} of the head is incomplete: {error}") from None


def _known(cls: type, plain: object, what: str) -> dict:
    if not isinstance(plain, Mapping):
        raise HeadError(f"{what} is {plain!r}; it must be an object")
    known = [f.name for f in fields(cls)]
    unknown = [key for key in plain if key not in known]
    if unknown:
        raise HeadError(f"{what} has an unknown key {unknown[0]!r}; it may have {', '.join(known)}")
    return dict(plain)


def _among(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise HeadError(f"{what} is {value!r}; it must be one of {', '.join(allowed)}")


def _whole(what: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise HeadError(f"{what} is {value!r}; it must be a whole number from {low} to {high}")
