"""Routers of a running cluster."""

import os
from pathlib import Path
from typing import Any

from ps.cluster import ROOT, controller, kernel_cache
from ps.runtime import Runtime, read_token


def start_router(
    runtime: Runtime,
    models_dir: Path,
    name: str = "router-0",
    host: str = "127.0.0.1",
    grpc_port: int = 0,
    http_port: int = 0,
) -> dict[str, Any]:
    """Start a router beside a cluster's servers: {"grpc": "HOST:PORT", "http": "HOST:PORT", "pid"}.

    Ports of 0 are chosen by the system. It ends with the cluster. ConfigError where it cannot start, with the reason.
    """
    rest = os.environ.get("PYTHONPATH", "")
    environment = {
        "NUMBA_CACHE_DIR": str(kernel_cache()),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{rest}" if rest else str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    with controller(runtime):  # this process as a driver of the cluster's Ray
        from router.config import RouterSettings
        from router.server import RouterSetup
        from router.server import start_router as start

        setup = RouterSetup(
            models_dir=str(models_dir),
            addresses=runtime.addresses,
            token=read_token(runtime.token_path),
            tls_ca=runtime.tls_ca,
            host=host,
            grpc_port=grpc_port,
            http_port=http_port,
            root=str(ROOT),
            log=f"{runtime.state}/logs/{name}.log",
            settings=RouterSettings(),
        )
        return start(setup, name, runtime.namespace, environment)
