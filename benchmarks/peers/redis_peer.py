"""Redis as an embedding store: what people fall back to.

Best settings known: a Unix socket, no persistence, keys of 8 bytes, unique ids only, MGETs of `CHUNK` keys sent one
behind another before the first answer is read, hiredis on both ways, and one torch call to pool all tables. Written on
hiredis and a socket directly: redis-py's own pipeline over the same hiredis took longer for the same answers.
"""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.process import PeerMissing, PeerProcess
from benchmarks.workloads import Batch, Workload

CHUNK = 512
HOW = "install it with `apt-get install redis-server` and `pip install redis[hiredis]`"


class RedisBags:
    """The tables of a workload in a Redis server of our own."""

    def __init__(self, workload: Workload) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            raise PeerMissing(f"Redis is not measured: there is no redis-server on the PATH; {HOW}")
        try:
            import hiredis
        except ImportError:
            raise PeerMissing(f"Redis is not measured: the Python package hiredis is missing; {HOW}") from None
        torch.set_num_threads(1)
        self.hiredis: Any = hiredis
        self.number = {name: i for i, name in enumerate(workload.tables)}
        self.dim = workload.shape.dim
        self.folder = tempfile.TemporaryDirectory(prefix="embring-redis-")
        path = f"{self.folder.name}/socket"
        options = ["--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", self.folder.name]
        self.server = PeerProcess([program, *options])
        self.server.wait_for(Path(path).exists)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.reader: Any = hiredis.Reader()
        self.buffer = bytearray(1 << 20)
        for i in range(len(workload.tables)):
            self._load(i, workload.values(i))

    def pool(self, batch: Batch) -> list[NDArray[np.float32]]:
        """float32[B, dim] of each table, in the order of the batch."""
        keys = np.concatenate([ids | self.number[name] << 40 for name, (ids, _) in batch.items()])
        unique, inverse = torch.unique(torch.from_numpy(keys), return_inverse=True)  # five times as fast as numpy's
        names = _keys(unique.numpy())
        chunks = [names[at : at + CHUNK] for at in range(0, len(names), CHUNK)]
        commands = [self.hiredis.pack_command((b"MGET", *chunk)) for chunk in chunks]
        parts = [part for answer in self._exchange(commands) for part in answer]
        rows = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.float32).view(-1, self.dim)
        ends, at = [], 0
        for ids, offsets in batch.values():
            ends.append(offsets[:-1] + at)
            at += len(ids)
        bags = torch.from_numpy(np.concatenate([*ends, [at]]))
        with torch.inference_mode():
            pooled = torch.nn.functional.embedding_bag(
                inverse, rows, bags, mode="sum", include_last_offset=True
            ).numpy()
        return np.split(pooled, np.cumsum([len(offsets) - 1 for _, offsets in batch.values()])[:-1])

    def close(self) -> None:
        """End the server."""
        self.socket.close()
        self.server.close()
        self.folder.cleanup()

    def _load(self, table: int, values: NDArray[np.float32]) -> None:
        names = _keys(np.arange(len(values)) | table << 40)
        for at in range(0, len(values), CHUNK):
            command: list[bytes] = [b"MSET"]
            for name, row in zip(names[at : at + CHUNK], values[at : at + CHUNK], strict=True):
                command += (name, row.tobytes())
            for answer in self._exchange([self.hiredis.pack_command(tuple(command))]):
                if answer != b"OK":
                    raise PeerMissing(f"Redis is not measured: it answered MSET with {answer!r}")

    def _exchange(self, commands: list[bytes]) -> Iterator[list[bytes]]:
        """Send all while answers come: neither side's socket buffer may fill up on both ways at once."""
        out = memoryview(b"".join(commands))
        pending = len(commands)
        self.socket.setblocking(False)
        try:
            while len(out):
                with suppress(BlockingIOError):
                    out = out[self.socket.send(out) :]
                    continue
                with suppress(BlockingIOError):
                    self._receive()
        finally:
            self.socket.settimeout(60)
        while pending:
            answer = self.reader.gets()
            if answer is False:
                self._receive()
                continue
            pending -= 1
            yield answer

    def _receive(self) -> None:
        n = self.socket.recv_into(self.buffer)
        if not n:
            raise PeerMissing("Redis closed the connection")
        self.reader.feed(self.buffer, 0, n)


def _keys(numbers: NDArray[np.int64]) -> list[bytes]:
    raw = numbers.astype("<i8").tobytes()
    return [raw[at : at + 8] for at in range(0, len(raw), 8)]
