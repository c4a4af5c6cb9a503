"""What the two MovieLens sets share: ratings of users in time, and the history before each."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ps.errors import ConfigError
from router.columns import INT64, Column

LIKED_FROM = 4.0
"""A rating from here on is a positive label."""

MALFORMED_SHARE = 0.001
"""Copies of public files pass through many hands: a damaged line is left out; more than a few mean another file."""

HISTORY_MAX = 20
"""Events kept of each kind."""


@dataclass(frozen=True)
class Ratings:
    """n events: users and items int64[n], labels float32[n] of 0 and 1, times int64[n] in seconds.

    skipped: malformed rows that were left out.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    labels: NDArray[np.float32]
    times: NDArray[np.int64]
    skipped: int = 0

    @classmethod
    def of(cls, rows: list[list[str]], where: str) -> "Ratings":
        """From (user, item, rating, time) as text. A row that is malformed is left out and counted, never guessed at.

        ConfigError names `where` and the first such row where they are more than MALFORMED_SHARE of all, or all.
        """
        good: list[tuple[int, int, float, int]] = []
        first_bad = ""
        for row in rows:
            try:
                user, item, rating, time = row
                good.append((int(user), int(item), float(rating), int(time)))
            except ValueError:
                first_bad = first_bad or ",".join(row)[:80]
        skipped = len(rows) - len(good)
        if not good or skipped > MALFORMED_SHARE * len(rows):
            raise ConfigError(f"{where} has {skipped} malformed ratings of {len(rows)}, the first {first_bad!r}")
        users, items, ratings, times = (np.array(column) for column in zip(*good, strict=True))
        labels = (ratings >= LIKED_FROM).astype(np.float32)
        return cls(users.astype(np.int64), items.astype(np.int64), labels, times.astype(np.int64), skipped)


def history(ratings: Ratings, visible: NDArray[np.bool_]) -> dict[str, Column]:
    """{"liked", "disliked"}: the items that a row's user rated before it, oldest first, the newest HISTORY_MAX of each.

    Only events strictly before the row's own time count, and only where `visible` (bool[n]): the label of a held-out
    row is in nobody's history.
    """
    n = len(ratings.users)
    seen: dict[str, list[list[int]]] = {"liked": [[]] * n, "disliked": [[]] * n}
    order = np.lexsort((ratings.times, ratings.users)).tolist()
    users, items, times = ratings.users.tolist(), ratings.items.tolist(), ratings.times.tolist()
    liked, shown = (ratings.labels > 0).tolist(), visible.tolist()
    for _, events in groupby(order, key=users.__getitem__):
        before: dict[str, list[int]] = {"liked": [], "disliked": []}
        for _, moment in groupby(events, key=times.__getitem__):
            now = list(moment)
            for kind, rows in seen.items():
                known = before[kind][-HISTORY_MAX:]
                for row in now:
                    rows[row] = known
            for row in now:
                if shown[row]:
                    before["liked" if liked[row] else "disliked"].append(items[row])
    return {kind: Column.of_lists(rows, INT64) for kind, rows in seen.items()}
