"""Restoring as changes of the view: what began is ended in whatever view there is by then."""

from dataclasses import replace

import numpy as np
import pytest
from msgpack import packb

from hashring.planner import AlterTable, Begin, CreateTable, DropTable, Enlist, Fail, Return, TruncateTable, plan
from hashring.view import Move, Server, View
from ps.controller.restore import conclude, prepare, receivers, recovered, told
from ps.errors import RequestError
from ps.spec import SGD, Adagrad, Initializer, TableSpec
from ps.wire import FrameLimits


def cluster(replicas: int = 1) -> View:
    view = plan(View.empty(1, slot_bits=4), Enlist(tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(3))))
    return plan(view, CreateTable("t", {}, replicas=replicas))


def made(name: str, replicas: int = 1) -> CreateTable:
    spec = TableSpec(name, 4, replicas=replicas)
    return CreateTable(name, spec.to_plain(), spec.placement, spec.replicas)


def manifest(view: View, term_max: int = 50) -> dict:
    return {
        "cluster": view.cluster,
        "term_max": term_max,
        "tables": [[t.number, t.name, t.group, dict(t.spec)] for t in view.tables],
        "groups": [[g.number, g.placement, g.replicas, g.first, g.slots] for g in view.groups],
    }


def test_slots_that_begin_anew_have_one_owner() -> None:
    view = plan(plan(plan(cluster(2), Fail("s0")), Fail("s1")), Fail("s2"))
    lost = view.lost()
    assert lost.any()
    back = plan(plan(view, Return(Server("s0", 20, "h0"))), Return(Server("s1", 21, "h1")))
    after = recovered(back)
    assert not after.lost().any()
    assert ((after.owners()[lost] >= 0).sum(axis=1) == 1).all()
    assert (after.terms()[lost] == after.epoch).all()


def test_a_restore_ends_in_the_view_of_its_end() -> None:
    view = plan(cluster(), Fail("s1"))
    lost = np.flatnonzero(view.lost())
    restore = prepare(view, manifest(view), replace_tables=False, accept_loss=False)
    assert restore.first.epoch == 51  # above every position in the checkpoint, whoever goes on from here
    assert (restore.first.terms()[lost] == restore.first.epoch).all()
    assert restore.wanted == lost.tolist()
    meanwhile = plan(plan(restore.first, Return(Server("s1", 21, "h1"))), CreateTable("u", {}, replicas=2))
    after = conclude(meanwhile, restore)
    assert after.epoch == meanwhile.epoch + 1 == 54
    assert not after.lost().any()
    assert after.table("u") is not None
    there = [restore.final.servers[i].name for i in restore.final.owners()[lost, 0]]
    assert [after.servers[i].name for i in after.owners()[lost, 0]] == there
    assert (after.terms()[lost] == 54).all()
    rest = np.setdiff1d(np.arange(meanwhile.slots_total), lost)
    assert (after.terms()[rest] == meanwhile.terms()[rest]).all()
    assert [s.name for s in after.servers] == ["s0", "s2", "s1"]  # nobody lies in the grave any more


def test_lost_slots_come_back_from_a_checkpoint_that_knows_tables_dropped_since() -> None:
    view = plan(cluster(), CreateTable("gone", {}, replicas=2))
    saved = manifest(view)
    view = plan(plan(view, DropTable("gone")), Fail("s1"))
    restore = prepare(view, saved, replace_tables=False, accept_loss=False)
    assert restore.wanted == np.flatnonzero(view.lost()).tolist()
    assert restore.tables == {view.table("t").number: view.table("t").number}
    assert not conclude(restore.first, restore).lost().any()


def test_lost_slots_of_a_restored_cluster_come_back_from_the_checkpoint_that_it_was_restored_from() -> None:
    full = plan(plan(cluster(), DropTable("t")), made("a"))
    full = plan(full, made("b", 2))
    saved = manifest(full)
    empty = plan(View.empty(2, slot_bits=4), Enlist(tuple(Server(f"r{i}", 30 + i, f"h{i}") for i in range(3))))
    again = prepare(empty, saved, replace_tables=False, accept_loss=False)
    view = plan(conclude(again.first, again), Fail("r1"))
    restore = prepare(view, saved, replace_tables=False, accept_loss=False)
    assert restore.tables == again.tables
    assert sorted(restore.slots) == sorted(again.slots)
    assert restore.wanted == np.flatnonzero(view.lost()).tolist()
    assert not conclude(restore.first, restore).lost().any()


def test_lost_slots_come_back_after_the_cluster_went_back_to_the_checkpoint_by_hand_alone() -> None:
    """Tables that a restore has made anew cannot be told from those that somebody dropped to begin anew."""
    view = plan(cluster(), DropTable("t"))
    for copies in (1, 2):
        view = plan(view, made("tu"[copies - 1], copies))
    saved = manifest(view)
    again = prepare(view, saved, replace_tables=True, accept_loss=False)
    view = plan(conclude(again.first, again), Fail("s1"))
    restore = prepare(view, saved, replace_tables=False, accept_loss=False)
    assert restore.tables == again.tables
    assert restore.wanted == np.flatnonzero(view.lost()).tolist()
    assert sorted(restore.slots) == sorted(again.slots)
    with pytest.raises(RequestError, match="an earlier state, of table 't', whose rows in lost slots would be gone"):
        prepare(view, saved, replace_tables=False, accept_loss=False, same_tables=True)


