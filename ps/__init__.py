"""embring's parameter server, as its users see it.

    import ps
    client = ps.connect()                                              # EMBRING_ADDRESS, or this machine's cluster
    client.create_table("item", dim=32, optimizer=ps.RowWiseAdagrad(lr=0.05))
    rows = client.pull("item", ids)                                    # float32[n, 32]
    pooled = client.pull_bags({"item": (ids, offsets)}, mode="mean")   # {"item": float32[bags, 32]}
    client.push("item", ids, grads)                                    # the optimizer runs on the servers

Names are imported when they are first used: `import ps` by itself loads neither torch nor Ray nor gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashring.tokens import hash_strings
    from ps.client import AsyncClient, Client, PushHandle, RowRange, connect
    from ps.errors import (
        AuthError,
        ConfigError,
        EmbringError,
        MemoryFull,
        NotApplied,
        Overloaded,
        PerhapsApplied,
        RequestError,
        SlotsLost,
        WrongView,
    )
    from ps.ragged import RaggedIds
    from ps.spec import FTRL, SGD, Adagrad, Adam, Initializer, RowWiseAdagrad, TableSpec

_HOMES = {
    "ps.client": ("connect", "Client", "AsyncClient", "PushHandle", "RowRange"),
    "ps.errors": (
        "AuthError",
        "ConfigError",
        "EmbringError",
        "MemoryFull",
        "NotApplied",
        "Overloaded",
        "PerhapsApplied",
        "RequestError",
        "SlotsLost",
        "WrongView",
    ),
    "ps.ragged": ("RaggedIds",),
    "ps.spec": ("SGD", "Adagrad", "Adam", "FTRL", "Initializer", "RowWiseAdagrad", "TableSpec"),
    "hashring.tokens": ("hash_strings",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - the verbs first, then what they take, then what they raise
    "connect",
    "Client",
    "AsyncClient",
    "PushHandle",
    "RowRange",
    "TableSpec",
    "SGD",
    "Adagrad",
    "RowWiseAdagrad",
    "Adam",
    "FTRL",
    "Initializer",
    "RaggedIds",
    "hash_strings",
    "EmbringError",
    "RequestError",
    "MemoryFull",
    "ConfigError",
    "AuthError",
    "WrongView",
    "NotApplied",
    "Overloaded",
    "PerhapsApplied",
    "SlotsLost",
]


def __getattr__(name: str) -> Any:
    if name == "nn":  # the PyTorch module: the only part of a client that needs torch
        return import_module("ps.nn")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'ps' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "nn"])
