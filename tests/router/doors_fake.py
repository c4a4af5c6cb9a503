"""A router that scores without a parameter server, and doors that run beside the test's thread."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter

from router.columns import BytesColumn, Column
from router.errors import DeadlineExceeded, UnknownModel
from router.models import ModelMetadata, TensorMetadata
from router.pipeline import Prediction


class Counted:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Counter("fake_router_requests", "Requests.", registry=self.registry).inc(7)


@dataclass
class FakeRouter:
    """Model "ctr", versions 1 and 2. A row's score is the sum over inputs of its numbers or of its strings' lengths."""

    error: Exception | None = None
    is_ready: bool = True
    seen: list[dict[str, Column]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    hold: bool = False
    metrics: Counted = field(default_factory=Counted)

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    def model_ready(self, model: str, version: str | None) -> bool:
        self.metadata(model, version)
        return self.is_ready

    def metadata(self, model: str, version: str | None) -> ModelMetadata:
        if model != "ctr":
            raise UnknownModel(f"there is no model {model!r}; there are: ctr")
        if version not in (None, "1", "2"):
            raise UnknownModel(f"model {model!r} has no version {version!r}; it has 1, 2")
        inputs = (
            TensorMetadata("user", "BYTES", (-1,)),
            TensorMetadata("item", "INT64", (-1,)),
            TensorMetadata("item.offsets", "INT64", (-1,)),
        )
        return ModelMetadata("ctr", ("1", "2"), "embring", inputs, (TensorMetadata("scores", "FP32", (-1,)),))

    async def predict(
        self, model: str, version: str | None, columns: Mapping[str, Column], timeout: float | None
    ) -> Prediction:
        self.metadata(model, version)
        self.seen.append(dict(columns))
        self.timeouts.append(timeout)
        if self.error:
            raise self.error
        if self.hold:
            await asyncio.sleep(timeout or 0)
            raise DeadlineExceeded(f"the deadline of {timeout:g} s passed while the request waited")
        return Prediction(score(columns), model, version or "2", 3)


def score(columns: Mapping[str, Column]) -> NDArray[np.float32]:
    """float32[B], written plainly."""
    rows = next(iter(columns.values())).rows
    out = np.zeros(rows, np.float32)
    for column in columns.values():
        for b in range(rows):
            start, stop = (b, b + 1) if column.offsets is None else column.offsets[b : b + 2]
            for i in range(start, stop):
                values = column.values
                out[b] += len(values.to_list()[i]) if isinstance(values, BytesColumn) else values[i].sum()
    return out


class Beside:
    """An event loop in a thread of its own, so that blocking clients can be used from the test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float = 30.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def close(self, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.run(stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()
