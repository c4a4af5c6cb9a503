"""Addresses of the fabric: "tcp:HOST:PORT", "unix:/path", or a bare "HOST:PORT", which means tcp."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ps.config import SEND_BUFFER
from ps.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: `path` for a Unix socket, else `host` and `port` (0: any free one)."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it: a Unix socket, "localhost" or a loopback address."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(given: str) -> Address:
    """The address in a text; ConfigError naming it where it is none."""
    kind, _, rest = given.partition(":")
    if kind == "unix":
        if not rest:
            raise ConfigError(f"address {given!r} has no path; write unix:/path")
        return Address(path=rest)
    host, colon, port = (rest if kind == "tcp" else given).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and "/" not in host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"address {given!r} is none; write tcp:HOST:PORT with a port from 0 to 65535, or unix:/path")
    return Address(host=host, port=int(port))


def pick(addresses: Sequence[str]) -> list[str]:
    """A server's addresses in the order to try: Unix sockets that exist here first, other hosts' left out."""
    here = [a for a in addresses if a.startswith("unix:") and os.path.exists(a[len("unix:") :])]
    return here + [a for a in addresses if not a.startswith("unix:")]


def check_free(host: str, port: int, why: str) -> None:
    """ConfigError, naming the setting `why`, unless this process could listen there now (0: on any free port)."""
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
    except OSError as error:
        raise ConfigError(f"{why}: cannot listen on {host}:{port}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{why}: cannot listen on {host}:{port}: no host can have that name") from None


def widen(connected: socket.socket) -> None:
    """Let a Unix socket hold SEND_BUFFER bytes on their way. TCP is left alone: the kernel sizes its buffers itself."""
    if connected.family == socket.AF_UNIX:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
