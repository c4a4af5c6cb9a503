"""Restoring a checkpoint, as changes of the view. Pure: a view and a manifest's tables in, two views out.

Slots that are being restored stay *lost* until every row of theirs is back: nobody is ever answered from half of them.

  1. Into a cluster without tables: a first view makes the tables, their slots owned by a dead server of no process,
     hence lost. Into the cluster that the checkpoint is of, or one that was restored from it, where slots were lost: it
     begins a new term of those.
  2. The future owners absorb the blocks, while their view has the slots lost and in the term of the first view: what
     comes late, of this restore or one before it, is not taken. No view names them yet, so they answer for none of it.
  3. A second view recovers the lost slots. Its epoch, and with it their term, is above all in the cluster and in
     the checkpoint, so that no position is ever used twice. It is planned from what is the newest view by then: other
     slots may have changed owners meanwhile.

Some tables alone come *beside* what runs: under hidden names, in slots of their own, and the last view gives them
their names; a table of the same name serves until then, and is dropped by that view.

Whatever happens before the third step leaves the slots lost, and the restore can be begun again.

Slots that begin anew have one owner, whose copies are then made as after a failure: of two, one might still hold an
older copy of its own.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hashring.planner import CreateTable, DropTable, PlanError, Reassign, Recover, Renew, plan
from hashring.tables import any_lost
from hashring.view import Server, View
from ps.checkpoint.hidden import hidden, hidden_name, missed, nobody
from ps.errors import RequestError
from ps.spec import TableSpec


@dataclass(frozen=True)
class Restore:
    """first: the view to install before the rows are sent, above every term in the checkpoint: whatever becomes of the
    slots later, it begins above what was taken. final: what is to be after, if nothing changes.

    slots: [first in the checkpoint, first here, count] of each group. tables: number in the checkpoint -> here; rows
    of other tables are left out. wanted: numbers (here) of the slots that rows are taken for. renames: hidden name ->
    the table's own.
    """

    first: View
    final: View
    slots: list[list[int]]
    tables: dict[int, int]
    wanted: list[int]
    renames: Mapping[str, str] = field(default_factory=dict)


def prepare(
    view: View,
    manifest: Mapping[str, Any],
    *,
    replace_tables: bool,
    accept_loss: bool,
    tables: Sequence[str] = (),
    same_tables: bool = False,
) -> Restore:
    """Plan a restore. Raises RequestError, in one sentence, where the checkpoint does not fit.

    manifest: cluster, term_max, tables and groups of a checkpoint (ps.checkpoint.manifest). tables: only these,
    beside whatever else there is. same_tables: of this cluster's checkpoint no tables that were dropped since, and
    made again under their names: a restore may have made them, or somebody who begins anew.
    """
    if tables:
        return _beside(view, manifest, tables, replace_tables)
    groups = {g.number: g for g in view.groups}
    known = [[number, first] for number, _, _, first, _ in manifest["groups"]]
    # Numbers of groups are never used again: one that is gone was dropped with its tables since, and nobody misses it.
    own = manifest["cluster"] == view.cluster and all(n not in groups or groups[n].first == f for n, f in known)
    if missed(view).any() and not replace_tables:
        fit = _own(view, manifest) if own else NOTHING
        if not (own and same_tables):
            fit = _alike(view, manifest, fit)
        if own or fit[0]:
            return _lost(view, manifest, accept_loss, *fit)
    if view.tables and not replace_tables:
        raise RequestError(_occupied(view))
    return _afresh(view, manifest)


def _occupied(view: View) -> str:
    """Why a checkpoint cannot be restored into the cluster, and what can be done."""
    hides = hidden(view)
    left = sorted(t.name for t in view.tables if hides[view.group(t.group).first])
    names = ", ".join(sorted(t.name for t in view.tables)[:10])
    why = "none of this checkpoint's slots is lost"
    if missed(view).any():
        why = "lost slots, but the checkpoint has none of the same name, dim, seed, optimizer and number of slots"
    cure = "restore into an empty cluster, choose tables with --table, or say --replace to drop the cluster's"
    tidy = f"; {', '.join(left[:10])} is of a restore that has not ended: drop it if that was killed" if left else ""
    return f"the cluster has tables ({names}) and {why}: {cure}{tidy}"


def told(restore: Restore) -> dict[str, Any]:
    """What whoever carries the rows must know: plain data.

    slots and tables as in `Restore`, tables as pairs. owners: int16 of each slot in `slots`, in their order, packed by
    zlib, since it travels in the header of a frame; an index into servers ([name, incarnation, host, zone, addresses]
    each), -1 where rows are not wanted. term: that of the slots meanwhile. hidden: names of tables that must not stay
    if it fails.
    """
    final = restore.final
    owners = np.full(final.slots_total, -1, "<i2")
    wanted = np.array(restore.wanted, np.int64)
    owners[wanted] = final.owners()[wanted, 0]
    return {
        "cluster": final.cluster,
        "term": restore.first.epoch,
        "slots": restore.slots,
        "tables": [[there, here] for there, here in restore.tables.items()],
        "hidden": list(restore.renames),
        "owners": zlib.compress(b"".join(owners[first : first + count].tobytes() for _, first, count in restore.slots)),
        "servers": [[s.name, s.incarnation, s.host, s.zone, list(s.addresses)] for s in final.servers],
    }


Fit = tuple[dict[int, int], list[list[int]]]
"""The tables of a checkpoint that a view has, and their slots, as in `Restore`."""

NOTHING: Fit = ({}, [])


def _own(view: View, manifest: Mapping[str, Any]) -> Fit:
    """Of the very cluster that the checkpoint is of."""
    group_of = {t.number: t.group for t in view.tables}
    saved = {number for number, _, group, _ in manifest["tables"] if group_of.get(number) == group}
    here = {g.number for g in view.groups}
    slots = [[first, first, count] for number, _, _, first, count in manifest["groups"] if number in here]
    return {n: n for n in saved}, slots


def _alike(view: View, manifest: Mapping[str, Any], known: Fit) -> Fit:
    """Those that are known, and others of the same name and specification, in as many slots: such are those of another
    cluster that was restored from the checkpoint, or of this one, if they were dropped for a restore."""
    places = {number: (first, count) for number, _, _, first, count in manifest["groups"]}
    used, filled = ({entry[at] for entry in known[1]} for at in (0, 1))  # what is told knows one place of each slot
    tables, groups = dict[int, int](), dict[int, int]()
    for number, name, there, spec in manifest["tables"]:
        table = view.table(name)
        if table is None or places[there][0] in used or view.group(table.group).first in filled:
            continue
        if places[there][1] != view.group(table.group).slots or _fixed(spec) != _fixed(table.spec):
            continue
        taken = table.group in groups.values() and groups.get(there) != table.group  # no slot is filled from two
        if not taken and groups.setdefault(there, table.group) == table.group:
            tables[number] = table.number
    slots = [[places[there][0], view.group(here).first, places[there][1]] for there, here in groups.items()]
    return {**known[0], **tables}, known[1] + slots


def _fixed(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a table's specification nobody can alter (ps.controller.admin): it decides where rows lie and what is in
    them."""
    return spec.get("dim"), spec.get("seed"), (spec.get("optimizer") or {}).get("kind")


