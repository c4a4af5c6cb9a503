"""Tables that a restore brings back beside what runs: under hidden names, in slots of nobody, until all rows are there.

One whose restore was killed stays. Nobody has ever read or written it, so its slots are not missed: what runs is saved
without them, and lost slots return without them. A restore of the same table, or whoever drops it, removes it.
"""

import numpy as np
from numpy.typing import NDArray

from hashring.view import View
from ps.spec import NAME_MAX

SUFFIX = ".restoring"
"""Of hidden names: nobody else makes a table of such a name."""

_NOBODY = "restore~"


def hidden_name(table: str) -> str:
    """The name of a table until it is restored; of a long name the end is left out."""
    return table[: NAME_MAX - len(SUFFIX)] + SUFFIX


def nobody(epoch: int) -> str:
    """The name of the dead server of no process that owns slots until they are restored, from this epoch on."""
    return f"{_NOBODY}{epoch}"


def unrestored(view: View) -> NDArray[np.bool_]:
    """bool[slots_total]: slots made by a restore that has not ended."""
    owned = np.array([s.name.startswith(_NOBODY) for s in view.servers] + [False])
    return owned[view.owners()[:, 0]]


def hidden(view: View) -> NDArray[np.bool_]:
    """bool[slots_total]: those of them that have hidden tables alone, which nobody misses."""
    out = unrestored(view)
    shown = {t.group for t in view.tables if not t.name.endswith(SUFFIX)}
    for group in view.groups:
        if group.number in shown:
            out[group.first : group.first + group.slots] = False
    return out


def missed(view: View) -> NDArray[np.bool_]:
    """bool[slots_total]: slots that are lost, but for hidden ones."""
    return view.lost() & ~hidden(view)
