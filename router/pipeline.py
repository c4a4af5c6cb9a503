"""Router: raw columns in, scores out. prepare -> batch -> one pull for all tables -> head.

    router = Router("models", client)
    await router.start()
    prediction = await router.predict("ctr", None, {"user": Column.of([7]), "genres": Column.of(["Drama|Crime"])})

In a program without an event loop:

    with Router.in_thread("models") as router:
        scores = router.predict_sync("ctr", None, columns).scores
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

import ps
from dense_head import HeadError
from ps.errors import ConfigError, EmbringError, NotApplied, RequestError
from router.batcher import Batcher
from router.columns import Column
from router.config import RouterSettings, find_models
from router.errors import DeadlineExceeded, NonFiniteScore, UnknownModel
from router.feature_kernels import warmup
from router.features import Prepared
from router.metrics import RouterMetrics
from router.models import LoadedModel, ModelMetadata

START_S = 120.0
"""What starting or closing a router in a thread may take."""

OVERHEAD_S = 60.0
"""What `predict_sync` grants beyond a request's own time before it gives up on its event loop."""


@dataclass(frozen=True)
class Prediction:
    """scores float32[B]; absent: how many ids had no row, in the whole batch that the request was part of."""

    scores: NDArray[np.float32]
    model: str
    version: str
    absent: int


@dataclass(slots=True)
class _Request:
    prepared: Prepared
    deadline: float
    stage: str
    since: float


