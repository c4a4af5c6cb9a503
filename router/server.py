"""A router process: a Ray actor that hosts a Router with both front doors.

Everything runs on one event loop in a thread of its own. Ray starts the process, watches it and starts it again when it
dies; requests come through the front doors only.
"""

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import uvloop
from prometheus_client import REGISTRY
from ray.exceptions import RayError

import ps
from ps.errors import ConfigError, EmbringError
from router.config import RouterSettings
from router.grpc_door import serve_grpc
from router.http_door import serve_http
from router.metrics import RouterMetrics
from router.pipeline import Router

START_TIMEOUT_S = 180.0
ASK_TIMEOUT_S = 10.0
RETRY_S = 1.0

log = logging.getLogger("embring.router")


@dataclass(frozen=True)
class RouterSetup:
    """What a router is told when it starts.

    actor, namespace: its name in Ray and the cluster's. models_dir: the model repository. addresses, token, tls_ca: of
    the servers that hold the tables; tls_ca is "" where they speak plain TCP. host: where both doors listen; a port of
    0 is chosen by the system. patient: whether to wait, doors open and not ready, for tables that are still to be made.
    lives: a file that counts its lives. root: where the starter's modules came from. log: its log file.
    """

    name: str
    actor: str
    models_dir: str
    addresses: tuple[str, ...]
    token: str = field(repr=False)
    tls_ca: str
    namespace: str
    host: str
    grpc_port: int
    http_port: int
    patient: bool
    lives: str
    root: str
    log: str
    settings: RouterSettings


class RouterServer:
    """The Ray actor."""

    def __init__(self, setup: RouterSetup) -> None:
        here = Path(__file__).resolve().parents[1]
        if Path(setup.root).is_dir() and here != Path(setup.root):
            raise ConfigError(f"a router found its modules in {here}; it was started from {setup.root}")
        _log_to(Path(setup.log))
        torch.set_num_threads(1)
        self._setup = setup
        self._restarts = _count_life(Path(setup.lives)) - 1
        self._metrics = RouterMetrics(REGISTRY)
        self._router: Router | None = None
        self._places: dict[str, str] = {}
        self._waiting = ""
        self._told: Future[None] = Future()
        self._opened = AsyncExitStack()
        threading.Thread(target=lambda: uvloop.run(self._live()), name="router", daemon=True).start()

    async def _live(self) -> None:
        """Open the doors, begin to serve, and stay. In a later life than the first nothing makes it give up."""
        again = self._restarts > 0
        try:
            for step, patient in ((self._open, again), (self._begin, again or self._setup.patient)):
                while not await self._tried(step):
                    self._tell()
                    if not patient:
                        await self._opened.aclose()
                        return
                    await asyncio.sleep(RETRY_S)
            self._tell()
            await asyncio.Event().wait()
        except BaseException as error:
            log.exception("the router ends")
            if self._told.done():
                os._exit(1)  # Ray starts it again
            self._told.set_exception(error)

    async def _tried(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Whether a step succeeded; what it waits for is logged when it changes."""
        try:
            await step()
        except (EmbringError, OSError) as error:
            if str(error) != self._waiting:
                log.warning("waiting: %s", error)
            self._waiting = str(error)
            return False
        self._waiting = ""
        return True

    def _tell(self) -> None:
        if not self._told.done():
            self._told.set_result(None)

    async def _open(self) -> None:
        """Load the models, connect to the cluster, open the doors: live from here on, and not ready yet."""
        setup = self._setup
        addresses = await asyncio.to_thread(self._addresses) if self._restarts else setup.addresses
        async with AsyncExitStack() as stack:
            client = await ps.AsyncClient.connect(addresses, setup.token, tls=setup.tls_ca)
            stack.push_async_callback(client.close)
            router = Router(setup.models_dir, client, setup.settings, self._metrics)
            stack.push_async_callback(router.close)
            grpc_door = await serve_grpc(router, setup.host, setup.grpc_port)
            stack.push_async_callback(grpc_door.stop)
            http_door = await serve_http(router, setup.host, setup.http_port)
            stack.push_async_callback(http_door.stop)
            self._opened = stack.pop_all()
        self._router = router
        self._places = {"grpc": f"{setup.host}:{grpc_door.port}", "http": f"{setup.host}:{http_door.port}"}

    async def _begin(self) -> None:
        assert self._router is not None
        await self._router.start()
        gc.freeze()  # a collection that walks through torch and the models in the middle of a request takes 0.2 s
        log.info("serving %s at %s", ", ".join(self._router.models), self._places)

    def _addresses(self) -> tuple[str, ...]:
        """Where servers listen now: they may have begun again since this router was first started."""
        try:
            controller: Any = ray.get_actor("controller", self._setup.namespace)
            answer: Any = ray.get(controller.admin.remote("status", {}), timeout=ASK_TIMEOUT_S)
            return tuple(a for s in answer["ok"]["servers"] for a in s["addresses"]) or self._setup.addresses
        except (RayError, ValueError, TimeoutError):
            return self._setup.addresses

    def start(self) -> dict[str, Any]:
        """The status once it serves, or knows why it cannot yet."""
        self._told.result(START_TIMEOUT_S)
        return self.status()

    def status(self) -> dict[str, Any]:
        """As plain data; state is "serving", "waiting" (for what stands in `waiting`) or "starting"."""
        serving = self._router is not None and self._router.ready()
        return {
            "name": self._setup.name,
            "state": "serving" if serving else "waiting" if self._waiting else "starting",
            "waiting": self._waiting,
            "grpc": self._places.get("grpc", ""),
            "http": self._places.get("http", ""),
            "models": list(self._router.models) if self._router is not None else [],
            "pid": os.getpid(),
            "restarts": self._restarts,
        }


def _count_life(path: Path) -> int:
    """Which life of a router this is, from 1 on: its file has a byte for each."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("ab") as file:
        file.write(b".")
        return file.tell()


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("embring")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


RouterActor: Any = ray.remote(num_cpus=0)(RouterServer)


def start_routers(setups: list[RouterSetup], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Start routers in the Ray that this process is connected to; they live on, detached, and Ray restarts them.

    Their statuses. ConfigError, with the reason, where one could not start or (unless it is patient) serve; then none
    of them is left. The first is waited for before the others begin: it fills the cache of compiled kernels, which
    must have one writer.
    """
    actors: list[Any] = []
    told: list[dict[str, Any]] = []
    for group in (setups[:1], setups[1:]):
        for setup in group:
            try:
                actors.append(_actor(setup, environment))
            except ValueError:
                _kill(actors)
                raise ConfigError(f"there is a router {setup.name!r} already; give another name") from None
        for setup, actor in zip(group, actors[-len(group) :], strict=False):
            status, reason = _begun(actor)
            if reason and not (setup.patient and status.get("grpc")):
                _kill(actors)
                raise ConfigError(f"{setup.name} did not start: {reason} (log: {setup.log})")
            told.append(status)
    return told


def _begun(actor: Any) -> tuple[dict[str, Any], str]:
    """The status of a router that was just started, and why it does not serve."""
    try:
        status: dict[str, Any] = ray.get(actor.start.remote(), timeout=START_TIMEOUT_S)
        return status, status["waiting"]
    except (RayError, TimeoutError) as error:
        return {}, (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _actor(setup: RouterSetup, environment: Mapping[str, str]) -> Any:
    return RouterActor.options(
        name=setup.actor,
        namespace=setup.namespace,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=8,
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": dict(environment)},
    ).remote(setup)


def _kill(actors: list[Any]) -> None:
    for actor in actors:
        ray.kill(actor)
