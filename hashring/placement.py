"""Placing the slots of a sharded group: even loads, distinct hosts, and no more moved rows than a change asks for.

Owners are int16[slots, copies], each slot's list first and -1 behind it. Two loads are kept apart: *copies* (all
owners) and *primaries* (first in the list). Changing who is first moves no rows.

What every server should hold (`Sites.fair`) is the same for all, unless distinct hosts forbid it: a host holds at most
one copy of each slot while there are enough hosts, so the servers of a big host may hold less than others. A server
that joins takes its fair share from those above theirs; the slots of a leaver go to those below. Both come out within
one slot of the fair share: sharing each slot's copies out in fractions would, and a flow rounds that to whole numbers
(`flow.settle`). The exception is a host with a copy of nearly every slot: few slots can go to or from it, and loads
may stay uneven until `spread`. Which slots go is chosen so that each keeps its owners in different teams (teams.py),
and else by the ring, by `distances`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.flow import gather, offers, rooms, settle
from hashring.teams import CLASH, NEVER, members, teams, untangle

Owners = NDArray[np.int16]
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sites:
    """Where servers 0..k-1 stand: hosts and zones by name ("" = no zone given), and which may be given slots."""

    hosts: tuple[str, ...]
    zones: tuple[str, ...]
    usable: NDArray[np.bool_]

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """int64[2, k]: number of each server's host, and of its zone. A host without a zone is a zone of its own."""
        zone_of = {host: (zone, "" if zone else host) for host, zone in zip(self.hosts, self.zones, strict=True)}
        hosts = {host: i for i, host in enumerate(zone_of)}
        zones = {zone: i for i, zone in enumerate(dict.fromkeys(zone_of.values()))}
        return np.array([[hosts[h] for h in self.hosts], [zones[zone_of[h]] for h in self.hosts]], np.int64)

    @cached_property
    def servers(self) -> list[int]:
        """The usable ones."""
        return np.flatnonzero(self.usable).tolist()

    def only(self, servers: Sequence[int]) -> "Sites":
        """The same places, with only these servers usable."""
        usable = np.zeros_like(self.usable)
        usable[list(servers)] = True
        sites = Sites(self.hosts, self.zones, usable)
        sites.__dict__["places"] = self.places
        return sites

    def clash(self, server: int, others: Sequence[int]) -> int:
        """Owners that share this server's host, counted double, and its zone."""
        shared = [
            (self.places[0, o] == self.places[0, server], self.places[1, o] == self.places[1, server]) for o in others
        ]
        return sum(2 * bool(host) + bool(zone) for host, zone in shared)

    def _sizes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Usable servers of each host, and the zone of each such host."""
        size: dict[int, int] = {}
        zone: dict[int, int] = {}
        for s in self.servers:
            host = int(self.places[0, s])
            size[host] = size.get(host, 0) + 1
            zone[host] = int(self.places[1, s])
        return size, zone

    def limits(self, copies: int) -> NDArray[np.int64]:
        """int64[2]: how many owners of one slot may share a host, and a zone: 1 each where there are enough of them."""
        size, zone = self._sizes()
        host_max = 1
        while sum(min(n, host_max) for n in size.values()) < copies:
            host_max += 1
        inside: dict[int, int] = {}
        for host, n in size.items():
            inside[zone[host]] = inside.get(zone[host], 0) + min(n, host_max)
        zone_max = 1
        while sum(min(n, zone_max) for n in inside.values()) < copies:
            zone_max += 1
        return np.array([host_max, zone_max])

    def fair(self, slots: int, copies: int) -> NDArray[np.float64]:
        """float64[k]: the copies each usable server should hold, as even as `limits` allows (water-filling)."""
        size, zone = self._sizes()
        host_max, zone_max = self.limits(copies).tolist()
        share: dict[int, float] = {}  # of whole hosts, for those at a limit
        left, open_hosts = float(slots * copies), dict(size)
        while True:
            level = left / sum(open_hosts.values()) if open_hosts else 0.0
            full = [h for h, n in open_hosts.items() if n * level > slots * min(n, host_max) + _ROUNDING]
            for host in full:
                share[host] = float(slots * min(open_hosts.pop(host), host_max))
                left -= share[host]
            if full:
                continue
            zones: dict[int, float] = {}
            for host in size:
                zones[zone[host]] = zones.get(zone[host], 0.0) + share.get(host, open_hosts.get(host, 0) * level)
            crowded = [z for z, load in zones.items() if load > slots * zone_max + _ROUNDING]
            if not crowded:
                break
            for z in crowded:
                hosts = [h for h in size if zone[h] == z]
                left += sum(share.pop(h, 0.0) for h in hosts) - slots * zone_max
                share |= _pour(slots, slots * zone_max, {h: size[h] for h in hosts}, host_max)
                for h in hosts:
                    open_hosts.pop(h, None)
        level = left / sum(open_hosts.values()) if open_hosts else 0.0
        out = np.zeros(len(self.hosts))
        for s in self.servers:
            host = int(self.places[0, s])
            out[s] = share[host] / size[host] if host in share else level
        return out


def _pour(slots: int, total: float, size: dict[int, int], host_max: int) -> dict[int, float]:
    """Share `total` copies among the hosts of one zone, evenly by server, none above its limit."""
    share: dict[int, float] = {}
    rest = dict(size)
    while rest:
        level = (total - sum(share.values())) / sum(rest.values())
        full = [h for h, n in rest.items() if n * level > slots * min(n, host_max) + _ROUNDING]
        for host in full or list(rest):
            n = rest.pop(host)
            share[host] = float(slots * min(n, host_max)) if full else n * level
    return share


def _loads(owners: Owners, live: NDArray[np.bool_], k: int) -> NDArray[np.int64]:
    listed = owners[live]
    return np.bincount(listed[listed >= 0], minlength=k)


def _bounds(wanted: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole numbers around what is wanted, at least 0."""
    low = np.maximum(np.floor(wanted + _ROUNDING), 0).astype(np.int64)
    return low, np.maximum(np.ceil(wanted - _ROUNDING), low).astype(np.int64)


