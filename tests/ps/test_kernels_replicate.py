"""Kernels by which blocks are checked, judged, accepted and numbered, against slow twins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.kernels import replicate
from ps.kernels.plan import ARENA, CODE, NUMBER, TABLE_COLUMNS, codes_of
from ps.kernels.replicate import BAD_SLOTS, BEHIND, GOOD, LEADS_BACK, OLD, TAKEN
from ps.kernels.window import put

SLOTS = 12
position = st.builds(lambda term, counter: (term << 40) | counter, st.integers(0, 3), st.integers(0, 3))
any64 = st.integers(-(2**63), 2**63 - 1)


def ints(values: list[int], dtype: type = np.int64) -> np.ndarray:
    return np.array(values, dtype)


@given(st.lists(st.tuples(st.one_of(st.integers(-1, 5), any64), position, position, st.integers(-1, 2)), max_size=9))
def test_rule_of(lines: list[tuple[int, int, int, int]]) -> None:
    slots, base, last, part = ([line[i] for line in lines] for i in range(4))
    if len(set(slots)) < len(slots) or not all(0 <= slot < 2**31 for slot in slots):
        wanted = BAD_SLOTS
    else:
        wanted = LEADS_BACK if any(b > e for b, e in zip(base, last, strict=True)) or min(part, default=0) < 0 else GOOD
    assert replicate.rule_of(ints(slots), ints(base), ints(last), ints(part, np.int32)) == wanted


def test_rule_of_many_slots_far_apart() -> None:
    slots = np.arange(3000, dtype=np.int64) * 700_000
    zeros = np.zeros(3000, np.int64)
    assert replicate.rule_of(slots, zeros, zeros, zeros.astype(np.int32)) == GOOD
    slots[-1] = slots[1500]
    assert replicate.rule_of(slots, zeros, zeros, zeros.astype(np.int32)) == BAD_SLOTS


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=6), st.integers(0, 5))
def test_even(offsets: list[int], n: int) -> None:
    wanted = offsets[0] == 0 and offsets[-1] == n and offsets == sorted(offsets)
    assert replicate.even(ints(offsets), n) == wanted


@given(st.data())
def test_judge(data: st.DataObject) -> None:
    k = data.draw(st.integers(0, SLOTS))
    terms = data.draw(st.lists(st.integers(0, 3), min_size=k, max_size=k))
    owners = data.draw(st.lists(st.lists(st.integers(-1, 2), min_size=2, max_size=2), min_size=k, max_size=k))
    sender = data.draw(st.sampled_from([-2, 0, 1]))
    asked = data.draw(st.lists(st.tuples(st.integers(0, SLOTS + 2), position), max_size=8))
    wanted = []
    for slot, at in asked:
        term = at >> 40
        if slot >= k or term > terms[slot]:
            wanted.append(BEHIND)
        else:
            wanted.append(TAKEN if term == terms[slot] and owners[slot][0] == sender else OLD)
    verdicts = np.full(len(asked), 77, np.uint8)
    table = np.array(owners, np.int16).reshape(k, 2)
    replicate.judge(ints([s for s, _ in asked]), ints([p for _, p in asked]), sender, ints(terms), table, verdicts)
    assert verdicts.tolist() == wanted


@given(
    st.lists(position, min_size=SLOTS, max_size=SLOTS),
    st.dictionaries(
        st.integers(0, SLOTS - 1),
        st.tuples(position, st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), position),
        max_size=6,
    ),
)
def test_accept_and_advance(stood: list[int], block: dict[int, tuple[int, int, int, int, int]]) -> None:
    slots, lines = ints(list(block)), list(block.values())
    base, last = ints([line[0] for line in lines]), ints([line[4] for line in lines])
    full, final = (ints([line[i] for line in lines], np.uint8) for i in (1, 3))
    part, positions, taken = ints([line[2] for line in lines], np.int32), ints(stood), np.ones(len(lines), np.bool_)
    plain = replicate.accept(slots, base, full, part, final, positions, taken)
    wanted = [line[2] == 0 and (line[1] > 0 or line[0] == stood[slot]) for slot, line in block.items()]
    assert taken.tolist() == wanted
    assert plain == (all(wanted) and not full.any() and bool(final.all()))
    begun = replicate.advance(slots, base, last, positions)
    assert begun == any(line[0] >> 40 != line[4] >> 40 for line in lines)
    assert positions.tolist() == [block[s][4] if s in block else stood[s] for s in range(SLOTS)]


@given(st.lists(st.lists(st.integers(0, SLOTS - 1), unique=True), max_size=4), st.data())
def test_choose_and_count_peers(pushes: list[list[int]], data: st.DataObject) -> None:
    """Each push moves its slots by one; a slot is chosen once, from where the first of them met it."""
    table = st.lists(st.permutations([-1, 0, 1]), min_size=SLOTS, max_size=SLOTS)
    peers = np.array(data.draw(table), np.int16)
    modes = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=SLOTS, max_size=SLOTS)),
        np.uint8,
    )
    streamed = [
        {int(p) for p, mode in zip(peers[s], modes[s], strict=True) if p >= 0 and mode == replicate.STREAM}
        for s in range(SLOTS)
    ]
    local, n = np.full(SLOTS, -1, np.int32), 0
    out, base = np.empty(sum(map(len, pushes)), np.int64), np.empty(sum(map(len, pushes)), np.int64)
    stood, wanted = [10] * SLOTS, {}
    for slots in pushes:
        n = replicate.choose(ints(slots), ints([stood[s] for s in slots]), peers, modes, 1, local, out, base, n)
        for slot in slots:
            if 1 in streamed[slot]:
                wanted.setdefault(slot, stood[slot])
            stood[slot] += 1
        counts = np.zeros(2, np.int64)
        replicate.count_peers(ints(slots), peers, modes, counts)
        assert counts.tolist() == [sum(peer in streamed[s] for s in slots) for peer in (0, 1)]
    assert out[:n].tolist() == list(wanted)
    assert base[:n].tolist() == list(wanted.values())
    assert local.tolist() == [list(wanted).index(s) if s in wanted else -1 for s in range(SLOTS)]


@given(
    st.dictionaries(st.integers(0, SLOTS - 1), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=3))
)
def test_put(entries: dict[int, list[tuple[int, int]]]) -> None:
    client = 2**64 - 2  # clients are any 64 bits
    names = {0: client, 1: client - 1, 2: 5}
    flat = [(names[who], seen) for some in entries.values() for who, seen in some]
    offsets = np.cumsum([0, *map(len, entries.values())])
    last, mask = np.full(SLOTS, -1, np.int64), np.zeros(SLOTS, np.uint64)
    who, seen = ints([w for w, _ in flat], np.uint64), ints([s for _, s in flat])
    put(ints(list(entries)), offsets, who, np.uint64(client), seen, seen.view(np.uint64), last, mask)
    for slot in range(SLOTS):
        mine = [s for w, s in entries.get(slot, []) if w == 0]
        assert (last[slot], mask[slot]) == ((mine[-1], mine[-1]) if mine else (-1, 0))


@given(st.sets(st.integers(0, 9)), st.lists(st.integers(-1, 10), max_size=12), st.integers(0, 1))
def test_codes_of(known: set[int], tables: list[int], arena: int) -> None:
    columns = np.zeros((len(known), TABLE_COLUMNS), np.int64)
    columns[:, NUMBER] = sorted(known)
    columns[:, ARENA], columns[:, CODE] = columns[:, NUMBER] % 2, columns[:, NUMBER] * 3
    codes = np.zeros(len(tables), np.int32)
    bad = codes_of(ints(tables, np.int32), arena, columns, codes)
    wrong = [i for i, t in enumerate(tables) if t not in known or t % 2 != arena]
    assert bad == (wrong[0] if wrong else -1)
    if not wrong:
        assert codes.tolist() == [3 * t for t in tables]


@pytest.mark.parametrize("client", [0, 1, 2**63, 2**64 - 1])
def test_put_knows_clients_by_all_64_bits(client: int) -> None:
    last, mask = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    names = np.array([client ^ 1, client], np.uint64)
    put(ints([0]), ints([0, 2]), names, names[1], ints([3, 4]), names, last, mask)
    assert last[0] == 4
