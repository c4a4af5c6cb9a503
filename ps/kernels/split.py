"""Splitting: from the ids of a whole request to the share of each server, in one call for all features.

Symbols, here and in merge.py:

    n ids, F features (one table each), G bags of all features, S servers of the view, C owners of a slot
    starts int64[F+1]      first bag of each feature; bag g belongs to feature f where starts[f] <= g < starts[f+1]
    offsets int64[G+1]     ids of bag g, or empty: every id is a bag of its own, and G = n
    piece                  the ids that one server has of one bag
    share bags             what a server answers with one row each: pieces, or single ids (unique rows)
    edge                   (bag, share bag, weight): the row of this share bag is part of that bag

A server can answer a feature with one partial sum for each piece, or with one row for each distinct id, which the
client then pools. `split` counts both, and takes the cheaper for each feature and server (`_cheaper`): pieces where
bags are long, rows where few distinct ids are asked for by many bags.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashring.tokens import mix64
from ps.kernels import inline, kernel
from ps.share import ABSENT, BAGS, MODE, TABLE

I16 = NDArray[np.int16]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

CHOOSE, ROWS, PIECES = 0, 1, 2
"""Policies of a feature: the cheaper of both; always distinct rows; never (the order of ids is kept)."""

ROW_COST, EDGE_COST = 8, 1
"""What a row costs on its way through server, socket and client, to what the client pays to pool one that is there
(dim 64: some 160 ns to 20 ns, on loopback). A network makes rows dearer still."""


NEARLY = 0.75
"""A server that holds this part of what the best one holds may be asked in its place."""


@dataclass(slots=True)
class Split:
    """Who is asked what. Ids, bags and edges stand server behind server: server s has x[x_start[s]:x_start[s+1]].

    lost: a slot without a living owner that was asked for, or -1 (then all else is valid).
    servers int16[n]: of each id (-1 where it was done before). starts int64[3, S+1]: id_start, bag_start, edge_start.
    features int32[S, F, 4]: the lines of each server's share (ps/share.py). edges int32[S, F]: of each feature.
    ids int64, weights float32 (empty if none were given); offsets int64: each server's begin at bag_start[s] + s.
    edge_bag int32, edge_row int32 (share bag within its feature), edge_weight float32 (empty if none were given).
    """

    lost: int
    servers: I16
    starts: I64
    features: I32
    edges: I32
    ids: I64
    offsets: I64
    weights: F32
    edge_bag: I32
    edge_row: I32
    edge_weight: F32


class _Cursors(NamedTuple):
    """Where each server's next id, share bag and edge go; where its piece begins; its share bag of this feature."""

    ids: I64
    bags: I64
    edges: I64
    begin: I64
    seen: I64


class _Out(NamedTuple):
    """What is filled: the arrays of `Split` of the same names."""

    starts: I64
    features: I32
    edges: I32
    ids: I64
    offsets: I64
    weights: F32
    edge_bag: I32
    edge_row: I32
    edge_weight: F32


@inline
def _slot(i: int, first: int, shift: np.uint64, seed: np.uint64) -> int:
    """Slot of an id. The double shift makes 64 (a table of one slot) a shift like any other."""
    return first + int((mix64(np.uint64(i) ^ seed) >> np.uint64(32)) >> (shift - np.uint64(32)))


@inline
def _place(
    ids: I64, starts: I64, offsets: I64, done: U8, seeds: U64, firsts: I64, shifts: U64, slots: I32
) -> None:  # fmt: skip
    """Slot of each id, -1 where done."""
    for f in range(starts.size - 1):
        low, high = starts[f], starts[f + 1]
        if offsets.size:
            low, high = offsets[low], offsets[high]
        for i in range(low, high):
            skipped = done.size and done[i]
            slots[i] = -1 if skipped else _slot(ids[i], firsts[f], shifts[f], seeds[f])


