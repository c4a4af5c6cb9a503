"""The view: the immutable membership of a cluster at one epoch.

A view holds the servers, the table specifications (opaque here), and for every group of tables the owners and the
term of each slot. It is the fact that everybody judges by; the ring is only the planner's target.

Invariants, checked by `View.check` where a view enters a process, and trusted inside:
  1. Names of servers are unique, and so are names and numbers of tables and numbers of groups.
  2. A group's slots stand at [first, first + slots), groups do not overlap, and all stand below `next_slot`.
  3. Owners index `servers`, are distinct within a slot, and -1 fills the end of a slot's list.
  4. A slot's term is never above the epoch; every group has a table, and every table a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hashring.columns import any_of

SLOT_BITS = 14

SLOTS_MAX = 2**24
"""Slot numbers that a cluster can give out: those of groups that are gone are not used again."""

Placement = Literal["sharded", "whole"]


def _frozen(array: NDArray[Any], dtype: type) -> NDArray[Any]:
    out: NDArray[Any] = np.ascontiguousarray(array, dtype)
    if out.flags.writeable:
        out = out.copy() if out is array else out
        out.flags.writeable = False
    return out


@dataclass(frozen=True)
class Server:
    """One server process: `incarnation` (random uint64) tells it from any process before it under the same name.

    addresses: "tcp:HOST:PORT" or "unix:/path". alive: False once its process is known dead or was judged so.
    """

    name: str
    incarnation: int
    host: str
    zone: str = ""
    addresses: tuple[str, ...] = ()
    alive: bool = True


@dataclass(frozen=True, eq=False)
class Group:
    """Tables that share slots, and with them placement and replicas.

    first: global number of its first slot, never used again. owners int16[slots, copies]: indexes of `View.servers`,
    the primary first, -1 where there is none. terms int64[slots]. weights float64[slots]: what balancing counts.
    """

    number: int
    placement: Placement
    replicas: int | Literal["all"]
    first: int
    owners: NDArray[np.int16]
    terms: NDArray[np.int64]
    weights: NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", _frozen(self.owners, np.int16))
        object.__setattr__(self, "terms", _frozen(self.terms, np.int64))
        object.__setattr__(self, "weights", _frozen(self.weights, np.float64))

    @property
    def slots(self) -> int:
        """How many slots the group has."""
        return len(self.terms)


@dataclass(frozen=True)
class Table:
    """A table's number (never reused), name, group, and its specification as plain data."""

    number: int
    name: str
    group: int
    spec: Mapping[str, object]


@dataclass(frozen=True)
class Move:
    """A change of the servers that is under way: those of these names join, or leave.

    bytes_per_s: what each server may spend on copying slots to others; 0 is no limit. undoes: they leave because their
    join was aborted.
    """

    kind: Literal["join", "leave"]
    names: tuple[str, ...]
    bytes_per_s: int = 0
    undoes: bool = False

    def __str__(self) -> str:
        verb = "going back" if self.undoes else "joining" if self.kind == "join" else "leaving"
        return f"{', '.join(self.names)} {verb}"


