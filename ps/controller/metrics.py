"""The servers' figures as Prometheus metrics, and the page that serves them."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Status = Mapping[str, Any]
"""The controller's status record (ps.controller.status)."""

SCRAPE_S = 5.0
"""How long a scrape waits for the status: Prometheus itself gives up after ten seconds."""

log = logging.getLogger("embring.controller")

_CLUSTER = (
    ("epoch", "Epoch of the view"),
    ("slots_lost", "Slots whose rows are lost"),
    ("slots_under_replicated", "Slots with fewer living owners than their tables ask for"),
    ("slots_learning", "Slots that are being copied to further owners"),
)
_GAUGES = (
    ("rows", "Rows held"),
    ("bytes", "Bytes of rows, state and metadata held"),
    ("slots", "Slots whose primary the server is"),
    ("unanswered", "Pings unanswered, one after another"),
    ("lag_changes", "Changes of one slot that another owner lacks, at the most"),
    ("lag_s", "Seconds that another owner has owed an answer, at the most"),
)
_COUNTERS = (
    ("requests", "Requests answered"),
    ("errors", "Requests answered with an error"),
    ("absent_ids", "Ids asked for that had no row"),
    ("restarts", "Times the server was started again"),
)


class _Figures(Collector):
    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        try:
            status = self._status()
        except TimeoutError:  # an empty page: a scrape has a deadline of its own, and comes again
            log.warning("the metrics were not told: the controller was busy for %g s", SCRAPE_S)
            return
        for name, text in _CLUSTER:
            metric = GaugeMetricFamily(f"embring_{name}", text)
            metric.add_metric([], float(status[name]))
            yield metric
        up = GaugeMetricFamily("embring_server_up", "1 where the server lives", labels=["server"])
        for server in status["servers"]:
            up.add_metric([server["name"]], float(server["state"] == "alive"))
        yield up
        for name, text in _GAUGES:
            gauge = GaugeMetricFamily(f"embring_server_{name}", text, labels=["server"])
            for server in status["servers"]:
                gauge.add_metric([server["name"]], float(server.get(name, 0)))
            yield gauge
        for name, text in _COUNTERS:
            counter = CounterMetricFamily(f"embring_server_{name}", text, labels=["server"])
            for server in status["servers"]:
                counter.add_metric([server["name"]], float(server.get(name, 0)))
            yield counter


def on_loop(status: Callable[[], Status], loop: asyncio.AbstractEventLoop) -> Callable[[], Status]:
    """`status`, worked out on the loop, for callers on other threads: what it looks at changes there alone, and a look
    may itself change what is remembered of it. TimeoutError where the loop does not come to it in time."""

    async def told() -> Status:
        return status()

    def ask() -> Status:
        asked = asyncio.run_coroutine_threadsafe(told(), loop)
        try:
            return asked.result(SCRAPE_S)
        except TimeoutError:
            asked.cancel()
            raise

    return ask


def serve_metrics(status: Callable[[], Status], port: int) -> tuple[str, Callable[[], None]]:
    """Serve the metrics on the loopback; (URL, how to stop). port 0 takes a free one. Raises OSError."""
    registry = CollectorRegistry()
    registry.register(_Figures(status))
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return f"http://127.0.0.1:{server.server_port}/metrics", stop
