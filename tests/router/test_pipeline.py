"""The router in process, before a client that answers from arrays: scores, limits, deadlines, refusals, metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client import generate_latest

from dense_head import HeadFeature, HeadSpec, Predictor, build, save
from ps.errors import ConfigError, NotApplied, Overloaded, RequestError
from router.columns import Column, take_rows
from router.errors import DeadlineExceeded, NonFiniteScore, UnknownModel
from router.features import FeaturePrep
from router.pipeline import Router

LIMIT_S = 30.0
DIM = 4
FEATURES = """
[[input]]
name = "user"
dtype = "INT64"
[[input]]
name = "words"
dtype = "BYTES"
split = " "
[[input]]
name = "price"
dtype = "FP32"

[[feature]]
name = "user"
kind = "id"
inputs = ["user"]
table = "user"
[[feature]]
name = "words"
kind = "hash"
inputs = ["words"]
table = "words"
pooling = "mean"
[[feature]]
name = "price"
kind = "log"
inputs = ["price"]
"""
SPEC = HeadSpec(
    "mlp", (HeadFeature("user", "user", DIM), HeadFeature("words", "words", DIM, "mean")), dense=1, hidden=(8,)
)


def row_of(table: str, id_: int) -> NDArray[np.float32]:
    """The row of an id in these tests: a function of both; ids divisible by 7 have none."""
    if id_ % 7 == 0:
        return np.zeros(DIM, np.float32)
    return np.sin(np.arange(1, DIM + 1) * (id_ % 1000 + len(table))).astype(np.float32)


class FakeClient:
    """Answers pulls as a cluster would, one call at a time to look at; holds them while `gate` is closed."""

    def __init__(self, dims: Mapping[str, int] | None = None) -> None:
        self.dims = {"user": DIM, "words": DIM} if dims is None else dims
        self.calls: list[dict] = []
        self.last_absent = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()
        self.error: Exception | None = None
        self.rows: dict[int, NDArray[np.float32]] = {}

    async def describe(self, name: str) -> SimpleNamespace:
        if name not in self.dims:
            raise RequestError(f"table {name!r} is unknown")
        return SimpleNamespace(name=name, dim=self.dims[name])

    async def pull_bags(
        self, bags: Mapping[str, tuple], mode: Mapping[str, str], absent: str, timeout: float
    ) -> dict[str, NDArray[np.float32]]:
        self.calls.append({"bags": bags, "mode": mode, "absent": absent, "timeout": timeout})
        self.called.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        out, self.last_absent = {}, 0
        for table, (ids, offsets) in bags.items():
            pooled = np.zeros((len(offsets) - 1, DIM), np.float32)
            for b in range(len(pooled)):
                rows = [self.rows.get(int(i), row_of(table, int(i))) for i in ids[offsets[b] : offsets[b + 1]]]
                if rows:
                    pooled[b] = np.mean(rows, axis=0) if mode[table] == "mean" else np.sum(rows, axis=0)
            self.last_absent += int((ids % 7 == 0).sum())
            out[table] = pooled
        return out


def publish(models: Path, version: int = 1, seed: int = 0, model_toml: str = "", features: str = FEATURES) -> None:
    folder = models / "ctr" / str(version)
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(model_toml)
    (folder / "features.toml").write_text(features)
    torch.manual_seed(seed)
    save(folder / "head", SPEC, build(SPEC))


def columns(n: int, start: int = 0) -> dict[str, Column]:
    numbers = range(start, start + n)
    return {
        "user": Column.of(np.array(numbers, np.int64)),
        "words": Column.of([" ".join("abcdefg"[: i % 4]) for i in numbers]),
        "price": Column.of(np.array(numbers, np.float32)),
    }


def expected(models: Path, given: Mapping[str, Column], version: int = 1) -> NDArray[np.float32]:
    """Scores row by row, without router, batcher or client."""
    folder = models / "ctr" / str(version)
    prep, head = FeaturePrep.load(folder), Predictor.load(folder / "head")
    scores = []
    for b in range(given["user"].rows):
        one = prep.prepare(take_rows(given, np.array([b])))
        words = [row_of("words", int(i)) for i in one.bags["words"][0]]
        embeddings = {
            "user": row_of("user", int(one.bags["user"][0][0]))[None],
            "words": (np.mean(words, axis=0) if words else np.zeros(DIM, np.float32))[None],
        }
        scores.append(head.predict(embeddings, one.dense)[0])
    return np.array(scores, np.float32)


def run(models: Path, test: Callable[[Router, FakeClient], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            client = FakeClient()
            router = await Router(models, client).start()  # type: ignore[arg-type]
            try:
                await test(router, client)
            finally:
                client.gate.set()
                await router.close()

    asyncio.run(limited())


def queued_rows(router: Router) -> float | None:
    labels = {"model": "ctr", "version": "1"}
    return router.metrics.registry.get_sample_value("embring_router_queued_rows", labels)


def clock_that_jumps() -> Callable[[float], None]:
    """Lets the running loop's clock be set forward by seconds, so that a deadline passes when the test says so."""
    loop, skew = asyncio.get_running_loop(), 0.0
    real = loop.time

    def jump(seconds: float) -> None:
        nonlocal skew
        skew += seconds

    loop.time = lambda: real() + skew  # type: ignore[method-assign]
    return jump


