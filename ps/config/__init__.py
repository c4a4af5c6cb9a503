"""Every setting of a cluster in one place: unit, range, default, trade-off. Written as `cluster.toml`.

`ClusterConfig` fixes where every id belongs; it is fingerprinted, and a server or client with another fingerprint
is refused at the handshake. The other sections may differ between servers and change at a restart.
"""

import json
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import xxhash

from ps.config.checkpoint import CheckpointConfig
from ps.config.setting import setting as _setting
from ps.errors import ConfigError

HASHES = "mix64/1 xxh64/0"
"""The hash functions and their versions: of ids, and of strings with its seed. Part of the fingerprint."""

SEND_BUFFER = 4 * 2**20
"""What a Unix socket may hold, where net.core.wmem_max lets it. By default it is 200 KB: a share of a push, or
the answer to a pull, is larger, and whatever has to wait wakes two processes once more."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where ids belong. Never changes during the life of a cluster."""

    slot_bits: int = _setting(
        14,
        "log2 of slots",
        6,
        16,
        "More slots move in smaller steps and balance more servers (up to some 2**slot_bits / 50); each "
        "costs about 100 bytes a server.",
    )
    seed: int = _setting(
        0,
        "integer",
        0,
        2**63 - 1,
        "Tables that are created without a seed draw theirs from this and their name. Tables with equal seeds place "
        "equal ids in equal slots, and give them equal initial rows.",
    )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of everything that decides where an id belongs."""
        text = json.dumps({"hashes": HASHES, **asdict(self)}, sort_keys=True)
        return xxhash.xxh64_hexdigest(text.encode())


@dataclass(frozen=True)
class ServerConfig:
    """One server process: one data thread."""

    servers: int = _setting(
        3,
        "processes",
        1,
        256,
        "How many servers `embring up` starts. One for each core that may serve; a server uses one core.",
    )
    replicas: int = _setting(
        1,
        "owners",
        1,
        64,
        "Owners of each slot of tables that are created without a number, at most `servers`. With R, rows outlive R - 1"
        " servers, take R times the memory, and a push costs up to R times as much. `embring table alter` changes a"
        " table's own.",
    )
    owners_min: int = _setting(
        1,
        "servers",
        1,
        64,
        "Owners that a slot must have for pushes to be taken. More refuses pushes where copies are missing, rather"
        " than risk them on one server; pulls go on.",
    )
    verify_slots_per_s: float = _setting(
        2.0,
        "slots a second",
        0,
        10000,
        "Slots that each server compares with their other owners by itself, all day long (of large ones 8192 rows at a "
        "time); 0 leaves that to `embring verify`. Both servers spend about a microsecond a row.",
    )
    copy_max_mib_per_s: int = _setting(
        0,
        "MiB/s a server",
        0,
        2**20,
        "What each server spends on copying slots to others, after failures and when servers join or leave; 0 is no "
        "limit but what pulls and pushes leave: copies slow down by themselves, to 4 MiB/s, while requests wait.",
    )
    host: str = _setting(
        "127.0.0.1",
        "address",
        None,
        None,
        "Where servers listen. The loopback keeps strangers out; another address needs a network that you"
        " trust, besides the token.",
    )
    port: int = _setting(
        0,
        "TCP port",
        0,
        65000,
        "Port of the first server, the others follow it; 0 lets the system choose free ones, which change"
        " at a restart.",
    )
    memory_max_mib: int = _setting(
        0,
        "MiB a server",
        0,
        2**24,
        "Rows beyond it are refused (updates and pulls go on) instead of meeting the out-of-memory "
        "killer; 0 shares 70 % of this host's memory among its servers.",
    )
    clients_max: int = _setting(
        256,
        "clients",
        1,
        65536,
        "Training processes whose pushes a server tells apart (each is applied once). One costs up to 16 bytes a slot.",
    )
    deletions_max: int = _setting(
        262144,
        "ids",
        1024,
        2**28,
        "Deletions remembered for incremental exports; older ones make an export send whole slots. 28 bytes each.",
    )
    shared_reads: bool = _setting(
        True,
        "switch",
        None,
        None,
        "Processes of this user on a server's own host read its rows in place, without a message. Without huge pages"
        " for shared memory (`embring doctor`) the server's own random reads take up to half as long again.",
    )
    connections_max: int = _setting(
        4096,
        "connections",
        1,
        65536,
        "Open at once; further ones are turned away. Each may hold frame_max_mib while a request arrives.",
    )
    frame_max_mib: int = _setting(
        256,
        "MiB",
        1,
        1024,
        "Largest request or reply. Larger batches in one go; more memory that one client can hold.",
    )
    queue_max: int = _setting(
        1024,
        "requests",
        1,
        65536,
        "Requests waiting in a server before it answers Overloaded. A longer queue rides out bursts; "
        "the wait grows with it.",
    )
    queue_max_mib: int = _setting(
        512,
        "MiB",
        1,
        65536,
        "The same in bytes of arrays: memory that waiting requests may hold.",
    )
    unread_max_mib: int = _setting(
        512,
        "MiB",
        1,
        65536,
        "Bytes of replies that one client may leave unread before it is cut off; it protects memory from slow readers.",
    )
    handshake_s: float = _setting(
        5.0,
        "seconds",
        0.5,
        60,
        "Time for a handshake. Shorter sheds strangers sooner; a busy host needs longer.",
    )
    silent_s: float = _setting(
        30.0,
        "seconds",
        20,
        3600,
        "Connections silent for so long are closed; clients with nothing to say ping every 10 s.",
    )


@dataclass(frozen=True)
class ControlConfig:
    """The controller: health, restarts, statistics."""

    ping_interval_ms: int = _setting(
        200,
        "milliseconds",
        20,
        10000,
        "Time between pings of a server. Shorter finds a silent server sooner; busy hosts look silent sooner too.",
    )
    pings_max: int = _setting(
        5,
        "pings",
        2,
        100,
        "Unanswered pings, one after another, after which a server leaves its slots, save those of which it is the "
        "last owner. If most fall silent at once, only Ray's word counts.",
    )
    restart: bool = _setting(
        True,
        "switch",
        None,
        None,
        "Start a dead server again. It comes back owning nothing, and is given copies; slots of which it was the last "
        "owner stay lost until a restore or `embring recover --accept-loss`.",
    )
    restarts_max: int = _setting(
        20,
        "restarts a server",
        0,
        10000,
        "A server that keeps dying is given up after so many restarts.",
    )
    copy_wait_ms: int = _setting(
        5000,
        "milliseconds",
        0,
        3600000,
        "How long, while a server is missing, the copies that it had are not made anew on others. One that returns by "
        "then from a pause needs only what it missed; a second failure meanwhile can lose rows.",
    )
    copy_slots_max: int = _setting(
        4096,
        "slots a server",
        1,
        1048576,
        "Slots that one server copies to others at a time; those that were copied and wait for others do not count. "
        "More mends sooner; pulls and pushes feel it more.",
    )
    statistics_interval_ms: int = _setting(
        2000,
        "milliseconds",
        200,
        60000,
        "How often the controller asks servers for their figures: rates and metrics are as fresh as this.",
    )
    metrics_port: int = _setting(
        0,
        "TCP port",
        0,
        65535,
        "Prometheus metrics of all servers, on the loopback; 0 lets the system choose a free port (see "
        "`embring status`).",
    )


@dataclass(frozen=True)
class RayConfig:
    """Ray, which starts and watches the processes. No embedding passes through it."""

    port: int = _setting(
        0,
        "TCP port",
        0,
        65535,
        "Port of the Ray head, which other hosts need to join it; 0 lets the system choose one.",
    )
    object_store_mib: int = _setting(
        80,
        "MiB",
        76,
        2**20,
        "Ray's shared object store. embring puts nothing there; raise it only if your own Ray work shares"
        " this cluster.",
    )
    reconnect_s: int = _setting(
        315360000,
        "seconds",
        60,
        315360000,
        "How long processes outlive a dead Ray head. Ray's own default (60) would end every server a "
        "minute after the head.",
    )
    scratch: str = _setting(
        "/tmp",
        "folder",
        None,
        None,
        "Where the folder of sockets is made. Keep it short: a Unix socket's path holds 107 bytes.",
    )


@dataclass(frozen=True)
class RouterConfig:
    """Routers, which `embring up` starts beside the servers where a models repository is named."""

    models: str = _setting(
        "",
        "folder",
        None,
        None,
        "Models repository: NAME/VERSION/ with model.toml in each; at the same path on every host. Empty: no routers.",
    )
    routers: int = _setting(
        1,
        "processes",
        1,
        64,
        "How many routers. Each serves every model, and scores on a core of its own; more answer more requests.",
    )
    host: str = _setting(
        "127.0.0.1",
        "address",
        None,
        None,
        "Where routers listen. They ask for no token: on another address than the loopback, keep strangers out.",
    )
    grpc_port: int = _setting(
        8001,
        "TCP port",
        0,
        65000,
        "Port for gRPC of the first router; the next one's is two higher. 0 lets the system choose, anew at a restart.",
    )
    http_port: int = _setting(
        8000,
        "TCP port",
        0,
        65000,
        "Port for HTTP of the first router; the next one's is two higher. 0 lets the system choose, anew at a restart.",
    )


@dataclass(frozen=True)
class TlsConfig:
    """TLS between hosts: of the fabric over TCP. Unix sockets stay plain, since they never leave their host."""

    certificate: str = _setting(
        "",
        "PEM file",
        None,
        None,
        "What servers show, with the names and addresses of all their hosts in it; at the same path on every host. "
        "Empty: no TLS. TLS hides rows and token from the network, and costs a server time for every byte.",
    )
    key: str = _setting(
        "",
        "PEM file",
        None,
        None,
        "The certificate's private key, without a password. Whoever can read it can pose as a server.",
    )
    ca: str = _setting(
        "",
        "PEM file",
        None,
        None,
        "The authority that clients trust; the runtime file names it. Empty: the certificate itself, which is "
        "then self-signed: simpler, but every client needs the new one when it changes.",
    )

    @property
    def trusted(self) -> str:
        """Path of what clients trust, or "" where TLS is off."""
        return self.ca or self.certificate


@dataclass(frozen=True)
class Config:
    """A whole cluster.toml."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the cluster section."""
        return self.cluster.fingerprint

    def to_plain(self) -> dict[str, Any]:
        """Sections of plain settings; `config_from_plain` is the inverse."""
        return asdict(self)

    def with_settings(self, section: str, **settings: Any) -> "Config":
        """A copy with some settings of one section changed, checked like a file's."""
        plain = self.to_plain()
        plain[section] = {**plain[section], **settings}
        return config_from_plain(plain)


