"""Rows of a checkpoint into a cluster of any number of servers: each slot goes to whoever will own it.

A chain is absorbed link by link, the full one first: a slot takes an increment only when it stands exactly where that
increment begins, and at last where the manifest says, so that no link can be left out.
"""

import contextlib
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.view import Server
from ps.checkpoint.codec import decode_block
from ps.checkpoint.files import chain, check_files, read_blocks
from ps.checkpoint.manifest import Manifest
from ps.checkpoint.reach import Absorber, Access, Ask, Counter, connected
from ps.checkpoint.storage import CheckpointError, Storage
from ps.errors import EmbringError, NotApplied
from ps.rowblock import RowBlock, Section

FILES_AT_ONCE = 4


@dataclass(frozen=True)
class Restored:
    """What a restore did. rows: sent, those too that a later increment overwrote. chain: checkpoints read. models:
    versions of the dense models that go with the rows, by name."""

    path: str
    name: str
    chain: int
    rows: int
    bytes: int
    slots: int
    tables: int
    models: dict[str, str]


def restore(
    storage: Storage,
    ask: Ask,
    access: Access,
    *,
    name: str | None = None,
    replace_tables: bool = False,
    accept_loss: bool = False,
    tables: Sequence[str] = (),
    same_tables: bool = False,
    counter: Counter | None = None,
) -> Restored:
    """Bring a checkpoint's rows into the cluster: the named one's, or the newest one's, of this cluster if it has any.

    Into a cluster without tables (or replace_tables: it drops them, once every checksum was compared) everything; into
    the cluster that the checkpoint is of, or another with the same tables, the slots that it has lost. Until all is
    there, those slots answer SlotsLost. tables: only these, into any cluster: one of the same name (with
    replace_tables) serves on until then. same_tables: no rows of tables that were dropped since, and made again.
    Raises CheckpointError or RequestError.
    """
    status = ask("status")
    links = chain(storage, name, status["cluster"])
    manifest = links[-1]
    for link in links:
        check_files(storage, link)
    check_fingerprint(storage, manifest, status["fingerprint"])
    if replace_tables and not tables:  # from "restore" on the cluster's own are gone: damage is to be known before
        for link in links:
            for file in link.files:
                deque(read_blocks(storage, link, file), maxlen=0)
    wanted = {k: getattr(manifest, k) for k in ("cluster", "term_max", "tables", "groups")}
    answer = ask(
        "restore", manifest=wanted, replace_tables=replace_tables, accept_loss=accept_loss, tables=list(tables),
        same_tables=same_tables,
    )  # fmt: skip
    work = _Work(storage, Translation.of(answer, manifest), access, counter or Counter())
    work.counter.expect(sum(link.bytes for link in links))
    try:
        for link in links:
            work.absorb(link)
        work.check(manifest)
        ask("restored", restore=answer["restore"])
    except BaseException:  # whatever ended it, a full server or SIGTERM, nobody would remove them
        _drop_hidden(ask, answer)
        raise
    plan = work.plan
    return Restored(
        storage.path(manifest.name), manifest.name, len(links), work.rows, work.bytes,
        int((plan.slots >= 0).sum()), int((plan.tables >= 0).sum()), manifest.models,
    )  # fmt: skip


def _drop_hidden(ask: Ask, answer: Mapping[str, Any]) -> None:
    """Drop the hidden tables of this restore: one that has begun since gave its own the same names."""
    mine = [here for _, here in answer["tables"]]
    with contextlib.suppress(EmbringError):
        for table in ask("status")["tables"] if answer["hidden"] else ():
            if table["name"] in answer["hidden"] and table["number"] in mine:
                ask("drop_table", name=table["name"])


def check_fingerprint(storage: Storage, manifest: Manifest, here: str) -> None:
    """Raise CheckpointError where ids have other places here than in the checkpoint."""
    if manifest.fingerprint != here:
        raise CheckpointError(
            f"{storage.path(manifest.name)} was saved under fingerprint {manifest.fingerprint}; "
            f"the cluster has {here}: it needs the same settings of [cluster]"
        )


