"""HttpClient and GrpcClient against the doors: over a fake pipeline, what arrives and which error comes back; over the
real one, the scores of each row alone."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import EmbringError, NotApplied, Overloaded, PerhapsApplied, RequestError
from router.columns import BytesColumn, Column
from router.errors import DeadlineExceeded, UnknownModel
from router.grpc_client import GrpcClient
from router.grpc_door import serve_grpc
from router.http_client import HttpClient
from router.http_door import serve_http
from router.pipeline import Router
from tests.router.doors_fake import FakeRouter, score
from tests.router.test_pipeline import FakeClient, columns, expected, publish

LIMIT_S = 60.0
clients = pytest.mark.parametrize("kind", ["http", "grpc"])
Client = HttpClient | GrpcClient


def connected(kind: str, address: str) -> Client:
    return HttpClient(address) if kind == "http" else GrpcClient(address)


def through(kind: str, router: Any, test: Callable[[Client], Awaitable[None]]) -> None:
    """Run a test with a client of a door before a router, all on one loop."""

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            serve = serve_http if kind == "http" else serve_grpc
            door = await serve(router, "127.0.0.1", 0)
            try:
                async with connected(kind, f"127.0.0.1:{door.port}") as client:
                    await test(client)
            finally:
                await (door.stop() if kind == "http" else door.stop(0.1))

    asyncio.run(limited())


def same(sent: Mapping[str, Column], seen: Mapping[str, Column]) -> None:
    assert list(sent) == list(seen)
    for name, column in sent.items():
        other = seen[name]
        assert column.dtype == other.dtype
        if isinstance(column.values, BytesColumn):
            assert column.values.to_list() == other.values.to_list()
        else:
            np.testing.assert_array_equal(column.values, other.values)
        assert (column.offsets is None) == (other.offsets is None)
        if column.offsets is not None:
            np.testing.assert_array_equal(column.offsets, other.offsets)


# -- over a fake pipeline

INT64S = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(width=32, allow_nan=True)
TEXTS = st.text(max_size=5)


@st.composite
def some_columns(draw: st.DrawFn) -> dict[str, Column]:
    """Every datatype, one value a row and many, empty strings and empty rows."""
    rows = draw(st.integers(1, 4))

    def of(values: st.SearchStrategy) -> list:
        return draw(st.lists(values, min_size=rows, max_size=rows))

    return {
        "user": Column.of(of(TEXTS)),
        "id": Column.of(np.array(of(INT64S), np.int64)),
        "price": Column.of(np.array(of(FLOATS), np.float32)),
        "pair": Column.of(np.array(of(st.tuples(FLOATS, FLOATS)), np.float32)),
        "words": Column.of_lists(of(st.lists(TEXTS, max_size=3)), "BYTES"),
        "item": Column.of_lists(of(st.lists(INT64S, max_size=3)), "INT64"),
    }


@clients
@settings(max_examples=25)
@given(some_columns())
def test_every_column_arrives_as_it_was_sent(kind: str, sent: dict[str, Column]) -> None:
    router = FakeRouter()

    async def test(client: Client) -> None:
        scores = await client.infer("ctr", sent)
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores, score(sent))

    with np.errstate(all="ignore"):
        through(kind, router, test)
    same(sent, router.seen[0])


@clients
def test_strings_that_are_no_utf8(kind: str) -> None:
    router, sent = FakeRouter(), {"user": Column.of(BytesColumn.of([b"\xff\x00", b"ok"]))}

    async def test(client: Client) -> None:
        if kind == "http":
            with pytest.raises(RequestError, match=r"input 'user' holds b'\\xff\\x00', which JSON cannot carry"):
                await client.infer("ctr", sent)
        else:
            assert (await client.infer("ctr", sent)).tolist() == [2.0, 2.0]
            same(sent, router.seen[0])

    through(kind, router, test)


@clients
@pytest.mark.parametrize(
    ("error", "meets"),
    [
        (RequestError("price of row 3 is bad"), RequestError),
        (UnknownModel("there is no model 'x'; there are: ctr"), RequestError),
        (NotApplied("the servers are away"), NotApplied),
        (Overloaded("16384 rows wait already"), NotApplied),
        (PerhapsApplied("no answer within 1 s"), EmbringError),
        (DeadlineExceeded("the deadline of 5 ms passed in stage pull"), EmbringError),
    ],
)
def test_errors_come_back_in_the_routers_words(kind: str, error: Exception, meets: type[Exception]) -> None:
    async def test(client: Client) -> None:
        with pytest.raises(meets) as caught:
            await client.infer("ctr", columns(1))
        assert str(error) in str(caught.value)
        router.error = None
        assert len(await client.infer("ctr", columns(1))) == 1

    router = FakeRouter(error=error)
    through(kind, router, test)


@clients
def test_an_unknown_model_is_the_callers_fault(kind: str) -> None:
    async def test(client: Client) -> None:
        with pytest.raises(RequestError, match="there is no model 'nope'; there are: ctr"):
            await client.infer("nope", columns(1))

    through(kind, FakeRouter(), test)


def test_metadata_over_http() -> None:
    async def test(client: Any) -> None:
        told = await client.metadata("ctr")
        assert [one["name"] for one in told["inputs"]] == ["user", "item", "item.offsets"]
        assert told["versions"] == ["1", "2"]
        with pytest.raises(RequestError, match="there is no model 'nope'; there are: ctr"):
            await client.metadata("nope")

    through("http", FakeRouter(), test)


# -- where there is no router


@contextmanager
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@clients
def test_nobody_there_and_nobody_who_answers(kind: str) -> None:
    async def ask(address: str, timeout: float) -> None:
        async with asyncio.timeout(LIMIT_S), connected(kind, address) as client:
            await client.infer("ctr", columns(1), timeout=timeout)

    with silent() as address, pytest.raises(PerhapsApplied):
        asyncio.run(ask(address, 0.2))
    with pytest.raises(NotApplied, match=rf"the router at .*{address}"):
        asyncio.run(ask(address, LIMIT_S))


def test_a_server_that_is_no_router() -> None:
    async def main(answer: bytes) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            async with asyncio.timeout(LIMIT_S), HttpClient(f"127.0.0.1:{port}") as client:
                await client.metadata("ctr")
        finally:
            server.close()

    page = b"<html>"
    for status, meets in ((404, RequestError), (502, NotApplied)):
        head = f"HTTP/1.1 {status} No\r\nContent-Length: {len(page)}\r\nConnection: close\r\n\r\n"
        with pytest.raises(meets, match=f"HTTP status {status}"):
            asyncio.run(main(head.encode() + page))


# -- over the real pipeline


def test_both_doors_over_one_real_pipeline(tmp_path: Path) -> None:
    """Scores over gRPC, over HTTP and in process are those of each row alone, while requests share batches."""
    publish(tmp_path, model_toml="batch_wait_ms = 20\nrequest_rows_max = 50\n")
    sizes = [1, 17, 3, 40, 8]
    given = [columns(n, start=100 * k) for k, n in enumerate(sizes)]

    async def main() -> list[list[np.ndarray]]:
        tables = FakeClient()
        router = await Router(tmp_path, tables).start()  # type: ignore[arg-type]
        grpc_door, http_door = await serve_grpc(router, "127.0.0.1", 0), await serve_http(router, "127.0.0.1", 0)
        try:
            async with (
                asyncio.timeout(LIMIT_S),
                GrpcClient(f"127.0.0.1:{grpc_door.port}") as grpc_client,
                HttpClient(f"127.0.0.1:{http_door.port}") as http_client,
            ):
                asked = [c.infer("ctr", one) for c in (grpc_client, http_client) for one in given]
                remote = await asyncio.gather(*asked)
                assert len(tables.calls) < len(asked)  # some shared a batch
                local = [(await router.predict("ctr", None, one)).scores for one in given]
                told = await http_client.metadata("ctr")
                assert [one["name"] for one in told["inputs"]] == ["user", "words", "price"]
                for client in (grpc_client, http_client):
                    with pytest.raises(RequestError, match="the request has 51 rows; it must have 1 to 50"):
                        await client.infer("ctr", columns(51))
                    with pytest.raises(RequestError, match="'price'"):
                        await client.infer("ctr", {k: v for k, v in columns(2).items() if k != "price"})
                tables.error = NotApplied("server 's1' cannot be reached")
                for client in (grpc_client, http_client):
                    with pytest.raises(NotApplied, match="server 's1' cannot be reached"):
                        await client.infer("ctr", columns(2))
        finally:
            await grpc_door.stop(0.1)
            await http_door.stop()
            await router.close()
        return [remote[: len(given)], remote[len(given) :], local]

    by_grpc, by_http, local = asyncio.run(main())
    for one, *answers in zip(given, by_grpc, by_http, local, strict=True):
        alone = expected(tmp_path, one)
        for scores in answers:
            np.testing.assert_allclose(scores, alone, atol=1e-5)
