"""Where a cluster is: given, in the environment, or in the runtime file that `embring up` wrote."""

import os
import ssl
from collections.abc import Callable, Sequence

from ps.errors import ConfigError
from ps.fabric.address import parse_address
from ps.fabric.tls import CA, trusting
from ps.kernels import batch, merge, shared, split
from ps.runtime import read_runtime, read_token

ADDRESS = "EMBRING_ADDRESS"
TOKEN = "EMBRING_TOKEN"

TOKEN_MAX = 1024
"""Characters of a token."""

Tls = ssl.SSLContext | str | os.PathLike[str] | None
"""What to trust over TCP: a context, or the path of an authority's PEM file."""


Seeds = Sequence[str] | Callable[[], Sequence[str]]
"""Addresses to look for the cluster at, or what says where they are by now."""


def where(
    addresses: str | Sequence[str] | None, token: str | None, tls: Tls
) -> tuple[Seeds, str, ssl.SSLContext | None]:
    """(addresses, token, context): what is given, else EMBRING_ADDRESS, EMBRING_TOKEN and EMBRING_TLS_CA, else this
    machine's cluster, whose runtime file is read again whenever all that this client knows are gone.

    Raises ConfigError where no cluster is known, an address is malformed or a file cannot be used.
    """
    given = os.environ.get(ADDRESS) if addresses is None else addresses
    if isinstance(given, str):
        given = [part.strip() for part in given.split(",") if part.strip()]
    secret = os.environ.get(TOKEN) if token is None else token
    trusted = os.environ.get(CA) if tls is None else tls
    of_file = given is None
    if given is None:
        runtime = read_runtime()
        given = runtime.addresses
        if secret is None:
            secret = read_token(runtime.token_path)
        trusted = runtime.tls_ca if trusted is None else trusted
    if not isinstance(given, Sequence) or not all(isinstance(address, str) for address in given):
        raise ConfigError(f"addresses is {given!r}; it must be texts: HOST:PORT or unix:/path")
    if secret is not None and not (isinstance(secret, str) and len(secret) <= TOKEN_MAX and secret.isprintable()):
        raise ConfigError(f"the token must be a text of at most {TOKEN_MAX} characters that can be printed")
    if not given:
        raise ConfigError(f"no address was given; write HOST:PORT or unix:/path (or set {ADDRESS})")
    for address in given:
        parse_address(address)
    known = tuple(given)
    return (lambda: _of_file(known)) if of_file else known, secret or "", trusting(trusted)


def _of_file(known: tuple[str, ...]) -> tuple[str, ...]:
    """What the runtime file names now; what it named before where it is gone."""
    try:
        return read_runtime().addresses or known
    except ConfigError:
        return known


def prepare() -> None:
    """Have the client's kernels ready before any deadline runs: their first use on a machine takes seconds."""
    batch.warmup()
    split.warmup()
    merge.warmup()
    shared.warmup()
