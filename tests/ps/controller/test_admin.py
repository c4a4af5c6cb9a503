"""What an administrator asks, as changes of the view."""

import numpy as np
import pytest

from hashring.planner import AlterTable, CreateTable, DropTable, Fail, Join, PlanError, TruncateTable, plan
from hashring.view import Server, View
from ps.controller.admin import change_of, last_owned, spec_of
from ps.errors import RequestError
from ps.spec import SGD, Adagrad, TableSpec

ITEM = TableSpec("item", dim=8, optimizer=Adagrad(lr=0.1), seed=3)


@pytest.fixture
def view() -> View:
    empty = View.empty(1, slot_bits=6)
    joined = plan(empty, Join((Server("s0", 1, "h"), Server("s1", 2, "h"))))
    return plan(joined, change_of(joined, "create_table", {"spec": ITEM.to_plain()}))


def test_a_new_table(view):
    change = change_of(view, "create_table", {"spec": TableSpec("user", dim=4).to_plain()})
    assert isinstance(change, CreateTable)
    after = plan(view, change)
    assert spec_of(after, "user") == TableSpec("user", dim=4)
    assert spec_of(after, "item") == ITEM


def test_the_same_again_changes_nothing_and_another_is_refused(view):
    assert change_of(view, "create_table", {"spec": ITEM.to_plain()}) is None
    with pytest.raises(RequestError, match="its dim is 8, asked was 9"):
        change_of(view, "create_table", {"spec": {**ITEM.to_plain(), "dim": 9}})


def test_a_name_that_restores_use_is_refused(view):
    with pytest.raises(RequestError, match=r"^table name is 'x\.restoring'; names that end with '\.restoring' are for"):
        change_of(view, "create_table", {"spec": {"name": "x.restoring", "dim": 4}})


def test_tables_without_a_seed_draw_different_ones_from_the_clusters(view):
    def drawn(name, seed):
        return change_of(view, "create_table", {"spec": {"name": name, "dim": 4}}, seed=seed).spec["seed"]

    assert drawn("user", 77) == drawn("user", 77)
    assert len({drawn("user", 77), drawn("user", 78), drawn("genre", 77)}) == 3
    change = change_of(view, "create_table", {"spec": {"name": "user", "dim": 4, "seed": 0}}, seed=77)
    assert change.spec["seed"] == 0


@pytest.mark.parametrize(("given", "kept"), [({}, 2), ({"replicas": None}, 2), ({"replicas": 1}, 1)])
def test_a_table_without_a_number_of_replicas_has_the_clusters(view, given, kept):
    change = change_of(view, "create_table", {"spec": {"name": "user", "dim": 4, **given}}, replicas=2)
    assert (change.replicas, change.spec["replicas"]) == (kept, kept)


def test_altering(view):
    change = change_of(view, "alter_table", {"name": "item", "changes": {"absent": "zeros"}})
    assert isinstance(change, AlterTable)
    assert spec_of(plan(view, change), "item").absent == "zeros"
    assert change_of(view, "alter_table", {"name": "item", "changes": {"absent": ITEM.absent}}) is None
    faster = change_of(view, "alter_table", {"name": "item", "changes": {"optimizer": {"kind": "adagrad", "lr": 1.0}}})
    assert spec_of(plan(view, faster), "item").optimizer == Adagrad(lr=1.0)


def test_truncating_and_dropping(view):
    assert change_of(view, "truncate", {"name": "item"}) == TruncateTable("item")
    assert change_of(view, "drop_table", {"name": "item"}) == DropTable("item")


