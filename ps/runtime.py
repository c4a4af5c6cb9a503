"""The runtime file: where this user's running cluster is, for `ps.connect()` and the `embring` command.

`embring up` writes it (mode 0600) and `embring down` removes it. It names files with secrets, never the secrets.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from ps.errors import ConfigError


@dataclass(frozen=True)
class Runtime:
    """A running cluster, as its user sees it.

    addresses: of its servers ("tcp:HOST:PORT", "unix:/path"), kept up by the controller; any of them knows the others.
    token_path: file (mode 0600) with the token of the fabric. cluster: its random id. state: its state folder.
    ray_address and ray_token_path: how to join its Ray. head_pid and head_started: our Ray head process and its
    start time in clock ticks since boot, so that a reused pid is never taken for it; 0 where Ray was joined.
    scratch: short folder of sockets, removed by `down`. metrics: URL of the servers' Prometheus metrics, or "".
    namespace: of its actors in Ray. tls_ca: path of the authority that clients trust, or "" without TLS.
    """

    addresses: tuple[str, ...]
    token_path: str
    cluster: int = 0
    fingerprint: str = ""
    state: str = ""
    ray_address: str = ""
    ray_token_path: str = ""
    head_pid: int = 0
    head_started: int = 0
    scratch: str = ""
    metrics: str = ""
    namespace: str = "embring"
    tls_ca: str = ""


def runtime_path() -> Path:
    """$XDG_RUNTIME_DIR/embring/cluster.json where that folder exists, else ~/.cache/embring/cluster.json."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(base) if base and Path(base).is_dir() else Path.home() / ".cache"
    return folder / "embring" / "cluster.json"


def write_private(path: Path, data: bytes) -> None:
    """Put `data` at `path` with mode 0600, whole or not at all, and synced before its name appears."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:  # mkstemp made it with mode 0600
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_runtime(runtime: Runtime, path: Path | None = None) -> Path:
    """Write the runtime file (mode 0600), replacing an older one; returns its path."""
    target = path or runtime_path()
    write_private(target, json.dumps(asdict(runtime), indent=2).encode() + b"\n")
    return target


def read_runtime(path: Path | None = None) -> Runtime:
    """Read the runtime file. Raises ConfigError where there is none, it is malformed, or not the user's alone."""
    target = path or runtime_path()
    try:
        with open(target, "rb") as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except FileNotFoundError:
        raise ConfigError(
            f"no cluster is known here ({target} does not exist): start one with `embring up`, "
            "or give addresses and a token"
        ) from None
    except OSError as error:
        raise ConfigError(f"the runtime file {target} cannot be read: {error.strerror}") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"the runtime file {target} must belong to you alone (mode 0600); it has mode {status.st_mode & 0o777:04o}"
        )
    try:
        data = json.loads(text)
        unknown = sorted(set(data) - {f.name for f in fields(Runtime)})
        if unknown:
            raise ConfigError(f"the runtime file {target} has an unknown key {unknown[0]!r}; it is of another version")
        return Runtime(**{**data, "addresses": tuple(data["addresses"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"the runtime file {target} is malformed: {error}") from None


def readdress(path: str | Path, cluster: int, addresses: tuple[str, ...]) -> bool:
    """Have a cluster's runtime file name these addresses; False where the file is not there, or not this cluster's."""
    try:
        known = read_runtime(Path(path))
    except ConfigError:
        return False
    if known.cluster != cluster:
        return False
    if known.addresses != addresses:
        write_runtime(replace(known, addresses=addresses), Path(path))
    return True


def read_token(path: str | Path) -> str:
    """The token in `path`, without surrounding white space. Raises ConfigError where it is missing or empty."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {path} cannot be read: {error}") from None
    if not token:
        raise ConfigError(f"the token file {path} is empty")
    return token