@pytest.mark.parametrize("how", ["restored beside", "made again while slots are lost"])
def test_tables_that_shared_slots_and_do_not_any_more_are_not_filled_from_them(how: str) -> None:
    """Each slot of a checkpoint is sent to one place: the other would be called restored, without its rows."""
    view = plan(cluster(), DropTable("t"))
    for name in "tu":
        view = plan(view, made(name))
    saved = manifest(view)
    if how == "restored beside":
        beside = prepare(view, saved, replace_tables=True, accept_loss=False, tables=["u"])
        view = plan(conclude(beside.first, beside), Fail("s1"))
    else:
        view = plan(plan(plan(view, Fail("s1")), DropTable("u")), made("u"))
    lost = view.lost()
    groups = [view.group(view.table(name).group) for name in "tu"]
    if lost[groups[1].first : groups[1].first + groups[1].slots].any():
        with pytest.raises(
            RequestError, match="an earlier state, of table 'u', whose rows in lost slots would be gone"
        ):
            prepare(view, saved, replace_tables=False, accept_loss=False)
    restore = prepare(view, saved, replace_tables=False, accept_loss=True)
    assert len({there for there, _, _ in restore.slots}) == len(restore.slots)
    assert [groups[0].first] == [here for _, here, _ in restore.slots]


def test_a_table_that_was_truncated_does_not_come_back_as_it_was_before() -> None:
    saved = manifest(cluster())
    view = plan(plan(cluster(), TruncateTable("t")), Fail("s1"))
    with pytest.raises(RequestError, match="an earlier state, of table 't', whose rows in lost slots would be gone"):
        prepare(view, saved, replace_tables=False, accept_loss=False)


def test_what_is_told_fits_the_header_of_a_frame_after_many_tables() -> None:
    view = plan(View.empty(1, slot_bits=14), Enlist(tuple(Server(f"s{i}", 10 + i, f"h{i}") for i in range(3))))
    for _ in range(100):
        view = plan(plan(view, CreateTable("t", {}, replicas=1)), DropTable("t"))
    view = plan(plan(view, CreateTable("t", {}, replicas=1)), Fail("s1"))
    answer = told(prepare(view, manifest(view), replace_tables=False, accept_loss=False))
    assert len(packb(answer)) < FrameLimits().header_max / 4


def test_lost_slots_do_not_come_back_from_a_stranger() -> None:
    view = plan(cluster(), Fail("s1"))
    for other in (
        {**manifest(view), "cluster": 9, "tables": [[0, "u", view.tables[0].group, {}]]},
        {**manifest(view), "cluster": 9, "tables": [[0, "t", view.tables[0].group, {"dim": 8}]]},
        {**manifest(view), "cluster": 9, "tables": [[0, "t", view.tables[0].group, {"seed": 8}]]},
        {**manifest(view), "cluster": 9, "tables": [[0, "t", view.tables[0].group, {"optimizer": {"kind": "sgd"}}]]},
        {**manifest(view), "cluster": 9, "groups": [[view.tables[0].group, "sharded", 1, 0, 99]]},
    ):
        with pytest.raises(
            RequestError, match=r"the cluster has tables \(t\) and lost slots.* has none .* dim, seed, optimizer"
        ):
            prepare(view, other, replace_tables=False, accept_loss=False)
    both = plan(plan(cluster(), CreateTable("u", {}, replicas=1)), Fail("s1"))
    with pytest.raises(RequestError, match="the checkpoint has no table 'u', whose rows"):
        prepare(both, {**manifest(view), "cluster": 9}, replace_tables=False, accept_loss=False)


def test_lost_slots_come_back_though_what_may_be_altered_was_altered_since() -> None:
    spec = TableSpec("t", 4, Adagrad(lr=0.1), seed=7)
    saved = {**manifest(_with(spec)), "cluster": 9}
    for altered in (
        replace(spec, optimizer=Adagrad(lr=0.05, weight_decay=0.1)),
        replace(spec, initializer=Initializer(0, 0)),
        replace(spec, absent="default", default=(1.0, 2.0, 3.0, 4.0)),
        replace(spec, replicas=2),
    ):
        view = plan(plan(_with(spec), AlterTable("t", altered.to_plain())), Fail("s1"))
        restore = prepare(view, saved, replace_tables=False, accept_loss=False)
        assert restore.wanted == np.flatnonzero(view.lost()).tolist()
    for other in (replace(spec, dim=5), replace(spec, seed=8), replace(spec, optimizer=SGD(lr=0.1))):
        with pytest.raises(RequestError, match="has none"):
            prepare(plan(_with(other), Fail("s1")), saved, replace_tables=False, accept_loss=False)


