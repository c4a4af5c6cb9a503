"""The slow twin of a store: dicts of rows, one id at a time, written for reading."""

from dataclasses import dataclass, field

import numpy as np

from hashring.view import View
from ps.share import ABSENT, MODE, PullShare, PushShare
from ps.spec import FTRL, SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad, TableSpec

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def token_of(spec: TableSpec, id_: int) -> int:
    return mix64((id_ & MASK) ^ mix64((spec.seed + GOLDEN) & MASK))


def initial_row(spec: TableSpec, id_: int) -> np.ndarray:
    low, high = float(np.float32(spec.initializer.low)), float(np.float32(spec.initializer.high))
    token = token_of(spec, id_)
    tops = [mix64((token + (j + 1) * GOLDEN) & MASK) >> 40 for j in range(spec.dim)]
    return np.array([low + (high - low) * (top * 2.0**-24) for top in tops], np.float32)


def begin_state(optimizer: Optimizer, row: np.ndarray) -> dict[str, np.ndarray]:
    d = len(row)
    match optimizer:
        case Adagrad() | RowWiseAdagrad():
            width = d if isinstance(optimizer, Adagrad) else 1
            return {"n": np.full(width, optimizer.initial_accumulator, np.float64)}
        case Adam():
            return {"m": np.zeros(d), "v": np.zeros(d), "t": np.zeros(1)}
        case FTRL():
            z = -row * (optimizer.beta / optimizer.alpha + optimizer.l2) - np.sign(row) * optimizer.l1
            return {"z": z.astype(np.float64), "n": np.zeros(d)}
    return {}


def step(o: Optimizer, w: np.ndarray, s: dict[str, np.ndarray], g: np.ndarray, scale: float) -> np.ndarray:
    """One optimizer step on one row, in float64: the new row; changes s."""
    w, g = w.astype(np.float64), g.astype(np.float64)
    norm = np.sqrt((g * g).sum())
    if o.clip and norm > o.clip:
        g = g * (o.clip / norm)
    if not isinstance(o, FTRL):
        g = g + o.weight_decay * w
    match o:
        case SGD():
            return w - o.lr * scale * g
        case Adagrad():
            s["n"] = s["n"] + g * g
            return w - o.lr * scale * g / (np.sqrt(s["n"]) + o.eps)
        case RowWiseAdagrad():
            s["n"] = s["n"] + (g * g).mean()
            return w - o.lr * scale * g / (np.sqrt(s["n"]) + o.eps)
        case Adam():
            s["t"] = s["t"] + 1
            t = s["t"][0]
            s["m"] = o.beta1 * s["m"] + (1 - o.beta1) * g
            s["v"] = o.beta2 * s["v"] + (1 - o.beta2) * g * g
            rate = o.lr * scale * np.sqrt(1 - o.beta2**t) / (1 - o.beta1**t)
            return w - rate * s["m"] / (np.sqrt(s["v"]) + o.eps)
        case FTRL():
            sigma = (np.sqrt(s["n"] + g * g) - np.sqrt(s["n"])) / o.alpha
            s["z"] = s["z"] + scale * g - sigma * w
            s["n"] = s["n"] + g * g
            slope = (o.beta + np.sqrt(s["n"])) / o.alpha + o.l2
            return np.where(np.abs(s["z"]) <= o.l1, 0.0, -(s["z"] - np.sign(s["z"]) * o.l1) / slope)
    raise AssertionError(o)


@dataclass
class Slot:
    position: int
    rows: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    state: dict[tuple[int, int], dict[str, np.ndarray]] = field(default_factory=dict)
    seen: dict[int, set[int]] = field(default_factory=dict)


