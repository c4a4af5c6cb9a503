"""Rows between a cluster and the files of a checkpoint: exported by their primaries, absorbed by their new owners.

The number of servers on either side does not matter: blocks name slots, and each slot goes to whoever will own it.
"""

import os
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from hashring.view import Server, View
from ps.checkpoint.files import (
    Block,
    BlockFile,
    CheckpointError,
    Manifest,
    Saving,
    check_files,
    choose,
    read_blocks,
    read_manifest,
)
from ps.errors import NotApplied, SlotsLost
from ps.fabric.blocking import BlockingConnection
from ps.fabric.protocol import Hello
from ps.rowblock import TERM_SHIFT, RowBlock, Section
from ps.window import ClientEntries
from ps.wire import LIMITS, PREFIX, Message, assemble, decode_header, decode_prefix, encode, view_of

TIMEOUT_S = 60.0
"""For one part of an export, or one block to be absorbed."""

WORKERS = 4
"""Servers or files worked on at once."""

Report = Callable[[int, int], None]
"""Told (rows, bytes) moved since the last call, from any thread."""

Ask = Callable[..., Mapping[str, Any]]
"""ask(verb, **fields) of the controller (ps.cluster.controller)."""


@dataclass(frozen=True)
class Moved:
    """What a save or a restore did."""

    path: Path
    rows: int
    bytes: int
    slots: int
    tables: int


@dataclass(frozen=True)
class Access:
    """How to reach the servers: the cluster's token, and what to trust over TCP where they speak TLS."""

    token: str = field(repr=False)
    tls: ssl.SSLContext | None = None


@contextmanager
def connected(server: Server, access: Access) -> Iterator[BlockingConnection]:
    """A connection to one server, by its Unix socket where that is on this host."""
    local = [a for a in server.addresses if a.startswith("unix:") and os.path.exists(a.removeprefix("unix:"))]
    hello = Hello(access.token, server.incarnation)
    connection = BlockingConnection.connect((local or server.addresses)[0], hello, TIMEOUT_S, access.tls)
    try:
        yield connection
    finally:
        connection.close()


def call(connection: BlockingConnection, op: str, fields: dict[str, Any], arrays: dict[str, Any]) -> Message:
    """One request and its reply."""
    return connection.receive(connection.send(op, fields, arrays, TIMEOUT_S), TIMEOUT_S)


def newest_view(servers: list[Server], access: Access) -> View:
    """The view of the first of these servers that answers. Raises NotApplied where none does."""
    for server in servers:
        try:
            with connected(server, access) as connection:
                reply = call(connection, "view", {}, {})
                return view_of(reply.fields, reply.arrays)
        except NotApplied:
            continue
    raise NotApplied("no server of the cluster answers")


# -- save


def save(
    folder: Path, view: View, access: Access, fingerprint: str, *, name: str | None = None, report: Report
) -> Moved:
    """Save every row of the view's slots into a new checkpoint of `folder`.

    Each slot is saved as it stood at one moment, its position; the moments of different slots differ. Pushes go on.
    Raises SlotsLost where slots are lost, CheckpointError where tables or owners change meanwhile.
    """
    if lost := int(view.lost().sum()):
        raise SlotsLost(f"{lost} slots are lost: nothing was saved, since the checkpoint would lack their rows")
    now = datetime.now(UTC)
    with Saving(folder, name or now.strftime("%Y-%m-%dT%H-%M-%S.%fZ")) as saving:
        primaries = view.owners()[:, 0] if view.groups else np.empty(0, np.int16)
        shares = [(s, np.flatnonzero(primaries == i).astype(np.int64)) for i, s in enumerate(view.servers)]
        with ThreadPoolExecutor(WORKERS) as pool:
            tasks = [
                pool.submit(_save_server, saving.path, s, slots, access, report) for s, slots in shares if len(slots)
            ]
            parts = [task.result() for task in tasks]
        after = newest_view([s for s in view.servers if s.alive], access)
        if _places(after) != _places(view):
            raise CheckpointError("tables or owners changed during the save: nothing was kept, save again")
        slots = np.concatenate([p[1] for p in parts] or [np.empty(0, np.int64)])
        positions = np.concatenate([p[2] for p in parts] or [np.empty(0, np.int64)])
        manifest = Manifest(
            name=saving.target.name,
            created=now.isoformat(),
            cluster=view.cluster,
            epoch=view.epoch,
            fingerprint=fingerprint,
            term_max=max(view.epoch, int((positions >> TERM_SHIFT).max(initial=0))),
            tables=[[t.number, t.name, t.group, dict(t.spec)] for t in view.tables],
            groups=[[g.number, g.placement, g.replicas, g.first, g.slots] for g in view.groups],
            watermark={"slots": slots.tolist(), "positions": positions.tolist()},
            blocks=[b for p in parts for b in p[0]],
        )
        path = saving.commit(manifest)
    return Moved(path, manifest.rows, manifest.bytes, len(slots), len(view.tables))