@pytest.mark.parametrize(
    ("verb", "fields", "sentence"),
    [
        ("create_table", {}, "needs a field spec"),
        ("create_table", {"spec": {"name": "x", "dim": 0}}, "dim of table 'x' is 0; it must be 1 to 4096"),
        ("create_table", {"spec": {"name": "x", "dim": 4, "replicas": 0}}, "is 0; it must be 1 to 64"),
        ("failover", {"name": "s9"}, "no living server is named 's9'; the living servers are: s0, s1"),
        ("alter_table", {"name": "nothing", "changes": {}}, "unknown table 'nothing'; the tables are: item"),
        ("alter_table", {"name": "item"}, "needs a field changes"),
        (
            "alter_table",
            {"name": "item", "changes": {"placement": "half"}},
            'is \'half\'; it must be "sharded" or "whole"',
        ),
        (
            "alter_table",
            {"names": ["item", "item"], "changes": {"absent": "zeros"}},
            "together they change placement and replicas only",
        ),
        ("alter_table", {"name": "item", "changes": {"replicas": 2, "absent": "zeros"}}, "change alone, not with"),
        ("alter_table", {"name": "item", "changes": {"replicas": 0}}, "replicas"),
        ("alter_table", {"name": "item", "changes": {"dim": 9}}, "dim of table 'item' cannot change"),
        ("alter_table", {"name": "item", "changes": {"optimizer": SGD()}}, "is adagrad; it cannot become sgd"),
        ("truncate", {"name": "nothing"}, "unknown table 'nothing'"),
        ("drop_table", {"name": "nothing"}, "unknown table 'nothing'"),
        ("rename", {"name": "item"}, "unknown verb 'rename'"),
    ],
)
def test_wrong_wishes_are_refused_in_a_sentence(view, verb, fields, sentence):
    with pytest.raises(RequestError) as caught:
        change_of(view, verb, fields)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("replicas", [2, "all"])
def test_a_table_of_several_copies_has_them_at_once(view, replicas):
    after = plan(view, change_of(view, "create_table", {"spec": {"name": "x", "dim": 4, "replicas": replicas}}))
    group = after.group(after.table("x").group)
    assert (np.sort(group.owners, axis=1) == [0, 1]).all()


def test_more_copies_than_servers_are_refused(view):
    change = change_of(view, "create_table", {"spec": {"name": "x", "dim": 4, "replicas": 3}})
    with pytest.raises(PlanError, match="replicas of table 'x' is 3; the cluster has 2 living servers"):
        plan(view, change)


def test_a_server_that_alone_has_rows_is_declared_dead_only_by_force(view):
    lost = int((view.owners()[:, 0] == 1).sum())
    with pytest.raises(RequestError, match=f"'s1' is the last owner of {lost} slots, whose rows would be lost"):
        change_of(view, "failover", {"name": "s1"})
    assert change_of(view, "failover", {"name": "s1", "force": True}) == Fail("s1")
    empty = plan(view, DropTable("item"))
    copied = plan(empty, change_of(empty, "create_table", {"spec": {"name": "x", "dim": 4, "replicas": 2}}))
    after = plan(copied, change_of(copied, "failover", {"name": "s1"}))
    assert not after.lost().any()
    assert last_owned(after, "s0") == after.group(after.table("x").group).slots
    with pytest.raises(RequestError, match="no living server is named 's1'"):
        change_of(after, "failover", {"name": "s1", "force": True})


def test_replicas_and_placement_change_for_the_tables_that_are_named(view):
    both = plan(view, change_of(view, "create_table", {"spec": TableSpec("user", dim=4).to_plain()}))
    change = change_of(both, "alter_table", {"names": ["item", "user"], "changes": {"replicas": 2}})
    after = plan(both, change)
    assert [g.replicas for g in after.groups] == [2]
    assert (after.terms() == both.terms()).all()  # the goal is another one: owners follow in steps
    assert spec_of(after, "item").replicas == spec_of(after, "user").replicas == 2
    assert change_of(after, "alter_table", {"names": ["item", "user"], "changes": {"replicas": 2}}) is None
    apart = plan(after, change_of(after, "alter_table", {"name": "item", "changes": {"placement": "whole"}}))
    old, new = apart.group(apart.table("user").group), apart.group(apart.table("item").group)
    assert (old.placement, new.placement, old.slots, new.slots) == (
        "sharded",
        "whole",
        after.groups[0].slots,
        old.slots,
    )
    assert (new.owners == old.owners).all()  # until rows have moved
    assert (apart.terms()[old.first : old.first + old.slots] == apart.epoch).all()
    fields = {"names": ["item", "user"], "changes": {"replicas": "all"}}
    with pytest.raises(RequestError, match="tables item, user would differ in placement or replicas: say both"):
        change_of(apart, "alter_table", fields)
    again = plan(apart, change_of(apart, "alter_table", {"name": "item", "changes": {"placement": "sharded"}}))
    assert again.table("item").group == new.number  # it has slots of its own already
    with pytest.raises(PlanError, match="replicas of table 'item' is 3; the cluster has 2 living servers"):
        plan(view, change_of(view, "alter_table", {"name": "item", "changes": {"replicas": 3}}))