def _wide(owners: Owners, copies: int) -> Owners:
    """A copy with at least this many columns."""
    out = np.full((len(owners), max(copies, owners.shape[1])), -1, np.int16)
    out[:, : owners.shape[1]] = owners
    return out


def without(owners: Owners, gone: NDArray[np.bool_], where: NDArray[np.bool_]) -> Owners:
    """The lists `where` it is True without the servers `gone`; the next in line moves up."""
    vacant = (owners < 0) | (gone[owners] & where[:, None])
    order = np.argsort(vacant, axis=1, kind="stable")
    return np.take_along_axis(np.where(vacant, np.int16(-1), owners), order, axis=1)


def fresh(slots: int, sites: Sites, distances: NDArray[np.int32], copies: int) -> Owners:
    """Owners of slots that have none: as if the servers had joined one by one, so that one mechanism places all."""
    live = np.ones(slots, np.bool_)
    order = _apart_first(sites)
    in_turn = (np.arange(slots)[:, None] + np.arange(copies)) % copies  # `join` counts on even primaries
    owners = np.array(order[:copies], np.int16)[in_turn]
    for count in range(copies, len(order)):
        owners = join(owners, order[count], sites.only(order[: count + 1]), distances, copies, live)
    owners = untangle(owners, teams(owners, live, sites.usable, copies), partial(_over, sites=sites, copies=copies))
    for _ in range(3):  # nothing lies there yet: all may move
        if excess(owners, sites, copies, live) > (0, 0):
            owners = spread(owners, sites, distances, copies, live)
    return _gathered(owners, sites, distances, live)


