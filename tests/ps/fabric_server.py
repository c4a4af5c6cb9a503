"""A listener on a thread of its own, with a handler whose slow requests end when the test says so."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from ps.errors import ERRORS, RequestError
from ps.fabric.blocking import BlockingConnection
from ps.fabric.listen import Listener, ListenLimits, ListenStatistics
from ps.fabric.protocol import Hello, Welcome
from ps.loop import LoopThread
from ps.wire import LIMITS, FrameLimits, Message

WAIT_S = 20.0
"""No wait of a test lasts longer."""

WELCOME = Welcome(cluster=5, epoch=3, name="a", incarnation=77, fingerprint="fp", slot_bits=14)
HELLO = Hello("secret")


class EchoServer:
    """Ops: echo; fail {error}; crash; hold (answers at `release()`); big {size} -> rows; nap {ms} blocks the thread."""

    def __init__(
        self, token: str, limits: ListenLimits, frames: FrameLimits, tls=None, tcp: bool = True, first=()
    ) -> None:
        self._thread = LoopThread("test server")
        self._held = asyncio.Event()
        self.handled: list[str] = []
        self.listener = Listener(self._handle, token, lambda: WELCOME, frames, limits, first)
        self.path = Path(mkdtemp(prefix="eb")) / "s"
        addresses = [f"unix:{self.path}"] + (["tcp:127.0.0.1:0"] if tcp else [])
        self.unix, *rest = self._thread.call(self.listener.start(addresses, tls), WAIT_S)
        self.tcp = rest[0] if rest else ""

    def _handle(self, request: Message, waited: float):
        self.handled.append(request.op)
        match request.op:
            case "echo" | "ping":
                return dict(request.fields), request.arrays
            case "fail":
                raise ERRORS[request.fields["error"]]("as you wish")
            case "crash":
                raise KeyError("a fault of ours")
            case "big":
                return {}, {"rows": np.arange(request.fields["size"], dtype=np.float32)}
            case "nap":
                time.sleep(request.fields["ms"] / 1000)
                return {}, {}
            case "unsendable":
                return {}, {"rows": np.zeros(1, bool)}
            case "hold":
                return self._hold()
        raise RequestError("no such operation")

    async def _hold(self):
        await self._held.wait()
        return {"held": True}, {}

    def release(self) -> None:
        """Answer what is held, now and from now on."""
        self.on_loop(self._held.set)

    def on_loop(self, call):
        """Call something on the server's thread."""

        async def run():
            return call()

        return self._thread.call(run(), WAIT_S)

    def statistics(self) -> ListenStatistics:
        return self.on_loop(self.listener.statistics)

    def until(self, condition) -> None:
        """Wait until the statistics fulfil a condition."""
        end = time.monotonic() + WAIT_S
        pause = threading.Event()
        while not condition(self.statistics()):
            assert time.monotonic() < end, self.statistics()
            pause.wait(0.005)

    def connect(self, address: str = "", hello: Hello = HELLO, **kwargs) -> BlockingConnection:
        return BlockingConnection.connect(address or self.unix, hello, WAIT_S, **kwargs)

    def stop_listening(self) -> None:
        self._thread.call(self.listener.close(), WAIT_S)

    def close(self) -> None:
        self.stop_listening()
        self._thread.close()
        self.path.parent.rmdir()


@contextmanager
def echo_server(
    token: str = "secret", limits: ListenLimits | None = None, frames: FrameLimits = LIMITS, **kwargs
) -> Iterator[EchoServer]:
    server = EchoServer(token, limits or ListenLimits(), frames, **kwargs)
    try:
        yield server
    finally:
        server.close()