def config_from_plain(plain: Mapping[str, Any]) -> Config:
    """A checked Config from {section: {key: value}}; what is missing takes its default.

    Raises ConfigError naming the key, the value and what is allowed.
    """
    sections = {f.name: f.default_factory for f in fields(Config)}
    config = Config()
    for name, settings in plain.items():
        if name not in sections:
            raise ConfigError(f"unknown section {name!r}; the sections are {', '.join(sections)}")
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{name} is {settings!r}; it must be a section: write it as [{name}]")
        known = {f.name: f for f in fields(getattr(config, name))}
        for key, value in settings.items():
            if key not in known:
                raise ConfigError(f"unknown setting {name}.{key}; [{name}] has {', '.join(known)}")
            _check(f"{name}.{key}", known[key], value)
        # An integer is a good value for a setting in fractions.
        typed = {k: float(v) if isinstance(known[k].default, float) else v for k, v in settings.items()}
        config = replace(config, **{name: replace(getattr(config, name), **typed)})
    if (config.checkpoint.every_s or config.checkpoint.restore_lost) and not config.checkpoint.directory:
        raise ConfigError("checkpoint.every_s and checkpoint.restore_lost need checkpoint.directory")
    server = config.server
    if server.replicas > server.servers:
        raise ConfigError(
            f"server.replicas is {server.replicas}; it must be 1 to {server.servers}, the number of servers"
        )
    tls = config.tls
    if bool(tls.certificate) != bool(tls.key) or (tls.ca and not tls.certificate):
        raise ConfigError("tls.certificate and tls.key go together, and tls.ca needs both")
    return config