def _apart_first(sites: Sites) -> list[int]:
    """The servers in an order whose every beginning spans as many zones and hosts as it can."""
    seen = np.zeros((2, len(sites.hosts)), np.int64)
    rest, order = list(sites.servers), []
    while rest:
        nearest = min(rest, key=lambda s: (seen[1, sites.places[1, s]], seen[0, sites.places[0, s]], s))
        rest.remove(nearest)
        order.append(nearest)
        seen[0, sites.places[0, nearest]] += 1
        seen[1, sites.places[1, nearest]] += 1
    return order


def join(
    owners: Owners, newcomer: int, sites: Sites, distances: NDArray[np.int32], copies: int, live: NDArray[np.bool_]
) -> Owners:
    """The newcomer's fair share: first of places that nobody holds, then from the servers that are above theirs.

    Nothing moves between the others. Slots go first that have two owners on one host, or in one team, and would not
    then; else of every primary as many, for it is primaries that copy them, and of its slots those that the ring puts
    nearest to the newcomer, from the owners that it puts farthest.
    """
    owners = _wide(owners, copies)
    slots, k = len(owners), len(sites.hosts)
    fair = sites.fair(int(live.sum()), copies)
    limits = sites.limits(copies)
    goal = int(fair[newcomer] + _ROUNDING) - int(_loads(owners, live, k)[newcomer])
    nearness = distances[:, newcomer]

    vacant = np.flatnonzero(live & (owners[:, copies - 1] < 0) & ~(owners == newcomer).any(axis=1))
    if len(vacant):
        free = np.full((len(vacant), k), -1, np.int16)
        rooms(owners[vacant], sites.usable, sites.places, limits, free)
        vacant = vacant[free[:, newcomer] >= 0]
        filled = vacant[np.argsort(nearness[vacant], kind="stable")[: max(0, goal)]]
        owners[filled, (owners[filled] >= 0).sum(axis=1)] = newcomer
        goal -= len(filled)

    options = np.full((slots, owners.shape[1] + 1), -1, np.int16)
    must = np.zeros(slots, np.bool_)
    offers(owners, live, newcomer, sites.places, limits, options[:, :-1], must)
    options[~must, -1] = k  # "nobody gives" is the server k
    willing = np.flatnonzero((options[:, :-1] >= 0).any(axis=1))
    goal = min(len(willing), max(goal, int(must.sum())))
    if goal <= 0:
        return owners
    gifts = _gifts(owners, options[:, :-1], newcomer, distances, teams(owners, live, sites.usable, copies))
    best = gifts.min(axis=1)
    apart = -(-best // CLASH)  # without the distance
    rank = _rank_of((nearness, apart, ~must), owners[:, 0])
    choice = np.full(slots, k, np.int64)
    givers = willing[np.lexsort((rank[willing], apart[willing], ~must[willing]))][:goal]
    choice[givers] = options[givers, gifts[givers].argmin(axis=1)]
    costs = np.empty(options.shape, np.int32)
    costs[:, :-1] = rank[:, None] + gifts
    costs[:, -1] = -rank  # to keep after all: last in turn
    surplus = _loads(owners, live, k) - fair
    low, high = _bounds(surplus)
    settle(choice, options, costs, np.append(low, slots - goal), np.append(high, slots - goal))
    moved = choice < k
    owners[moved[:, None] & (owners == choice[:, None])] = newcomer
    return owners


def _rank_of(keys: tuple[NDArray[Any], ...], primaries: NDArray[np.int16]) -> NDArray[np.int32]:
    """int32[slots]: how many slots of the same primary come before each, by the last of the keys first."""
    order = np.lexsort((*keys, primaries))
    sorted_primaries = primaries[order]
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order)) - np.searchsorted(sorted_primaries, sorted_primaries)
    return rank


def _crowded(owners: Owners, team: NDArray[np.int8]) -> NDArray[np.int32]:
    """int32[slots, k]: what it costs that a server becomes an owner, by the owner that its team has already."""
    return np.where(members(owners, team)[:, team] > 0, np.int32(CLASH), np.int32(0))


