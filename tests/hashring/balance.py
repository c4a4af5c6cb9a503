"""How evenly a group lies on the servers of a view."""

from dataclasses import dataclass

import numpy as np

from hashring.view import Group, View


@dataclass(frozen=True)
class Balance:
    """Weight per living server: max / mean of primaries and of copies, and the mean of each."""

    primaries: float
    copies: float
    primaries_mean: float
    copies_mean: float


def balance(view: View, group: Group) -> Balance:
    """How evenly the living servers share a group's weight."""
    alive = np.flatnonzero([s.alive for s in view.servers])
    n = len(view.servers)
    owners = group.owners.astype(np.int64)
    weights = np.broadcast_to(group.weights[:, None], owners.shape)
    held = owners >= 0
    copies = np.bincount(owners[held], weights[held], minlength=n)[alive]
    first = held[:, 0]
    primaries = np.bincount(owners[first, 0], group.weights[first], minlength=n)[alive]
    ratio = [float(x.max() / x.mean()) if len(x) and x.mean() else 1.0 for x in (primaries, copies)]
    means = [float(x.mean()) if len(x) else 0.0 for x in (primaries, copies)]
    return Balance(ratio[0], ratio[1], means[0], means[1])
