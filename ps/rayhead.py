"""Our own Ray head: started as our child, found again later, ended without touching any other Ray.

What Ray does by itself, and what is done about it here:

* `ray start --head` begins with token authentication off and listens on every interface: a token file (mode 0600)
  is made first and `RAY_AUTH_MODE=token` is set, so that strangers are turned away.
* `ray stop` ends every Ray on the machine by name: our processes carry a mark in their environment instead, and only
  marked ones are ended.
* After SIGTERM it waits up to 30 s for detached actors to go: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0.
* Every process ends 60 s after the head died: RAY_gcs_rpc_server_reconnect_timeout_s is raised. With `--block` the node
  ends at once with any of its processes, the head's GCS too: so it is left out, and the head is the GCS.
* Of a node that was given no CPUs it starts one process at a time: RAY_worker_maximum_startup_concurrency.
* Its workers run at nice 15, so that servers starve, miss pings and keep pulls waiting wherever other work runs beside
  them: RAY_worker_niceness=0.
* It gives its own processes 30 to 60 s to come up, too little on a busy host: the variables are raised, and where there
  is none (the node's own registration) the head is started once more.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ps.config import RayConfig
from ps.errors import EmbringError
from ps.runtime import write_private

MARK = "EMBRING_MARK"
"""Environment variable that every process of one cluster inherits from its Ray head."""

MIB = 2**20
START_TIMEOUT_S = 240.0
RAYS_OWN_S = 25.0
"""A head that ends by itself after so long has met a deadline of Ray's; one that ends sooner, another trouble."""


class StartError(EmbringError):
    """A process of the cluster did not start; says where its log is."""


@dataclass(frozen=True)
class Head:
    """A running Ray head. pid: of its GCS. started: its start time in clock ticks since boot."""

    pid: int
    started: int
    address: str


def ensure_token(path: Path) -> Path:
    """Make a random token (256 bits, mode 0600) at `path` unless there is one."""
    if not path.exists():
        write_private(path, secrets.token_hex(32).encode())
    return path


def ray_environment(config: RayConfig, token_path: str | Path) -> dict[str, str]:
    """Environment variables of every process that takes part in Ray."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(config.reconnect_s),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_enable_worker_prestart": "0",
        "RAY_worker_niceness": "0",
        "RAY_worker_maximum_startup_concurrency": str(max(2, os.cpu_count() or 2)),
        "RAY_worker_register_timeout_seconds": f"{START_TIMEOUT_S:.0f}",
        "RAY_agent_register_timeout_ms": f"{START_TIMEOUT_S * 1000:.0f}",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{START_TIMEOUT_S:.0f}",
    }


def start_head(config: RayConfig, *, token_path: Path, scratch: Path, folder: Path, mark: str) -> Head:
    """Start `ray start --head` in `folder` and wait until it answers. Raises StartError.

    scratch: short folder for Ray's sockets. mark: told to every process (see MARK).
    """
    begun = time.monotonic()
    try:
        return _start_head(config, token_path=token_path, scratch=scratch, folder=folder, mark=mark)
    except StartError:
        if time.monotonic() - begun < RAYS_OWN_S:
            raise
    shutil.rmtree(scratch / "ray", ignore_errors=True)
    return _start_head(config, token_path=token_path, scratch=scratch, folder=folder, mark=mark)


def _start_head(config: RayConfig, *, token_path: Path, scratch: Path, folder: Path, mark: str) -> Head:
    log = folder / "logs" / "ray.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    address_file = scratch / "ray" / "ray_current_cluster"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={config.port}", "--num-cpus=0", "--include-dashboard=false"),
        *("--include-log-monitor=false", "--no-monitor", "--metrics-export-port=0", "--runtime-env-agent-port=0"),
        *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--min-worker-port=0"),
        *("--max-worker-port=0", f"--ray-client-server-port={free_port()}", f"--temp-dir={scratch / 'ray'}"),
        f"--object-store-memory={config.object_store_mib * MIB}",
    ]
    environment = {**os.environ, **ray_environment(config, token_path), MARK: mark, "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        status: int | None = child.wait(START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status = None
    gcs = [pid for pid in marked(mark) if "gcs_server" in _command(pid)]
    if status == 0 and gcs and address_file.exists():
        return Head(gcs[0], start_time(gcs[0]) or 0, address_file.read_text().strip())
    end_marked(mark)
    _reap(child.pid)
    if status is None:
        raise StartError(f"Ray did not start within {START_TIMEOUT_S:.0f} s; its log is {log}")
    raise StartError(f"Ray ended while starting: {_last_line(log)} (all of it: {log})")


def end_head(pid: int, started: int, mark: str, timeout: float = 20.0) -> int:
    """End every process that carries the mark, our Ray head last; returns how many had to be killed.

    SIGTERM first: Ray's node says goodbye to its head, if that lives. Then SIGKILL to whatever is still there.
    """
    deadline = time.monotonic() + timeout
    if pid and start_time(pid) == started:
        for some in ([p for p in marked(mark) if p != pid], [pid]):
            for each in some:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGTERM)
            while any(start_time(each) is not None for each in some) and time.monotonic() < deadline:
                time.sleep(0.05)
    return end_marked(mark)


def end_marked(mark: str, timeout: float = 10.0) -> int:
    """SIGKILL every process that carries the mark, and wait until they are gone; returns how many there were."""
    found: set[int] = set()
    deadline = time.monotonic() + timeout
    while (pids := marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            found.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return len(found)


def marked(mark: str) -> list[int]:
    """Pids of the living processes (not this one) whose environment carries the mark."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0") and start_time(int(entry.name)) is not None:
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or not ours to look at
            continue
    return found


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where it is gone or a zombie."""
    try:
        # The name in parentheses may itself hold spaces and parentheses: count fields from the last one.
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if rest[0] in ("Z", "X") else int(rest[19])


def _reap(pid: int) -> None:
    """Collect the child's exit status where the head is a child of this very process."""
    if pid:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def free_port() -> int:
    """A TCP port of this host that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
