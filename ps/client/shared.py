"""Reading this host's servers in place: their memory, mapped side by side. What makes that sound is in ps/shared.py.

A pull is read in place where every slot it touches has an owner on this host that shares its memory; whatever is in
the way (a write at the same moment, a slot that moved, a server that was stopped) sends it over the fabric instead.
"""

import ctypes
import math
import mmap
import os
import select
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.view import Server
from ps.client.batch import Batch
from ps.client.routing import Features, Routing
from ps.errors import EmbringError
from ps.fabric.address import pick
from ps.kernels import index as ix
from ps.kernels.merge import MAX, finish
from ps.kernels.shared import (
    ABSENT,
    DONE,
    HEADER_FIELDS,
    INCARNATION,
    SLOTS,
    SPOILT,
    WORK_FIELDS,
    begin,
    cut_parts,
    fence,
    lay_out,
    read,
    read_parts,
)
from ps.memory import HUGE_PAGE

ATTEMPTS = 2
"""Reads that may meet a write before the fabric is asked: a push may hold a server for milliseconds."""

ALONE_MAX = 4096
"""Ids that one thread reads alone: 200 us. To wake another takes 20 to 40."""

PART = 1024
"""Ids that a thread takes on at a time, where two share a read: 40 us."""

CORES = len(os.sched_getaffinity(0))

AGAIN_S = 1.0
"""Seconds before a server that could not be mapped is looked at again."""

SERVERS_MAX = 127

_ROW_BYTES = {"directory": 8, "nodes": 128, "entries": 16}
_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FIXED = 0x10

File = Sequence[int]
"""[descriptor in the server's process, device, inode, bytes]"""

_Arguments = tuple[Any, ...]


@dataclass(slots=True)
class Described:
    """What a server said of its memory, and its process; closes the latter with itself."""

    plain: Mapping[str, Any]
    incarnation: int
    process: int

    def __del__(self) -> None:
        os.close(self.process)


@dataclass(slots=True)
class _Arena:
    """The joint arrays of the servers' arenas of one kind, as `kernels.shared.read` takes them; sizes int64[4]."""

    directory: NDArray[np.int64]
    nodes: NDArray[np.int64]
    entries: NDArray[np.int64]
    values: NDArray[np.float32]
    sizes: NDArray[np.int64]


@dataclass(slots=True)
class _Shape:
    """The tables of a request: plan lines without its bags, codes int64[S, F], and arenas with absent rows."""

    lines: NDArray[np.int64]
    codes: NDArray[np.int64]
    arenas: list[tuple[int, _Arena, NDArray[np.float64], NDArray[np.float32]]]


class Mapped:
    """The memory of some servers, for one view."""

    def __init__(self, routing: Routing, servers: Sequence[tuple[int, Described]]) -> None:
        """Map it. OSError where that cannot be."""
        self.routing = routing
        self.known = [known for _, known in servers]
        plain = [known.plain for known in self.known]
        headers = _side_by_side(self.known, [p["header"] for p in plain], 8 * HEADER_FIELDS, np.int64, mmap.PAGESIZE)
        self.headers = headers.reshape(len(servers), -1)
        for line, known in zip(self.headers, self.known, strict=True):
            if line[INCARNATION] != np.uint64(known.incarnation).astype(np.int64):
                raise OSError(f"process {known.plain['pid']} is another one here")
        self.generations = np.array([p["generation"] for p in plain], np.int64)
        self.seen = np.empty(len(servers), np.int64)
        self.roles = _side_by_side(self.known, [p["roles"] for p in plain], 1, np.uint8, HUGE_PAGE)
        self.slots = len(self.roles) // len(servers)
        self.where = _where(routing, [i for i, _ in servers])
        self.poll = select.poll()
        for known in self.known:
            self.poll.register(known.process, select.POLLIN)
        self._arenas: dict[tuple[int, str], _Arena] = {}
        self._shapes: dict[tuple[str, ...], _Shape] = {}

    def shape(self, names: tuple[str, ...]) -> _Shape:
        """What the tables of a request have in common with the servers' memory."""
        found = self._shapes.get(names)
        if found is None:
            found = self._shapes[names] = self._made(names)
        return found

    def _made(self, names: tuple[str, ...]) -> _Shape:
        tables = [self.routing.table(name) for name in names]
        keys = [(t.spec.dim, t.spec.optimizer.kind) for t in tables]
        numbered = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        features = self.routing.features(names)
        lines = np.zeros((len(names), ix.PLAN_COLUMNS), np.int64)
        lines[:, ix.P_CODE] = np.arange(len(names))
        lines[:, ix.P_SEED] = features.seeds.astype(np.int64)
        lines[:, ix.P_BITS] = [t.bits for t in tables]
        lines[:, ix.P_FIRST] = features.firsts
        lines[:, ix.P_ABSENT] = features.lines[:, 3]
        lines[:, ix.P_ARENA] = [numbered[key] for key in keys]
        codes = np.full((len(self.known), len(names)), -1, np.int64)
        for s, known in enumerate(self.known):
            code_of = {number: code for number, _, code, _, _ in known.plain["tables"]}
            places = {number: [first, slots] for number, _, _, first, slots in known.plain["tables"]}
            if any(places.get(t.number, [t.first, 1 << t.bits]) != [t.first, 1 << t.bits] for t in tables):
                raise OSError("the server has a table in other slots than this view")
            codes[s] = [code_of.get(t.number, -1) for t in tables]
        initial = np.zeros((len(names), 2))
        for f, table in enumerate(tables):
            low = float(np.float32(table.spec.initializer.low))
            initial[f] = low, float(np.float32(table.spec.initializer.high)) - low
        arenas = []
        for key, number in numbered.items():
            defaults = np.zeros((len(names), key[0]), np.float32)
            for f, table in enumerate(tables):
                if keys[f] == key and table.spec.default:
                    defaults[f] = table.spec.default
            arenas.append((number, self._arena(*key), initial, defaults))
        return _Shape(lines, codes, arenas)

    def _arena(self, dim: int, optimizer: str) -> _Arena:
        key = (dim, optimizer)
        if key not in self._arenas:
            files: list[Mapping[str, File]] = []
            for known in self.known:
                mine = (a["files"] for a in known.plain["arenas"] if (a["dim"], a["optimizer"]) == key)
                files.append(next(mine, {}))
            flat = {}
            sizes = np.zeros(4, np.int64)
            sizes[SLOTS] = self.slots
            for kind, name in enumerate(("directory", "nodes", "entries", "values")):
                row = _ROW_BYTES.get(name, 4 * dim)
                dtype = np.float32 if name == "values" else np.int64
                stride = self.slots * 8 if name == "directory" else 0
                flat[name] = _side_by_side(self.known, [f.get(name) for f in files], row, dtype, HUGE_PAGE, stride)
                sizes[kind] = flat[name].nbytes // row // len(self.known)
            self._arenas[key] = _Arena(
                flat["directory"], flat["nodes"].reshape(-1, 16), flat["entries"].reshape(-1, 2),
                flat["values"].reshape(-1, dim), sizes,
            )  # fmt: skip
        return self._arenas[key]