class Router:
    """Serves every model of a repository from the tables of one cluster. Lives on one event loop.

    client: connected to the cluster that holds the models' tables; the caller closes it after the router.
    metrics: where to count; None is a registry of the router's own.
    Raises ConfigError, naming file and key, where a model of the repository is malformed.
    """

    def __init__(
        self,
        models_dir: str | Path,
        client: "ps.AsyncClient",
        settings: RouterSettings | None = None,
        metrics: RouterMetrics | None = None,
    ) -> None:
        self.settings = settings or RouterSettings()
        self.metrics = metrics or RouterMetrics()
        self._client = client
        self._models = {
            name: {str(v): LoadedModel.load(name, v, folder, self.settings.device) for v, folder in versions.items()}
            for name, versions in find_models(Path(models_dir)).items()
        }
        self._threads = ThreadPoolExecutor(self.settings.threads, "head")
        self._batchers: dict[tuple[str, str], Batcher[_Request, Prediction]] = {}
        self._heads: dict[tuple[str, str], asyncio.Lock] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = False

    async def start(self) -> "Router":
        """Warm up, check the tables against the cluster, be ready. ConfigError names a table that differs; then it may
        be started again."""
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(self._threads, warmup)
        for model in self._all():
            await self._check_tables(model)
            key = (model.name, model.version)
            self._heads[key] = asyncio.Lock()
            self._batchers[key] = self._batcher(model)
            await self._loop.run_in_executor(self._threads, model.predictor.warmup)
        self._ready = True
        return self

    async def close(self) -> None:
        """Refuse what waits, let batches on their way end, release the threads."""
        self._ready = False
        await asyncio.gather(*(batcher.close() for batcher in self._batchers.values()))
        self._threads.shutdown(wait=False)

    def live(self) -> bool:
        """Whether the process answers at all."""
        return True

    def ready(self) -> bool:
        """Whether every model is loaded, warm and connected to its tables."""
        return self._ready

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models served."""
        return tuple(self._models)

    def model_ready(self, model: str, version: str | None = None) -> bool:
        """Whether this version (None: the latest) answers; UnknownModel where there is none."""
        self._find(model, version)
        return self._ready

    def metadata(self, model: str, version: str | None = None) -> ModelMetadata:
        """Inputs and outputs of a model, for the front doors; UnknownModel names it."""
        found = self._find(model, version)
        return found.metadata(tuple(self._models[model]))

    async def predict(
        self, model: str, version: str | None, columns: Mapping[str, Column], timeout: float | None = None
    ) -> Prediction:
        """Scores of a batch of raw columns, or of prepared ids (router.features says how they are named).

        version None or "": the latest. timeout in seconds, None: the model's own. UnknownModel, RequestError for a bad
        batch, Overloaded where the queue is full, DeadlineExceeded naming the stage, NonFiniteScore naming a row, else
        what the pull raised.
        """
        start = time.perf_counter()
        try:
            found = self._find(model, version)
        except UnknownModel as error:
            self.metrics.errors.labels("", error.code).inc()
            raise
        labels = (found.name, found.version)
        try:
            prediction = await self._predict(found, columns, timeout)
        except EmbringError as error:
            self.metrics.errors.labels(found.name, error.code).inc()
            raise
        except Exception:
            self.metrics.errors.labels(found.name, "internal").inc()
            raise
        self.metrics.requests.labels(*labels).inc()
        self.metrics.rows.labels(*labels).inc(len(prediction.scores))
        self.metrics.stage_seconds.labels(*labels, "total").observe(time.perf_counter() - start)
        return prediction

    def predict_sync(
        self, model: str, version: str | None, columns: Mapping[str, Column], timeout: float | None = None
    ) -> Prediction:
        """`predict` from a thread other than the router's own (see `in_thread`); the same errors."""
        if self._loop is None:
            raise NotApplied("the router has not started")
        future = asyncio.run_coroutine_threadsafe(self.predict(model, version, columns, timeout), self._loop)
        return future.result((timeout or 600.0) + OVERHEAD_S)

    @classmethod
    @contextmanager
    def in_thread(
        cls,
        models_dir: str | Path,
        connect: Callable[[], Awaitable["ps.AsyncClient"]] | None = None,
        settings: RouterSettings | None = None,
    ) -> Iterator["Router"]:
        """A started router on an event loop in a thread of its own, for `predict_sync`.

        connect: how to reach the cluster; None is `AsyncClient.connect()`, which looks where `ps.connect()` does.
        """

        async def begin() -> tuple["Router", "ps.AsyncClient"]:
            client = await (connect or ps.AsyncClient.connect)()
            try:
                return await cls(models_dir, client, settings).start(), client
            except BaseException:
                await client.close()
                raise

        loop = uvloop.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="router", daemon=True)
        thread.start()
        try:
            router, client = asyncio.run_coroutine_threadsafe(begin(), loop).result(START_S)
            try:
                yield router
            finally:
                asyncio.run_coroutine_threadsafe(router.close(), loop).result(START_S)
                asyncio.run_coroutine_threadsafe(client.close(), loop).result(START_S)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(START_S)
            loop.close()

    def _all(self) -> Iterator[LoadedModel]:
        for versions in self._models.values():
            yield from versions.values()

    def _find(self, name: str, version: str | None) -> LoadedModel:
        versions = self._models.get(name)
        if versions is None:
            raise UnknownModel(f"there is no model {name!r}; there are: {', '.join(self._models)}")
        chosen = version or next(reversed(versions))
        if chosen not in versions:
            raise UnknownModel(f"model {name!r} has no version {chosen!r}; it has {', '.join(versions)}")
        return versions[chosen]

    async def _check_tables(self, model: LoadedModel) -> None:
        for feature in model.predictor.spec.features:
            try:
                described = await self._client.describe(feature.table)
            except RequestError as error:
                raise ConfigError(f"model {model.name!r} version {model.version}: {error}") from None
            if described.dim != feature.dim:
                raise ConfigError(
                    f"model {model.name!r} version {model.version}: table {feature.table!r} has dim {described.dim}; "
                    f"the head takes {feature.dim}"
                )

    def _batcher(self, model: LoadedModel) -> Batcher[_Request, Prediction]:
        async def run(requests: list[_Request]) -> list[Prediction]:
            return await self._answer(model, requests)

        config = model.config
        batcher = Batcher(
            run,
            rows_max=config.batch_rows_max,
            wait_s=config.batch_wait_ms / 1e3,
            queue_rows_max=config.queue_rows_max,
            batches_max=config.batches_max,
        )
        self.metrics.queued_rows.labels(model.name, model.version).set_function(lambda: batcher.queued_rows)
        return batcher

    async def _predict(self, model: LoadedModel, columns: Mapping[str, Column], timeout: float | None) -> Prediction:
        if not self._ready:
            raise NotApplied("the router is not ready")
        timeout = model.config.timeout_ms / 1e3 if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + timeout
        rows = max((column.rows for column in columns.values()), default=0)
        if not 1 <= rows <= model.config.request_rows_max:
            raise RequestError(f"the request has {rows} rows; it must have 1 to {model.config.request_rows_max}")
        with self.metrics.stage(model.name, model.version, "prepare"):
            prepared = model.features.prepare(columns)
        request = _Request(prepared, deadline, "queue", time.perf_counter())
        batcher = self._batchers[model.name, model.version]
        try:
            async with asyncio.timeout_at(deadline):
                prediction = await batcher.submit(request, rows)
        except TimeoutError:
            late = f"model {model.name!r}: the deadline of {timeout * 1e3:.0f} ms passed in stage {request.stage}"
            raise DeadlineExceeded(late) from None
        _check_finite(prediction)
        return prediction

    async def _answer(self, model: LoadedModel, requests: list[_Request]) -> list[Prediction]:
        """One batch: every request's scores, from one pull and one run of the head."""
        labels, metrics = (model.name, model.version), self.metrics
        now = time.perf_counter()
        for request in requests:
            metrics.stage_seconds.labels(*labels, "queue").observe(now - request.since)
            request.stage = "pull"
        batch = Prepared.join([request.prepared for request in requests])
        metrics.batch_rows.labels(*labels).observe(batch.rows)
        metrics.batch_requests.labels(*labels).observe(len(requests))
        # The most patient request decides: a hurried one leaves alone, by its own deadline.
        left = max(request.deadline for request in requests) - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded(f"model {model.name!r}: the deadline passed in stage queue")
        with metrics.stage(*labels, "pull"):
            bags = model.features.by_table(batch)
            absent_answer: Any = model.config.absent  # one of the choices that its setting allows
            pooled = await self._client.pull_bags(bags, model.features.modes, absent_answer, left)
            absent = self._client.last_absent
        metrics.absent.labels(*labels).inc(absent)
        for request in requests:
            request.stage = "head"
        with metrics.stage(*labels, "head"):
            scores = await self._score(model, model.features.by_feature(pooled), batch.dense)
        ends = np.cumsum([request.prepared.rows for request in requests])[:-1]
        return [Prediction(part, *labels, absent) for part in np.split(scores, ends)]

    async def _score(
        self, model: LoadedModel, embeddings: dict[str, NDArray[np.float32]], dense: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        matrix = dense if dense.shape[1] else None
        arguments: tuple[Any, ...] = (embeddings, matrix)
        try:
            async with self._heads[model.name, model.version]:  # a Predictor is used by one thread at a time
                if len(dense) <= model.config.inline_rows_max:
                    return model.predictor.predict(*arguments)
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, model.predictor.predict, *arguments)
        except HeadError as error:
            raise RequestError(f"model {model.name!r}: {error}") from None


def _check_finite(prediction: Prediction) -> None:
    """NonFiniteScore names the first row whose score is NaN or infinite.

    Asked of each request, so that nobody fails who merely travelled with such a row; and before any door, so that the
    answer is the same over all: JSON has no NaN, and binary outputs would carry what cannot be ranked.
    """
    finite = np.isfinite(prediction.scores)
    if not finite.all():
        row = int(finite.argmin())
        raise NonFiniteScore(
            f"model {prediction.model!r} version {prediction.version} gave row {row} the score "
            f"{prediction.scores[row]}; it must be finite"
        )
