"""A gRPC Python echo over a Unix socket: the server in a process of its own, a blocking client here.

python -m benchmarks.peers.grpc_echo SOCKET        serves until its standard input ends
"""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from benchmarks.peers.process import PeerProcess

METHOD = "/embring.Echo/Echo"


class GrpcEcho:
    """Unary calls that carry `size` bytes each way."""

    def __init__(self, size: int = 1024) -> None:
        self.payload = bytes(size)
        self.folder = tempfile.TemporaryDirectory(prefix="embring-grpc-")
        path = f"{self.folder.name}/socket"
        self.server = PeerProcess.of_module("benchmarks.peers.grpc_echo", path)
        self.server.wait_for(Path(path).exists)
        self.channel = grpc.insecure_channel(f"unix:{path}")
        grpc.channel_ready_future(self.channel).result(30)
        self.call = self.channel.unary_unary(METHOD)

    def calls(self, n: int) -> list[float]:
        """Seconds of n calls, one after another."""
        seconds = []
        for _ in range(n):
            begun = time.perf_counter()
            answer = self.call(self.payload)
            seconds.append(time.perf_counter() - begun)
            assert answer == self.payload
        return seconds

    def close(self) -> None:
        """End the server."""
        self.channel.close()
        self.server.close()
        self.folder.cleanup()


def serve(path: str) -> None:
    """Answer every call with what it brought, until standard input ends."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server = grpc.server(ThreadPoolExecutor(1))
    service, method = METHOD.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    serve(sys.argv[1])
