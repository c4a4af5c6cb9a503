"""TLS of the fabric: contexts made of files, and what a failed handshake means to whoever connects.

Only TCP is encrypted. A Unix socket never leaves its host and only its owner may open it, so it stays plain.
"""

import os
import socket
import ssl
from collections.abc import Callable

from ps.config import TlsConfig
from ps.errors import AuthError, ConfigError, EmbringError, NobodyListens, NotApplied
from ps.fabric.address import Address

CA = "EMBRING_TLS_CA"
"""Environment variable: path of the authority that clients trust."""

HOW = f"give tls=, the path of the authority that signed its certificate, or set {CA} to it"


def serving(config: TlsConfig) -> ssl.SSLContext | None:
    """What servers listen with on TCP; None where TLS is off. Raises ConfigError naming a file that is not usable."""
    if not config.certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # The default would wait for a password on the terminal; an encrypted key is refused instead.
    _load(lambda: context.load_cert_chain(config.certificate, config.key, password=""), config.certificate, config.key)
    return context


def trusting(ca: ssl.SSLContext | str | os.PathLike[str] | None) -> ssl.SSLContext | None:
    """What clients connect with: a context as it is, or one that trusts the authority in a PEM file, and it alone.

    None and "" are None: plain TCP. Raises ConfigError where the file cannot be used.
    """
    if isinstance(ca, ssl.SSLContext):
        return ca
    if ca is None or not str(ca):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    _load(lambda: context.load_verify_locations(cafile=str(ca)), str(ca))
    return context


def _load(load: Callable[[], None], *files: str) -> None:
    for file in files:
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"the TLS file {file} cannot be read: {error.strerror}") from None
    try:
        load()
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"the TLS files {', '.join(files)} cannot be used: {error}") from None


def refusal(address: str, error: Exception) -> EmbringError:
    """What a failed connect means: AuthError or ConfigError where trying again is useless, else NotApplied."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthError(f"the certificate of {address} is not trusted: {error.verify_message}")
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return ConfigError(f"{address} does not speak TLS: connect without tls= and without {CA}")
    refused = isinstance(error, ConnectionRefusedError | FileNotFoundError)
    return (NobodyListens if refused else NotApplied)(f"cannot connect to {address}: {error}")


def unwelcome(address: str, where: Address, timeout: float, error: EmbringError) -> EmbringError:
    """What it means that a server closed a plain connection without a word: it may speak TLS, so ask it in TLS.

    Nothing secret is sent, and nothing that it says is believed.
    """
    if where.path:
        return NotApplied(str(error))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((where.host, where.port), timeout) as plain, context.wrap_socket(plain):
            return ConfigError(f"{address} speaks TLS: {HOW}")
    except OSError:
        return NotApplied(str(error))