def _check(key: str, setting: Field, value: Any) -> None:
    """Raise ConfigError unless `value` has the default's type and lies in the setting's range."""
    kind = type(setting.default)
    good = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if kind is not bool and isinstance(value, bool):
        good = False
    if not good:
        word = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ConfigError(f"{key} is {value!r}; it must be {word}")
    low, high = setting.metadata["low"], setting.metadata["high"]
    if low is not None and not low <= value <= high:  # also refuses NaN
        raise ConfigError(f"{key} is {value!r}; it must be {low} to {high} ({setting.metadata['unit']})")
    if kind is str and not value and setting.default:
        unit = setting.metadata["unit"]
        raise ConfigError(f"{key} is empty; it must be {'an' if unit[0] in 'aeiou' else 'a'} {unit}")


def load_config(path: str | Path | None) -> Config:
    """Read a cluster.toml; None gives the defaults. Raises ConfigError, one sentence, naming the file.

    Files and folders in it are relative to the folder that it lies in.
    """
    if path is None:
        return Config()
    try:
        text = Path(path).read_text(encoding="utf-8")
        return _placed(config_from_plain(tomllib.loads(text)), Path(path).resolve().parent)
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _placed(config: Config, folder: Path) -> Config:
    """The configuration with every file and folder as an absolute path."""
    plain = config.to_plain()
    for section in fields(config):
        for setting in fields(getattr(config, section.name)):
            value = plain[section.name][setting.name]
            if value and setting.metadata["unit"].endswith(("file", "folder")) and "://" not in value:
                plain[section.name][setting.name] = str(folder / Path(value).expanduser())
    return config_from_plain(plain)


def annotated(config: Config | None = None) -> str:
    """A cluster.toml with every setting, its unit, range, default and trade-off; reading it back gives `config`."""
    config = config or Config()
    lines = ["# embring: cluster.toml. Every setting may be left out; an unknown one is refused."]
    for section in fields(config):
        values = getattr(config, section.name)
        lines += ["", f"# {str(values.__doc__).strip().splitlines()[0]}", f"[{section.name}]"]
        for setting in fields(values):
            meta = setting.metadata
            span = "" if meta["low"] is None else f", {meta['low']} to {meta['high']}"
            comment = f"{meta['unit']}{span}; default {json.dumps(setting.default)}. {meta['why']}"
            lines += [f"# {line}" for line in textwrap.wrap(comment, 108)]
            lines.append(f"{setting.name} = {json.dumps(getattr(values, setting.name))}")
    return "\n".join(lines) + "\n"