def _lost(
    view: View, manifest: Mapping[str, Any], accept_loss: bool, tables: dict[int, int], slots: list[list[int]]
) -> Restore:
    """Lost slots alone: rows of the other slots stay as they are, and tables that another restore hides."""
    saved, lost = set(tables.values()), missed(view)
    missing = [t.name for t in view.tables if t.number not in saved and any_lost(view.group(t.group), lost)]
    if missing and not accept_loss:
        known = missing[0] in {name for _, name, _, _ in manifest["tables"]}
        has = "has other slots, or an earlier state, of" if known else "has no"
        raise RequestError(
            f"the checkpoint {has} table {missing[0]!r}, whose rows in lost slots would be gone: "
            "choose a newer one, or say --accept-loss"
        )
    first = _above(_planned(view, Renew(np.flatnonzero(lost))), manifest["term_max"])
    return Restore(first, recovered(first), slots, tables, np.flatnonzero(lost).tolist())


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
    if (view.terms()[wanted] != restore.first.epoch).any():
        raise RequestError("another restore of the same slots has begun since: they stay lost, restore again")
    return _renamed(_planned(view, Reassign(wanted, owners)), restore.renames)


def receivers(view: View, restore: Restore) -> set[str]:
    """Names of the servers that rows are sent to, while the restore can still end: whoever leaves, dooms it."""
    wanted = np.array(restore.wanted, np.int64)
    waiting = view.lost()[wanted] & (view.terms()[wanted] == restore.first.epoch)
    planned = {restore.final.servers[i].incarnation for i in np.unique(restore.final.owners()[wanted[waiting], 0])}
    return {s.name for s in view.servers if s.alive and s.incarnation in planned}


def recovered(view: View) -> View:
    """The view with every lost slot given to one living server, which is neither joining nor leaving where there are
    others. Raises RequestError where none lives."""
    after, lost = _planned(view, Recover()), view.lost()
    moving = view.move.names if view.move is not None else ()
    settled = np.array([i for i, s in enumerate(after.servers) if s.alive and s.name not in moving], np.int16)
    groups = []
    for group in after.groups:
        owners, mine = group.owners.copy(), lost[group.first : group.first + group.slots]
        owners[mine, 1:] = -1
        others = np.flatnonzero(mine & ~np.isin(owners[:, 0], settled))
        if len(settled):  # a whole table keeps to one of them
            owners[others, 0] = settled[(others if group.placement == "sharded" else group.number) % len(settled)]
        groups.append(replace(group, owners=owners))
    return replace(after, groups=tuple(groups)).check()


def _afresh(view: View, manifest: Mapping[str, Any]) -> Restore:
    """All of a checkpoint into a cluster whose tables, if it has any, are dropped."""
    return _into(replace(view, tables=(), groups=()), manifest)


