"""Checkpoints of a benchmark's cluster, each saved by a process of its own, which may be killed."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.servers import Servers
from ps.checkpoint.files import MANIFEST, survey
from ps.checkpoint.retention import verify
from ps.checkpoint.storage import Storage
from ps.config import Config
from ps.runtime import Runtime, read_token

SAVE_S = 120.0


class Saves:
    """Saves into one folder, one at a time, by what the controller runs for its own (`ps.checkpoint.job`)."""

    def __init__(self, folder: Path, runtime: Runtime, servers: Servers, config: Config) -> None:
        self._folder, self._servers = folder, servers
        self._token = read_token(runtime.token_path)
        self._fingerprint = config.fingerprint
        self._process: subprocess.Popen[str] | None = None
        self.outcomes: list[Mapping[str, Any]] = []

    def begin(self) -> None:
        """Begin a save."""
        view = self._servers.view()
        order = {
            "what": "save", "directory": str(self._folder), "full_every": 1, "keep": 1000, "token": self._token,
            "servers": [[s.name, s.incarnation, list(s.addresses)] for s in view.servers if s.alive],
            "tls_ca": "", "fingerprint": self._fingerprint, "cluster": view.cluster, "models": "",
        }  # fmt: skip
        command = [sys.executable, "-m", "ps.checkpoint.job"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order))
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        """Of the process of the last save."""
        assert self._process is not None
        return self._process.pid

    def writing(self) -> bool:
        """Whether rows of a checkpoint that is not committed are in the folder."""
        some = (path for path in self._folder.iterdir() if not (path / MANIFEST).exists())
        return any(file.stat().st_size for path in some for file in path.glob("*"))

    def over(self) -> bool:
        """Whether the process has ended."""
        return self._process is None or self._process.poll() is not None

    def end(self) -> bool:
        """Wait until the process has ended; whether it saved."""
        assert self._process is not None
        self._process.stdin = None
        text, _ = self._process.communicate(timeout=SAVE_S)
        told = json.loads(text) if text else {"error": "its process was killed"}
        self.outcomes.append(told)
        return "name" in told

    def close(self) -> None:
        """End the process, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def check(self) -> dict[str, Any]:
        """How many saves there were, and of the checkpoints that are in the folder those that are damaged."""
        storage = Storage(str(self._folder))
        checked = list(verify(storage)) if survey(storage)[0] else []
        saved = [told["name"] for told in self.outcomes if "name" in told]
        return {
            "saves": len(self.outcomes),
            "saved": len(saved),
            "refused": [told["error"] for told in self.outcomes if "error" in told],
            "damaged": [c.name for c in checked if c.problems] + sorted(set(saved) - {c.name for c in checked}),
        }
