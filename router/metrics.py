"""What a router tells Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = tuple(base * 10.0**power for power in (-5, -4, -3, -2, -1, 0) for base in (1, 2, 5))
_ROWS = tuple(2.0**power for power in range(15))


class RouterMetrics:
    """Counters and histograms of one router. Models are labels only once they are loaded: callers cannot invent any.

    registry: where they are kept; None is one of their own, so that several routers can live in one process.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        model = ["model", "version"]
        self.requests = self._counter("requests", "Requests answered with scores.", model)
        self.rows = self._counter("rows", "Rows scored.", model)
        self.errors = self._counter("errors", "Requests refused or failed, by the error's code.", ["model", "code"])
        self.absent = self._counter("absent_ids", "Ids pulled that have no row.", model)
        self.stage_seconds = Histogram(
            "embring_router_stage_seconds",
            "Time in a stage: prepare, queue and total for each request, pull and head for each batch.",
            [*model, "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "embring_router_batch_rows", "Rows of a batch.", model, buckets=_ROWS, registry=self.registry
        )
        self.batch_requests = Histogram(
            "embring_router_batch_requests", "Requests of a batch.", model, buckets=_ROWS[:10], registry=self.registry
        )
        self.queued_rows = Gauge("embring_router_queued_rows", "Rows waiting.", model, registry=self.registry)

    def _counter(self, name: str, doc: str, labels: list[str]) -> Counter:
        return Counter(f"embring_router_{name}", doc, labels, registry=self.registry)

    @contextmanager
    def stage(self, model: str, version: str, stage: str) -> Iterator[None]:
        """Time a block into the stage's histogram, whether it succeeds or not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stage_seconds.labels(model, version, stage).observe(time.perf_counter() - start)
