"""A scrape comes on a thread of its own, and what it tells is worked out on the controller's loop."""

import asyncio
import logging
import threading
from typing import Any

import pytest

from ps.controller import metrics
from ps.controller.metrics import _Figures, on_loop
from ps.loop import LoopThread

RECORD = {"epoch": 7, "slots_lost": 0, "slots_under_replicated": 0, "slots_learning": 0, "servers": []}


def test_the_status_is_worked_out_on_the_loop() -> None:
    thread, seen = LoopThread("test"), list[str]()

    def status() -> dict[str, Any]:
        seen.append(threading.current_thread().name)
        return RECORD

    told = {m.name: m.samples[0].value for m in _Figures(on_loop(status, thread.loop)).collect() if m.samples}
    thread.close()
    assert told["embring_epoch"] == 7
    assert seen == ["test"]


def test_a_loop_that_is_busy_gives_an_empty_page(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_S", 0.0)
    loop = asyncio.new_event_loop()  # which does not run yet
    with caplog.at_level(logging.WARNING, "embring.controller"):
        assert list(_Figures(on_loop(lambda: RECORD, loop)).collect()) == []
    assert "the metrics were not told: the controller was busy" in caplog.text
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
