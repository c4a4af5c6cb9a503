"""A peer in a process of its own: started, waited for, ended."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class PeerMissing(Exception):
    """A peer that cannot be measured here: the message says which, and how to get it."""


class PeerProcess:
    """One child; `close` ends it, and nothing else."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.command = list(command)
        self.child = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {}), "PYTHONPATH": str(ROOT)},
        )

    @classmethod
    def of_module(cls, module: str, *arguments: str, environment: dict[str, str] | None = None) -> "PeerProcess":
        """A Python module of ours as a child of this interpreter."""
        return cls([sys.executable, "-m", module, *arguments], environment)

    def ask(self, line: str) -> str:
        """Write one line to the child and return the line that it answers; PeerMissing where it has ended."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(line + "\n")
            self.child.stdin.flush()
            answer = self.child.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise PeerMissing(f"{' '.join(self.command[:4])} ended with status {self.child.poll()}")
        return answer

    def wait_for(self, ready: Callable[[], bool], timeout: float = 30.0) -> None:
        """Poll until ready; PeerMissing where the child ends or the time passes first."""
        until = time.monotonic() + timeout
        while not ready():
            if self.child.poll() is not None or time.monotonic() > until:
                self.close()
                raise PeerMissing(f"{self.command[0]} was not ready within {timeout:.0f} s")
            time.sleep(0.01)

    def close(self) -> None:
        """End the child: its standard input is closed, then SIGTERM, then SIGKILL."""
        if self.child.stdin:
            with contextlib.suppress(OSError):  # the child is gone, and a line that it never read is still buffered
                self.child.stdin.close()
        self.child.terminate()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        if self.child.stdout:
            self.child.stdout.close()