def _gifts(
    owners: Owners, givers: Owners, newcomer: int, distances: NDArray[np.int32], team: NDArray[np.int8]
) -> NDArray[np.int32]:
    """int32[slots, c]: what it costs that this giver's place becomes the newcomer's: by how many more or fewer owners
    are not alone in their team then, and less if the giver is far on the ring."""
    held, theirs, mine = members(owners, team), team[givers], team[newcomer]
    leaves_alone = np.take_along_axis(held, theirs.astype(np.int64), axis=1) > 1
    worse = np.where(theirs == mine, 0, (held[:, [mine]] > 0).astype(np.int32) - leaves_alone)
    far = np.take_along_axis(distances, np.maximum(givers, 0), axis=1)
    return np.where(givers >= 0, worse * np.int32(CLASH) - far, np.int32(NEVER))


def fill(owners: Owners, sites: Sites, distances: NDArray[np.int32], copies: int, live: NDArray[np.bool_]) -> Owners:
    """Give live slots with fewer than `copies` owners more of them, from the servers below their fair share."""
    owners = _wide(owners, copies)
    k = len(sites.hosts)
    fair, limits = sites.fair(int(live.sum()), copies), sites.limits(copies)
    team = teams(owners, live, sites.usable, copies)
    while True:
        short = np.flatnonzero(live & (owners[:, copies - 1] < 0))
        if not len(short):
            return owners
        options = np.full((len(short), k), -1, np.int16)
        rooms(owners[short], sites.usable, sites.places, limits, options)
        wanted = np.maximum(fair - _loads(owners, live, k), 0)
        wanted *= min(1.0, len(short) / max(1.0, wanted.sum()))
        costs = distances[short] + _crowded(owners[short], team)
        choice = np.where(options >= 0, costs, np.iinfo(np.int32).max).argmin(axis=1)
        settle(choice, options, costs, *_bounds(wanted))
        owners[short, (owners[short] >= 0).sum(axis=1)] = choice


def shed(owners: Owners, sites: Sites, distances: NDArray[np.int32], copies: int, live: NDArray[np.bool_]) -> Owners:
    """Take owners from live slots with more than `copies`: where two share a host, one of them; else whoever is above
    the fair share, and far on the ring."""
    k = len(sites.hosts)
    while owners.shape[1] > copies and len(over := np.flatnonzero(live & (owners[:, copies] >= 0))):
        options = owners[over]
        shared = sum(
            weight * (sites.places[kind][options][:, :, None] == sites.places[kind][options][:, None, :])
            * ((options >= 0)[:, :, None] & (options >= 0)[:, None, :])
            for kind, weight in ((0, 2), (1, 1))
        ).sum(axis=2)  # fmt: skip
        options = np.where((options >= 0) & (shared == shared.max(axis=1, keepdims=True)), options, np.int16(-1))
        costs = -np.take_along_axis(distances[over], np.maximum(options, 0), axis=1)
        choice = np.take_along_axis(
            options, np.where(options >= 0, costs, 1).argmin(axis=1)[:, None], axis=1
        )[:, 0].astype(np.int64)  # fmt: skip
        wanted = np.maximum(_loads(owners, live, k) - sites.fair(int(live.sum()), copies), 0)
        wanted *= len(over) / max(1.0, wanted.sum())
        settle(choice, options, costs, *_bounds(wanted))
        gone = np.full(len(owners), -1)
        gone[over] = choice
        left = np.where(owners == gone[:, None], np.int16(-1), owners)
        order = np.argsort(left < 0, axis=1, kind="stable")
        owners = np.take_along_axis(left, order, axis=1)
    return owners