def test_scores_are_those_of_each_row_alone_however_requests_are_batched(tmp_path: Path) -> None:
    publish(tmp_path, model_toml="inline_rows_max = 8\nbatch_rows_max = 40\n")
    sizes = [1, 3, 20, 2, 30, 7, 64]

    async def test(router: Router, client: FakeClient) -> None:
        asked = [columns(n, start=13 * i) for i, n in enumerate(sizes)]
        answers = await asyncio.gather(*(router.predict("ctr", None, given) for given in asked))
        for given, answer in zip(asked, answers, strict=True):
            assert answer.scores.dtype == np.float32
            assert (answer.model, answer.version) == ("ctr", "1")
            np.testing.assert_allclose(answer.scores, expected(tmp_path, given), atol=1e-6)
        assert len(client.calls) < len(sizes)  # some travelled together
        assert all(set(call["bags"]) == {"user", "words"} for call in client.calls)  # one pull for all tables
        assert all(call["absent"] == "zeros" for call in client.calls)

    run(tmp_path, test)


def test_prepared_ids_score_as_raw_columns_do(tmp_path: Path) -> None:
    publish(tmp_path)

    async def test(router: Router, client: FakeClient) -> None:
        given = columns(9)
        prepared = FeaturePrep.load(tmp_path / "ctr" / "1").prepare(given)
        ids = {f"ids:{name}": Column.of(*bags) for name, bags in prepared.bags.items()}
        raw = await router.predict("ctr", None, given)
        ready = await router.predict("ctr", None, {**ids, "dense": Column.of(prepared.dense)})
        np.testing.assert_array_equal(raw.scores, ready.scores)
        assert raw.absent == sum(int((b[0] % 7 == 0).sum()) for b in prepared.bags.values()) > 0

    run(tmp_path, test)


def test_versions_the_latest_by_number_and_unknown_ones_by_name(tmp_path: Path) -> None:
    for version in (2, 10):
        publish(tmp_path, version, seed=version)

    async def test(router: Router, client: FakeClient) -> None:
        assert router.live()
        assert router.ready()
        assert router.model_ready("ctr", "2")
        assert (await router.predict("ctr", None, columns(2))).version == "10"
        old = await router.predict("ctr", "2", columns(2))
        np.testing.assert_allclose(old.scores, expected(tmp_path, columns(2), 2), atol=1e-6)
        with pytest.raises(UnknownModel, match=r"there is no model 'ctx'; there are: ctr$"):
            await router.predict("ctx", None, columns(1))
        with pytest.raises(UnknownModel, match="no version '3'; it has 2, 10"):
            router.metadata("ctr", "3")
        metadata = router.metadata("ctr")
        assert [(t.name, t.datatype, t.shape) for t in metadata.inputs] == [
            ("user", "INT64", (-1,)),
            ("words", "BYTES", (-1,)),
            ("price", "FP32", (-1,)),
        ]
        assert [(t.name, t.datatype, t.shape) for t in metadata.outputs] == [("scores", "FP32", (-1,))]
        assert metadata.versions == ("2", "10")

    run(tmp_path, test)


def test_a_ragged_input_is_described_with_its_offsets(tmp_path: Path) -> None:
    publish(tmp_path, features=FEATURES.replace('split = " "', "ragged = true"))

    async def test(router: Router, client: FakeClient) -> None:
        assert [(t.name, t.datatype) for t in router.metadata("ctr").inputs] == [
            ("user", "INT64"),
            ("words", "BYTES"),
            ("words.offsets", "INT64"),
            ("price", "FP32"),
        ]

    run(tmp_path, test)


