"""Restoring a checkpoint, as changes of the view. Pure: a view and a manifest's tables in, two views out.

Slots that are being restored stay *lost* until every row of theirs is back: nobody is ever answered from half of them.

  1. Into a cluster without tables: a first view makes the tables, their slots owned by a dead server of no process,
     hence lost. Into the cluster that the checkpoint is of, where slots were lost: there is nothing to do first.
  2. The future owners absorb the blocks. A view does not name them yet, so they answer for none of it.
  3. A second view recovers the lost slots. Its epoch, and with it their term, is above all in the cluster and in
     the checkpoint, so that no position is ever used twice. It is planned from what is the newest view by then: other
     slots may have changed owners meanwhile.

Whatever happens before the third step leaves the slots lost, and the restore can be begun again.

Slots that begin anew have one owner, whose copies are then made as after a failure: of two, one might still hold an
older copy of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hashring.planner import CreateTable, PlanError, Reassign, Recover, plan
from hashring.view import Group, Server, Table, View
from ps.errors import RequestError


@dataclass(frozen=True)
class Restore:
    """first: the view to install before the rows are sent, or None. final: what is to be after, if nothing changes.

    slots: [first in the checkpoint, first here, count] of each group. tables: number in the checkpoint -> here; rows
    of other tables are left out. wanted: numbers (here) of the slots that rows are taken for. term_max: the highest
    term in the checkpoint.
    """

    first: View | None
    final: View
    slots: list[list[int]]
    tables: dict[int, int]
    wanted: list[int]
    term_max: int


def prepare(view: View, manifest: Mapping[str, Any], *, replace_tables: bool, accept_loss: bool) -> Restore:
    """Plan a restore. Raises RequestError, in one sentence, where the checkpoint does not fit.

    manifest: cluster, term_max, tables and groups of a checkpoint (ps.checkpoint.files.Manifest).
    """
    groups = {g.number: g for g in view.groups}
    known = [[number, first] for number, _, _, first, _ in manifest["groups"]]
    own = manifest["cluster"] == view.cluster and all(n in groups and groups[n].first == f for n, f in known)
    if own and view.lost().any() and not replace_tables:
        return _lost(view, manifest, accept_loss)
    if view.tables and not replace_tables:
        names = ", ".join(sorted(t.name for t in view.tables)[:10])
        raise RequestError(
            f"the cluster has tables ({names}) and none of this checkpoint's slots is lost: "
            "restore into an empty cluster, or say --replace to drop its tables"
        )
    return _afresh(view, manifest)


def told(restore: Restore) -> dict[str, Any]:
    """What whoever carries the rows must know: plain data.

    slots and tables as in `Restore`, tables as pairs. owners: int16 of each slot here, as bytes; an index into servers
    ([name, incarnation, host, zone, addresses] each), -1 where rows are not wanted.
    """
    final = restore.final
    owners = np.full(final.slots_total, -1, "<i2")
    wanted = np.array(restore.wanted, np.int64)
    owners[wanted] = final.owners()[wanted, 0]
    return {
        "cluster": final.cluster,
        "slots": restore.slots,
        "tables": [[there, here] for there, here in restore.tables.items()],
        "owners": owners.tobytes(),
        "servers": [[s.name, s.incarnation, s.host, s.zone, list(s.addresses)] for s in final.servers],
    }


def _lost(view: View, manifest: Mapping[str, Any], accept_loss: bool) -> Restore:
    """Lost slots of the very cluster that the checkpoint is of: rows of the other slots stay as they are."""
    saved = {number for number, _, _, _ in manifest["tables"]}
    lost = view.lost()
    missing = [t.name for t in view.tables if t.number not in saved and _any_lost(view.group(t.group), lost)]
    if missing and not accept_loss:
        raise RequestError(
            f"the checkpoint has no table {missing[0]!r}, whose rows in lost slots would be gone: "
            "choose a newer one, or say --accept-loss"
        )
    final = _above(recovered(view), manifest["term_max"])
    tables = {t.number: t.number for t in view.tables if t.number in saved}
    slots = [[first, first, count] for _, _, _, first, count in manifest["groups"]]
    return Restore(None, final, slots, tables, np.flatnonzero(lost).tolist(), manifest["term_max"])


def conclude(view: View, restore: Restore) -> View:
    """The view that ends a restore, from the present one. Raises RequestError where what was planned cannot be."""
    wanted = np.array(restore.wanted, np.int64)
    index = {s.incarnation: i for i, s in enumerate(view.servers) if s.alive}
    here = np.array([index.get(s.incarnation, -1) for s in restore.final.servers] + [-1], np.int16)
    owners = here[restore.final.owners()[wanted, :1]]
    if (owners < 0).any() or not view.lost()[wanted].all():
        raise RequestError(
            "a server that rows were sent to has died, or tables were dropped, during the restore: "
            "its slots stay lost, restore again"
        )
    return _above(_planned(view, Reassign(wanted, owners)), restore.term_max)


def recovered(view: View) -> View:
    """The view with every lost slot given to one living server. Raises RequestError where none lives."""
    after, lost = _planned(view, Recover()), view.lost()
    groups = []
    for group in after.groups:
        owners = group.owners.copy()
        owners[lost[group.first : group.first + group.slots], 1:] = -1
        groups.append(replace(group, owners=owners))
    return replace(after, groups=tuple(groups)).check()


def _any_lost(group: Group, lost: np.ndarray) -> bool:
    return bool(lost[group.first : group.first + group.slots].any())


def _afresh(view: View, manifest: Mapping[str, Any]) -> Restore:
    """All of a checkpoint into a cluster whose tables, if it has any, are dropped."""
    made = replace(view, tables=(), groups=())
    for _, name, _, spec in sorted(manifest["tables"], key=lambda entry: entry[0]):
        made = _planned(made, CreateTable(name, spec, spec["placement"], spec["replicas"]))
    epoch = view.epoch + 1
    nobody = Server(f"restore~{epoch}", 0, "", alive=False)
    hidden = tuple(
        replace(g, owners=np.full((g.slots, 1), len(made.servers), np.int16), terms=np.full(g.slots, epoch))
        for g in made.groups
    )
    first = replace(made, epoch=epoch, servers=(*made.servers, nobody), groups=hidden).check()
    final = _above(recovered(first), manifest["term_max"]) if first.groups else _empty(first)
    numbers = {name: number for number, name, _, _ in manifest["tables"]}
    tables = {numbers[t.name]: t.number for t in first.tables}
    starts = {number: first_slot for number, _, _, first_slot, _ in manifest["groups"]}
    home = {number: group for number, _, group, _ in manifest["tables"]}
    slots = [[starts[home[numbers[t.name]]], *_place(first, t)] for t in first.tables]
    unique = [list(entry) for entry in sorted({tuple(entry) for entry in slots})]
    return Restore(first, final, unique, tables, np.flatnonzero(first.lost()).tolist(), manifest["term_max"])


def _place(view: View, table: Table) -> list[int]:
    group = view.group(table.group)
    return [group.first, group.slots]


def _empty(first: View) -> View:
    """After the restore of a checkpoint without tables."""
    servers = tuple(s for s in first.servers if s.alive or "~" not in s.name)
    return replace(first, epoch=first.epoch + 1, servers=servers)


def _above(view: View, term_max: int) -> View:
    """The view with its epoch, and the terms that it opened, above `term_max`."""
    epoch = max(view.epoch, term_max + 1)
    groups = tuple(replace(g, terms=np.where(g.terms == view.epoch, epoch, g.terms)) for g in view.groups)
    return replace(view, epoch=epoch, groups=groups).check()


def _planned(view: View, change: CreateTable | Recover | Reassign) -> View:
    try:
        return plan(view, change)
    except PlanError as error:
        raise RequestError(str(error)) from None