@dataclass(frozen=True)
class Translation:
    """From a checkpoint's numbers to a cluster's.

    slots int64[count]: slot of the checkpoint -> slot here, -1 where it is not wanted. tables int32: tables likewise,
    and at last -1 for those that the checkpoint does not name. homes int64[2, len(tables)]: first slot (of the
    checkpoint) of each table, and the one behind its last: rows that a table left behind in other slots, when it moved,
    are not its own. owners int16[count]: index into servers. term: of the slots here, until the restore ends. foreign:
    the rows are of another cluster, or come into other slots than they were in.
    """

    cluster: int
    term: int
    slots: NDArray[np.int64]
    tables: NDArray[np.int32]
    homes: NDArray[np.int64]
    owners: NDArray[np.int16]
    servers: tuple[Server, ...]
    foreign: bool

    @classmethod
    def of(cls, answer: Mapping[str, Any], manifest: Manifest) -> "Translation":
        """From the controller's answer to "restore"."""
        first_of, count_of = {}, {}
        for number, _, _, first, count in manifest.groups:
            first_of[number], count_of[number] = first, count
        end = max((first + count for _, _, _, first, count in manifest.groups), default=0)
        told, at = np.frombuffer(zlib.decompress(answer["owners"]), "<i2"), 0
        slots, owners = np.full(end, -1, np.int64), np.full(end, -1, np.int16)
        for there, first, count in answer["slots"]:
            mine = told[at : at + count]
            if (
                slots[there : there + count] >= 0
            ).any():  # its rows would go to one of two places, and lack at the other
                raise CheckpointError(
                    f"slots {there} to {there + count - 1} of the checkpoint are wanted in two places"
                )
            slots[there : there + count] = np.where(mine >= 0, np.arange(first, first + count), -1)
            owners[there : there + count] = mine
            at += count
        highest = max((entry[0] for entry in manifest.tables), default=0)
        tables, homes = np.full(highest + 2, -1, np.int32), np.zeros((2, highest + 2), np.int64)
        for there, here in answer["tables"]:
            tables[there] = here
        for number, _, group, _ in manifest.tables:
            homes[:, number] = first_of[group], first_of[group] + count_of[group]
        servers = tuple(Server(n, i, h, z, tuple(a)) for n, i, h, z, a in answer["servers"])
        cluster, wanted = int(answer["cluster"]), np.flatnonzero(slots >= 0)
        foreign = cluster != manifest.cluster or bool((slots[wanted] != wanted).any())
        return cls(cluster, int(answer["term"]), slots, tables, homes, owners, servers, foreign)

    def split(self, block: RowBlock) -> Iterator[tuple[int, RowBlock]]:
        """(server, block of the slots that it will own), in this cluster's numbers."""
        if not len(self.slots):  # all tables were dropped before the last link of the chain
            return
        inside = np.minimum(block.slots, len(self.slots) - 1)
        known = (block.slots < len(self.slots)) & (self.owners[inside] >= 0)
        owner = np.where(known, self.owners[inside], -1)
        sections = tuple(self._section(s, block.slots) for s in block.sections)
        # A section that lost its rows may be of a width that no table has any more.
        block = replace(block, sections=tuple(s for s in sections if len(s.ids) or len(s.gone_ids)))
        for server in np.unique(owner[owner >= 0]).tolist():
            keep = owner == server
            part = block if keep.all() else block.select(keep)
            yield server, replace(part, slots=self.slots[part.slots], cluster=self.cluster)

    def _section(self, section: Section, slots: NDArray[np.int64]) -> Section:
        """The rows of wanted tables, under their numbers here."""
        rows, numbers = self._wanted(section.tables, section.offsets, slots)
        gone, gone_numbers = self._wanted(section.gone_tables, section.gone_offsets, slots)
        if not gone.all():
            ids, offsets = _some(section.gone_ids, section.gone_offsets, gone)
            section = replace(
                section, gone_ids=ids, gone_versions=section.gone_versions[gone], gone_tables=gone_numbers[gone],
                gone_offsets=offsets,
            )  # fmt: skip
        else:
            section = replace(section, gone_tables=gone_numbers)
        if rows.all():
            return replace(section, tables=numbers)
        ids, offsets = _some(section.ids, section.offsets, rows)
        return replace(
            section, ids=ids, offsets=offsets, tables=numbers[rows], values=section.values[rows],
            state=section.state[rows], meta=section.meta[rows],
        )  # fmt: skip

    def _wanted(
        self, tables: NDArray[np.int32], offsets: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Which rows are wanted, and the numbers of their tables here."""
        known = np.minimum(tables, len(self.tables) - 1)
        numbers = self.tables.take(known)
        at = np.repeat(slots, np.diff(offsets))
        first, end = self.homes
        return (numbers >= 0) & (at >= first.take(known)) & (at < end.take(known)), numbers


def _some(
    values: NDArray[Any], offsets: NDArray[np.int64], keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The kept entries of all lists, and their offsets."""
    sums = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    return values[keep], sums[offsets]


class _Work:
    """A restore under way. stood int64: where each slot of the checkpoint stands at its new owner, -1 before."""

    def __init__(self, storage: Storage, plan: Translation, access: Access, counter: Counter) -> None:
        self.plan = plan
        self.rows = self.bytes = 0
        self.counter = counter
        self._storage, self._access = storage, access
        self._stood = np.full(len(plan.slots), -1, np.int64)
        self._stopped = threading.Event()

    def absorb(self, link: Manifest) -> None:
        """Send one link's blocks; its files side by side, each in order."""
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            try:
                for done in as_completed([pool.submit(self._file, link, file) for file in link.files]):
                    rows, size = done.result()
                    self.rows += rows
                    self.bytes += size
            except BaseException:  # the pool waits for the other files, which may have gigabytes before them
                self._stopped.set()
                raise

    def _file(self, link: Manifest, file: str) -> tuple[int, int]:
        rows = size = 0
        with ExitStack() as stack:
            absorbers: dict[int, Absorber] = {}
            for entry, message in read_blocks(self._storage, link, file):
                if self._stopped.is_set():
                    raise NotApplied("another part of the restore failed")
                block = decode_block(message)
                for server, part in self.plan.split(block):
                    if server not in absorbers:
                        place = self.plan.servers[server]
                        connection = stack.enter_context(connected(place, self._access))
                        absorbers[server] = Absorber(connection, place.name, self.plan.term, self.plan.foreign)
                    absorbers[server].send(part)
                    rows += part.rows
                ended = (block.final > 0) & (block.slots < len(self._stood))
                self._stood[block.slots[ended]] = block.last[ended]
                size += entry.size
                self.counter.add(entry.rows, entry.size, entry.size)
            for absorber in absorbers.values():
                absorber.finish()
        return rows, size

    def check(self, manifest: Manifest) -> None:
        """Raise CheckpointError unless every wanted slot stands where the manifest says."""
        wanted = np.flatnonzero(self.plan.slots >= 0)
        told = np.full(len(self._stood), -1, np.int64)
        known = manifest.slots < len(told)
        told[manifest.slots[known]] = manifest.positions[known]
        wrong = wanted[(self._stood[wanted] != told[wanted]) | (told[wanted] < 0)]
        if len(wrong):
            path = self._storage.path(manifest.name)
            raise CheckpointError(f"{path} does not lead slot {wrong[0]} to its position: the slots stay lost")
