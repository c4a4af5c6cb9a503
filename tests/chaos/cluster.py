"""The cluster under test: its processes by kind, its view, and a second Ray node beside the head's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ps
from hashring.tokens import tokens
from hashring.view import View
from ps.config import Config
from ps.errors import EmbringError
from ps.rayhead import MARK, marked, ray_environment, start_time
from ps.runtime import Runtime, read_token

SECOND_HOST = "127.0.0.2"
"""Where the second node says it is: another host to the planner, so that copies are spread over both."""

NODE_S = 60.0

Ask = Callable[..., dict[str, Any]]
"""The controller, by verb."""


class Place:
    """A running cluster. table: that of the load, whose ids it places."""

    def __init__(
        self, runtime: Runtime, runtime_file: Path, config: Config, table: str, ids: NDArray[np.int64]
    ) -> None:
        self.runtime, self.runtime_file, self.config = runtime, runtime_file, config
        self.mark = Path(runtime.scratch).name
        self._token = read_token(runtime.token_path)
        self._table, self._ids = table, ids
        self._look = self.connect()
        self._node: subprocess.Popen[bytes] | None = None

    def connect(self) -> ps.Client:
        """A client that knows the addresses of the start, whatever has become of them."""
        return ps.connect(list(self.runtime.addresses), token=self._token, timeout=30.0)

    def fresh(self) -> ps.Client:
        """A client that begins now, at the addresses of the newest view."""
        addresses = [a for s in self.view().servers if s.alive for a in s.addresses]
        return ps.connect(addresses, token=self._token, timeout=30.0)

    def view(self) -> View:
        """The newest view."""
        self._look.tables()
        return self._look._verbs.routing.view

    def owners(self) -> tuple[View, NDArray[np.int16]]:
        """The newest view, and the owners of each id of the load: int16[ids, owners], -1 for none."""
        view = self.view()
        info = self._look._verbs.routing.table(self._table)
        slots = tokens(self._ids, info.spec.seed) >> np.uint64(64 - info.bits)
        return view, view.owners()[info.first + slots.astype(np.int64)]

    # -- processes

    def pids(self, *words: str) -> list[int]:
        """Living processes of the cluster whose command line holds each of these words."""
        found = []
        for pid in marked(self.mark):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(pid)
        return found

    def controllers(self) -> list[int]:
        """The controller's processes: one, unless there are rivals."""
        return self.pids("ray::Controller")

    def end_head(self) -> None:
        """`kill -9` of Ray's head, its GCS."""
        os.kill(self.runtime.head_pid, signal.SIGKILL)
        wait_gone([self.runtime.head_pid])

    # -- the second node

    def start_node(self) -> None:
        """Start a raylet of our own beside the head's, as another host would."""
        if self.pids("raylet/raylet", SECOND_HOST):
            return
        runtime = self.runtime
        folder = Path(runtime.scratch) / f"node-{time.monotonic_ns()}"
        log = open(Path(runtime.state) / "logs" / "node.log", "ab")  # noqa: SIM115 - the child's
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={runtime.ray_address}", "--block"),
            *(f"--node-ip-address={SECOND_HOST}", "--num-cpus=0", "--disable-usage-stats", f"--temp-dir={folder}"),
            *("--min-worker-port=0", "--max-worker-port=0", "--metrics-export-port=0", "--runtime-env-agent-port=0"),
            *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--include-log-monitor=false"),
            f"--object-store-memory={80 * 2**20}",
        ]
        environment = {**os.environ, **ray_environment(self.config.ray, runtime.ray_token_path), MARK: self.mark}
        environment.pop("RAY_ADDRESS", None)
        self._node = subprocess.Popen(
            command, cwd=runtime.state, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        log.close()

    def node_up(self) -> bool:
        """Whether Ray has the second node among those that live."""
        import ray

        return any(n["Alive"] and n["NodeManagerAddress"] == SECOND_HOST for n in ray.nodes())

    def close(self) -> None:
        """Let go of clients and children."""
        self._look.close()
        if self._node is not None and self._node.poll() is None:
            os.kill(self._node.pid, signal.SIGTERM)
            self._node.wait(NODE_S)


def wait_gone(pids: list[int], timeout: float = 10.0) -> None:
    """Wait until processes are gone."""
    until(lambda: all(start_time(pid) is None for pid in pids), timeout, f"the end of {pids}")


def until(check: Callable[[], bool], timeout: float, what: str, pause: float = 0.05) -> float:
    """Seconds until `check` holds. Raises TimeoutError."""
    begun = time.monotonic()
    while True:
        try:
            if check():
                return time.monotonic() - begun
        except EmbringError:  # the controller is being started again
            pass
        if time.monotonic() - begun > timeout:
            raise TimeoutError(f"{what} did not come within {timeout:.0f} s")
        time.sleep(pause)