@kernel
def choose_readers(slots: I32, readers: I16, load: F64) -> I16:
    """The server asked for each slot, int16[slots of the view]: few servers cover the ids, and all share the load.

    Greedy cover: next comes a server that holds all that is still uncovered, or else one of those that hold nearly the
    most of it (at least NEARLY of that); among several, the least loaded. Were it always the one that holds the most,
    the owner of a few hot ids would answer two to four times its share, whatever its load; so, it takes up to a tenth
    more servers a request, and none with up to five.
    readers int16[slots, C], -1 behind the last living owner. load float64[S].
    """
    ids_of = np.zeros(readers.shape[0], np.int32)
    touched = np.empty(min(slots.size, readers.shape[0]), np.int32)
    k = 0
    for slot in slots:
        if slot >= 0:
            if ids_of[slot] == 0:
                touched[k] = slot
                k += 1
            ids_of[slot] += 1
    chosen = np.full(readers.shape[0], -1, np.int16)
    cover = np.empty(load.size, np.int64)
    while k:
        cover[:] = 0
        total = 0
        for t in range(k):
            slot = touched[t]
            total += ids_of[slot]
            for c in range(readers.shape[1]):
                s = readers[slot, c]
                if s < 0:
                    break
                cover[s] += ids_of[slot]
        most = cover.max()
        if most == 0:
            break
        enough = float(total) if most == total else most * NEARLY
        best = -1
        for s in range(load.size):
            if cover[s] >= enough and (best < 0 or load[s] < load[best]):
                best = s
        left = 0
        for t in range(k):
            slot = touched[t]
            for c in range(readers.shape[1]):
                if readers[slot, c] == best:
                    chosen[slot] = best
            if chosen[slot] < 0:
                touched[left] = slot
                left += 1
        k = left
    return chosen


@inline
def _assign_servers(
    ids: I64, starts: I64, offsets: I64, done: U8, seeds: U64, firsts: I64, shifts: U64, chosen: I16, servers: I16,
    asked: I64, pieces: I64,
) -> int:  # fmt: skip
    """Server of each id (-1 where done), and the ids and pieces of each server and feature: asked, pieces int64[S, F].

    Returns the first slot that nobody can answer for, or -1.
    """
    mark = np.full(asked.shape[0], -1, np.int64)
    for f in range(starts.size - 1):
        first, shift, seed = firsts[f], shifts[f], seeds[f]
        for g in range(starts[f], starts[f + 1]):
            low, high = g, g + 1
            if offsets.size:
                low, high = offsets[g], offsets[g + 1]
            for i in range(low, high):
                servers[i] = -1
                if done.size and done[i]:
                    continue
                slot = _slot(ids[i], first, shift, seed)
                s = chosen[slot]
                if s < 0:
                    return slot
                servers[i] = s
                asked[s, f] += 1
                pieces[s, f] += np.int64(mark[s] != g)
                mark[s] = g
    return -1


@inline
def _number_unique(
    ids: I64, servers: I16, low: int, high: int, stop_at: int, keys: I64, rows: I32, stamps: I32, stamp: int,
    number: I32, unique: I32,
) -> bool:  # fmt: skip
    """Number the distinct ids of one feature on each server, in order of first occurrence: number int32[n], unique[S].

    Gives up (False) once there are more than `stop_at` of them, so that the cost is bounded by what could be won.
    keys, rows, stamps: an open-addressing table of a power of two places; a place is taken if it bears `stamp`.
    """
    mask = np.uint64(keys.size - 1)
    found = 0
    for i in range(low, high):
        s = servers[i]
        if s < 0:
            continue
        at = mix64(np.uint64(ids[i])) & mask
        while stamps[at] == stamp and keys[at] != ids[i]:
            at = (at + np.uint64(1)) & mask
        if stamps[at] != stamp:
            found += 1
            if found > stop_at:
                return False
            stamps[at] = stamp
            keys[at] = ids[i]
            rows[at] = unique[s]
            unique[s] += 1
        number[i] = rows[at]
    return True


@inline
def _cheaper(asked: int, pieces: int, unique: int) -> bool:
    """Whether distinct rows cost less than partial sums."""
    return unique * ROW_COST + asked * EDGE_COST < pieces * (ROW_COST + EDGE_COST)


@inline
def _choose_rows(
    ids: I64, servers: I16, starts: I64, offsets: I64, policy: U8, asked: I64, pieces: I64, unique: I32, number: I32,
    as_rows: U8,
) -> None:  # fmt: skip
    """Decide as_rows uint8[S, F], and number the distinct ids wherever it is set."""
    servers_n, features = asked.shape
    limit = np.zeros(features, np.int64)
    for f in range(features):
        # More distinct ids than these could not be the cheaper way (`_cheaper`, over all servers).
        n, p = asked[:, f].sum(), pieces[:, f].sum()
        most = (p * (ROW_COST + EDGE_COST) - n * EDGE_COST - 1) // ROW_COST
        limit[f] = n if policy[f] == ROWS else max(0, most)
    capacity = 2
    for f in range(features):
        while policy[f] != PIECES and capacity < 2 * limit[f] + 2:
            capacity *= 2
    keys = np.empty(capacity, np.int64)
    rows = np.empty(capacity, np.int32)
    stamps = np.zeros(capacity, np.int32)
    for f in range(features):
        if policy[f] == PIECES or limit[f] == 0:
            continue
        low, high = starts[f], starts[f + 1]
        if offsets.size:
            low, high = offsets[low], offsets[high]
        size = 2
        while size < 2 * limit[f] + 2:
            size *= 2
        all_numbered = _number_unique(
            ids, servers, low, high, limit[f], keys[:size], rows, stamps, f + 1, number, unique[f]
        )
        for s in range(servers_n):
            if all_numbered and asked[s, f]:
                as_rows[s, f] = policy[f] == ROWS or _cheaper(asked[s, f], pieces[s, f], unique[f, s])


