"""The split kernel against a slow twin that is written with dictionaries, bag by bag and id by id."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashring.tokens import token_seed, tokens
from ps.kernels.batch import cut, join_offsets
from ps.kernels.split import CHOOSE, PIECES, ROWS, Split, choose_readers, split
from ps.share import ABSENT, BAGS, MODE, TABLE, features_of

SLOT_BITS = 6
NONE = np.empty(0, np.float32)
NOT_DONE = np.empty(0, np.uint8)


@dataclass
class Request:
    """Arguments of `split`, made from plain lists: bags[f] is a list of bags, each a list of ids."""

    bags: list[list[list[int]]]
    whole: list[bool]
    readers: np.ndarray
    servers: int
    policy: list[int]
    weighted: bool = False
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        flat = [bag for feature in self.bags for bag in feature]
        self.ids = np.array([i for bag in flat for i in bag], np.int64)
        self.offsets = np.concatenate([[0], np.cumsum([len(bag) for bag in flat])]).astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum([len(f) for f in self.bags])]).astype(np.int64)
        count = len(self.ids)
        self.weights = (np.arange(count, dtype=np.float32) + 1) if self.weighted else NONE
        self.seeds = np.array([token_seed(f) for f in range(len(self.bags))], np.uint64)
        # Sharded tables share the first 64 slots; each whole table has one slot of its own behind them.
        self.firsts = np.array([(64 + f) if w else 0 for f, w in enumerate(self.whole)], np.int64)
        self.lines = features_of(range(len(self.bags)), [0] * len(self.bags), 1, 2)
        self.shifts = np.array([64 if w else 64 - SLOT_BITS for w in self.whole], np.uint64)

    def split(self, load: np.ndarray | None = None) -> Split:
        done = np.array(self.done, np.uint8) if self.done else NOT_DONE
        policy = np.array(self.policy, np.uint8)
        load = np.zeros(self.servers) if load is None else load
        return split(
            self.ids, self.starts, self.offsets, self.weights, done, self.seeds, self.firsts, self.shifts,
            self.lines, self.readers, load, policy,
        )  # fmt: skip

    def slot(self, f: int, i: int) -> int:
        if self.whole[f]:
            return 64 + f
        return int(tokens(np.array([i], np.int64), f)[0]) >> (64 - SLOT_BITS)


def slow_shares(request: Request, chosen: dict[int, int]) -> dict:
    """(server, feature) -> the ids asked, in order, as [(bag, id, weight)]."""
    asked: dict[tuple[int, int], list] = {}
    g = k = 0
    for f, feature in enumerate(request.bags):
        for bag in feature:
            for i in bag:
                if not (request.done and request.done[k]):
                    weight = float(request.weights[k]) if request.weighted else 1.0
                    asked.setdefault((chosen[request.slot(f, i)], f), []).append((g, i, weight))
                k += 1
            g += 1
    return asked


def edges_of(result: Split, s: int, f: int, weighted: bool) -> list:
    """(bag, share bag, weight) of one server and feature."""
    start = result.starts[2, s] + result.edges[s, :f].sum()
    span = slice(start, start + result.edges[s, f])
    weights = result.edge_weight[span] if weighted else np.ones(result.edges[s, f])
    return list(zip(result.edge_bag[span].tolist(), result.edge_row[span].tolist(), weights.tolist(), strict=True))


def share_of(result: Split, s: int, f: int, weighted: bool) -> list:
    """[[(id, weight), ...] of each share bag] of one server and feature."""
    offsets = result.offsets[result.starts[1, s] + s : result.starts[1, s + 1] + s + 1]
    ids = result.ids[result.starts[0, s] : result.starts[0, s + 1]]
    weights = result.weights[result.starts[0, s] : result.starts[0, s + 1]] if weighted else np.ones(len(ids))
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    first = result.features[s, :f, BAGS].sum()
    spans = [slice(offsets[b], offsets[b + 1]) for b in range(first, first + result.features[s, f, BAGS])]
    return [list(zip(ids[span].tolist(), weights[span].tolist(), strict=True)) for span in spans]


def as_multiset(request: Request, result: Split, s: int, f: int) -> list:
    """What a server's share and the client's edges together say of each bag: sorted (bag, id, weight)."""
    share = share_of(result, s, f, request.weighted)
    return sorted(
        (g, i, edge * inner) for g, row, edge in edges_of(result, s, f, request.weighted) for i, inner in share[row]
    )


@st.composite
def requests(draw, policies=(CHOOSE, ROWS, PIECES), copies=1):
    features = draw(st.integers(1, 4))
    servers = draw(st.integers(1, 5))
    some_ids = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1))
    bags = draw(
        st.lists(
            st.lists(st.lists(some_ids, max_size=6), max_size=6), min_size=features, max_size=features
        )
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    copies = min(copies, servers)
    readers = np.array([rng.permutation(servers)[:copies] for _ in range(64 + features)], np.int16)
    total = sum(len(bag) for f in bags for bag in f)
    return Request(
        bags,
        draw(st.lists(st.booleans(), min_size=features, max_size=features)),
        readers,
        servers,
        draw(st.lists(st.sampled_from(policies), min_size=features, max_size=features)),
        draw(st.booleans()),
        rng.integers(0, 2, total).tolist() if draw(st.booleans()) else [],
    )


@settings(max_examples=150)
@given(requests())
def test_every_id_of_every_bag_is_asked_once_of_its_owner(request_):
    result = request_.split()
    expected = slow_shares(request_, {slot: int(o) for slot, o in enumerate(request_.readers[:, 0])})
    assert result.lost == -1
    assert (result.features[:, :, TABLE] == request_.lines[:, TABLE]).all()
    assert (result.features[:, :, MODE] == 1).all()
    assert (result.features[:, :, ABSENT] == 2).all()
    for s in range(request_.servers):
        for f in range(len(request_.bags)):
            assert as_multiset(request_, result, s, f) == sorted(expected.get((s, f), []))


@settings(max_examples=80)
@given(requests(policies=(PIECES,)))
def test_pieces_keep_the_order_of_the_request_and_hold_no_empty_bags(request_):
    result = request_.split()
    expected = slow_shares(request_, {slot: int(o) for slot, o in enumerate(request_.readers[:, 0])})
    for s in range(request_.servers):
        for f in range(len(request_.bags)):
            pieces: dict[int, list] = {}
            for g, i, weight in expected.get((s, f), []):
                pieces.setdefault(g, []).append((i, weight))
            assert share_of(result, s, f, request_.weighted) == list(pieces.values())
            assert [(g, row) for g, row, _ in edges_of(result, s, f, request_.weighted)] == [
                (g, row) for row, g in enumerate(pieces)
            ]


@settings(max_examples=80)
@given(requests(policies=(ROWS,)))
def test_rows_hold_each_id_once_in_order_of_first_occurrence(request_):
    result = request_.split()
    expected = slow_shares(request_, {slot: int(o) for slot, o in enumerate(request_.readers[:, 0])})
    for s in range(request_.servers):
        for f in range(len(request_.bags)):
            distinct = list(dict.fromkeys(i for _, i, _ in expected.get((s, f), [])))
            assert share_of(result, s, f, request_.weighted) == [[(i, 1.0)] for i in distinct]


def one_feature(bags: list[list[int]], servers: int = 2, policy: int = CHOOSE) -> Request:
    readers = (np.arange(65) % servers).astype(np.int16).reshape(-1, 1)
    return Request([bags], [False], readers, servers, [policy])


def test_few_ids_asked_by_many_bags_go_as_rows_and_long_bags_as_pieces():
    popular = one_feature([[k % 5] for k in range(100)])
    assert popular.split().features[:, :, BAGS].sum() == 5
    long_bags = one_feature([list(range(50 * k, 50 * k + 50)) for k in range(10)])
    assert long_bags.split().features[:, :, BAGS].sum() == 20


def test_no_ids_and_no_bags_give_nothing():
    for bags in ([], [[]], [[], [], []]):
        result = one_feature(bags).split()
        assert result.lost == -1
        assert result.features[:, :, BAGS].sum() == 0
        assert (result.starts == 0).all()


def test_a_slot_without_reader_is_named():
    request_ = one_feature([[1, 2, 3, 4, 5, 6, 7, 8]])
    lost = request_.slot(0, 5)
    request_.readers[lost, 0] = -1
    assert request_.split().lost == lost


@settings(max_examples=60)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 40), st.integers(0, 2**32))
def test_a_greedy_cover_asks_the_same_owners_as_a_slow_one(servers, copies, n, seed):
    rng = np.random.default_rng(seed)
    copies = min(copies, servers)
    readers = np.array([rng.permutation(servers)[:copies] for _ in range(64)], np.int16)
    slots = rng.integers(0, 64, n).astype(np.int32)
    load = rng.integers(0, 3, servers).astype(np.float64)
    chosen = choose_readers(slots, readers, load)
    uncovered, expected = list(slots), {}
    while uncovered:
        cover = [sum(s in readers[k] for k in uncovered) for s in range(servers)]
        enough = len(uncovered) if max(cover) == len(uncovered) else max(cover) * 0.75
        best = min((s for s in range(servers) if cover[s] >= enough), key=lambda s: (load[s], s))
        expected |= {k: best for k in uncovered if best in readers[k]}
        uncovered = [k for k in uncovered if best not in readers[k]]
    assert {k: chosen[k] for k in slots} == expected


def test_hot_ids_do_not_make_one_owner_answer_for_all():
    """Two copies on three servers, a tenth of all ids in one slot: two servers a request, and all are asked alike."""
    owners = np.array([(k % 3, (k + 1) % 3) for k in range(60)], np.int16)
    slots = np.concatenate([np.arange(60), np.zeros(7)]).astype(np.int32)
    load = np.zeros(3)
    for _ in range(300):
        chosen = choose_readers(slots, owners, load)[slots]
        assert len(set(chosen.tolist())) == 2
        load += np.bincount(chosen, minlength=3)
    assert load.max() / load.mean() < 1.02


def test_a_fully_replicated_table_costs_one_server_the_least_loaded():
    readers = np.array([np.random.default_rng(k).permutation(3) for k in range(65)], np.int16)
    request_ = Request([[[k] for k in range(200)]], [False], readers, 3, [PIECES])
    result = request_.split(np.array([5.0, 1.0, 2.0]))
    assert result.features[:, 0, BAGS].tolist() == [0, 200, 0]


@pytest.mark.parametrize(
    ("offsets", "bad"),
    [
        ([0, 2, 1, 3], (0, 2)),
        ([1, 2, 2, 3], (0, 0)),
        ([0, 1, 2, 9], (0, 3)),
        ([0, 0, 1, 2], (0, 3)),
        ([0, 1, 3, 3], (-1, 0)),
    ],
)
def test_offsets_that_torch_accepts_in_silence_are_found(offsets, bad):
    starts, joined = np.empty(2, np.int64), np.empty(4, np.int64)
    assert join_offsets(np.array([[4], [3]]), np.array(offsets, np.int64), starts, joined) == bad


def test_offsets_of_several_features_are_joined():
    starts, joined = np.empty(4, np.int64), np.empty(6, np.int64)
    counts = np.array([[3, 1, 4], [3, 0, 4]])
    assert join_offsets(counts, np.array([0, 1, 3, 0, 0, 0, 2, 4], np.int64), starts, joined) == (-1, 0)
    assert joined.tolist() == [0, 1, 3, 3, 5, 7]
    assert starts.tolist() == [0, 2, 2, 5]


def test_a_cut_keeps_all_occurrences_of_an_id_together_in_about_equal_parts():
    request_ = one_feature([[k % 1000] for k in range(3000)])
    part = cut(request_.ids, request_.starts, request_.offsets, request_.seeds, 4)
    assert (part[:1000] == part[1000:2000]).all()
    assert np.bincount(part, minlength=4).min() > 3000 / 4 * 0.8
    assert part.max() == 3
