"""A view laid out for placement: what a change, or the goal of a view, is worked out on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.placement import Owners, Sites, even_primaries, without
from hashring.ring import distances
from hashring.view import Group, View
from hashring.whole import WholeTables


class Desk:
    """Sites, distances, and the owners of every group, to be replaced.

    gone bool[k + 1] (the last is for "no owner"): servers that are off every list and are given nothing; `where`
    bool[slots_total]: only there, if given.
    """

    def __init__(
        self, view: View, gone: NDArray[np.bool_] | None = None, where: NDArray[np.bool_] | None = None
    ) -> None:
        self.view = view
        servers = view.servers
        self.gone = np.zeros(len(servers) + 1, np.bool_) if gone is None else gone
        usable = np.array([s.alive for s in servers], np.bool_) & ~self.gone[:-1]
        self.sites = Sites(tuple(s.host for s in servers), tuple(s.zone for s in servers), usable)
        self.distances = distances([s.name for s in servers], 2**view.slot_bits)
        self.whole_groups = [g for g in view.groups if g.placement == "whole"]
        where = np.ones(view.slots_total, np.bool_) if where is None else where
        self.owners = {g.number: without(g.owners, self.gone, where[g.first : g.first + g.slots]) for g in view.groups}

    def sharded(self) -> list[Group]:
        """The sharded groups, as the view has them."""
        return [g for g in self.view.groups if g.placement == "sharded"]

    def copies(self, group: Group) -> int:
        """Owners that each slot of the group should have, with the servers there are."""
        there = len(self.sites.servers)
        return there if group.replicas == "all" else min(group.replicas, there)

    def of(self, group: Group) -> dict[str, Any]:
        """What the functions of placement.py take: a slot whose only owner is dead, and not gone, is not live."""
        owners = self.owners[group.number]
        first = owners[:, 0]
        live = (first < 0) | self.sites.usable[first]
        return {
            "owners": owners,
            "sites": self.sites,
            "distances": self.distances,
            "copies": self.copies(group),
            "live": live,
        }

    def whole(self, groups: Sequence[Group] | None = None) -> WholeTables:
        """The whole tables; each stands on the ring where its group's number hashes to, so that equals are spread."""
        groups = self.whole_groups if groups is None else groups
        rows = [self._row(g) for g in groups]
        slots = [(g.number * 0x9E3779B1 % 2**32) * len(self.distances) >> 32 for g in groups]
        return WholeTables(rows, [float(g.weights[0]) for g in groups], self.sites, self.distances[slots])

    def _row(self, group: Group) -> list[int]:
        """The owners of a whole table. While its slots come together, those who own most of them; to whom the others
        go only makes them more so."""
        owners = self.owners[group.number]
        if (owners == owners[0]).all():
            return [s for s in owners[0].tolist() if s >= 0]
        counts = np.bincount(owners[owners >= 0], minlength=len(self.sites.hosts))
        most = [s for s in np.argsort(-counts, kind="stable").tolist() if counts[s] and self.sites.usable[s]]
        row: list[int] = []
        while most and len(row) < self.copies(group):
            row.append(min(most, key=lambda s: (self.sites.clash(s, row), most.index(s))))
            most.remove(row[-1])
        return row

    def give(self, group: Group, row: list[int], which: NDArray[np.bool_] | None = None) -> None:
        """Slots of a group (all, or which bool[slots]) get the same owners."""
        before = self.owners[group.number]
        owners = np.full((group.slots, max(len(row), before.shape[1], 1)), -1, np.int16)
        owners[:, : before.shape[1]] = before
        some = np.ones(group.slots, np.bool_) if which is None else which
        owners[some] = -1
        owners[some, : len(row)] = row
        self.owners[group.number] = owners

    def done(self) -> View:
        """The view with the owners as they are now, first places shared out evenly."""
        level = [g for g in self.whole_groups if (self.owners[g.number] == self.owners[g.number][0]).all()]
        whole = self.whole(level)
        whole.even_primaries()
        for group, row in zip(level, whole.rows, strict=True):
            self.give(group, row)
        for group in self.sharded():
            rows = self.of(group)
            del rows["copies"]
            self.owners[group.number] = even_primaries(**rows)
        groups = tuple(replace(g, owners=trimmed(self.owners[g.number])) for g in self.view.groups)
        return replace(self.view, groups=groups)


def trimmed(owners: Owners) -> Owners:
    """Without the columns at the end in which no slot has an owner; one is kept."""
    used = int((owners >= 0).any(axis=0).sum())
    return owners[:, : max(1, used)]
