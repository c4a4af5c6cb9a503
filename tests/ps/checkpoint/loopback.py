"""A cluster without sockets: real services, whose requests are answered by a call. For saves and restores."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from hashring.planner import CreateTable, DropTable, Fail, Join, Return, plan
from hashring.tokens import tokens
from hashring.view import Server, View
from ps.checkpoint.reach import Access
from ps.checkpoint.restore import Restored, restore
from ps.checkpoint.save import Saved, save
from ps.checkpoint.storage import Storage
from ps.config import Config
from ps.controller.restore import conclude, prepare, told
from ps.errors import EmbringError, NotApplied, RequestError, judged_by
from ps.service import Service
from ps.spec import TableSpec
from ps.store import Store, StoreLimits
from ps.wire import Message
from tests.ps.store_helpers import push_share

CONFIG = Config().with_settings("cluster", slot_bits=6)
ACCESS = Access("")
LIMITS = StoreLimits(memory_max=2**26, slots_max=2**12, deletions_max=256)
_everyone: dict[int, Service] = {}
_data_thread = threading.Lock()
"""Services expect one thread each; a save and a restore have several."""


class Connection:
    """What `connected` gives: the service answers when it is asked for the answer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._answers: dict[int, Message | Exception] = {}
        self._numbers = itertools.count(1)

    def send(self, op: str, fields: dict[str, Any], arrays: dict[str, Any], timeout: float) -> int:
        number, fields = next(self._numbers), dict(fields)
        epoch = fields.pop("epoch", 0)  # nothing can be waited for
        try:
            with _data_thread:
                reply = self._service.handle(Message(op, number, fields, dict(arrays)), 0.0)
            assert isinstance(reply, tuple), "this service has nobody to wait for"
            self._answers[number] = Message("ok", number, *reply)
        except EmbringError as error:
            self._answers[number] = judged_by(self._service.view.epoch, epoch, error)
        return number

    def receive(self, number: int, timeout: float) -> Message:
        answer = self._answers.pop(number)
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def connected(server: Server, access: Access, timeout: float = 0.0) -> Iterator[Connection]:
    if server.incarnation not in _everyone:
        raise NotApplied(f"nobody listens for {server.name}")
    yield Connection(_everyone[server.incarnation])


