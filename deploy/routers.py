"""Routers of a running cluster: started beside its servers, asked how they are."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ps.cluster import ROOT, controller, kernel_cache, named_actors
from ps.config import RouterConfig
from ps.runtime import Runtime, read_token

ASK_TIMEOUT_S = 10.0

ACTOR_PREFIX = "router:"
"""Of a router's name in Ray, where servers and the controller have names of their own."""


def start_router(runtime: Runtime, models_dir: Path, config: RouterConfig, name: str = "router-0") -> dict[str, Any]:
    """Start a router that must serve at once, and its status; ConfigError with the reason where it cannot."""
    return _start(runtime, models_dir, config, [name], patient=False)[0]


def start_all(runtime: Runtime, config: RouterConfig) -> list[dict[str, Any]]:
    """Start the routers of a configuration, `router-0` and on, and their statuses.

    They wait for tables that are still to be made. Each has a pair of ports, the next one's two higher.
    """
    names = [f"router-{k}" for k in range(config.routers)]
    return _start(runtime, Path(config.models), config, names, patient=True)


def _start(
    runtime: Runtime, models_dir: Path, config: RouterConfig, names: Sequence[str], *, patient: bool
) -> list[dict[str, Any]]:
    rest = os.environ.get("PYTHONPATH", "")
    environment = {
        "NUMBA_CACHE_DIR": str(kernel_cache()),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{rest}" if rest else str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    with controller(runtime):  # this process as a driver of the cluster's Ray
        from router.config import RouterSettings
        from router.server import RouterSetup, start_routers

        first = RouterSetup(
            name="",
            actor="",
            models_dir=str(models_dir),
            addresses=runtime.addresses,
            token=read_token(runtime.token_path),
            tls_ca=runtime.tls_ca,
            namespace=runtime.namespace,
            host=config.host,
            grpc_port=0,
            http_port=0,
            patient=patient,
            lives="",
            root=str(ROOT),
            log="",
            settings=RouterSettings(),
        )
        setups = [
            replace(
                first,
                name=name,
                actor=ACTOR_PREFIX + name,
                grpc_port=config.grpc_port and config.grpc_port + 2 * k,
                http_port=config.http_port and config.http_port + 2 * k,
                lives=f"{runtime.scratch}/{name}.lives",
                log=f"{runtime.state}/logs/{name}.log",
            )
            for k, name in enumerate(names)
        ]
        return start_routers(setups, environment)


def statuses(namespace: str) -> list[dict[str, Any]]:
    """The status of every router of a cluster; for a driver of its Ray, as `ps.cluster.controller` makes one.

    One that does not answer, because Ray is starting it again or it is stuck, has the state "not answering".
    """
    import ray

    asked: dict[str, Any] = {}
    for name in named_actors(namespace):
        if not name.startswith(ACTOR_PREFIX):
            continue
        try:
            asked[name] = ray.get_actor(name, namespace).status.remote()
        except ValueError:  # it ended since
            continue
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ASK_TIMEOUT_S)
    found = []
    for name, reference in asked.items():
        silent = {"name": name.removeprefix(ACTOR_PREFIX), "state": "not answering", "waiting": "", "models": []}
        try:
            found.append(ray.get(reference, timeout=0.1))
        except (ray.exceptions.RayError, TimeoutError):
            found.append({**silent, "grpc": "", "http": "", "pid": 0, "restarts": 0})
    return found
