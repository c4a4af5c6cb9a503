"""Clicks drawn from a known model: no file, no network. Users and items have hidden vectors; tags shift the odds."""

import numpy as np

from deploy.datasets import Dataset, Targets, features_text, random_split
from router.columns import Column

ROWS, USERS, ITEMS, TAGS, HIDDEN = 60_000, 2_000, 3_000, 40, 4
ZIPF = 1.1
"""Items are as unevenly liked as in real traffic: the k-th has weight k ** -ZIPF."""


def load(rows: int = ROWS, seed: int = 7) -> Dataset:
    """The same rows for the same seed."""
    rng = np.random.default_rng(seed)
    user_vectors, item_vectors = rng.normal(size=(USERS, HIDDEN)), rng.normal(size=(ITEMS, HIDDEN))
    user_bias, item_bias, tag_bias = rng.normal(size=USERS), rng.normal(size=ITEMS), rng.normal(size=TAGS)
    weights = np.arange(1, ITEMS + 1) ** -ZIPF
    users = rng.integers(0, USERS, rows)
    items = rng.choice(ITEMS, rows, p=weights / weights.sum())
    price = rng.lognormal(2.0, 1.0, rows)
    tags_of = [rng.choice(TAGS, rng.integers(0, 5), replace=False) for _ in range(ITEMS)]
    tag_effect = np.array([tag_bias[tags].mean() if len(tags) else 0.0 for tags in tags_of])
    logits = user_bias[users] + item_bias[items] + 1.5 * tag_effect[items] - 0.5 * (np.log1p(price) - 2.0)
    logits += 0.5 * (user_vectors[users] * item_vectors[items]).sum(axis=1)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    names = ["|".join(f"tag-{t}" for t in tags) for tags in tags_of]
    columns = {
        "user": Column.of(users),
        "item": Column.of(items),
        "tags": Column.of([names[i] for i in items]),
        "price": Column.of(price.astype(np.float32)),
    }
    targets = Targets(auc_min=0.72, auc_max=0.86, logloss_max=0.65)
    return Dataset("synthetic", columns, labels, random_split(rows), features_text("synthetic"), targets)
