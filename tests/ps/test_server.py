"""The actor around a server: what needs neither Ray nor a data thread."""

import asyncio

from ps.server import Server


def test_only_one_waits_for_a_servers_end() -> None:
    """Watchers that nobody hears any more leave room for other calls: the one before ends when the next comes."""

    async def watch() -> list[bool]:
        server = object.__new__(Server)
        server._watched = asyncio.Event()
        calls = [asyncio.ensure_future(server.forever()) for _ in range(3)]
        done, _ = await asyncio.wait(calls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 2:
            more, _ = await asyncio.wait(set(calls) - done, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            assert more
            done |= more
        ended = [call.done() for call in calls]
        calls[2].cancel()
        return ended

    assert asyncio.run(watch()) == [True, True, False]
