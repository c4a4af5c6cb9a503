"""The second thread of a large read: each half is done once, by whoever is free."""

import os
import threading

from ps.client.second import SecondThread


def test_both_halves_are_done_beside_each_other() -> None:
    """Neither call can end before the other has begun: two threads run them."""
    meeting = threading.Barrier(2, timeout=30)
    pair = SecondThread()
    assert pair.both(lambda: meeting.wait() >= 0, lambda: meeting.wait() >= 0) == (True, True)


def test_who_is_first_done_does_the_rest() -> None:
    """While the second thread is busy with something else, the caller does both, and each once."""
    pair = SecondThread()
    free, begun, calls = threading.Event(), threading.Event(), []

    def long() -> None:
        begun.set()
        assert free.wait(30)

    waiting = threading.Thread(target=pair.both, args=(lambda: begun.wait(30), long))
    waiting.start()
    assert begun.wait(30)
    by = threading.get_ident()
    for n in range(3):
        assert pair.both(threading.get_ident, lambda n=n: calls.append(n) or threading.get_ident()) == (by, by)
    free.set()
    waiting.join(30)
    assert calls == [0, 1, 2]
    assert pair.both(lambda: 1, lambda: 2) == (1, 2)


def test_a_forked_child_has_a_second_thread_of_its_own() -> None:
    """What the parent's thread would do is not waited for."""
    pair = SecondThread()
    assert pair.both(lambda: 1, lambda: 2) == (1, 2)
    child = os.fork()
    if child == 0:
        meeting = threading.Barrier(2, timeout=30)
        os._exit(0 if pair.both(lambda: meeting.wait() >= 0, lambda: meeting.wait() >= 0) == (True, True) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
