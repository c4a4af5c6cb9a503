"""A server of the simulation: the real store and the real replication machine, behind frames."""

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hashring.view import Server as ServerEntry
from hashring.view import View
from ps.errors import EmbringError, NotApplied, RequestError, WrongView, judged_by
from ps.replication import Answer, Forward, Refuse, Replication, ReplicationLimits, Send, SendView
from ps.replication.members import ADMITTED
from ps.rowblock import RowBlock, Watermark
from ps.share import PullReply, PullShare
from ps.store import StoreLimits
from ps.wire import (
    Message,
    error_fields,
    pull_share,
    push_message,
    push_share,
    raise_error,
    view_message,
    view_of,
)
from tests.sim.network import Connection
from tests.sim.process import Process, frame, unframe
from tests.sim.store import CheckedStore

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

TICK_S = 0.1
LIMITS = ReplicationLimits(
    queue_bytes_max=64 * 1024,
    block_bytes_max=8000,
    bulk_bytes_max=1000,
    repair_slots=3,
    copy_bytes=1000,
    verify_rows=4,
    verify_slots_per_s=4.0,
)
HASTY = replace(LIMITS, copy_bytes=150, bulk_bytes_max=4000)
"""Copies of many parts, several of them on their way at once."""

STORE_LIMITS = StoreLimits(memory_max=2**22, clients_max=8, slots_max=256, deletions_max=24)


