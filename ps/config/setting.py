"""One setting of a cluster.toml: a field with its unit, range, and the trade-off behind it."""

from dataclasses import field
from typing import Any


def setting(default: Any, unit: str, low: float | None, high: float | None, why: str) -> Any:
    """A field of a section. low and high are inclusive; None where the value is text or a switch."""
    return field(default=default, metadata={"unit": unit, "low": low, "high": high, "why": why})
