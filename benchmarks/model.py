"""The arithmetic of placements: what a workload must cost under a view, from its law alone. Pure.

Symbols: table f has rows i of probability p_i, and a bag of k_f ids a sample; a request has B samples. q_fs is the
probability that an id of f is asked of server s: the sum of p_i over the slots that s answers for.

    ids asked of s          B k_f q_fs
    partial sums            B (1 - (1 - q_fs)^k_f)          pieces of bags that s has any id of
    distinct ids            sum over i on s of 1 - (1 - p_i)^(B k_f)
    rows sent by s          distinct ids where they are the cheaper (`as_rows`), else partial sums
    servers touched         sum over s of 1 - product over f of (1 - q_fs)^(B k_f)
    bytes                   frames of ps/wire.py that carry so many ids, offsets and rows
    memory                  rows on s x (values, state, metadata) + their directory's segments (ps/kernels/index.py)

Where a slot has several owners, servers are taken as the client takes them (`choose_readers` of ps/kernels/split.py):
next comes one that covers all that is left, or else one of those that cover nearly the most; of several, the one that
has been asked for the least so far. The figures are the average over enough requests, one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads import Workload
from hashring.planner import Fail, Join, plan
from hashring.tokens import tokens
from hashring.view import Server, View
from ps.arena import ENTRY_BYTES, ArenaKey
from ps.client.request import UNDIVIDED_MAX
from ps.kernels.index import CAPACITY, LIMIT
from ps.kernels.split import EDGE_COST, NEARLY, ROW_COST
from ps.rowblock import RowBlock, Section
from ps.share import FEATURE_COLUMNS
from ps.spec import TableSpec
from ps.window import ClientEntries
from ps.wire import Message, encode

TURNS = 12
"""Requests for each server that `covers` averages over."""

ALL = 1 - 1e-9
"""A sum of probabilities that is all of it, but for rounding."""

NODE_BYTES = 128
FANOUT = 16


@dataclass(frozen=True)
class PullCost:
    """Of one request, expected: rows that servers send, servers touched, bytes and frames both ways.

    busiest: the share of the busiest server in all ids that are sent, over many requests.
    """

    rows: float
    servers: float
    bytes_sent: float
    bytes_received: float
    frames: float
    busiest: float


@dataclass(frozen=True)
class PushCost:
    """Of one push, expected: rows that change, bytes from the client, and bytes between servers for other owners."""

    rows: float
    bytes_sent: float
    bytes_between: float


@dataclass(frozen=True)
class Change:
    """Of a change of membership: rows that move to a newcomer, and that many by the ideal, (rows and copies)/(N+1)."""

    rows_moved: float
    rows_ideal: float


@dataclass(frozen=True)
class Loss:
    """Of one lost server, averaged over all: slots and rows without a copy, rows one copy short, bags that fail."""

    slots_lost: float
    slots_under_replicated: float
    rows_lost: float
    bags_failed: float


class Model:
    """A workload's tables, by `names`, where a view has put them. Tables must share one arena (dim and optimizer)."""

    def __init__(self, view: View, names: Sequence[str], workload: Workload) -> None:
        self.view, self.names, self.workload = view, tuple(names), workload
        self.counts = workload.shape.ids_per_sample
        self.laws = [workload.law(f) for f in range(len(self.names))]
        self.slots = [slots_of(view, name, len(law)) for name, law in zip(self.names, self.laws, strict=True)]
        self.mass = np.zeros(view.slots_total)
        for slots, law, k in zip(self.slots, self.laws, self.counts, strict=True):
            np.add.at(self.mass, slots, law * k)
        groups = {view.group(t.group).number for t in view.tables if t.name in self.names}
        owners = [set(row) - {-1} for number in groups for row in np.unique(view.group(number).owners, axis=0).tolist()]
        self.everywhere = bool(set.intersection(*owners))
        """Whether a server owns every slot of these tables."""
        self.rows_of_slot = np.bincount(np.concatenate(self.slots), minlength=view.slots_total)

    # -- reads

    def pull(self, samples: int) -> PullCost:
        """One pull of B samples, every bag by sum."""
        owners = self.view.owners()
        used = np.flatnonzero(self.mass)
        turns = covers(owners[used], self.mass[used], len(self.view.servers))
        found = np.zeros(5)
        load = np.zeros(len(self.view.servers))
        for weight, chosen in turns:
            server = np.full(self.view.slots_total, -1)
            server[used] = chosen
            figures, ids = self._one(samples, server)
            found += weight * figures
            load += weight * ids
        rows, touched, sent, received, frames = found.tolist()
        return PullCost(rows, touched, sent, received, frames, busiest=float(load.max() / load.sum()))

    def _one(self, samples: int, server: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(rows, servers, bytes sent, bytes received, frames) and ids sent to each server, for one cover."""
        asked, rows, ids, missed = self._shares(samples, server)
        servers = np.flatnonzero(asked.sum(axis=1) > 0)
        if self.everywhere and sum(self.counts) * samples <= UNDIVIDED_MAX:  # sent as it is
            rows[servers[0]], ids[servers[0]] = samples, np.array(self.counts) * samples
        total = np.zeros(5)
        for s in servers:
            touched = 1 - np.exp(missed[s].sum())
            sent = touched * pull_bytes(ids[s].sum() / touched, rows[s].sum() / touched, len(self.counts))
            got = touched * reply_bytes(rows[s].sum() / touched * self.workload.shape.dim)
            total += np.array([rows[s].sum(), touched, sent, got, 2 * touched])
        return total, ids.sum(axis=1)

    def _shares(self, samples: int, server: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
        """asked, rows, ids, missed: float64[S, F]. missed: the logarithm of the chance that s has no id of f."""
        n_servers = len(self.view.servers)
        asked, rows, ids, missed = np.zeros((4, n_servers, len(self.names)))
        for f, (slots, law, k) in enumerate(zip(self.slots, self.laws, self.counts, strict=True)):
            on = server[slots]
            n = samples * k
            q = np.minimum(np.bincount(on, weights=law, minlength=n_servers), 1.0)
            unique = np.bincount(on, weights=seen(law, n), minlength=n_servers)
            pieces = samples * seen(q, k)
            asked[:, f] = n * q
            by_row = as_rows(asked[:, f], pieces, unique)
            rows[:, f] = np.where(by_row, unique, pieces)
            ids[:, f] = np.where(by_row, unique, asked[:, f])
            with np.errstate(divide="ignore"):
                missed[:, f] = n * np.log1p(-q)
        return asked, rows, ids, missed

    # -- writes

    def push(self, samples: int, state_width: int) -> PushCost:
        """One push of a gradient for each bag: to the primaries, and from them to the other owners."""
        dim = self.workload.shape.dim
        owners = self.view.owners()
        _, rows, ids, _ = self._shares(samples, owners[:, 0].astype(np.int64))
        sent = sum(
            push_bytes(ids[s].sum(), rows[s].sum(), len(self.counts), dim) for s in np.flatnonzero(ids.sum(axis=1))
        )
        rows_in, missed = np.zeros((2, self.view.slots_total))
        changed = 0.0
        for slots, law, k in zip(self.slots, self.laws, self.counts, strict=True):
            some = seen(law, samples * k)
            changed += float(some.sum())
            rows_in += np.bincount(slots, weights=some, minlength=len(rows_in))
            in_slot = np.minimum(np.bincount(slots, weights=law, minlength=len(missed)), 1.0)
            with np.errstate(divide="ignore"):
                missed += samples * k * np.log1p(-in_slot)
        between = 0.0
        mine = self.rows_of_slot > 0  # the view may have slots of other tables, of which nothing is told
        for s in range(len(self.view.servers)):
            for peer in range(len(self.view.servers)):
                theirs = mine & (owners[:, 0] == s) & (owners[:, 1:] == peer).any(axis=1)
                told = float(-np.expm1(missed[theirs].sum()))  # the chance that there is anything to tell
                if told > 0:
                    touched, rows_out = -np.expm1(missed[theirs]).sum() / told, rows_in[theirs].sum() / told
                    between += told * block_bytes(touched, rows_out, dim, state_width)
        return PushCost(changed, float(sent), between)

    # -- rows at rest, and changes

    def memory(self, beside: NDArray[np.int64], optimizer: str = "sgd") -> NDArray[np.float64]:
        """float64[S]: bytes of each server's rows and their directory.

        beside int64[slots]: rows of other tables in the same slots, which share segments with these.
        """
        row_bytes = ArenaKey(self.workload.shape.dim, optimizer).row_bytes
        directory = directory_bytes(beside + self.rows_of_slot) - directory_bytes(beside)
        of_slot = self.rows_of_slot * row_bytes + directory
        owners = self.view.owners()
        held = np.where(owners >= 0, of_slot[:, None], 0.0)
        found: NDArray[Any] = np.bincount(owners.ravel() + 1, held.ravel(), len(self.view.servers) + 1)
        return found[1:]

    def copies(self) -> int:
        """Rows, each counted as often as it is held."""
        return int((self.rows_of_slot * (self.view.owners() >= 0).sum(axis=1)).sum())

    def join(self, server: Server) -> Change:
        """What another server would be given: rows of the slots that the planner's next view has it own."""
        after = plan(self.view, Join((server,)))
        at = after.server_index(server.name)
        moved = self.rows_of_slot[(after.owners() == at).any(axis=1)].sum()
        return Change(float(moved), self.copies() / len(after.servers))

    def loss(self) -> Loss:
        """What the planner's view after the death of one server lacks."""
        lost, short, rows, failed = [], [], [], []
        used = self.rows_of_slot > 0
        wanted = (self.view.owners() >= 0).sum(axis=1)
        for s in self.view.servers:
            after = plan(self.view, Fail(s.name))
            gone = after.lost() & used
            lost.append(int(gone.sum()))
            short.append(int((used & ~gone & ((after.owners() >= 0).sum(axis=1) < wanted)).sum()))
            rows.append(int(self.rows_of_slot[gone].sum()))
            failed.append(self._bags_failed(gone))
        return Loss(*(float(np.mean(x)) for x in (lost, short, rows, failed)))

    def _bags_failed(self, gone: NDArray[np.bool_]) -> float:
        """The share of a sample's bags with an id in a slot that is gone."""
        shares = [
            1 - (1 - min(1.0, float(law[gone[slots]].sum()))) ** k
            for slots, law, k in zip(self.slots, self.laws, self.counts, strict=True)
        ]
        return float(np.mean(shares))


def slots_of(view: View, name: str, rows: int) -> NDArray[np.int64]:
    """int64[rows]: the slots of ids 0 to rows - 1 of a table."""
    table = view.table(name)
    if table is None:
        raise KeyError(name)
    group = view.group(table.group)
    bits = group.slots.bit_length() - 1
    found = tokens(np.arange(rows), TableSpec.from_plain(table.spec).seed)
    return group.first + ((found >> np.uint64(1)) >> np.uint64(63 - bits)).astype(np.int64)


def seen(p: NDArray[np.float64], n: float) -> NDArray[np.float64]:
    """1 - (1 - p)^n: the chance that something of probability p happens within n tries."""
    with np.errstate(divide="ignore"):
        return -np.expm1(n * np.log1p(-p))


def as_rows(asked: NDArray[Any], pieces: NDArray[Any], unique: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each server sends distinct rows of a table: `split`'s rule, for expected figures.

    Where the two costs are nearly equal, requests go either way, and figures may be some percent from these.
    """
    limit = (pieces.sum() * (ROW_COST + EDGE_COST) - asked.sum() * EDGE_COST - 1) / ROW_COST
    cheaper: NDArray[np.bool_] = unique * ROW_COST + asked * EDGE_COST < pieces * (ROW_COST + EDGE_COST)
    return cheaper & bool(unique.sum() <= limit) & (asked > 0)


def covers(owners: NDArray[np.int16], mass: NDArray[np.float64], servers: int) -> list[tuple[float, NDArray[Any]]]:
    """[(weight, int64[slots])]: which owner answers for each slot; one entry for each way that servers are taken.

    owners int16[slots, C], mass float64[slots] above 0. A slot without an owner is -1.
    """
    has = np.stack([(owners == s).any(axis=1) for s in range(servers)])
    load = np.zeros(servers)
    ways: dict[tuple[int, ...], tuple[float, NDArray[Any]]] = {}
    for _ in range(TURNS * servers):
        taken: tuple[int, ...] = ()
        chosen = np.full(len(mass), -1, np.int64)
        while (cover := (has & (chosen < 0)) @ mass).max() > 0:
            left = mass[chosen < 0].sum()
            enough = left * ALL if cover.max() >= left * ALL else cover.max() * NEARLY
            best = min(np.flatnonzero(cover >= enough), key=load.__getitem__)
            chosen[has[best] & (chosen < 0)] = best
            load[best] += cover[best]
            taken += (int(best),)
        weight, _ = ways.get(taken, (0.0, chosen))
        ways[taken] = weight + 1 / (TURNS * servers), chosen
    return list(ways.values())


def directory_bytes(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bytes of the segments of slots with so many entries: the smallest class that may hold them.

    A slot of more than three quarters of the largest class (the middle of where it splits) is a node of 16 such.
    """
    counts = counts.astype(np.float64)
    big = counts > 0.75 * LIMIT[-1]
    size: NDArray[Any] = CAPACITY[np.searchsorted(LIMIT, np.where(big, 0, counts))] * float(ENTRY_BYTES)
    if big.any():
        size[big] = NODE_BYTES + FANOUT * directory_bytes(np.ceil(counts[big] / FANOUT).astype(np.int64))
    return size


def frame_bytes(op: str, given: dict[str, Any], arrays: dict[str, Any]) -> int:
    """Bytes of a frame."""
    return sum(map(len, encode(Message(op, 1000, given, arrays))))


def pull_bytes(ids: float, bags: float, features: int) -> int:
    """Bytes of a pull's request: offsets are left out where every bag has one id."""
    return frame_bytes("pull", {"epoch": 30, "deadline_ms": 3333}, _asked(ids, bags, features))


def push_bytes(ids: float, bags: float, features: int, dim: int) -> int:
    """Bytes of a push's request."""
    given = {"client": 2**63, "sequence": 1000, "kind": "push", "lr_scale": 1.0, "epoch": 30, "deadline_ms": 3333}
    rows = {"rows": np.empty(round(bags) * dim, np.float32)}
    return frame_bytes("push", given, {**_asked(ids, bags, features), **rows})


def reply_bytes(floats: float) -> int:
    """Bytes of the reply that carries so many floats."""
    return frame_bytes("ok", {"absent": 0, "epoch": 30}, {"rows": np.empty(round(floats), np.float32)})


def _asked(ids: float, bags: float, features: int) -> dict[str, Any]:
    arrays = {"features": np.empty((features, FEATURE_COLUMNS), np.int32), "ids": np.empty(round(ids), np.int64)}
    if round(ids) != round(bags):
        arrays["offsets"] = np.empty(round(bags) + 1, np.int64)
    return arrays


def block_bytes(slots: float, rows: float, dim: int, state_width: int) -> int:
    """Bytes of the frame that tells another owner of a push that changed so many rows of so many slots."""
    s, n = round(slots), round(rows)
    offsets, nothing, none = np.zeros(s + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32)
    each = np.zeros(s, np.int64)
    section = Section(
        *(dim, "sgd", np.zeros(n, np.int64), np.zeros(n, np.int32), offsets, np.zeros((n, dim), np.float32)),
        *(np.zeros((n, state_width), np.float32), np.zeros((n, 2), np.int64), nothing, none, nothing, offsets),
    )
    clients = ClientEntries(each.view(np.uint64), each, each.view(np.uint64), offsets)
    flags, part = np.zeros(s, np.uint8), np.zeros(s, np.int32)
    block = RowBlock(2**63, 0, each, each, each, flags, part, flags, nothing, offsets, clients, (section,))
    return frame_bytes("replicate", *block.to_arrays())
