"""What a features.toml may declare: inputs, features, and the rules between them (features.py explains the kinds)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ps.errors import ConfigError
from router.columns import BYTES, DTYPES, FP32, INT64
from router.settings import build, setting

IDS_PREFIX = "ids:"
DENSE = "dense"
"""Names of the columns of a request that brings prepared ids."""

BAG_KINDS = ("id", "hash", "bucketise", "cross")
DENSE_KINDS = ("log", "dense")


@dataclass(frozen=True)
class InputSpec:
    """One column that a request brings."""

    name: str = setting(..., "Name of the tensor in a request.")
    dtype: str = setting(..., "Datatype, as the Open Inference Protocol names it.", choices=DTYPES)
    ragged: bool = setting(False, "Whether a row has any number of values: they come as values and offsets.")
    split: str = setting("", "One ASCII character that separates the values inside a string; empty pieces are skipped.")
    values_max: int = setting(1024, "Values kept of a multi-valued row. More cost more pulls.", 1, 65536)
    keep: str = setting("first", "Which values of a longer row are kept.", choices=("first", "last"))
    width: int = setting(1, "Numbers a row of an FP32 input that is not ragged: its shape is [B, width].", 1, 65536)

    @property
    def multi(self) -> bool:
        """Whether a row may have any number of values."""
        return self.ragged or bool(self.split)


@dataclass(frozen=True)
class FeatureSpec:
    """One thing that the model sees: a bag of ids a row, or columns of the dense matrix."""

    name: str = setting(..., "Name under which the head knows the feature.")
    kind: str = setting(..., "What is computed.", choices=BAG_KINDS + DENSE_KINDS)
    inputs: tuple[str, ...] = setting(..., "The inputs it is made of: one, or 2 to 3 for a cross.")
    table: str = setting("", "Table that holds the rows of its ids.")
    pooling: str = setting("sum", "How the rows of a bag become one.", choices=("sum", "mean", "max"))
    buckets: int = setting(0, "hash, cross: ids are taken modulo this; 0 keeps all 64 bits.", 0, 2**62)
    prefix: int = setting(0, "hash of BYTES: how many leading bytes count; 0 for all.", 0, 65536)
    boundaries: tuple[float, ...] = setting((), "bucketise: rising numbers.")
    values_max: int = setting(1024, "cross: combinations kept of a row.", 1, 65536)
    shift: float = setting(0.0, "dense: subtracted first.")
    scale: float = setting(1.0, "dense: multiplied then.")


def parse(plain: Mapping[str, object], where: str) -> tuple[tuple[InputSpec, ...], tuple[FeatureSpec, ...]]:
    """Inputs and features of a parsed features.toml, checked; ConfigError names what is wrong and where."""
    parts: dict[str, list[object]] = {}
    for key, value in plain.items():
        if key not in ("input", "feature") or not isinstance(value, list):
            raise ConfigError(f"{where} has {key!r}; it may only have [[input]] and [[feature]] tables")
        parts[key] = value
    inputs = tuple(build(InputSpec, one, f"{where} [[input]] {i + 1}") for i, one in enumerate(parts.get("input", [])))
    features = tuple(
        build(FeatureSpec, one, f"{where} [[feature]] {i + 1}") for i, one in enumerate(parts.get("feature", []))
    )
    _check(inputs, features)
    return inputs, features


def _check(inputs: tuple[InputSpec, ...], features: tuple[FeatureSpec, ...]) -> None:
    """Everything that one declaration alone cannot show; ConfigError names the input or feature."""
    for what, names in (("input", [i.name for i in inputs]), ("feature", [f.name for f in features])):
        if not names:
            raise ConfigError(f"features.toml declares no {what}; it needs at least one")
        twice = [name for name, count in Counter(names).items() if count > 1 or not name]
        if twice:
            raise ConfigError(f"{what} {twice[0]!r} is declared twice, or has no name")
    for one in inputs:
        if one.name.startswith(IDS_PREFIX) or one.name == DENSE:
            raise ConfigError(f"input {one.name!r} has a name kept for prepared ids; it must be another")
        if one.split and (one.dtype != BYTES or one.ragged or len(one.split) != 1 or not one.split.isascii()):
            raise ConfigError(
                f"input {one.name!r} has split {one.split!r}; it is one ASCII character, for BYTES that are not ragged"
            )
        if one.width > 1 and (one.dtype != FP32 or one.multi):
            raise ConfigError(
                f"input {one.name!r} has width {one.width}; only FP32 that is not ragged may be wider than 1"
            )
    by_name = {spec.name: spec for spec in inputs}
    for feature in features:
        _check_feature(feature, by_name)
    used = {name for feature in features for name in feature.inputs}
    for name in by_name:
        if name not in used:
            raise ConfigError(f"input {name!r} is used by no feature")
    modes: dict[str, str] = {}
    for feature in features:
        if feature.table and modes.setdefault(feature.table, feature.pooling) != feature.pooling:
            mode = modes[feature.table]
            raise ConfigError(
                f"feature {feature.name!r} pools table {feature.table!r} by {feature.pooling}, others by {mode}"
            )


_DTYPES_OF = {
    "id": (INT64,),
    "hash": (BYTES, INT64),
    "bucketise": (INT64, FP32),
    "cross": (BYTES, INT64),
    "log": (INT64, FP32),
    "dense": (INT64, FP32),
}


_KINDS_WITH = {
    "buckets": ("hash", "cross"),
    "prefix": ("hash",),
    "values_max": ("cross",),
    "shift": ("dense",),
    "scale": ("dense",),
}


def _check_feature(feature: FeatureSpec, inputs: Mapping[str, InputSpec]) -> None:
    low, high = (2, 3) if feature.kind == "cross" else (1, 1)
    if not low <= len(feature.inputs) <= high:
        raise ConfigError(
            f"feature {feature.name!r} has {len(feature.inputs)} inputs; a {feature.kind} takes {low} to {high}"
        )
    for name in feature.inputs:
        if name not in inputs:
            raise ConfigError(f"feature {feature.name!r} is made of {name!r}, which is no declared input")
        one = inputs[name]
        if one.dtype not in _DTYPES_OF[feature.kind]:
            allowed = " or ".join(_DTYPES_OF[feature.kind])
            raise ConfigError(
                f"feature {feature.name!r} is made of {name!r} of {one.dtype}; a {feature.kind} takes {allowed}"
            )
        if feature.kind in DENSE_KINDS and one.multi:
            raise ConfigError(
                f"feature {feature.name!r} is made of multi-valued {name!r}; a {feature.kind} takes one value a row"
            )
        if feature.kind in BAG_KINDS and one.width > 1:
            raise ConfigError(
                f"feature {feature.name!r} is made of {name!r}, {one.width} numbers wide; it takes one value a row"
            )
    if (feature.kind in BAG_KINDS) != bool(feature.table):
        needs = "needs a table" if feature.kind in BAG_KINDS else "takes no table"
        raise ConfigError(f"feature {feature.name!r} has table {feature.table!r}; a {feature.kind} {needs}")
    rising = list(feature.boundaries) == sorted(set(feature.boundaries))
    numbers = all(isinstance(b, int | float) and not isinstance(b, bool) for b in feature.boundaries)
    if (feature.kind == "bucketise") != bool(feature.boundaries) or not numbers or not rising:
        raise ConfigError(
            f"feature {feature.name!r} has boundaries {list(feature.boundaries)}; a bucketise has rising numbers"
        )
    for one_field in fields(feature):
        kinds = _KINDS_WITH.get(one_field.name)
        if kinds and feature.kind not in kinds and getattr(feature, one_field.name) != one_field.default:
            raise ConfigError(f"feature {feature.name!r} sets {one_field.name}; only kind {' or '.join(kinds)} has it")
