"""What an administrator may ask of a cluster, as changes of its view. Pure: a view and a wish in, a change out.

verb           fields                       does
create_table   spec                         makes a table; the same spec again changes nothing
alter_table    name or names, changes       new optimizer, absent, default or initializer; or placement and replicas
truncate       name                         forgets every row of a table, which gets a new number
drop_table     name                         removes a table
failover       name, force                  declares a server dead; force: although rows are lost with it
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hashring.planner import Abort, AlterTable, CreateTable, DropTable, Fail, Place, TruncateTable
from hashring.tokens import hash_strings
from hashring.view import View
from ps.checkpoint.hidden import SUFFIX
from ps.errors import RequestError
from ps.spec import TableSpec

PLACES = ("placement", "replicas")
ALTERABLE = ("optimizer", "initializer", "absent", "default", *PLACES)
"""What of a table may change while it holds rows: dim and seed decide what they are, and where in its slots."""

Change = CreateTable | AlterTable | Place | TruncateTable | DropTable | Fail


def change_of(view: View, verb: str, fields: Mapping[str, Any], seed: int = 0, replicas: int = 1) -> Change | None:
    """The change that a verb asks for, or None where the view is already so.

    seed: the cluster's, of which tables that come without one draw theirs. replicas: of those that name none.
    Raises RequestError in one sentence.
    """
    if verb == "create_table":
        return _create(view, fields.get("spec"), seed, replicas)
    name = fields.get("name")
    if verb == "alter_table":
        names, changes = fields.get("names") or [name], fields.get("changes")
        if isinstance(changes, Mapping) and not changes.keys().isdisjoint(PLACES):
            return _place(view, [str(n) for n in names], changes)
        if len(names) != 1:
            raise RequestError(f"{len(names)} tables are named; together they change placement and replicas only")
        return _alter(view, str(names[0]), changes)
    if verb == "truncate":
        _existing(view, str(name))
        return TruncateTable(str(name))
    if verb == "drop_table":
        _existing(view, str(name))
        return DropTable(str(name))
    if verb == "failover":
        return _fail(view, str(name), bool(fields.get("force")))
    raise RequestError(f"unknown verb {verb!r}; known are create_table, alter_table, truncate, drop_table, failover")


def abort_of(view: View, kind: Any, names: Sequence[str]) -> tuple[tuple[str, ...], Abort | None]:
    """Whose move of a kind is to be undone, and the change: None where it has been. Without names it is the move that
    is under way. Raises RequestError where there is none to undo."""
    if kind not in ("join", "leave"):
        raise RequestError(f"an abort is of a join or a leave, not of {kind!r}")
    if view.move is None:
        there = [view.server_index(name) is not None for name in names]
        if not names or (any(there) if kind == "join" else not all(there)):
            raise RequestError("no server is joining or leaving")
        return tuple(names), None
    whose = tuple(names) or view.move.names
    undone = view.move.undoes and kind == "join" and set(whose) == set(view.move.names)
    return whose, None if undone else Abort(kind, whose)


def spec_of(view: View, name: str) -> TableSpec:
    """The specification of a table of the view. Raises RequestError where there is none of the name."""
    return TableSpec.from_plain(_existing(view, name))


def _existing(view: View, name: str) -> Mapping[str, Any]:
    for table in view.tables:
        if table.name == name:
            return table.spec
    known = ", ".join(sorted(t.name for t in view.tables)[:20]) or "none yet"
    raise RequestError(f"unknown table {name!r}; the tables are: {known}")


def seed_of(name: str, seed: int) -> int:
    """The seed of a table that was given none: another one for each name, so that a hot id of several tables is hot in
    several places."""
    raw = np.frombuffer(name.encode(), np.uint8)
    return int(hash_strings(raw, np.array([0, len(raw)]))[0] ^ seed) & (2**63 - 1)


def _create(view: View, plain: Any, seed: int, replicas: int) -> CreateTable | None:
    if not isinstance(plain, Mapping):
        raise RequestError("create_table needs a field spec with the table's specification")
    own = {"seed": seed_of(str(plain.get("name")), seed), "replicas": replicas}
    spec = TableSpec.from_plain(own | {key: value for key, value in plain.items() if value is not None})
    if spec.name.endswith(SUFFIX):
        raise RequestError(f"table name is {spec.name!r}; names that end with {SUFFIX!r} are for tables being restored")
    if any(t.name == spec.name for t in view.tables):
        present = spec_of(view, spec.name)
        if present == spec:
            return None
        raise RequestError(f"table {spec.name!r} exists with another specification: {_difference(present, spec)}")
    return CreateTable(spec.name, spec.to_plain(), spec.placement, spec.replicas)


def _place(view: View, names: Sequence[str], changes: Mapping[str, Any]) -> Place | None:
    """Another placement or number of copies, of tables that have the same ones then."""
    if others := ", ".join(sorted(changes.keys() - set(PLACES))):
        raise RequestError(f"placement and replicas of {', '.join(names)} change alone, not with {others}")
    specs = {name: TableSpec.from_plain({**_existing(view, name), **changes}) for name in names}
    if all(spec == spec_of(view, name) for name, spec in specs.items()):
        return None
    ends = {(spec.placement, spec.replicas) for spec in specs.values()}
    if len(ends) > 1:
        raise RequestError(f"tables {', '.join(names)} would differ in placement or replicas: say both, or name one")
    ((placement, replicas),) = ends
    return Place({name: spec.to_plain() for name, spec in specs.items()}, placement, replicas)


def _alter(view: View, name: str, changes: Any) -> AlterTable | None:
    present = spec_of(view, name)
    if not isinstance(changes, Mapping):
        raise RequestError("alter_table needs a field changes with the new settings")
    for key in changes:
        if key not in ALTERABLE:
            raise RequestError(f"{key} of table {name!r} cannot change; what can: {', '.join(ALTERABLE)}")
    spec = TableSpec.from_plain({**present.to_plain(), **changes})
    if spec.optimizer.kind != present.optimizer.kind:
        raise RequestError(
            f"the optimizer of table {name!r} is {present.optimizer.kind}; it cannot become {spec.optimizer.kind}, "
            "since rows carry its state (its settings can change)"
        )
    return None if spec == present else AlterTable(name, spec.to_plain())


def last_owned(view: View, name: str) -> int:
    """Slots whose last living owner is the server of this name: they are lost with it."""
    alive = np.array([s.alive for s in view.servers] + [False])
    living = alive[view.owners()]
    mine = (view.owners() == view.server_index(name)) & living
    return int((mine.any(axis=1) & (living.sum(axis=1) == 1)).sum())


def _fail(view: View, name: str, force: bool) -> Fail:
    alive = [s.name for s in view.servers if s.alive]
    if name not in alive:
        raise RequestError(f"no living server is named {name!r}; the living servers are: {', '.join(sorted(alive))}")
    if (lost := last_owned(view, name)) and not force:
        raise RequestError(f"server {name!r} is the last owner of {lost} slots, whose rows would be lost: say --force")
    return Fail(name)


def _difference(present: TableSpec, asked: TableSpec) -> str:
    have, want = present.to_plain(), asked.to_plain()
    keys = [k for k in want if want[k] != have[k]]
    return "; ".join(f"its {k} is {have[k]!r}, asked was {want[k]!r}" for k in keys)