def _into(view: View, manifest: Mapping[str, Any]) -> Restore:
    """The tables of a checkpoint beside those of the view, whose slots stay as they are."""
    made, groups = _made(view, manifest["tables"], manifest["groups"])
    epoch = max(view.epoch, manifest["term_max"]) + 1
    owner = Server(nobody(epoch), 0, "", alive=False)
    here = set(groups.values())
    lost = (
        replace(g, owners=np.full((g.slots, 1), len(made.servers), np.int16), terms=np.full(g.slots, epoch))
        if g.number in here
        else g
        for g in made.groups
    )
    first = replace(made, epoch=epoch, servers=(*made.servers, owner), groups=tuple(lost)).check()
    final = recovered(first) if here else _empty(first)
    there = sorted(number for number, _, _, _ in manifest["tables"])
    tables = dict(zip(there, (t.number for t in first.tables[len(view.tables) :]), strict=True))
    starts = {number: start for number, _, _, start, _ in manifest["groups"]}
    places = {old: first.group(number) for old, number in groups.items()}
    slots = sorted([starts[old], group.first, group.slots] for old, group in places.items())
    wanted = np.concatenate([np.arange(f, f + count) for _, f, count in slots] or [np.empty(0, np.int64)])
    return Restore(first, final, slots, tables, np.sort(wanted).tolist())


def _made(view: View, entries: Sequence[Sequence[Any]], saved: Sequence[Sequence[Any]]) -> tuple[View, dict[int, int]]:
    """The view with tables made, in the order of their numbers, and each group's number: there -> here.

    saved: the groups of the checkpoint.

    Tables that shared slots share them again, and with no others: two slots cannot be put into one.
    """
    groups: dict[int, int] = {}
    sizes = {number: count for number, _, _, _, count in saved}
    for _, name, there, plain in sorted(entries, key=lambda entry: entry[0]):
        spec = TableSpec.from_plain(plain)  # servers would refuse the view, and every one after it
        alike = {g.number for g in view.groups if (g.placement, g.replicas) == ("sharded", spec.replicas)}
        unseen = alike - {groups.get(there, -1)}
        kept = tuple(g for g in view.groups if g.number not in unseen)
        part = replace(view, groups=kept, tables=tuple(t for t in view.tables if t.group not in unseen))
        part = _planned(part, CreateTable(name, spec.to_plain(), spec.placement, spec.replicas, slots=sizes[there]))
        new = part.tables[-1]
        groups[there] = new.group
        back = tuple(g for g in view.groups if g.number in unseen)
        view = replace(part, groups=(*part.groups, *back), tables=(*view.tables, new))
    return view, groups


def _beside(view: View, manifest: Mapping[str, Any], names: Sequence[str], replace_tables: bool) -> Restore:
    """Some of a checkpoint's tables into a cluster that runs."""
    known = {entry[1] for entry in manifest["tables"]}
    for name in names:
        if name not in known:
            raise RequestError(f"the checkpoint has no table {name!r}; it has {', '.join(sorted(known)) or 'none'}")
        if view.table(name) is not None and not replace_tables:
            raise RequestError(f"table {name!r} exists: say --replace to have it replaced once all rows are there")
    names_of = {name: hidden_name(name) for name in names}
    if len(set(names_of.values())) < len(set(names)):
        raise RequestError(f"{', '.join(names)} begin alike for so long that they need one restore each")
    for left in names_of.values():
        if (table := view.table(left)) is not None:
            if not hidden(view)[view.group(table.group).first]:
                raise RequestError(f"table {left!r} is in the way: a restore uses that name")
            view = _planned(view, DropTable(left))  # of a restore that did not end
    saved = [entry for entry in manifest["tables"] if entry[1] in names_of]
    chosen = [[number, names_of[name], group, {**spec, "name": names_of[name]}] for number, name, group, spec in saved]
    restore = _into(view, {**manifest, "tables": chosen})
    return replace(restore, renames={there: name for name, there in names_of.items()})


def _renamed(view: View, renames: Mapping[str, str]) -> View:
    """The view in which hidden tables take the places of those whose names they are given."""
    epoch = view.epoch
    for there, name in renames.items():
        if view.table(there) is None:
            raise RequestError(f"table {name!r} was dropped while it was restored")
        if view.table(name) is not None:
            view = _planned(view, DropTable(name))
        tables = (replace(t, name=name, spec={**t.spec, "name": name}) if t.name == there else t for t in view.tables)
        view = replace(view, tables=tuple(tables))
    return replace(view, epoch=epoch).check()


def _empty(first: View) -> View:
    """After the restore of a checkpoint without tables."""
    servers = tuple(s for s in first.servers if s.alive or "~" not in s.name)
    return replace(first, epoch=first.epoch + 1, servers=servers)


def _above(view: View, term_max: int) -> View:
    """The view with its epoch, and the terms that it opened, above `term_max`."""
    epoch = max(view.epoch, term_max + 1)
    groups = tuple(replace(g, terms=np.where(g.terms == view.epoch, epoch, g.terms)) for g in view.groups)
    return replace(view, epoch=epoch, groups=groups).check()


def _planned(view: View, change: CreateTable | DropTable | Recover | Reassign | Renew) -> View:
    try:
        return plan(view, change)
    except PlanError as error:
        raise RequestError(str(error)) from None
