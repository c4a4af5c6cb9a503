"""A server process: a Ray actor whose data thread holds the rows and speaks the fabric.

Ray's own threads only start it, hand it views and watch it; every read or write of rows happens on the data thread.
A new process is a new incarnation and owns nothing until a view gives it slots.
"""

import asyncio
import hashlib
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ps.config import Config, ServerConfig, config_from_plain
from ps.errors import ConfigError, EmbringError, NotApplied, PerhapsApplied
from ps.fabric.address import parse_address
from ps.loop import LoopThread
from ps.wire import raise_error

ADMIN_TIMEOUT_S = 60.0
OPEN_TIMEOUT_S = 280.0
LOOKS = ("status", "outlook")
"""What an administrator asks without changing anything."""

MEMORY_SHARE = 0.7
"""Of a host's memory, what its servers may fill together unless memory_max_mib says otherwise."""

RECONNECT, RECONNECT_DEFAULT_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0

PACKAGES = ("ps", "hashring")

log = logging.getLogger("embring.server")


@dataclass(frozen=True)
class Setup:
    """What every actor of a cluster is told when it starts.

    config: plain settings. state: the cluster's state folder on the head host. scratch: short folder for sockets.
    token: of the fabric. namespace: of Ray. root: where the starter's modules came from. environment: variables of
    the actors' processes. runtime_file: on the head host, what the controller keeps up.
    """

    config: dict[str, Any]
    state: str
    scratch: str
    token: str = field(repr=False)
    namespace: str
    root: str
    environment: dict[str, str]
    runtime_file: str = ""


def check_modules(root: str) -> None:
    """Raise ConfigError unless this process's modules are the starter's.

    Ray puts the starter's folders first on the path of its actors, so a stranger's folder of an equal name could
    shadow a package of ours. On another host the root may be elsewhere; there only their agreement is checked.
    """
    here = Path(__file__).resolve().parents[1]
    if Path(root).is_dir() and here != Path(root):
        raise ConfigError(f"a server found its modules in {here}; the cluster was started from {root}")
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] in PACKAGES and file and here not in Path(file).resolve().parents:
            raise ConfigError(f"a server found its module {name} in {file}, not in {here}")


def log_to(path: Path) -> None:
    """Send this process's log to a file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("embring", "ps"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def reconnect_s() -> float:
    """Seconds that this node of Ray, and with it this process, outlives Ray's head: workers have its environment."""
    try:
        return float(os.environ.get(RECONNECT, ""))
    except ValueError:
        return RECONNECT_DEFAULT_S


def memory_max(config: ServerConfig) -> int:
    """Bytes that one server may fill with rows."""
    if config.memory_max_mib:
        return config.memory_max_mib * 2**20
    return int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / config.servers)


def unanswered(verb: str, sent: bool, why: str) -> EmbringError:
    """What to tell an administrator whom the controller does not answer. sent: whether it may do what was asked."""
    if sent:
        return PerhapsApplied(f"the controller does not answer ({why}); {verb} may have been done, or be done later")
    return NotApplied(f"the controller does not answer ({why}); {verb} was not done")


async def _reply(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())


class Server:
    """The Ray actor. Its methods run on Ray's event loop and hand the work to the data thread."""

    def __init__(self, setup: Setup, name: str, index: int, before: Sequence[str] = ()) -> None:
        """before: where the last process of this name listened; its port is taken again if it is free here, so that
        clients that rested meanwhile find this one."""
        check_modules(setup.root)
        log_to(Path(setup.state) / "logs" / f"{name}.log")
        self.name = name
        self.incarnation = secrets.randbits(63) | 1
        self.config: Config = config_from_plain(setup.config)
        self.host = ray.util.get_node_ip_address()
        self._setup = setup
        self._index = index
        self._controller: Any = None
        self._watched = asyncio.Event()
        self._data = LoopThread("data")
        self.addresses: list[str] = self._data.call(self._open(before), OPEN_TIMEOUT_S)
        log.info("%s incarnation %d listens on %s", name, self.incarnation, ", ".join(self.addresses))

    async def _open(self, before: Sequence[str]) -> list[str]:
        """On the data thread: load the kernels, make the store and listen."""
        from ps.fabric.tls import serving
        from ps.kernels import warmup
        from ps.service import Service, serve
        from ps.store import Store, StoreLimits

        warmup()  # from the cache: a first request must not wait for it
        server = self.config.server
        limits = StoreLimits(
            memory_max=memory_max(server),
            clients_max=server.clients_max,
            deletions_max=server.deletions_max,
            shared=server.shared_reads,
        )
        store = Store(self.incarnation, limits)
        self._service = Service(store, self.config, self._setup.token, self._control, self.name)
        tls = serving(self.config.tls)
        if not server.port and (port := self._port_of(before)):
            try:
                return await serve(self._service, self._wanted(port), tls)
            except ConfigError as error:
                log.info("the port of the last process of this name has another owner: %s", error)
        return await serve(self._service, self._wanted(server.port and server.port + self._index), tls)

    def _port_of(self, before: Sequence[str]) -> int:
        """The port of addresses of a process that ran on this host, or 0."""
        known = (parse_address(address) for address in before)
        return next((a.port for a in known if a.host == self._listens), 0)

    @property
    def _listens(self) -> str:
        return self.host if self.config.server.host == "node" else self.config.server.host

    def _wanted(self, port: int) -> list[str]:
        """Addresses to listen on: a Unix socket for this host, and TCP."""
        folder = Path(self._setup.scratch)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        short = hashlib.blake2s(str(self.incarnation).encode(), digest_size=4).hexdigest()
        return [f"tcp:{self._listens}:{port}", f"unix:{folder}/{self.name}-{short}"]

    async def _control(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        """On the data thread: ask the controller, for an administrator. NotApplied only where it did not hear of it."""
        sent = False
        try:
            async with asyncio.timeout(ADMIN_TIMEOUT_S):
                if (controller := self._controller) is None:
                    controller = await asyncio.to_thread(ray.get_actor, "controller", self._setup.namespace)
                    self._controller = controller
                if verb not in LOOKS:
                    # Ray does not say whether a call that failed had begun: see first that the controller is there.
                    await _reply(controller.status.remote())
                    sent = True
                reply = await _reply(controller.admin.remote(verb, fields))
        except (RayError, ValueError, TimeoutError) as error:
            self._controller = None
            raise unanswered(verb, sent, type(error).__name__) from None
        if "error" in reply:
            raise_error(reply["error"])
        return reply["ok"]

    async def ready(self) -> dict[str, Any]:
        """Who this is; answers once it listens."""
        return {
            "incarnation": self.incarnation,
            "host": self.host,
            "addresses": self.addresses,
            "pid": os.getpid(),
            "reconnect_s": reconnect_s(),
        }

    async def forever(self) -> None:
        """Never returns before somebody else calls it: whoever waits for it hears from Ray when this process is gone.

        One waits at a time. Calls of controllers that died, or of one that had to ask again while this process was
        paused, would pile up until no other call (`ready`) got a turn.
        """
        self._watched.set()
        self._watched = mine = asyncio.Event()
        await mine.wait()


ServerActor = ray.remote(num_cpus=0)(Server)
