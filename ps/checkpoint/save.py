"""Rows from their primaries into the files of a checkpoint: all of them, or what changed since the last one.

The slots are shared out among lanes, one for each server that is primary of some at the beginning; a lane writes one
file. Where a slot's owner changes, its lane goes on with the new one, and asks for what it had not been given whole.
Pushes and pulls go on: servers cut an export into parts of a few milliseconds, each leaves when all owners hold it.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from hashring.view import Group, Server, View
from ps.checkpoint.codec import encode_block
from ps.checkpoint.files import BlockFile, Saving, check_files, links_of, survey
from ps.checkpoint.hidden import hidden, missed
from ps.checkpoint.manifest import Manifest
from ps.checkpoint.reach import Access, Counter, connected, exported, newest_view
from ps.checkpoint.storage import CheckpointError, Storage
from ps.errors import NotApplied, PerhapsApplied, RequestError, SlotsLost, WrongView
from ps.rowblock import TERM_SHIFT, RowBlock

log = logging.getLogger("embring.checkpoint")

LANES_MAX = 16
"""Servers asked at once."""

PATIENCE_S = 60.0
"""How long a lane goes on without any slot being saved, while owners change or do not answer."""

RETRY_S = 0.2


@dataclass(frozen=True)
class Saved:
    """What a save did. parent: the checkpoint that it is an increment to, "" for a full one. slots: it holds."""

    path: str
    name: str
    parent: str
    rows: int
    bytes: int
    slots: int
    tables: int
    seconds: float


def save(
    storage: Storage,
    servers: Sequence[Server],
    access: Access,
    fingerprint: str,
    *,
    name: str | None = None,
    incremental: bool = False,
    models: Mapping[str, str] | None = None,
    counter: Counter | None = None,
) -> Saved:
    """Save the rows of the cluster of these servers into a new checkpoint, named by the time unless `name` says.

    incremental: only what changed since the newest checkpoint of the same cluster, where there is one: deletions too.
    models: versions of the dense models that go with the rows, by name (ps.checkpoint.models).
    Each slot is saved as it stood at one moment, its position; the moments of different slots differ. Tables that are
    made meanwhile are not in it, nor such as a restore beside them still hides. Raises SlotsLost where slots are
    lost, CheckpointError, NotApplied.
    """
    began, view = time.monotonic(), newest_view(servers, access)
    known = _known(storage, incremental)
    now = _moment(known, view.cluster)
    parent = _parent(storage, known, view, fingerprint) if incremental else None
    with Saving(storage, now.strftime("%Y-%m-%dT%H-%M-%S.%fZ") if name is None else name) as saving:
        try:
            work = _Work(view, parent, access, counter or Counter())
            lanes = work.lanes()
            files = [saving.file() for _ in lanes]
            with ThreadPoolExecutor(LANES_MAX) as pool:
                try:
                    list(pool.map(work.lane, lanes, files))
                except BaseException:
                    work.stopped.set()
                    raise
            told = work.manifest(saving.name, now.isoformat(), fingerprint, dict(models or {}), files)
            manifest = saving.commit(told)
        except OSError as error:
            raise CheckpointError(f"{storage.path(saving.name)} cannot be written: {error.strerror or error}") from None
    return Saved(
        storage.path(manifest.name), manifest.name, manifest.parent, manifest.rows, manifest.bytes,
        int(work.written.sum()), len(manifest.tables), time.monotonic() - began,
    )  # fmt: skip


def _known(storage: Storage, incremental: bool) -> list[Manifest]:
    """The checkpoints there, oldest first. A full save goes on where they cannot be listed: it stands on none."""
    try:
        return survey(storage)[0]
    except CheckpointError:
        if incremental:
            raise
        return []


def _moment(known: Iterable[Manifest], cluster: int) -> datetime:
    """Now, or just behind the newest of the cluster's checkpoints where the clock was set back since: by these times
    the newest one is restored, and old ones are removed."""
    made = (datetime.fromisoformat(m.created) for m in known if m.cluster == cluster)
    return max((datetime.now(UTC), *(at + timedelta(microseconds=1) for at in made)))


def _parent(storage: Storage, known: Sequence[Manifest], view: View, fingerprint: str) -> Manifest | None:
    """The newest checkpoint that an increment can follow: one whose chain is whole, and of this very cluster.

    None where files of it are missing: on an older chain increments would pile up behind one that counts as newer.
    """
    names = {m.name: m for m in known}
    for manifest in reversed(known):
        links = links_of(manifest, names.get)
        if manifest.cluster != view.cluster or manifest.fingerprint != fingerprint or links[0].parent:
            continue
        try:
            for link in links:
                check_files(storage, link)
        except CheckpointError as error:
            log.warning("%s; no increment stands on %r: all is saved", error, manifest.name)
            return None
        return manifest
    return None


class _Work:
    """A save under way. Arrays over slot numbers; each lane writes those of its own slots only.

    positions int64: where a slot stood when it was saved, -1 before. since int64: what an increment is asked since, 0
    for the whole slot. written bool: slots of which a block was written; whole bool: of which all was.
    """

    def __init__(self, view: View, parent: Manifest | None, access: Access, counter: Counter) -> None:
        _refuse_lost(view)
        total = view.slots_total
        self.stopped, self._newest = threading.Event(), threading.Lock()
        self.view, self.parent = view, parent
        self.positions = np.full(total, -1, np.int64)
        self.written, self.whole = np.zeros(total, bool), np.zeros(total, bool)
        self.since = np.zeros(total, np.int64)
        if parent is not None:
            known = parent.slots < total
            self.since[parent.slots[known]] = parent.positions[known]
        self._access, self._counter = access, counter
        self._before = view

    def lanes(self) -> list[NDArray[np.int64]]:
        """The slots of each server."""
        primaries = np.where(hidden(self.view), -1, self.view.owners()[:, 0])
        lanes = [np.flatnonzero(primaries == i).astype(np.int64) for i in range(len(self.view.servers))]
        self._counter.expect(sum(map(len, lanes)))
        return [slots for slots in lanes if len(slots)]

    def lane(self, todo: NDArray[np.int64], file: BlockFile) -> None:
        """Save some slots, wherever they go meanwhile."""
        view, until = self.view, time.monotonic() + PATIENCE_S
        try:
            while len(todo):
                left, failed = len(todo), self._round(view, todo, file)
                todo = todo[self.positions[todo] < 0]
                if not len(todo):
                    break
                if len(todo) < left:
                    until = time.monotonic() + PATIENCE_S
                elif time.monotonic() >= until:
                    raise failed or CheckpointError(f"slot {todo[0]} was not sent: nothing was kept, save again")
                self.stopped.wait(RETRY_S)
                view = self._newer()
                _refuse_lost(view)
                todo = todo[view.owners()[todo, 0] >= 0]  # the slots of tables that were dropped are nobody's
        finally:
            file.close()

    def _newer(self) -> View:
        """The newest view that anybody heard of: servers that answer may have an older one than the save began with."""
        heard = newest_view(self.view.servers, self._access)
        with self._newest:
            self.view = max(self.view, heard, key=lambda view: view.epoch)
            return self.view

    def _round(self, view: View, todo: NDArray[np.int64], file: BlockFile) -> Exception | None:
        """Ask each slot's primary once; the last error that may pass."""
        failed: Exception | None = None
        primaries = view.owners()[todo, 0]
        for index in np.unique(primaries):
            slots = todo[primaries == index]
            begun = np.zeros(len(self.since), bool)
            try:
                with connected(view.servers[index], self._access) as connection:
                    since = self.since[slots] if self.parent is not None else None
                    for block in exported(connection, slots, view, since):
                        if self.stopped.is_set():
                            raise NotApplied("another part of the save failed")
                        if stale(block, view).any():
                            raise NotApplied(f"{view.servers[index].name} judges by a view older than {view.epoch}")
                        begun[block.slots] = True
                        self._write(block, file)
            except (WrongView, NotApplied, PerhapsApplied) as error:
                if self.stopped.is_set():
                    raise
                failed = error
                # What was begun and not ended cannot be gone on with, but a whole copy replaces it.
                self.since[slots[begun[slots] & (self.positions[slots] < 0)]] = 0
            except RequestError:
                if self.parent is None or not self.since[slots].any():
                    raise
                self.since[slots] = 0  # the watermark does not fit this cluster: whole slots do
        return failed

    def _write(self, block: RowBlock, file: BlockFile) -> None:
        changed = (block.full > 0) | (block.last != block.base) | (block.part > 0) | (block.final == 0)
        final = block.final > 0
        self.positions[block.slots[final]] = block.last[final]
        if not changed.all():
            block = block.select(changed)
        self.written[block.slots] = True
        self.whole[block.slots[block.full > 0]] = True
        size = file.append(encode_block(block), block.rows) if len(block.slots) else 0
        self._counter.add(block.rows, size, int(final.sum()))

    def manifest(
        self, name: str, created: str, fingerprint: str, models: dict[str, str], files: Sequence[BlockFile]
    ) -> Manifest:
        """What was saved, by the tables of now. Raises CheckpointError where a table's rows moved meanwhile."""
        servers = self.view.servers
        view = self._newer() if any(s.alive for s in servers) else self.view
        unseen = hidden(self._before)
        before = {t.name: t.group for t in self._before.tables if not unseen[self._before.group(t.group).first]}
        tables = [t for t in view.tables if t.name in before]
        moved = [t.name for t in tables if before[t.name] != t.group or not self._saved(view.group(t.group))]
        if moved:
            raise CheckpointError(f"table {moved[0]!r} got other slots during the save: nothing was kept, save again")
        kept = {t.group for t in tables}
        groups = [g for g in view.groups if g.number in kept]
        slots = np.flatnonzero(self.positions >= 0)
        positions = self.positions[slots]
        term_max = max(view.epoch, int((positions >> TERM_SHIFT).max(initial=0)))
        parent = self.parent
        return Manifest(
            name=name,
            created=created,
            cluster=view.cluster,
            epoch=view.epoch,
            fingerprint=fingerprint,
            term_max=max(term_max, parent.term_max if parent is not None else 0),
            tables=[[t.number, t.name, t.group, dict(t.spec)] for t in tables],
            groups=[[g.number, g.placement, g.replicas, g.first, g.slots] for g in groups],
            slots=slots,
            positions=positions,
            parent=parent.name if parent is not None else "",
            parent_checksum=parent.checksum if parent is not None else 0,
            full=int(self.whole.sum()),
            models=models,
            blocks=tuple(b for file in files for b in file.blocks),
        )

    def _saved(self, group: Group) -> bool:
        end = group.first + group.slots
        return end <= len(self.positions) and bool((self.positions[group.first : end] >= 0).all())


def stale(block: RowBlock, view: View) -> NDArray[np.bool_]:
    """bool[s]: slots sent by whoever has not heard of their terms in this view, and may keep tables in them that the
    view has elsewhere: their rows would be saved twice, and could not be restored."""
    return block.last >> TERM_SHIFT < view.terms()[block.slots]


def _refuse_lost(view: View) -> None:
    if lost := int(missed(view).sum()):
        raise SlotsLost(f"{lost} slots are lost: nothing was saved, since the checkpoint would lack their rows")