@dataclass(frozen=True, eq=False)
class View:
    """Who owns what. `cluster` is the cluster's random id; `next_*` are counters of numbers never used before.

    move: the change of the servers that is under way, so that whoever reads the view can go on with it.
    """

    cluster: int
    epoch: int
    slot_bits: int
    servers: tuple[Server, ...] = ()
    groups: tuple[Group, ...] = ()
    tables: tuple[Table, ...] = ()
    next_table: int = 1
    next_group: int = 1
    next_slot: int = 0
    move: Move | None = None

    @staticmethod
    def empty(cluster: int, slot_bits: int = SLOT_BITS) -> "View":
        """The view of a cluster that has neither servers nor tables: epoch 0."""
        return View(cluster=cluster, epoch=0, slot_bits=slot_bits)

    @property
    def slots_total(self) -> int:
        """Length of arrays over all slot numbers ever used."""
        return self.next_slot

    @cached_property
    def _tables(self) -> dict[str, Table]:
        return {t.name: t for t in self.tables}

    @cached_property
    def _groups(self) -> dict[int, Group]:
        return {g.number: g for g in self.groups}

    @cached_property
    def _servers(self) -> dict[str, int]:
        return {s.name: i for i, s in enumerate(self.servers)}

    def table(self, name: str) -> Table | None:
        """The table of this name, or None."""
        return self._tables.get(name)

    def group(self, number: int) -> Group:
        """The group of this number; KeyError where there is none."""
        return self._groups[number]

    def server_index(self, name: str) -> int | None:
        """Where the server of this name stands in `servers`, or None."""
        return self._servers.get(name)

    @cached_property
    def _owners(self) -> NDArray[np.int16]:
        copies = max((g.owners.shape[1] for g in self.groups), default=1)
        out = np.full((self.next_slot, copies), -1, np.int16)
        for g in self.groups:
            out[g.first : g.first + g.slots, : g.owners.shape[1]] = g.owners
        return _frozen(out, np.int16)

    def owners(self) -> NDArray[np.int16]:
        """int16[slots_total, copies]: owners of every slot by its global number, -1 where there is none."""
        return self._owners

    @cached_property
    def _terms(self) -> NDArray[np.int64]:
        out = np.zeros(self.next_slot, np.int64)
        for g in self.groups:
            out[g.first : g.first + g.slots] = g.terms
        return _frozen(out, np.int64)

    def terms(self) -> NDArray[np.int64]:
        """int64[slots_total]: the term of every slot, 0 where no group has it."""
        return self._terms

    @cached_property
    def _lost(self) -> NDArray[np.bool_]:
        alive = np.array([s.alive for s in self.servers] + [False], bool)  # index -1, no owner, is not alive
        owners = self.owners()
        return _frozen((owners[:, 0] >= 0) & ~any_of(alive[owners]), np.bool_)

    def lost(self) -> NDArray[np.bool_]:
        """bool[slots_total]: slots whose every owner is dead."""
        return self._lost

    def check(self) -> "View":
        """Return self, or raise ValueError naming the invariant that is broken."""
        _unique("server names", [s.name for s in self.servers])
        _unique("table names", [t.name for t in self.tables])
        _unique("table numbers", [t.number for t in self.tables])
        _unique("group numbers", [g.number for g in self.groups])
        numbers = {g.number for g in self.groups}
        if {t.group for t in self.tables} != numbers:
            raise ValueError("tables and groups of the view do not name each other")
        stop = 0
        for g in sorted(self.groups, key=lambda g: g.first):
            if g.first < stop or g.first + g.slots > self.next_slot:
                raise ValueError(f"slots of group {g.number} overlap another group's or pass {self.next_slot}")
            stop = g.first + g.slots
            _check_group(g, len(self.servers), self.epoch)
        return self

    def to_plain(self) -> dict[str, Any]:
        """As msgpack-able data; arrays as little-endian bytes."""
        return {
            "cluster": self.cluster,
            "epoch": self.epoch,
            "slot_bits": self.slot_bits,
            "next": [self.next_table, self.next_group, self.next_slot],
            "servers": [[s.name, s.incarnation, s.host, s.zone, list(s.addresses), s.alive] for s in self.servers],
            "groups": [
                [
                    *(g.number, g.placement, g.replicas, g.first, g.slots),
                    *(g.owners.tobytes(), g.terms.tobytes(), g.weights.tobytes()),
                ]
                for g in self.groups
            ],
            "tables": [[t.number, t.name, t.group, dict(t.spec)] for t in self.tables],
            "move": [m.kind, list(m.names), m.bytes_per_s, m.undoes] if (m := self.move) else None,
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> "View":
        """The inverse of `to_plain`, checked; ValueError where the data are not a view."""
        try:
            view = _from_plain(plain)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"this is not a view: {type(error).__name__} {error}") from None
        return view.check()


def _from_plain(plain: Mapping[str, Any]) -> View:
    groups = []
    for number, placement, replicas, first, slots, owners, terms, weights in plain["groups"]:
        groups.append(
            Group(
                number,
                placement,
                replicas,
                first,
                np.frombuffer(owners, "<i2").reshape(slots, -1),
                np.frombuffer(terms, "<i8"),
                np.frombuffer(weights, "<f8"),
            )
        )
    next_table, next_group, next_slot = plain["next"]
    move = plain.get("move")  # views that were logged before there were moves have none
    return View(
        cluster=plain["cluster"],
        epoch=plain["epoch"],
        slot_bits=plain["slot_bits"],
        servers=tuple(Server(n, i, h, z, tuple(a), bool(up)) for n, i, h, z, a, up in plain["servers"]),
        groups=tuple(groups),
        tables=tuple(Table(*entry) for entry in plain["tables"]),
        next_table=next_table,
        next_group=next_group,
        next_slot=next_slot,
        move=Move(move[0], tuple(move[1]), int(move[2]), *map(bool, move[3:4])) if move else None,
    )


def _unique(what: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{what} of the view are not unique: {sorted(values)}")


def _check_group(group: Group, servers: int, epoch: int) -> None:
    owners = group.owners
    if owners.ndim != 2 or len(owners) != group.slots or len(group.weights) != group.slots:
        raise ValueError(f"group {group.number} has arrays of different lengths")
    if owners.size and (owners.max() >= servers or owners.min() < -1):
        raise ValueError(f"group {group.number} names a server that the view does not have")
    columns = range(owners.shape[1])  # few: comparing them two by two is cheaper than sorting lines
    if any(((owners[:, i] == owners[:, j]) & (owners[:, i] >= 0)).any() for i in columns for j in range(i)):
        raise ValueError(f"group {group.number} names one server twice for a slot")
    if ((owners[:, :-1] < 0) & (owners[:, 1:] >= 0)).any():
        raise ValueError(f"group {group.number} has a gap in an owner list")
    if group.slots and group.terms.max() > epoch:
        raise ValueError(f"group {group.number} has a term above the view's epoch {epoch}")