class NaiveStore:
    """Owns every slot of the view; push and pull as ps.store.Store, by the words of the documentation."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.tables = {t.number: (TableSpec.from_plain(t.spec), view.group(t.group)) for t in view.tables}
        self.slots = {g.first + k: Slot(int(g.terms[k]) << 40) for g in view.groups for k in range(g.slots)}

    def slot_of(self, number: int, id_: int) -> int:
        spec, group = self.tables[number]
        return group.first + (0 if group.slots == 1 else token_of(spec, id_) >> (64 - self.view.slot_bits))

    def rows(self, number: int) -> dict[int, np.ndarray]:
        return {i: row for slot in self.slots.values() for (t, i), row in slot.rows.items() if t == number}

    def _bags(self, share: PullShare | PushShare) -> list[tuple[int, int, list[tuple[int, float]]]]:
        """(feature, table, [(id, weight)]) of every bag."""
        out, b = [], 0
        for f, (table, bags) in enumerate(share.features[:, :2].tolist()):
            for _ in range(bags):
                low, high = (b, b + 1) if share.offsets is None else share.offsets[b : b + 2]
                weights = np.ones(len(share.ids)) if share.weights is None else share.weights
                out.append((f, table, [(int(share.ids[i]), float(weights[i])) for i in range(low, high)]))
                b += 1
        return out

    def pull(self, share: PullShare) -> tuple[np.ndarray, int]:
        parts, absent = [np.empty(0)], 0
        for f, table, bag in self._bags(share):
            spec, _ = self.tables[table]
            rows = []
            for id_, weight in bag:
                row = self.slots[self.slot_of(table, id_)].rows.get((table, id_))
                if row is None:
                    absent += 1
                    default = np.array(spec.default) if spec.default else np.zeros(spec.dim)
                    row = (np.zeros(spec.dim), default, initial_row(spec, id_))[share.features[f, ABSENT]]
                rows.append(weight * row)
            stack = np.array(rows).reshape(-1, spec.dim)
            pooled = stack.max(axis=0) if share.features[f, MODE] == 1 and len(stack) else stack.sum(axis=0)
            parts.append(pooled)
        return np.concatenate(parts), absent

    def push(self, share: PushShare) -> tuple[int, int, int]:
        """(slots applied, slots that had seen it, rows made)."""
        gradients: dict[tuple[int, int], np.ndarray] = {}
        at = 0
        for _, table, bag in self._bags(share):
            spec, _ = self.tables[table]
            row = share.rows[at : at + spec.dim].astype(np.float64)
            at += 0 if share.kind == "delete" else spec.dim
            for id_, weight in bag:
                key = (table, id_)
                if share.kind == "push":
                    gradients[key] = gradients.get(key, np.zeros(spec.dim)) + weight * row
                else:
                    gradients[key] = row
        touched = {self.slot_of(*key) for key in gradients}
        new = {s for s in touched if share.sequence not in self.slots[s].seen.setdefault(share.client, set())}
        for s in new:
            self.slots[s].seen[share.client].add(share.sequence)
            self.slots[s].position += 1
        made = 0
        for (table, id_), gradient in gradients.items():
            slot = self.slots[self.slot_of(table, id_)]
            if self.slot_of(table, id_) in new:
                made += self._change(slot, table, id_, share, gradient)
        return len(new), len(touched) - len(new), made

    def _change(self, slot: Slot, table: int, id_: int, share: PushShare, row: np.ndarray) -> int:
        spec, _ = self.tables[table]
        key = (table, id_)
        if share.kind == "delete":
            slot.rows.pop(key, None)
            slot.state.pop(key, None)
            return 0
        fresh = key not in slot.rows
        if share.kind == "assign":
            slot.rows[key] = row.copy()
            slot.state[key] = begin_state(spec.optimizer, slot.rows[key])
            return int(fresh)
        if fresh:
            slot.rows[key] = initial_row(spec, id_).astype(np.float64)
            slot.state[key] = begin_state(spec.optimizer, slot.rows[key])
        slot.rows[key] = step(spec.optimizer, slot.rows[key], slot.state[key], row, share.lr_scale)
        return int(fresh)
