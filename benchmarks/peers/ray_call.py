"""A Ray actor call that carries 1 KB each way, driven by a process of its own (a driver of the cluster's Ray).

python -m benchmarks.peers.ray_call ADDRESS SIZE     reads "N" lines, answers each with JSON: seconds of N calls
"""

import json
import logging
import os
import sys
import time
from typing import Any

from benchmarks.peers.process import PeerProcess


class RayCall:
    """Calls of one actor, in the Ray at `address`; token_path is its token's file, or empty where it has none."""

    def __init__(self, address: str, token_path: str = "", size: int = 1024) -> None:
        environment = {"RAY_USAGE_STATS_ENABLED": "0"}
        if token_path:
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path}
        self.driver = PeerProcess.of_module("benchmarks.peers.ray_call", address, str(size), environment=environment)
        self.calls(10)

    def calls(self, n: int) -> list[float]:
        """Seconds of n calls, one after another."""
        return list(json.loads(self.driver.ask(str(n))))

    def close(self) -> None:
        """End the driver and its actor."""
        self.driver.close()


def drive(address: str, size: int) -> None:
    """Answer each line N with the seconds of N calls, until standard input ends."""
    import ray

    answers, sys.stdout = sys.stdout, sys.stderr
    os.chdir("/")
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)

    class Echo:
        def echo(self, payload: bytes) -> bytes:
            return payload

    remote: Any = ray.remote
    actor = remote(Echo).options(num_cpus=0).remote()
    payload = bytes(size)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            answer = ray.get(actor.echo.remote(payload))
            seconds.append(time.perf_counter() - begun)
            assert answer == payload
        print(json.dumps(seconds), file=answers, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    drive(sys.argv[1], int(sys.argv[2]))