class Server(Process):
    """One incarnation of a server."""

    def __init__(self, cluster: "Cluster", name: str, incarnation: int) -> None:
        super().__init__(cluster, name)
        self.incarnation = incarnation
        self.entry = ServerEntry(name, incarnation, f"host-{name}")
        self.store = CheckedStore(cluster, self, incarnation, STORE_LIMITS, lambda: 1000.0 + self.clock)
        self.machine = Replication(self.store, HASTY if cluster.faults.hasty else LIMITS)
        self._admissions = self.machine._primary._advance
        self.machine._primary._advance = self._advance  # type: ignore[method-assign]
        self._links: dict[int, Connection] = {}
        self._exports: dict[Hashable, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._ahead: dict[Hashable, int] = {}
        self.every(TICK_S, self.tick)

    @property
    def view(self) -> View | None:
        return self.store.view

    def tick(self) -> None:
        self.machine.tick(self.clock)
        self.perform()
        self.cluster.checks.limits(self)

    def install(self, view: View) -> None:
        before = {} if self.view is None else {t.number: t.group for t in self.view.tables}
        self.machine.install(view)
        now = {} if self.view is None else {t.number: t.group for t in self.view.tables}
        if any(now.get(number, group) != group for number, group in before.items()):
            self.cluster.step("a table moves", self)
        self.perform()

    def _advance(self, link: Any, slots: np.ndarray) -> None:
        members = self.machine.members
        before = int((members.ranks == ADMITTED).sum())
        self._admissions(link, slots)
        if int((members.ranks == ADMITTED).sum()) > before:
            self.cluster.step("a learner is admitted", self, self._links.get(link.incarnation))

    # -- what comes in

    def message(self, connection: Connection, data: bytes) -> None:
        message = unframe(data)
        if connection.caller is self:
            self._reply(connection, message)
        else:
            self._request(connection, message)
        self.perform()

    def _request(self, connection: Connection, request: Message) -> None:
        token = (connection, request.request)
        if request.fields.get("epoch", 0) > self.store.epoch:
            self._ahead[token] = request.fields["epoch"]
        copied = request.op != "absorb" and "full" in request.arrays and request.arrays["full"].any()
        op = "copy" if copied else request.op
        self.cluster.step(f"{op} arrives", self, connection)
        if not self.alive:
            return
        try:
            result = self._handle(token, request)
        except EmbringError as error:
            self._refuse(token, error)
            return
        if result is not None:
            self._answer(token, *result)
        if request.op in ("replicate", "repair", "fork"):
            self.cluster.step(f"{op} taken", self, connection)

    def _handle(self, token: Hashable, request: Message) -> tuple[dict[str, Any], dict[str, Any]] | None:
        op, fields, arrays = request.op, request.fields, request.arrays
        if op == "ping":
            return {}, self.machine.pinged(fields).to_arrays()
        if op == "view":
            if self.view is None:
                raise NotApplied("no view yet")
            return view_message(self.view)
        if op == "pull":
            return self._pull(pull_share(fields, arrays))
        if op == "push":
            only, end = arrays.get("only"), self.view.slots_total if self.view else 0
            before = self.store.held.slots.positions[:end].copy()
            self.machine.push(token, push_share(fields, arrays), fields.get("acks", "all"), only, fields.get("at"))
            self.cluster.checks.decided(self, token, before)
            return None
        if op == "install":
            if fields["view_epoch"] > self.store.epoch:
                self.install(view_of(fields, arrays))
            return {}, {}
        if op == "learn":
            self.machine.learn(arrays["slots"], fields["learner"], fields["term_epoch"])
            return {}, {}
        if op == "export":
            return self._export(token, fields, arrays)
        if op == "absorb":
            return self.machine.restore(fields, arrays)
        if op in ("replicate", "repair", "fork", "digest"):
            return self.machine.request(op, fields, arrays)
        raise RequestError(f"unknown op {op}")

    def _pull(self, share: PullShare) -> tuple[dict[str, Any], dict[str, Any]]:
        reply: PullReply = self.store.pull(share)
        self.cluster.checks.pulled(self, share, reply)
        return {"absent": reply.absent}, {"rows": reply.rows}

    def _export(self, token: Hashable, fields: dict[str, Any], arrays: dict[str, Any]) -> None:
        slots = arrays["slots"]
        since = Watermark(fields["cluster"], slots, arrays["positions"]) if "positions" in arrays else None
        block: RowBlock = next(iter(self.store.export(slots, since)))
        plain, sent = block.to_arrays()
        self._exports[token] = ({"block": plain}, sent)
        self.machine.hold(token, block.slots, block.last)

    def _reply(self, connection: Connection, reply: Message) -> None:
        if connection.context is None:
            return
        peer, link = connection.context
        error, view = None, None
        if reply.op == "error":
            try:
                raise_error(reply.fields)
            except EmbringError as caught:
                error = caught
        elif "view" in reply.arrays:
            view = view_of(reply.fields, reply.arrays)
        self.cluster.step("a peer's reply", self, connection)
        if self.alive:
            self.machine.replied(peer, link, reply.request, reply.fields, reply.arrays, error, view)

    def disconnected(self, connection: Connection) -> None:
        if connection.caller is self and connection.context is not None:
            self.machine.broken(*connection.context)
            self.perform()

    # -- what goes out

    def perform(self) -> None:
        """Carry out what the machine asks for."""
        while self.alive and (actions := self.machine.actions()):
            for action in actions:
                if not self.alive:
                    return
                if isinstance(action, Answer):
                    fields, arrays = self._exports.pop(action.token, (action.fields, {}))
                    self._answer(action.token, fields, arrays)
                elif isinstance(action, Refuse):
                    self._exports.pop(action.token, None)
                    self._refuse(action.token, action.error)
                else:
                    self._to_peer(action)

    def _refuse(self, token: Hashable, error: EmbringError) -> None:
        """Answer with an error; the product waits a while for the view that the request knows, which comes to this."""
        connection, number = token  # type: ignore[misc]
        error = judged_by(self.store.epoch, self._ahead.pop(token, 0), error)
        self._send(connection, Message("error", number, error_fields(error)))

    def _answer(self, token: Hashable, fields: dict[str, Any], arrays: dict[str, Any]) -> None:
        connection, number = token  # type: ignore[misc]
        self._ahead.pop(token, None)
        epoch = self.view.epoch if self.view else 0
        self._send(connection, Message("ok", number, {**fields, "epoch": epoch}, arrays))

    def _send(self, connection: Connection, message: Message) -> None:
        connection.send(self, frame(message))

    def _to_peer(self, action: Send | SendView | Forward) -> None:
        connection = self._link(action.peer, action.link)
        if connection is None:
            self.world.at(0.001, self._unreachable, action.peer, action.link)
            return
        if isinstance(action, Send):
            op, fields, arrays = action.op, action.fields, action.arrays
            label = "copy" if "full" in arrays and arrays["full"].any() else op
        elif isinstance(action, SendView):
            op, (fields, arrays) = "install", view_message(action.view)
            label = op
        else:
            op, (fields, arrays) = "push", push_message(action.share)
            label = op
            fields["acks"], fields["at"], arrays["only"] = action.acks, action.at, action.only
            self.cluster.world.counts["forwarded"] += 1
        first = self.world.chance(0.5)
        if first:
            self.cluster.step(f"{label} leaves", self, connection)
        if self.alive:
            self._send(connection, Message(op, action.number, fields, dict(arrays)))
            if not first:
                self.cluster.step(f"{label} leaves", self, connection)

    def _unreachable(self, peer: int, link: int) -> None:
        if self.alive:
            self.machine.broken(peer, link)
            self.perform()

    def _link(self, peer: int, number: int) -> Connection | None:
        """The connection of this number to a peer, made where it is a new one; None where nobody answers."""
        known = self._links.get(peer)
        if known is not None and known.context == (peer, number):
            return known if known.open else None
        if known is not None:
            known.close()
        name = next((s.name for s in self.view.servers if s.incarnation == peer), "") if self.view else ""
        try:
            target = self.cluster.reach(name, peer)
        except (WrongView, NotApplied):
            return None
        connection = self.cluster.network.connect(self, target)
        connection.context = (peer, number)
        self._links[peer] = connection
        return connection


def slots_of(server: Server) -> np.ndarray:
    return np.arange(server.view.slots_total if server.view else 0)
