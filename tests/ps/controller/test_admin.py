"""What an administrator asks, as changes of the view."""

import pytest

from hashring.planner import AlterTable, CreateTable, DropTable, Join, TruncateTable, plan
from hashring.view import Server, View
from ps.controller.admin import change_of, spec_of
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


def test_tables_without_a_seed_draw_different_ones_from_the_clusters(view):
    def drawn(name, seed):
        return change_of(view, "create_table", {"spec": {"name": name, "dim": 4}}, seed=seed).spec["seed"]

    assert drawn("user", 77) == drawn("user", 77)
    assert len({drawn("user", 77), drawn("user", 78), drawn("genre", 77)}) == 3
    change = change_of(view, "create_table", {"spec": {"name": "user", "dim": 4, "seed": 0}}, seed=77)
    assert change.spec["seed"] == 0


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
        ("create_table", {"spec": {"name": "x", "dim": 4, "replicas": 2}}, "this version keeps 1 copy of a row"),
        ("create_table", {"spec": {"name": "x", "dim": 4, "replicas": "all"}}, "this version keeps 1 copy of a row"),
        ("alter_table", {"name": "nothing", "changes": {}}, "unknown table 'nothing'; the tables are: item"),
        ("alter_table", {"name": "item"}, "needs a field changes"),
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
