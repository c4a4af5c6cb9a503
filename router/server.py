"""A router process: a Ray actor that hosts a Router with both front doors.

Everything runs on the actor's own event loop. Ray starts and watches it; requests come through the front doors only.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from prometheus_client import REGISTRY

import ps
from ps.errors import ConfigError, EmbringError
from router.config import RouterSettings
from router.grpc_door import GrpcDoor, serve_grpc
from router.http_door import HttpDoor, serve_http
from router.metrics import RouterMetrics
from router.pipeline import Router

START_TIMEOUT_S = 120.0

log = logging.getLogger("embring.router")


@dataclass(frozen=True)
class RouterSetup:
    """What a router is told when it starts.

    models_dir: the model repository. addresses, token, tls_ca: of the servers that hold the tables; tls_ca is "" where
    they speak plain TCP. host: where both doors listen; a port of 0 is chosen by the system. root: where the starter's
    modules came from. log: its log file.
    """

    models_dir: str
    addresses: tuple[str, ...]
    token: str = field(repr=False)
    tls_ca: str
    host: str
    grpc_port: int
    http_port: int
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
        self._client: ps.AsyncClient | None = None
        self._router: Router | None = None
        self._doors: list[GrpcDoor | HttpDoor] = []

    async def start(self) -> dict[str, Any]:
        """Load the models and open both doors: {"grpc", "http": "HOST:PORT", "pid"}, or {"error": one sentence}."""
        setup = self._setup
        try:
            self._client = await ps.AsyncClient.connect(setup.addresses, setup.token, tls=setup.tls_ca)
            self._router = Router(setup.models_dir, self._client, setup.settings, RouterMetrics(REGISTRY))
            await self._router.start()
            grpc_door = await serve_grpc(self._router, setup.host, setup.grpc_port)
            self._doors.append(grpc_door)
            http_door = await serve_http(self._router, setup.host, setup.http_port)
            self._doors.append(http_door)
        except (EmbringError, OSError) as error:
            await self.close()
            return {"error": str(error)}
        places = {"grpc": f"{setup.host}:{grpc_door.port}", "http": f"{setup.host}:{http_door.port}"}
        log.info("serving %s at %s", ", ".join(self._router.models), places)
        return {**places, "pid": os.getpid()}

    async def close(self) -> None:
        """Close the doors, let requests under way end, disconnect."""
        for door in self._doors:
            await door.stop()
        self._doors.clear()
        if self._router is not None:
            await self._router.close()
            self._router = None
        if self._client is not None:
            with suppress(EmbringError):
                await self._client.close()
            self._client = None

    async def forever(self) -> None:
        """Never returns: whoever waits for it hears from Ray when this process is gone."""
        await asyncio.Event().wait()


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("embring")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


RouterActor: Any = ray.remote(num_cpus=0)(RouterServer)


def start_router(setup: RouterSetup, name: str, namespace: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Start a router in the Ray that this process is connected to; it lives on, detached, after this process.

    What `RouterServer.start` answers; ConfigError where it could not start, with the reason.
    """
    options = {"name": name, "namespace": namespace, "lifetime": "detached", "max_concurrency": 32}
    actor = RouterActor.options(**options, runtime_env={"env_vars": dict(environment)}).remote(setup)
    try:
        answer: dict[str, Any] = ray.get(actor.start.remote(), timeout=START_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = str(error).strip().splitlines()
        answer = {"error": reason[-1].strip() if reason else type(error).__name__}
    if "error" in answer:
        ray.kill(actor)
        raise ConfigError(f"the router did not start: {answer['error']} (log: {setup.log})")
    return answer
