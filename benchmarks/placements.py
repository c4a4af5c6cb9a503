"""Ways to lay the tables of a workload over the servers of one cluster, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.workloads import Workload

NAMES = ("sharded", "whole", "twofold", "replicated", "mixed")

LABELS: Mapping[str, str] = {
    "sharded": "sharded",
    "whole": "whole tables",
    "twofold": "two-fold",
    "replicated": "fully replicated",
    "mixed": "mixed",
}

ABOUT: Mapping[str, str] = {
    "sharded": "rows of every table spread over all servers, one copy",
    "whole": "every table kept whole on one server, one copy",
    "twofold": "rows spread over all servers, two copies of each",
    "replicated": "every server holds every row",
    "mixed": "small hot tables on every server, the rest sharded with one copy",
}


@dataclass(frozen=True)
class Lay:
    """How one table lies: the settings of `create_table`."""

    placement: Literal["sharded", "whole"] = "sharded"
    replicas: int | Literal["all"] = 1


def lay_out(name: str, workload: Workload, servers: int, budget: float) -> list[Lay]:
    """How each table of a workload lies under the placement of this name; budget: see `mixed_tables`."""
    tables = range(len(workload.tables))
    if name == "mixed":
        everywhere = mixed_tables(workload, servers, budget)
        return [Lay(replicas="all") if f in everywhere else Lay() for f in tables]
    lay = {
        "sharded": Lay(),
        "whole": Lay(placement="whole"),
        "twofold": Lay(replicas=2),
        "replicated": Lay(replicas="all"),
    }[name]
    return [lay for _ in tables]


def mixed_tables(workload: Workload, servers: int, budget: float) -> frozenset[int]:
    """The tables that a mixed placement puts on every server: those most often read for the rows that they have.

    Tables are taken by ids a sample / rows, the highest first, as long as the further copies, rows x (servers - 1), of
    all that were taken stay within `budget` x the rows of the workload; one that does not fit is passed over.
    """
    left = budget * sum(workload.sizes)
    chosen = set()
    reads = [k / rows for k, rows in zip(workload.shape.ids_per_sample, workload.sizes, strict=True)]
    for f in sorted(range(len(reads)), key=lambda f: (-reads[f], f)):
        extra = workload.sizes[f] * (servers - 1)
        if extra <= left:
            chosen.add(f)
            left -= extra
    return frozenset(chosen)