@inline
def _layout(
    asked: I64, pieces: I64, unique: I32, as_rows: U8, lines: I32, starts: I64, features: I32, edges: I32
) -> None:  # fmt: skip
    """Where each server's ids, share bags and edges begin, and the lines of its share."""
    for k in range(3):
        starts[k, 0] = 0
    for s in range(asked.shape[0]):
        ids_n, bags_n, edges_n = 0, 0, 0
        for f in range(asked.shape[1]):
            bags: Any = pieces[s, f]
            edges[s, f] = pieces[s, f]
            if as_rows[s, f]:
                bags, edges[s, f] = np.int64(unique[f, s]), asked[s, f]
                ids_n += bags
            else:
                ids_n += asked[s, f]
            line = features[s, f]
            line[TABLE], line[BAGS], line[MODE], line[ABSENT] = lines[f, TABLE], bags, lines[f, MODE], lines[f, ABSENT]
            bags_n += bags
            edges_n += edges[s, f]
        starts[0, s + 1] = starts[0, s] + ids_n
        starts[1, s + 1] = starts[1, s] + bags_n
        starts[2, s + 1] = starts[2, s] + edges_n


@inline
def _fill_pieces(
    f: int, given: I64, servers: I16, starts: I64, offsets: I64, given_weights: F32, as_rows: U8, at: _Cursors,
    out: _Out,
) -> None:  # fmt: skip
    """Write the pieces of feature f, for the servers that pool it: the ids of a bag first, then what they add up to."""
    begin, piece = at.begin, at.seen
    begin[:] = at.ids[: begin.size]
    piece[:] = 0
    weighted = given_weights.size > 0
    for g in range(starts[f], starts[f + 1]):
        low, high = g, g + 1
        if offsets.size:
            low, high = offsets[g], offsets[g + 1]
        for i in range(low, high):
            s = servers[i]
            if s < 0 or as_rows[s, f]:
                continue
            k = at.ids[s]
            at.ids[s] = k + 1
            out.ids[k] = given[i]
            if weighted:
                out.weights[k] = given_weights[i]
        # Short bags know their servers by their ids; of long ones, every server has some.
        for j in range(min(high - low, begin.size)):
            s = servers[low + j] if high - low < begin.size else j
            if s < 0 or at.ids[s] == begin[s]:
                continue
            begin[s] = at.ids[s]
            e = at.edges[s]
            at.edges[s] = e + 1
            out.edge_bag[e] = g
            out.edge_row[e] = piece[s]
            if weighted:
                out.edge_weight[e] = np.float32(1.0)
            piece[s] += 1
            at.bags[s] += 1
            out.offsets[at.bags[s] + s] = at.ids[s] - out.starts[0, s]


@inline
def _fill_rows(
    f: int, given: I64, servers: I16, starts: I64, offsets: I64, given_weights: F32, number: I32, as_rows: U8,
    at: _Cursors, out: _Out,
) -> None:  # fmt: skip
    """Write the distinct ids of feature f, and an edge for each id, for the servers that send rows."""
    seen = at.seen
    seen[:] = 0
    weighted = given_weights.size > 0
    for g in range(starts[f], starts[f + 1]):
        low, high = g, g + 1
        if offsets.size:
            low, high = offsets[g], offsets[g + 1]
        for i in range(low, high):
            s = servers[i]
            if s < 0 or not as_rows[s, f]:
                continue
            e = at.edges[s]
            at.edges[s] = e + 1
            out.edge_bag[e] = g
            out.edge_row[e] = number[i]
            if weighted:
                out.edge_weight[e] = given_weights[i]
            if number[i] == seen[s]:
                seen[s] += 1
                at.bags[s] += 1
                k = at.ids[s]
                at.ids[s] = k + 1
                out.ids[k] = given[i]
                out.offsets[at.bags[s] + s] = k + 1 - out.starts[0, s]
                if weighted:
                    out.weights[k] = np.float32(1.0)