def _places(view: View) -> list[Any]:
    """What of a view decides where rows are; an altered specification does not."""
    return [[(t.number, t.group) for t in view.tables], [(g.number, g.owners.tobytes()) for g in view.groups]]


Saved = tuple[list[Block], NDArray[np.int64], NDArray[np.int64]]


def _save_server(folder: Path, server: Server, slots: NDArray[np.int64], access: Access, report: Report) -> Saved:
    """Write one server's share: its blocks, and slots with the positions they were saved at."""
    file = BlockFile(folder, f"{server.name}.blocks")
    stood: dict[int, int] = {}
    try:
        with connected(server, access) as connection:
            reply = call(connection, "export", {}, {"slots": slots})
            while reply.fields["more"]:
                block = RowBlock.from_arrays(reply.fields["block"], reply.arrays)
                frame = encode(Message("block", 0, reply.fields["block"], reply.arrays))
                file.append(frame, block.rows)
                final = block.final.astype(bool)
                stood.update(zip(block.slots[final].tolist(), block.last[final].tolist(), strict=True))
                report(block.rows, file.blocks[-1].size)
                reply = call(connection, "export", {"cursor": reply.fields["cursor"], "part": reply.fields["part"]}, {})
    finally:
        file.close()
    if missing := set(slots.tolist()) - stood.keys():
        raise CheckpointError(f"server {server.name} did not send slot {min(missing)}: nothing was kept, save again")
    return file.blocks, np.array(list(stood), np.int64), np.array(list(stood.values()), np.int64)


# -- restore


def restore(
    folder: Path,
    ask: Ask,
    access: Access,
    *,
    name: str | None = None,
    replace_tables: bool = False,
    accept_loss: bool = False,
    report: Report,
) -> Moved:
    """Bring a checkpoint's rows (the newest one's, or the named one's) into the cluster.

    Into a cluster without tables (or replace_tables: it drops them) everything; into the cluster that the checkpoint
    is of, where slots were lost, the lost slots. Until all is there, those slots answer SlotsLost.
    Raises CheckpointError or RequestError.
    """
    path = choose(folder, name)
    manifest = read_manifest(path)
    check_files(path, manifest)
    here = ask("status")["fingerprint"]
    if manifest.fingerprint != here:
        raise CheckpointError(
            f"{path} was saved under fingerprint {manifest.fingerprint}; the cluster has {here}: "
            "it needs the same settings of [cluster]"
        )
    wanted = {k: getattr(manifest, k) for k in ("cluster", "term_max", "tables", "groups")}
    answer = ask("restore", manifest=wanted, replace_tables=replace_tables, accept_loss=accept_loss)
    final = View.from_plain(msgpack.unpackb(answer["view"], strict_map_key=False))
    plan = Translation.of(answer, final)
    files = sorted({b.file for b in manifest.blocks})
    with ThreadPoolExecutor(WORKERS) as pool:
        groups = ([b for b in manifest.blocks if b.file == file] for file in files)
        tasks = [pool.submit(_restore_file, path, blocks, plan, access, report) for blocks in groups]
        done = [task.result() for task in tasks]
    restored = set().union(*(d[0] for d in done)) if done else set()
    if missing := set(answer["wanted"]) - restored:
        raise CheckpointError(f"{path} has no block of slot {min(missing)}: the slots stay lost")
    ask("restored")
    rows, size = sum(d[1] for d in done), sum(d[2] for d in done)
    return Moved(path, rows, size, len(restored), len(plan.tables))


@dataclass(frozen=True)
class Translation:
    """From a checkpoint's numbers to a cluster's.

    slots int64[count]: slot of the checkpoint -> slot here, -1 where it is not wanted. tables: likewise of tables.
    owners int16[slots here]: index into servers.
    """

    cluster: int
    slots: NDArray[np.int64]
    tables: dict[int, int]
    owners: NDArray[np.int16]
    servers: tuple[Server, ...]

    @classmethod
    def of(cls, answer: Mapping[str, Any], final: View) -> "Translation":
        """From the controller's answer to "restore"."""
        end = max((there + count for there, _, count in answer["slots"]), default=0)
        slots = np.full(end, -1, np.int64)
        wanted = np.zeros(final.slots_total, bool)
        wanted[answer["wanted"]] = True
        for there, first, count in answer["slots"]:
            numbers = np.arange(first, first + count)
            slots[there : there + count] = np.where(wanted[numbers], numbers, -1)
        tables = {int(k): int(v) for k, v in answer["tables"].items()}
        owners = final.owners()[:, 0] if final.groups else np.empty(0, np.int16)
        return cls(final.cluster, slots, tables, owners, final.servers)

    def split(self, block: RowBlock) -> Iterator[tuple[int, RowBlock]]:
        """(server, block of the slots that it will own), in this cluster's numbers."""
        inside = block.slots < len(self.slots)
        here = np.where(inside, self.slots[np.minimum(block.slots, len(self.slots) - 1)], -1)
        owner = np.where(here >= 0, self.owners[np.maximum(here, 0)], -1)
        for server in np.unique(owner[owner >= 0]).tolist():
            keep = owner == server
            yield server, replace(select(block, keep, self.tables), slots=here[keep], cluster=self.cluster)


