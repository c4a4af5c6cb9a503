"""`embring serve`."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli_common import JsonOption, running

_TAKEN = re.compile(r"controller|ray|server-\d+")


def serve(
    models: Annotated[Path, typer.Argument(help="Model repository: NAME/VERSION/ with model.toml in each.")],
    host: Annotated[str, typer.Option(help="Where it listens. It asks for no token: keep others out.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Port for gRPC; 0 lets the system choose.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Port for HTTP; 0 lets the system choose.")] = 8000,
    name: Annotated[str, typer.Option(help="Name of the router process.")] = "router-0",
    as_json: JsonOption = False,
) -> None:
    """Start a router that serves the models of a folder from the running cluster's tables; it ends with the cluster.

    Example:  embring serve models/
    """
    from deploy.routers import start_router
    from ps.config import RouterConfig
    from router.config import find_models

    check_name(name)
    find_models(models)  # a wrong folder is refused before a process is started
    ports = RouterConfig(host=host, grpc_port=grpc_port, http_port=http_port)
    told = start_router(running(), models.resolve(), ports, name)
    if as_json:
        print(json.dumps(told))
        return
    print(f"the router {name} serves {models}\ngRPC: {told['grpc']}\nHTTP: {told['http']}")


def check_name(name: str) -> None:
    """RequestError where a router cannot be named so: names are those of servers, and none that others have."""
    from ps.controller.outlook import NAME
    from ps.errors import RequestError

    if not NAME.fullmatch(name) or _TAKEN.fullmatch(name):
        raise RequestError(
            f"--name is {name[:80]!r}; it must be up to 63 letters, digits, '.', '_' and '-', and the cluster's other "
            "processes are named controller, ray and server-N"
        )
