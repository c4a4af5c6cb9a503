"""The fabric: frames between clients and servers. `protocol` decides, `blocking`, `aio` and `listen` move the bytes."""

from ps.fabric.aio import AsyncConnection
from ps.fabric.blocking import BlockingConnection
from ps.fabric.protocol import Hello, Welcome

__all__ = ["AsyncConnection", "BlockingConnection", "Hello", "Welcome"]