def _restore_file(
    path: Path, blocks: list[Block], plan: Translation, access: Access, report: Report
) -> tuple[set[int], int, int]:
    """Send one file's blocks, in order, to their owners: (slots whose last part was taken, rows, bytes)."""
    done: set[int] = set()
    rows = size = 0
    with ExitStack() as stack:
        connections: dict[int, BlockingConnection] = {}
        for entry, data in read_blocks(path, blocks):
            for server, part in plan.split(decode_block(data)):
                if server not in connections:
                    connections[server] = stack.enter_context(connected(plan.servers[server], access))
                fields, arrays = part.to_arrays()
                taken = call(connections[server], "absorb", {"block": fields}, arrays).arrays["taken"].astype(bool)
                if not taken.all():
                    slot = int(part.slots[~taken][0])
                    raise CheckpointError(f"{plan.servers[server].name} did not take slot {slot}: restore again")
                done.update(part.slots[part.final.astype(bool)].tolist())
                rows += part.rows
            size += entry.size
            report(entry.rows, entry.size)
    return done, rows, size


def decode_block(data: bytearray) -> RowBlock:
    """The block in a frame of a file; RequestError where it is none."""
    header, body = decode_prefix(data, 0, LIMITS)
    start = PREFIX.size + header
    message, places = decode_header(memoryview(data)[PREFIX.size : start], body, LIMITS)
    assemble(message, places, memoryview(data)[start:])
    return RowBlock.from_arrays(message.fields, message.arrays)


def select(block: RowBlock, keep: NDArray[np.bool_], tables: Mapping[int, int]) -> RowBlock:
    """The block with only the slots of `keep` (bool[s]) and the rows of `tables` (number -> new number)."""
    highest = max((int(x.max(initial=0)) for s in block.sections for x in (s.tables, s.gone_tables)), default=0)
    numbers = np.full(highest + 1, -1, np.int32)
    for old, new in tables.items():
        if old <= highest:
            numbers[old] = new
    lineage, lineage_offsets = _cut(block.lineage_offsets, keep)
    clients, client_offsets = _cut(block.clients.offsets, keep)
    entries = {name: getattr(block.clients, name)[clients] for name in ("clients", "last", "mask")}
    sections = (_select_section(s, keep, numbers) for s in block.sections)
    own = {name: getattr(block, name)[keep] for name in ("slots", "base", "last", "full", "part", "final")}
    return replace(
        block,
        **own,
        lineage=block.lineage[lineage],
        lineage_offsets=lineage_offsets,
        clients=ClientEntries(**entries, offsets=client_offsets),
        # A section that lost its rows may be of a width that no table has any more.
        sections=tuple(s for s in sections if len(s.ids) or len(s.gone_ids)),
    )


def _select_section(section: Section, keep: NDArray[np.bool_], numbers: NDArray[np.int32]) -> Section:
    rows, offsets = _cut(section.offsets, keep, numbers[section.tables] >= 0)
    gone, gone_offsets = _cut(section.gone_offsets, keep, numbers[section.gone_tables] >= 0)
    return replace(
        section,
        ids=section.ids[rows],
        tables=numbers[section.tables[rows]],
        offsets=offsets,
        values=section.values[rows],
        state=section.state[rows],
        meta=section.meta[rows],
        gone_ids=section.gone_ids[gone],
        gone_tables=numbers[section.gone_tables[gone]],
        gone_versions=section.gone_versions[gone],
        gone_offsets=gone_offsets,
    )


def _cut(
    offsets: NDArray[np.int64], keep: NDArray[np.bool_], also: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Entries of the kept slots (that `also` keeps, one by one), int64[k], and their offsets, int64[kept + 1]."""
    chosen = np.repeat(keep, np.diff(offsets))
    if also is not None:
        chosen &= also
    sums = np.concatenate([[0], np.cumsum(chosen)])
    counts = np.diff(sums[offsets])[keep]
    return np.flatnonzero(chosen), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


class Counter:
    """Adds up what the threads of a save or a restore report; thread-safe."""

    def __init__(self, write: Callable[[int, int], None]) -> None:
        self.rows = self.bytes = 0
        self._write = write
        self._lock = threading.Lock()

    def __call__(self, rows: int, size: int) -> None:
        with self._lock:
            self.rows += rows
            self.bytes += size
            self._write(self.rows, self.bytes)
