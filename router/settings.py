"""Strict reading of TOML into frozen dataclasses: unknown keys, wrong types and wrong values are refused by name."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ps.errors import ConfigError

T = TypeVar("T")


def setting(
    default: Any, doc: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A field of a settings class: its default, one paragraph (unit, trade-off), its range or the values it may take.

    A default of `...` makes the key obligatory.
    """
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def read_toml(path: Path) -> dict[str, Any]:
    """The file as plain data; ConfigError where it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def build(cls: type[T], data: object, where: str) -> T:
    """A checked instance of a settings class from plain data; ConfigError names the key and what is allowed."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {data!r}; it must be a table of settings")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ConfigError(f"{where} has an unknown key {key!r}; it may have {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, one in known.items():
        if name in data:
            values[name] = _checked(one, data[name], where)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{where} lacks the key {name!r}")
    return cls(**values)


def _checked(one: Field[Any], value: Any, where: str) -> Any:
    expected = one.type
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    kind = tuple if str(expected).startswith("tuple") else expected
    if not isinstance(kind, type) or not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: {one.name} is {value!r}; it must be {_KINDS.get(kind, str(expected))}")
    choices, low, high = one.metadata["choices"], one.metadata["low"], one.metadata["high"]
    if choices and value not in choices:
        raise ConfigError(f"{where}: {one.name} is {value!r}; it must be one of {', '.join(choices)}")
    if low is not None and not low <= value <= high:
        raise ConfigError(f"{where}: {one.name} is {value!r}; it must be {low} to {high}")
    return value


_KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list",
}