def test_bad_batches_are_refused_alone(tmp_path: Path) -> None:
    publish(tmp_path, model_toml="request_rows_max = 5\n")

    async def test(router: Router, client: FakeClient) -> None:
        missing = {name: column for name, column in columns(2).items() if name != "price"}
        good, *bad = await asyncio.gather(
            router.predict("ctr", None, columns(2)),
            router.predict("ctr", None, missing),
            router.predict("ctr", None, columns(6)),
            router.predict("ctr", None, columns(0)),
            router.predict("ctr", None, {}),
            return_exceptions=True,
        )
        assert len(good.scores) == 2
        assert [type(error) for error in bad] == [RequestError] * 4
        assert "'price' is missing" in str(bad[0])
        assert "has 6 rows; it must have 1 to 5" in str(bad[1])
        assert "has 0 rows" in str(bad[2])
        assert len(client.calls) == 1

    run(tmp_path, test)


def test_a_deadline_passed_names_its_stage_and_spares_the_patient(tmp_path: Path) -> None:
    publish(tmp_path, model_toml="batches_max = 1\n")

    async def test(router: Router, client: FakeClient) -> None:
        jump = clock_that_jumps()
        client.gate.clear()
        patient = asyncio.create_task(router.predict("ctr", None, columns(1), timeout=2 * LIMIT_S))
        await client.called.wait()
        hurried = asyncio.create_task(router.predict("ctr", None, columns(1), timeout=LIMIT_S / 3))
        while queued_rows(router) == 0:
            await asyncio.sleep(0)
        jump(LIMIT_S / 3)
        with pytest.raises(DeadlineExceeded, match="10000 ms passed in stage queue"):
            await hurried
        client.gate.set()
        assert len((await patient).scores) == 1
        client.gate.clear()
        client.called.clear()
        hurried = asyncio.create_task(router.predict("ctr", None, columns(1), timeout=LIMIT_S / 3))
        await client.called.wait()
        assert 0 < client.calls[-1]["timeout"] <= LIMIT_S / 3
        jump(LIMIT_S / 3)
        with pytest.raises(DeadlineExceeded, match="10000 ms passed in stage pull"):
            await hurried

    run(tmp_path, test)


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    publish(tmp_path, model_toml="batches_max = 1\nqueue_rows_max = 4\nrequest_rows_max = 4\n")

    async def test(router: Router, client: FakeClient) -> None:
        client.gate.clear()
        tasks = [asyncio.create_task(router.predict("ctr", None, columns(4)))]
        await client.called.wait()
        tasks.append(asyncio.create_task(router.predict("ctr", None, columns(3))))
        await asyncio.sleep(0)
        assert queued_rows(router) == 3
        with pytest.raises(Overloaded, match="limit of 4"):
            await router.predict("ctr", None, columns(2))
        client.gate.set()
        assert [len(p.scores) for p in await asyncio.gather(*tasks)] == [4, 3]

    run(tmp_path, test)


def test_what_the_pull_raises_reaches_the_caller(tmp_path: Path) -> None:
    publish(tmp_path)

    async def test(router: Router, client: FakeClient) -> None:
        client.error = NotApplied("no server answers")
        with pytest.raises(NotApplied, match="no server answers"):
            await router.predict("ctr", None, columns(1))
        client.error = None
        assert len((await router.predict("ctr", None, columns(1))).scores) == 1

    run(tmp_path, test)


def test_a_score_that_is_not_finite_fails_its_own_request_alone(tmp_path: Path) -> None:
    publish(tmp_path, model_toml="batches_max = 1\n")

    async def test(router: Router, client: FakeClient) -> None:
        client.rows[16] = np.full(DIM, np.nan, np.float32)
        client.gate.clear()
        first = asyncio.create_task(router.predict("ctr", None, columns(1)))
        await client.called.wait()
        tasks = [asyncio.create_task(router.predict("ctr", None, columns(4, start))) for start in (8, 13, 20)]
        await asyncio.sleep(0)
        client.gate.set()
        good, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
        assert len((await first).scores) == 1
        assert len(client.calls) == 2  # they travelled together
        for answer, start in ((good, 8), (other, 20)):
            np.testing.assert_allclose(answer.scores, expected(tmp_path, columns(4, start)), atol=1e-6)
        assert type(bad) is NonFiniteScore
        assert str(bad) == "model 'ctr' version 1 gave row 3 the score nan; it must be finite"
        value = router.metrics.registry.get_sample_value
        assert value("embring_router_errors_total", {"model": "ctr", "code": "non_finite"}) == 1

    run(tmp_path, test)


