"""The client: routing, splitting, retries and merging (without input or output), and two shells over the fabric.

batch     what a user hands in, checked and joined
routing   what a view says about tables and slots, as arrays
request   a batch split into calls to servers, replies merged into the answer
window    client id and sequences
core      when to retry, where, and when to give up; learning newer views
verbs     each verb, as a generator of commands;  ranges: the range pull
places    where the cluster is;  `connect` itself is here
blocking  Client, driven by flight        aio  AsyncClient
"""

from collections.abc import Sequence

from ps.client.aio import AsyncClient
from ps.client.blocking import Client, PushHandle
from ps.client.places import Tls, where
from ps.client.verbs import ClientStatistics, RowRange
from ps.share import Acks

__all__ = ["AsyncClient", "Client", "ClientStatistics", "PushHandle", "RowRange", "connect"]


def connect(
    addresses: str | Sequence[str] | None = None,
    token: str | None = None,
    timeout: float = 10.0,
    tls: Tls = None,
    acks: Acks = "all",
    in_place: bool = True,
) -> Client:
    """A `Client` of a running cluster.

    addresses: "host:port,host:port", or a list of addresses ("tcp:HOST:PORT", "unix:/path"); any server knows the
    others. None: $EMBRING_ADDRESS, else this user's cluster on this machine (what `embring up` wrote). token: None
    is $EMBRING_TOKEN, else the token of that cluster. timeout: seconds for a call that gives none. tls: for servers
    that speak TLS over TCP, the path of the authority (PEM) that signed their certificate, or an ssl.SSLContext; None
    is $EMBRING_TLS_CA, else that of the cluster found here, else plain TCP. Unix sockets stay plain.
    acks: who must hold a push before it is acknowledged, "all" owners or the "primary", whose death may then lose it.
    in_place: whether rows are read from the memory of servers on this host, where that can be; else by messages alone.
    Raises ConfigError where no cluster is known, or one side speaks TLS and the other does not; AuthError for a wrong
    token or a certificate that is not trusted; NotApplied where nobody answers.

        >>> client = ps.connect("localhost:7400", token="...")
    """
    found, secret, trust = where(addresses, token, tls)
    return Client(found, secret, timeout, trust, acks, in_place)
