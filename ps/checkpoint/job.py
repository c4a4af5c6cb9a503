"""`python -m ps.checkpoint.job`: what the controller has done beside itself, in a process of its own.

Rows by the gigabyte would keep the controller from its pings. The work comes as JSON on standard input (the token is
in it, and must not stand in an argument), its outcome goes as JSON to standard output.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from hashring.view import Server
from ps.checkpoint.files import newest, survey
from ps.checkpoint.models import newest_versions
from ps.checkpoint.reach import Access, controller_through
from ps.checkpoint.restore import restore
from ps.checkpoint.retention import chains, prune_after
from ps.checkpoint.save import save
from ps.checkpoint.storage import CheckpointError, Storage
from ps.errors import EmbringError
from ps.fabric.tls import trusting

NICE = 5
"""Servers come first."""


def work(order: Mapping[str, Any]) -> dict[str, Any]:
    """Do what was ordered; what came of it. Raises EmbringError.

    order: what ("save" or "restore"), directory, servers ([name, incarnation, addresses] each), token, tls_ca,
    fingerprint, cluster, full_every, keep, models (the repository that routers serve, "" for none).
    """
    storage = Storage(order["directory"])
    access = Access(order["token"], trusting(order["tls_ca"]))
    servers = [Server(name, number, "", "", tuple(places)) for name, number, places in order["servers"]]
    if order["what"] == "restore":
        with controller_through(servers, access) as ask:
            name = newest(storage, order["cluster"], only=True).name  # of another one, no slot could be restored here
            return vars(restore(storage, ask, access, name=name, same_tables=True))
    known = chains([m for m in survey(storage)[0] if m.cluster == order["cluster"]])
    incremental = bool(known) and len(known[-1]) < order["full_every"]
    models = {}
    if order["models"]:
        with suppress(CheckpointError):  # a repository that cannot be read keeps no rows from being saved
            models = newest_versions(order["models"])
    saved = save(storage, servers, access, order["fingerprint"], incremental=incremental, models=models)
    return {**vars(saved), **prune_after(storage, order["keep"], order["cluster"])}


@contextmanager
def heard() -> Iterator[list[str]]:
    """What is said as a warning meanwhile: nobody reads the standard error of this process."""
    sentences: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: sentences.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("embring.checkpoint")
    log.addHandler(handler)
    try:
        yield sentences
    finally:
        log.removeHandler(handler)


def main() -> None:
    """Read an order, do it, and say what came of it, and what was warned of."""
    os.nice(NICE)
    with heard() as warnings:
        try:
            told = work(json.load(sys.stdin))
        except EmbringError as error:
            told = {"error": str(error)}
    json.dump({**told, "warnings": warnings}, sys.stdout)


if __name__ == "__main__":
    main()