def excess(owners: Owners, sites: Sites, copies: int, live: NDArray[np.bool_]) -> tuple[int, float]:
    """How far live slots are from what they should be: owners that share a host or zone beyond the limits, and copies
    beyond one slot of the servers' fair shares."""
    over = int(_over(owners[live], sites, copies).sum())
    loads = _loads(owners, live, len(sites.hosts))
    off = np.abs(loads - sites.fair(int(live.sum()), copies))[sites.usable] - 1
    return over, float(np.round(np.maximum(off, 0).sum(), 6))


def _over(owners: Owners, sites: Sites, copies: int) -> NDArray[np.int64]:
    """int64[slots]: owners that share a host or zone beyond the limits."""
    limits, over = sites.limits(copies), np.zeros(len(owners), np.int64)
    for kind in range(2):
        places = np.where(owners >= 0, sites.places[kind][owners], -1)
        for c in range(1, owners.shape[1]):
            same = (places[:, :c] == places[:, c : c + 1]).sum(axis=1)
            over += (same >= limits[kind]) & (owners[:, c] >= 0)
    return over


def spread(owners: Owners, sites: Sites, distances: NDArray[np.int32], copies: int, live: NDArray[np.bool_]) -> Owners:
    """Every copy in place and every load fair, whatever it was; slots may go from any server to any other.

    One column after another (that of primaries last), each with the others as they are, so that a copy that cannot go
    where it is missing goes by way of a third server.
    """
    owners = fill(owners, sites, distances, copies, live)
    k, rows = len(sites.hosts), np.flatnonzero(live)
    fair, limits = sites.fair(len(rows), copies), sites.limits(copies)
    team = teams(owners, live, sites.usable, copies)
    for column in reversed(range(copies)):
        others = owners[rows]
        others[:, column] = -1
        costs = distances[rows] + _crowded(others, team)
        options = np.full((len(rows), k), -1, np.int16)
        rooms(others, sites.usable, sites.places, limits, options)
        choice = owners[rows, column].astype(np.int64)
        stays = options[np.arange(len(rows)), choice] >= 0
        nearest = np.where(options >= 0, costs, np.iinfo(np.int32).max).argmin(axis=1)
        choice = np.where(stays, choice, nearest)
        settle(choice, options, costs, *_bounds(fair - np.bincount(others[others >= 0], minlength=k)))
        owners[rows, column] = choice
    return owners


def even_primaries(owners: Owners, sites: Sites, distances: NDArray[np.int32], live: NDArray[np.bool_]) -> Owners:
    """The same owners with the first places shared out evenly: between the whole numbers around slots / servers.

    As they are where they cannot be more even; else see `_gathered`, which changes more of them than it must for that.
    """
    return min(owners, _gathered(owners, sites, distances, live), key=lambda o: _unevenness(o, live, len(sites.hosts)))


def _unevenness(owners: Owners, live: NDArray[np.bool_], k: int) -> int:
    first = owners[live, 0]
    return int((np.bincount(first[first >= 0], minlength=k) ** 2).sum())


def _gathered(owners: Owners, sites: Sites, distances: NDArray[np.int32], live: NDArray[np.bool_]) -> Owners:
    """First places shared out evenly, and slots that have the same owners with one primary as far as that allows.

    A push sends a message for every two servers of which one is primary, and the other not, of any slot in it: half as
    many as if both were primaries.
    """
    rows = np.flatnonzero(live & (owners[:, 0] >= 0))
    if owners.shape[1] == 1 or not len(rows):
        return owners
    options = owners[rows]
    choice = options[:, 0].astype(np.int64)
    share = np.where(sites.usable, len(rows) / len(sites.servers), 0.0)
    together = -np.sort(-options, axis=1)
    gather(choice, together, np.lexsort(together.T), share.max())
    costs = np.take_along_axis(distances[rows], np.maximum(options, 0), axis=1)
    costs[:, 0] -= CLASH  # who was gathered elsewhere goes back first
    settle(choice, options, costs, *_bounds(share))
    owners = owners.copy()
    place = (options == choice[:, None]).argmax(axis=1)
    owners[rows, place] = owners[rows, 0]
    owners[rows, 0] = choice
    return owners