@pytest.fixture
def without_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Saves and restores reach the services of `LoopCluster`."""
    for module in ("reach", "save", "restore"):
        monkeypatch.setattr(f"ps.checkpoint.{module}.connected", connected)
    yield
    _everyone.clear()


class LoopCluster:
    """Services of one process, with the planner in the controller's place."""

    def __init__(self, servers: int, cluster: int = 1, limits: StoreLimits = LIMITS) -> None:
        self.limits = limits
        self.sequence = 0
        self._incarnations = itertools.count(cluster * 1000 + 1)
        self._restoring: Any = None
        self.view = View.empty(cluster, 6)
        self.install(plan(self.view, Join(tuple(self.launch(f"s{i}") for i in range(servers)))))

    def launch(self, name: str) -> Server:
        async def control(verb: str, fields: dict[str, Any]) -> dict[str, Any]:
            raise RequestError(verb)

        number = next(self._incarnations)
        service = Service(Store(number, self.limits, clock=lambda: 1000.0), CONFIG, "", control, name)
        service._tidy_soon = lambda *_: None  # type: ignore[method-assign] # there is no loop
        _everyone[number] = service
        return Server(name, number, f"host-{name}", "", ("unix:/nowhere",))

    def install(self, view: View) -> None:
        self.view = view
        for server in view.servers:
            if server.alive and server.incarnation in _everyone:
                _everyone[server.incarnation].install(view)

    def change(self, change: Any) -> None:
        self.install(plan(self.view, change))

    def create(self, *specs: TableSpec) -> None:
        for spec in specs:
            self.change(CreateTable(spec.name, spec.to_plain(), spec.placement, spec.replicas))

    def kill(self, name: str) -> None:
        """The process dies and comes back as another."""
        del _everyone[self.view.servers[self.view.server_index(name) or 0].incarnation]
        self.change(Fail(name))
        self.change(Return(self.launch(name)))

    def push(self, table: str, ids: list[int], rows: np.ndarray, kind: str = "push", client: int = 1) -> None:
        """At the primary of each id's slot, under one sequence."""
        self.sequence += 1
        info = self.view.table(table)
        assert info is not None
        group, unique = self.view.group(info.group), np.array(ids, np.int64)
        bits = group.slots.bit_length() - 1
        seed = int(info.spec["seed"])  # type: ignore[call-overload]
        slots = np.zeros(len(unique), np.int64) + group.first
        if bits:
            slots += (tokens(unique, seed) >> np.uint64(64 - bits)).astype(np.int64)
        owners = self.view.owners()[slots, 0]
        for owner in np.unique(owners):
            mine = np.flatnonzero(owners == owner)
            part = np.asarray(rows)[mine] if kind != "delete" else np.empty(0)
            share = push_share(self.sequence, [info.number], [unique[mine].tolist()], part, kind, client)
            _everyone[self.view.servers[owner].incarnation].store.push(share)

    def stores(self) -> list[Store]:
        return [_everyone[s.incarnation].store for s in self.view.servers if s.alive]

    def rows(self, table: str) -> dict[int, list[float]]:
        """Every row of a table."""
        info = self.view.table(table)
        assert info is not None
        group = self.view.group(info.group)
        out: dict[int, list[float]] = {}
        for slot in range(group.slots):
            server = self.view.servers[group.owners[slot, 0]]
            low = (2**64 // group.slots) * slot
            high = None if slot == group.slots - 1 else (2**64 // group.slots) * (slot + 1)
            for ids, rows in _everyone[server.incarnation].store.range(info.number, low, high):
                out |= dict(zip(ids.tolist(), rows.tolist(), strict=True))
        return out

    def windows(self) -> set[tuple[int, int, int]]:
        """(slot, client, last sequence) of every slot, at its primary."""
        out = set()
        for index, server in enumerate(self.view.servers):
            slots = np.flatnonzero(self.view.owners()[:, 0] == index)
            if server.incarnation in _everyone and len(slots):
                entries = _everyone[server.incarnation].store.held.clients.entries(slots)
                where = np.repeat(slots, np.diff(entries.offsets)).tolist()
                out |= set(zip(where, entries.clients.tolist(), entries.last.tolist(), strict=True))
        return out

    def digests(self) -> list[int]:
        """Of all live slots, in order of their numbers."""
        out = np.zeros(self.view.slots_total, np.uint64)
        for index, server in enumerate(self.view.servers):
            slots = np.flatnonzero(self.view.owners()[:, 0] == index)
            if server.incarnation in _everyone and len(slots):
                out[slots] = _everyone[server.incarnation].store.digest(slots)
        return out[self.view.owners()[:, 0] >= 0].tolist()

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        if verb == "status":
            tables = [{"name": t.name, "number": t.number} for t in self.view.tables]
            return {"cluster": self.view.cluster, "fingerprint": CONFIG.fingerprint, "tables": tables}
        if verb == "restored":
            self.install(conclude(self.view, self._restoring))
            return {}
        if verb == "drop_table":
            self.change(DropTable(fields["name"]))
            return {}
        self._restoring = prepare(self.view, fields.pop("manifest"), **fields)
        self.install(self._restoring.first)
        return {**told(self._restoring), "restore": 1}

    def save(self, storage: Storage, name: str | None = None, **options: Any) -> Saved:
        return save(storage, self.view.servers, ACCESS, CONFIG.fingerprint, name=name, **options)

    def restore(self, storage: Storage, **options: Any) -> Restored:
        return restore(storage, self.ask, ACCESS, **options)
