"""Silence is counted in pings, and most falling silent at once convicts nobody."""

from hypothesis import given
from hypothesis import strategies as st

from ps.controller.health import Silence

NAMES = ("a", "b", "c", "d")


def test_so_many_in_a_row():
    silence = Silence(limit=5)
    for name in NAMES:
        silence.answered(name)
    for _ in range(4):
        silence.missed("a")
    assert silence.silent() == frozenset()
    silence.missed("a")
    assert silence.silent() == {"a"}
    silence.answered("a")
    assert silence.silent() == frozenset()


def test_an_answer_between_begins_the_count_anew():
    silence = Silence(limit=2)
    for name in NAMES:
        silence.answered(name)
    for _ in range(10):
        silence.missed("a")
        silence.answered("a")
    assert silence.silent() == frozenset()


def test_a_forgotten_server_does_not_count():
    silence = Silence(limit=1)
    for name in NAMES:
        silence.missed(name)
    assert silence.silent() == frozenset()  # all at once: the asker is more likely at fault
    silence.answered("c")
    silence.answered("d")
    assert silence.silent() == {"a", "b"}
    silence.forget("a")
    assert silence.silent() == {"b"}


def test_the_only_server_may_be_silent():
    silence = Silence(limit=1)
    silence.missed("a")
    assert silence.silent() == {"a"}


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), max_size=60))
def test_against_a_written_out_history(history):
    silence = Silence(limit=3)
    for name, answered in history:
        (silence.answered if answered else silence.missed)(name)
    seen = {name for name, _ in history}
    silent = {n for n in seen if [a for m, a in history if m == n][-3:] == [False] * 3}
    expected = silent if len(seen) == 1 or len(silent) <= len(seen) / 2 else set()
    assert silence.silent() == expected