@inline
def _fill(
    given: I64, servers: I16, starts: I64, offsets: I64, given_weights: F32, number: I32, as_rows: U8, out: _Out,
) -> None:  # fmt: skip
    """Write every id, share bag and edge to its server's place, in the order of the request."""
    servers_n, features = as_rows.shape
    for s in range(servers_n):
        out.offsets[out.starts[1, s] + s] = 0
    at = _Cursors(
        out.starts[0].copy(),
        out.starts[1].copy(),
        out.starts[2].copy(),
        np.empty(servers_n, np.int64),
        np.empty(servers_n, np.int64),
    )
    for f in range(features):
        rows = 0
        pieces = 0
        for s in range(servers_n):
            if as_rows[s, f]:
                rows += out.edges[s, f]
            else:
                pieces += out.edges[s, f]
        if pieces:
            _fill_pieces(f, given, servers, starts, offsets, given_weights, as_rows, at, out)
        if rows:
            _fill_rows(f, given, servers, starts, offsets, given_weights, number, as_rows, at, out)


@kernel
def split_into(
    ids: I64, starts: I64, offsets: I64, weights: F32, done: U8, seeds: U64, firsts: I64, shifts: U64, lines: I32,
    readers: I16, load: F64, policy: U8, servers: I16, cuts: I64, features: I32, edges: I32, out_ids: I64,
    out_offsets: I64, out_weights: F32, edge_bag: I32, edge_row: I32, edge_weight: F32,
) -> int:  # fmt: skip
    """`split`, into arrays long enough for any outcome: to return them would cost more than to split a few ids."""
    n = ids.size
    features_n = starts.size - 1
    s_n = load.size
    asked = np.zeros((s_n, features_n), np.int64)
    pieces = np.zeros((s_n, features_n), np.int64)
    unique = np.zeros((features_n, s_n), np.int32)
    as_rows = np.zeros((s_n, features_n), np.uint8)
    if readers.shape[1] == 1:
        chosen = readers.reshape(readers.size)
    else:
        slots = np.empty(n, np.int32)
        _place(ids, starts, offsets, done, seeds, firsts, shifts, slots)
        chosen = choose_readers(slots, readers, load)
    lost = _assign_servers(ids, starts, offsets, done, seeds, firsts, shifts, chosen, servers, asked, pieces)
    if lost >= 0:
        return lost
    number = np.empty(n, np.int32)
    _choose_rows(ids, servers, starts, offsets, policy, asked, pieces, unique, number, as_rows)
    for s in range(s_n):
        load[s] += asked[s].sum()
    _layout(asked, pieces, unique, as_rows, lines, cuts, features, edges)
    out = _Out(cuts, features, edges, out_ids, out_offsets, out_weights, edge_bag, edge_row, edge_weight)
    _fill(ids, servers, starts, offsets, weights, number, as_rows, out)
    return -1


def split(
    ids: I64, starts: I64, offsets: I64, weights: F32, done: U8, seeds: U64, firsts: I64, shifts: U64, lines: I32,
    readers: I16, load: F64, policy: U8,
) -> Split:  # fmt: skip
    """The `Split` of a request.

    ids int64[n]; weights float32[n] or empty; done uint8[n] (ids to leave out) or empty.
    seeds uint64[F], firsts int64[F], shifts uint64[F]: slot = firsts[f] + (mix64(id ^ seeds[f]) >> shifts[f]).
    lines int32[F, 4]: of each feature, as in a share; the bags are filled in.
    readers int16[slots, C]: servers that can answer for each slot, -1 behind the last. load float64[S] is added to.
    policy uint8[F]: CHOOSE, ROWS or PIECES.
    """
    n, features, s_n = len(ids), len(starts) - 1, len(load)
    weighted = n if len(weights) else 0
    edges = np.empty((2, n), np.int32)
    out = Split(
        -1, np.empty(n, np.int16), np.empty((3, s_n + 1), np.int64), np.empty((s_n, features, 4), np.int32),
        np.empty((s_n, features), np.int32), np.empty(n, np.int64), np.empty(n + s_n, np.int64),
        np.empty(weighted, np.float32), edges[0], edges[1], np.empty(weighted, np.float32),
    )  # fmt: skip
    out.lost = split_into(
        ids, starts, offsets, weights, done, seeds, firsts, shifts, lines, readers, load, policy, out.servers,
        out.starts, out.features, out.edges, out.ids, out.offsets, out.weights, out.edge_bag, out.edge_row,
        out.edge_weight,
    )  # fmt: skip
    return out


def warmup() -> None:
    """Compile this module's kernels, for arguments of the types that a client passes."""
    ids, bounds = np.zeros(1, np.int64), np.array([0, 1], np.int64)
    seeds, firsts, shifts = np.zeros(1, np.uint64), np.zeros(1, np.int64), np.full(1, 63, np.uint64)
    none, done = np.empty(0, np.float32), np.empty(0, np.uint8)
    readers, load, policy = np.zeros((2, 1), np.int16), np.zeros(1), np.zeros(1, np.uint8)
    split(ids, bounds, bounds, none, done, seeds, firsts, shifts, np.zeros((1, 4), np.int32), readers, load, policy)