def _with(spec: TableSpec) -> View:
    view = plan(cluster(), DropTable("t"))
    return plan(view, CreateTable(spec.name, spec.to_plain(), spec.placement, 1))


def test_a_restore_does_not_end_once_another_has_begun() -> None:
    view = plan(cluster(), Fail("s1"))
    restore = prepare(view, manifest(view), replace_tables=False, accept_loss=False)
    other = prepare(restore.first, manifest(view), replace_tables=False, accept_loss=False)
    with pytest.raises(RequestError, match="another restore of the same slots has begun"):
        conclude(other.first, restore)
    assert not conclude(other.first, other).lost().any()


def test_it_ends_not_where_rows_were_sent_to_a_server_that_died_or_of_tables_that_are_gone() -> None:
    view = plan(cluster(), Fail("s1"))
    restore = prepare(view, manifest(view), replace_tables=False, accept_loss=False)
    for meanwhile in (plan(restore.first, Fail("s0")), plan(restore.first, DropTable("t"))):
        with pytest.raises(RequestError, match="restore again"):
            conclude(meanwhile, restore)


def test_into_an_empty_cluster() -> None:
    full, view = cluster(2), plan(View.empty(2, slot_bits=4), Enlist((Server("a", 5, "h"), Server("b", 6, "h"))))
    saved = manifest(full)
    saved["tables"][0][3] = dict(made("t", 2).spec)
    restore = prepare(view, saved, replace_tables=False, accept_loss=False)
    assert restore.first.lost().all()
    after = conclude(restore.first, restore)
    assert [s.name for s in after.servers] == ["a", "b"]
    assert ((after.owners() >= 0).sum(axis=1) == 1).all()
    assert (restore.first.epoch, after.epoch) == (51, 52)


@pytest.mark.parametrize("tables", [[], ["t"]])
def test_no_view_has_a_specification_that_no_server_can_read(tables: list[str]) -> None:
    saved = manifest(plan(plan(cluster(), DropTable("t")), made("t")))
    saved["tables"][0][3]["ttl_s"] = 5
    with pytest.raises(RequestError, match=r"^table specification has an unknown key 'ttl_s'$"):
        prepare(cluster(), saved, replace_tables=True, accept_loss=False, tables=tables)


def test_a_checkpoint_without_tables() -> None:
    view = cluster()
    saved = {**manifest(view), "tables": [], "groups": []}
    restore = prepare(view, saved, replace_tables=True, accept_loss=False)
    after = conclude(restore.first, restore)
    assert after.tables == ()
    assert [s.name for s in after.servers] == ["s0", "s1", "s2"]


def test_lost_slots_are_not_given_to_who_is_joining_or_leaving() -> None:
    """A leaver would go before it has them, or never; who joins may be taken back."""
    whole = plan(cluster(), CreateTable("w", {}, "whole", replicas=1, slots=4))
    holder = whole.servers[whole.owners()[whole.group(whole.table("w").group).first, 0]].name
    view = plan(whole, Fail(holder))
    stays, goes = (s.name for s in view.servers if s.alive)
    join = Begin(Move("join", ("s9",)), (Server("s9", 30, "h9"),))
    for move, settled in ((Begin(Move("leave", (goes,))), {stays}), (join, {stays, goes})):
        moving = plan(view, move)
        after = recovered(moving)
        given = {after.servers[i].name for i in after.owners()[view.lost(), 0]}
        assert not after.lost().any()
        assert given <= settled
        kept = ~view.lost()
        assert (after.owners()[kept] == moving.owners()[kept]).all()
        group = after.group(after.table("w").group)
        assert len(np.unique(group.owners[:, 0])) == 1


def test_where_everybody_moves_lost_slots_go_to_who_does() -> None:
    view = plan(View.empty(1, slot_bits=4), Enlist((Server("s0", 10, "h0"),)))
    view = plan(plan(view, CreateTable("t", {}, replicas=1)), Fail("s0"))
    view = plan(view, Begin(Move("join", ("s1",)), (Server("s1", 11, "h1"),)))
    assert not recovered(view).lost().any()


def test_those_whom_rows_are_sent_to_are_known_while_the_restore_can_end() -> None:
    view = plan(cluster(), Fail("s1"))
    restore = prepare(view, manifest(view), replace_tables=False, accept_loss=False)
    assert receivers(restore.first, restore) == {"s0", "s2"}
    assert receivers(plan(restore.first, Fail("s0")), restore) == {"s2"}
    assert receivers(conclude(restore.first, restore), restore) == set()
    assert receivers(recovered(restore.first), restore) == set()
    assert (
        receivers(prepare(restore.first, manifest(view), replace_tables=False, accept_loss=False).first, restore)
        == set()
    )
    assert receivers(plan(restore.first, DropTable("t")), restore) == set()