def test_metrics_count_requests_errors_stages_batches_and_absent_ids(tmp_path: Path) -> None:
    publish(tmp_path)

    async def test(router: Router, client: FakeClient) -> None:
        await router.predict("ctr", None, columns(3))
        with pytest.raises(RequestError):
            await router.predict("ctr", None, {})
        with pytest.raises(UnknownModel):
            await router.predict("made up", None, {})
        value = router.metrics.registry.get_sample_value
        both = {"model": "ctr", "version": "1"}
        assert value("embring_router_requests_total", both) == 1
        assert value("embring_router_rows_total", both) == 3
        assert value("embring_router_absent_ids_total", both) == client.last_absent > 0
        assert value("embring_router_batch_rows_sum", both) == 3
        assert value("embring_router_errors_total", {"model": "ctr", "code": "request"}) == 1
        assert value("embring_router_errors_total", {"model": "", "code": "unknown_model"}) == 1
        for stage in ("prepare", "queue", "pull", "head", "total"):
            assert value("embring_router_stage_seconds_count", {**both, "stage": stage}) == 1, stage
        body = generate_latest(router.metrics.registry)
        assert b"embring_router_stage_seconds_bucket" in body
        assert b"made up" not in body

    run(tmp_path, test)


def test_callable_without_an_event_loop(tmp_path: Path) -> None:
    publish(tmp_path)

    async def connect() -> FakeClient:
        client = FakeClient()
        client.close = closing  # type: ignore[attr-defined]
        return client

    closed = []

    async def closing() -> None:
        closed.append(True)

    with Router.in_thread(tmp_path, connect) as router:  # type: ignore[arg-type]
        given = columns(5)
        answer = router.predict_sync("ctr", None, given)
        np.testing.assert_allclose(answer.scores, expected(tmp_path, given), atol=1e-6)
        with pytest.raises(UnknownModel):
            router.predict_sync("other", None, given)
    assert closed == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_toml": "colour = 1\n"}, "unknown key 'colour'"),
        ({"model_toml": "batch_rows_max = 0\n"}, "batch_rows_max is 0; it must be 1 to"),
        ({"model_toml": 'timeout_ms = "long"\n'}, "timeout_ms is 'long'; it must be a number"),
        ({"model_toml": "request_rows_max = 9\nqueue_rows_max = 8\n"}, "must not exceed queue_rows_max"),
        ({"features": FEATURES.replace('table = "words"', 'table = "other"')}, "feature 'words' has"),
        ({"features": FEATURES.replace('"price"\nkind = "log"', '"price"\nkind = "lgo"')}, "kind is 'lgo'"),
    ],
)
def test_a_malformed_model_names_file_and_key(tmp_path: Path, change: dict, message: str) -> None:
    publish(tmp_path, **change)
    with pytest.raises(ConfigError, match=message):
        Router(tmp_path, FakeClient())  # type: ignore[arg-type]


def test_a_repository_that_is_none(tmp_path: Path) -> None:
    client = FakeClient()
    with pytest.raises(ConfigError, match="there is no model repository"):
        Router(tmp_path / "models", client)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no model in"):
        Router(tmp_path, client)  # type: ignore[arg-type]
    publish(tmp_path)
    (tmp_path / "ctr" / "1" / "head" / "head.json").unlink()
    with pytest.raises(ConfigError, match=r"model 'ctr' version 1: .*head\.json is missing"):
        Router(tmp_path, client)  # type: ignore[arg-type]
    (tmp_path / "ctr" / "1").rename(tmp_path / "ctr" / "one")
    with pytest.raises(ConfigError, match="one is no version"):
        Router(tmp_path, client)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dims", "message"),
    [({"user": DIM}, "table 'words' is unknown"), ({"user": DIM, "words": 9}, "'words' has dim 9; the head takes 4")],
)
def test_tables_that_are_not_those_of_the_head(tmp_path: Path, dims: dict[str, int], message: str) -> None:
    publish(tmp_path)

    async def start() -> None:
        await Router(tmp_path, FakeClient(dims)).start()  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=message):
        asyncio.run(start())
