"""`embring doctor`: what of this machine slows or breaks a cluster."""

import json
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from deploy.cli_common import ConfigOption, JsonOption

FILES_MIN = 4096
SOCKET_PATH_MAX = 107
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: "ok", "warning" (works, slower or closer to a limit) or "error" (will not work)."""

    what: str
    state: str
    text: str


def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Look at huge pages, overcommit, file limits, memory, ports and versions. Status 1 where something will not work.

    Example:  embring doctor --config cluster.toml
    """
    from ps.config import load_config

    settings = load_config(config)
    findings = [
        _read("huge pages", Path("/sys/kernel/mm/transparent_hugepage/enabled"), _huge_pages),
        _read("shared memory", Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"), _shared_pages),
        _read("overcommit", Path("/proc/sys/vm/overcommit_memory"), _overcommit),
        _read("send buffers", Path("/proc/sys/net/core/wmem_max"), _send_buffers),
        _files(),
        _memory(settings.server.memory_max_mib, settings.server.servers),
        _room(Path(settings.ray.scratch)),
        *_ports(settings),
        *_versions(),
    ]
    if as_json:
        print(json.dumps([asdict(f) for f in findings]))
    else:
        for f in findings:
            print(f"{f.state:8} {f.what:14} {f.text}")
    if any(f.state == "error" for f in findings):
        raise typer.Exit(1)


def _read(what: str, path: Path, judge: Callable[[str], tuple[str, str]]) -> Finding:
    try:
        return Finding(what, *judge(path.read_text()))
    except OSError as error:
        return Finding(what, "warning", f"{path} cannot be read: {error.strerror}")


def _huge_pages(text: str) -> tuple[str, str]:
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        return "warning", 'never: random reads of rows are 1.6 to 1.9 times slower; write "madvise" to this setting'
    return "ok", chosen


def _shared_pages(text: str) -> tuple[str, str]:
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("never", "deny"):
        wanted = 'write "advise" to /sys/kernel/mm/transparent_hugepage/shmem_enabled, or set shared_reads = false'
        return "warning", f"{chosen} has huge pages: servers and those who read in place are slower; {wanted}"
    return "ok", f"huge pages: {chosen}"


def _overcommit(text: str) -> tuple[str, str]:
    if text.strip() == "2":
        return "error", "vm.overcommit_memory is 2: servers reserve address space far beyond memory; set it to 0 or 1"
    return "ok", f"vm.overcommit_memory is {text.strip()}"


def _send_buffers(text: str) -> tuple[str, str]:
    from ps.config import SEND_BUFFER

    if int(text) < SEND_BUFFER:
        wanted = f"sysctl -w net.core.wmem_max={SEND_BUFFER}"
        return "warning", f"net.core.wmem_max is {text.strip()}: large messages on this host wait in parts; {wanted}"
    return "ok", f"net.core.wmem_max is {text.strip()}"


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    state = "ok" if soft >= FILES_MIN else "warning"
    return Finding("open files", state, f"limit {soft} (up to {hard}); {FILES_MIN} is enough for a thousand clients")


def _memory(limit_mib: int, servers: int) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
    if limit_mib * servers > 0.9 * total:
        text = f"{servers} servers of {limit_mib} MiB are more than 90 % of this host's {total} MiB"
        return Finding("memory", "warning", text)
    return Finding("memory", "ok", f"{total} MiB, {os.cpu_count()} cores")


def _room(scratch: Path) -> Finding:
    free = shutil.disk_usage(scratch).free // MIB if scratch.is_dir() else 0
    longest = len(str(scratch)) + len(
        "/embring-12345678/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    )
    if longest > SOCKET_PATH_MAX:
        return Finding(
            "scratch", "error", f"{scratch} is too long for the path of a Unix socket ({SOCKET_PATH_MAX} bytes)"
        )
    if not os.access(scratch, os.W_OK):
        return Finding("scratch", "error", f"{scratch} cannot be written")
    return Finding("scratch", "ok" if free > 1024 else "warning", f"{scratch} has {free} MiB free")


def _ports(settings: "object") -> Iterator[Finding]:
    from ps.cluster import listening
    from ps.config import Config
    from ps.errors import ConfigError
    from ps.fabric.address import check_free

    assert isinstance(settings, Config)
    places = listening(settings)
    try:
        for why, host, port in places:
            check_free(host, port, why)
    except ConfigError as error:
        yield Finding("ports", "error", str(error))
        return
    fixed = sum(port > 0 for _, _, port in places)
    yield Finding("ports", "ok", f"{fixed} fixed ports are free" if fixed else "chosen by the system")


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.release()}")
    if platform.system() != "Linux":
        yield Finding("system", "error", f"{platform.system()} is not supported; embring needs Linux")
    for name in ("ray", "torch", "numba", "numpy", "uvloop"):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "error", "is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/s"
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.bind(path)
                yield Finding("unix sockets", "ok", "work")
            except OSError as error:
                yield Finding("unix sockets", "error", f"cannot be made: {error.strerror}")
