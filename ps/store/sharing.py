"""What a process of this host is told, so that it can map a store: see ps/shared.py."""

import os
from typing import Any

from ps.memory import Reservation
from ps.store.holdings import Holdings


def described(held: Holdings) -> dict[str, Any]:
    """What a process of this host needs to map the store: {} where it is not shared.

    Each file as [descriptor in this process, device, inode, bytes]; tables as [number, arena, code, first slot, slots].
    """
    if not held.latch.shared:
        return {}
    arenas = [
        {"dim": a.key.dim, "optimizer": a.key.optimizer, "files": {name: _file(m) for name, m in a.shared.items()}}
        for a in held.registry.arenas
    ]
    return {
        "pid": os.getpid(),
        "generation": held.latch.generation,
        "header": _file(held.latch.memory),
        "roles": _file(held.slots.roles_memory),
        "arenas": arenas,
        "tables": [[e.number, e.arena, e.code, e.first, e.slots] for e in held.registry.entries.values()],
    }


def _file(memory: Reservation) -> list[int]:
    found = os.fstat(memory.fd)
    return [memory.fd, found.st_dev, found.st_ino, found.st_size]