class SharedReader:
    """Reads in place where it can. It learns of servers by `asked` and `learnt`, between which its owner asks them."""

    def __init__(self) -> None:
        self._known: dict[int, Described | None] = {}
        self._private: set[int] = set()
        self._mapped: Mapped | None = None
        self._for: Routing | None = None
        self._again = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def ready(self, routing: Routing) -> bool:
        """Whether all is known that there is to know; else `asked` and `adopt` are due."""
        return self._for is routing and (self._mapped is not None or time.monotonic() < self._again)

    def asked(self, routing: Routing) -> list[int]:
        """Servers of the view that are to be asked what they share: on this host, and not known yet."""
        here = [i for i, s in enumerate(routing.servers) if s.alive and _here(s)]
        if len(here) > SERVERS_MAX or not hasattr(os, "pidfd_open"):
            return []
        there = {s.incarnation for s in routing.servers}
        self._private &= there
        for incarnation in self._known.keys() - there:
            del self._known[incarnation]
        names = [(i, routing.servers[i].incarnation) for i in here]
        return [i for i, one in names if self._known.get(one) is None and one not in self._private]

    def learn(self, server: Server, plain: Mapping[str, Any]) -> None:
        """Take what a server said. One that shares nothing never will: it is not asked again."""
        self._known[server.incarnation] = None
        if not plain.get("pid"):
            self._private.add(server.incarnation)
        if plain.get("pid"):
            with suppress(OSError):
                self._known[server.incarnation] = Described(plain, server.incarnation, os.pidfd_open(plain["pid"]))

    def adopt(self, routing: Routing) -> None:
        """Read by this view from now on."""
        self._for, self._mapped, self._again = routing, None, time.monotonic() + AGAIN_S
        known = [(i, self._known.get(s.incarnation)) for i, s in enumerate(routing.servers) if s.alive]
        there = [(i, one) for i, one in known if one is not None]
        if there:
            with suppress(OSError, ValueError, KeyError, TypeError):
                self._mapped = Mapped(routing, there)

    def pull(
        self,
        batch: Batch,
        features: Features,
        modes: NDArray[np.uint8],
        absent: int | None,
        places: NDArray[np.int64],
        out: NDArray[np.float32],
    ) -> int:
        """Fill `out` with the rows of all features; how many ids were absent, or -1 where the fabric must be asked."""
        mapped = self._mapped
        plain = modes is features.zeros
        if mapped is None or (not plain and batch.weights.size and (modes == MAX).any()):
            return -1
        if dead := mapped.poll.poll(0):
            self._forget({process for process, _ in dead})
            return -1
        try:
            shape = mapped.shape(batch.names)
        except (OSError, EmbringError):
            return -1
        plan = np.empty(shape.lines.shape, np.int64)
        lay_out(shape.lines, batch.starts, batch.offsets, places, modes, -1 if absent is None else absent, plan)
        every = _arguments(mapped, shape, plan, batch, out)
        large = len(batch.ids) >= ALONE_MAX and CORES > 1
        for _ in range(ATTEMPTS):
            if not begin(mapped.headers, mapped.generations, time.monotonic_ns(), mapped.seen):
                self._forget({known.process for known in mapped.known})
                return -1
            without = self._by_two(batch, every) if large else _alone(every)
            if without >= 0:
                if not plain:
                    touched = np.ones(batch.bags, np.uint8)
                    finish(batch.offsets, batch.starts, places, features.dims, modes, touched, out)
                return without
        return -1

    def _by_two(self, batch: Batch, every: Sequence[_Arguments]) -> int:
        """`_alone` with the help of a second thread: both take parts until none is left.

        A part is waited for only where the other thread is at it; nothing is awaited to wake up.
        """
        if self._pool is None or self._process != os.getpid():  # a forked child has no second thread
            self._pool, self._process = ThreadPoolExecutor(1, "embring-read"), os.getpid()
        cuts = np.empty(len(batch.ids) // PART + 2, np.int64)
        parts = cut_parts(batch.offsets, batch.bags, PART, cuts)
        works = [np.zeros(WORK_FIELDS, np.int64) for _ in every]

        def take_parts() -> None:
            for work, arguments in zip(works, every, strict=True):
                read_parts(work, cuts[: parts + 1], *arguments)

        helper = self._pool.submit(take_parts)
        take_parts()
        helper.cancel()
        for work in works:
            while work[DONE] < parts:
                os.sched_yield()
        fence()
        spoilt, absent = (sum(int(work[field]) for work in works) for field in (SPOILT, ABSENT))
        return -1 if spoilt else absent

    def _forget(self, processes: Collection[int]) -> None:
        """Ask these servers anew before the next pull."""
        for incarnation, known in list(self._known.items()):
            if known is not None and known.process in processes:
                self._known[incarnation] = None
        self._for = self._mapped = None


def _arguments(
    mapped: Mapped, shape: _Shape, plan: NDArray[np.int64], batch: Batch, out: NDArray[np.float32]
) -> list[_Arguments]:
    """Of every arena of the request: what `kernels.shared.read` takes."""
    rows = np.empty(len(batch.ids), np.int64)  # for all arenas, parts and threads: an id has its place
    return [
        (
            plan, number, batch.ids, batch.offsets, batch.weights, mapped.where, shape.codes, mapped.roles,
            arena.directory, arena.nodes, arena.entries, arena.values, arena.sizes, initial, defaults,
            mapped.headers, mapped.seen, rows, out,
        )
        for number, arena, initial, defaults in shape.arenas
    ]  # fmt: skip


def _alone(every: Sequence[_Arguments]) -> int:
    """How many ids were absent in all arenas, or -1 where what was read does not count."""
    absent = 0
    for arguments in every:
        without = read(*arguments)
        if without < 0:
            return -1
        absent += without
    return absent


def _here(server: Server) -> bool:
    """Whether a server is on this host, as far as its sockets tell."""
    first = pick(server.addresses)[:1]
    return bool(first) and first[0].startswith("unix:")


def _where(routing: Routing, servers: Sequence[int]) -> NDArray[np.int8]:
    """int8[slots]: which of the mapped servers (indexes of the view's) is read for each slot; -1: none has it."""
    mapped = np.full(len(routing.servers) + 1, -1, np.int8)
    mapped[list(servers)] = np.arange(len(servers))
    where = np.full(len(routing.readers), -1, np.int8)
    for column in reversed(range(routing.readers.shape[1])):
        held = mapped[routing.readers[:, column]]
        where = np.where(held >= 0, held, where)
    return where


def _side_by_side(
    servers: Sequence[Described], files: Sequence[File | None], row: int, dtype: Any, unit: int, stride: int = 0
) -> NDArray[Any]:
    """One array over the servers' files, each at the same distance from the one before: whole rows, whole pages.

    A server without the file has zeros there. OSError where a file is not the one that was described.
    """
    step = math.lcm(row, unit)
    longest = max((f[3] for f in files if f), default=0)
    stride = stride or max(1, -(-longest // step)) * step
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    region = mmap.mmap(-1, stride * len(files), flags=flags)
    array = np.frombuffer(region, dtype)
    for s, (server, file) in enumerate(zip(servers, files, strict=True)):
        if file:
            _map_over(array.ctypes.data + s * stride, server.plain["pid"], file)
            if _HUGEPAGE is not None and file[3] >= HUGE_PAGE:
                with suppress(OSError):
                    region.madvise(_HUGEPAGE, s * stride, file[3] // HUGE_PAGE * HUGE_PAGE)
    return array


def _map_over(address: int, pid: int, file: File) -> None:
    """Map another process's file at an address of our own that nothing else needs."""
    number, device, inode, size = file
    opened = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(opened)
        if (found.st_dev, found.st_ino, found.st_size) != (device, inode, size):
            raise OSError(f"descriptor {number} of process {pid} is another file")
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        if libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED | _NORESERVE, opened, 0) != address:
            raise OSError(ctypes.get_errno(), "the memory of a server cannot be mapped")
    finally:
        os.close(opened)
