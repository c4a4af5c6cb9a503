"""Start a cluster, find it again, ask it, end it.

`start()` gives this machine a Ray of our own (ps.rayhead), or joins a running one, puts the controller there, which
starts the servers, and writes the runtime file. It returns: the processes live on without the caller.

The state folder (mode 0700) holds the settings, the two tokens, the view log and the logs. Secrets are files of mode
0600 and never arguments of a command.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ps.config import Config, annotated, load_config
from ps.errors import ConfigError, NotApplied, cause
from ps.fabric.address import check_free, parse_address
from ps.fabric.tls import serving, trusting
from ps.rayhead import Head, StartError, end_head, ensure_token, marked, ray_environment, start_head, start_time
from ps.runtime import Runtime, read_runtime, read_token, runtime_path, write_private, write_runtime
from ps.viewlog import ViewLog
from ps.wire import raise_error

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 360.0
"""For the controller and its servers; those of the controller, a member and a server are each a little shorter."""

KERNELS_TIMEOUT_S = 900.0
PROGRESS_S = 0.5
REACH_S = 5.0
LOADING_S = 3.0
"""Kernels that are compiled already are loaded sooner; then their being compiled is worth a line."""

CALL_TIMEOUT_S = 60.0

Report = Callable[[str], None]
"""Told one line for each step of a long piece of work."""


def state_folder() -> Path:
    """$XDG_STATE_HOME/embring, or ~/.local/state/embring."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "embring"


def kernel_cache() -> Path:
    """Where compiled kernels are kept: $NUMBA_CACHE_DIR, or ~/.cache/embring/kernels."""
    given = os.environ.get("NUMBA_CACHE_DIR", "")
    return Path(given) if given else Path.home() / ".cache" / "embring" / "kernels"


def start(
    config: Config,
    *,
    state: Path | None = None,
    address: str | None = None,
    runtime_file: Path | None = None,
    report: Report = lambda line: None,
) -> Runtime:
    """Start a cluster and return what the runtime file says of it.

    address: of a running Ray to join ("host:port"; its RAY_AUTH_* variables come from the environment); None starts
    one. runtime_file: where to write the runtime file; None is the user's own place.
    Raises ConfigError where a cluster is running already, StartError where a process does not start.
    """
    target = runtime_file or runtime_path()
    running = find(target)
    if running is not None:
        raise ConfigError(f"a cluster is already running (state folder {running.state}): end it with `embring down`")
    _refuse_what_cannot_work(config, address)
    folder = (state or state_folder()).resolve()
    _private(folder)
    _same_cluster(folder, config)
    write_private(folder / "cluster.toml", annotated(config).encode())
    fabric_token = ensure_token(folder / "token")
    ray_token = ensure_token(folder / "ray.token")
    try:
        scratch = Path(tempfile.mkdtemp(prefix="embring-", dir=config.ray.scratch))
    except OSError as error:
        raise ConfigError(
            f"ray.scratch is {config.ray.scratch!r}, where nothing can be made: {error.strerror}"
        ) from None
    mark = scratch.name
    head = Head(0, 0, address or "")
    try:
        warmed = _warm_up(folder)
        # Ray takes a while to be imported, and while its head starts this process has nothing else to do.
        threading.Thread(target=import_module, args=("ps.controller.actor",), daemon=True).start()
        if address is None:
            report("starting Ray")
            head = start_head(config.ray, token_path=ray_token, scratch=scratch, folder=folder, mark=mark)
        report("loading kernels")
        _finish_warm_up(warmed, folder, report)
        runtime = Runtime(
            addresses=(),
            token_path=str(fabric_token),
            fingerprint=config.fingerprint,
            state=str(folder),
            ray_address=head.address,
            ray_token_path=str(ray_token) if address is None else "",
            head_pid=head.pid,
            head_started=head.started,
            scratch=str(scratch),
            namespace=NAMESPACE if address is None else f"{NAMESPACE}-{secrets.token_hex(4)}",
            tls_ca=config.tls.trusted,
        )
        report("starting the controller")
        runtime = _start_actors(runtime, config, target, report)
        write_runtime(runtime, target)
        return runtime
    except BaseException:
        if address is None:
            end_head(head.pid, head.started, mark)
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _refuse_what_cannot_work(config: Config, address: str | None) -> None:
    """Raise, in one sentence, what would else be found in the log of some process, or when rows are to be saved."""
    serving(config.tls)
    trusting(config.tls.trusted)
    if config.checkpoint.directory:
        from ps.checkpoint.storage import Storage

        storage = Storage(config.checkpoint.directory).lasting()
        if config.checkpoint.every_s:  # else it may be an archive, to be restored from
            storage.check_writable()
    if address is not None:
        _reach(address)
    for why, host, port in listening(config, here=address is None):
        check_free(host, port, why)


def listening(config: Config, here: bool = True) -> list[tuple[str, str, int]]:
    """(setting, host, port) of each place on this host where a new cluster listens by its settings.

    here: whether all its processes run here; else, in a Ray that was joined, only the controller surely does.
    """
    server, router = config.server, config.router
    places = [("control.metrics_port", "127.0.0.1", config.control.metrics_port)]
    if here:
        places += [("ray.port", "0.0.0.0", config.ray.port)]
        host = "0.0.0.0" if server.host == "node" else server.host
        if server.port:
            places += [("server.port", host, server.port + k) for k in range(server.servers)]
        else:
            places += [("server.host", host, 0)]
    if here and router.models:
        for why, port in (("router.grpc_port", router.grpc_port), ("router.http_port", router.http_port)):
            places += [(why, router.host, port and port + 2 * k) for k in range(router.routers)]
    return places


def _private(folder: Path) -> None:
    """Make a folder that is ours alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"state folder {folder} cannot be made: {error.strerror}") from None


def _reach(address: str) -> None:
    """ConfigError unless something listens there: Ray itself would try for minutes."""
    where = parse_address(address)
    if where.path:
        raise ConfigError(f"address {address!r} is no Ray's; write HOST:PORT")
    try:
        socket.create_connection((where.host, where.port), REACH_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray answers at {address}: {error.strerror or error}") from None


def _same_cluster(folder: Path, config: Config) -> None:
    """Refuse to continue a view log under settings that would place its ids elsewhere."""
    before = folder / "cluster.toml"
    if before.exists() and ViewLog(folder / "views").epochs():
        old = load_config(before)
        if old.fingerprint != config.fingerprint:
            raise ConfigError(
                f"the cluster in {folder} has fingerprint {old.fingerprint}, these settings {config.fingerprint}: "
                "settings of [cluster] never change; give another --state folder"
            )


def _warm_up(folder: Path) -> subprocess.Popen[bytes]:
    """One process fills the cache of compiled kernels, before any server reads it: its writers must not race."""
    cache = kernel_cache()
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": _python_path()}
    with open(folder / "kernels.log", "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ps.kernels.warm"],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _finish_warm_up(process: subprocess.Popen[bytes], folder: Path, report: Report) -> None:
    status: int | None = None
    for wait in (LOADING_S, KERNELS_TIMEOUT_S):
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(wait)
            break
        if wait == LOADING_S:
            report("compiling kernels: takes a minute or so, the first time and after an update")
    if status is None:
        process.kill()
        process.wait()
        raise StartError(f"the kernels did not compile within {KERNELS_TIMEOUT_S:.0f} s; see {folder}/kernels.log")
    if status:
        raise StartError(f"the kernels did not compile (status {status}); see {folder}/kernels.log")


def _python_path() -> str:
    rest = os.environ.get("PYTHONPATH", "")
    return f"{ROOT}{os.pathsep}{rest}" if rest else str(ROOT)


def _start_actors(runtime: Runtime, config: Config, runtime_file: Path, report: Report) -> Runtime:
    """Start the controller, which starts the servers; the runtime with what they tell."""
    import ray

    with _driver(runtime):
        controller = start_controller(runtime, config, runtime_file)
        try:
            status = _started(controller, config.server.servers, report)
        except (ray.exceptions.RayError, TimeoutError) as error:
            ray.kill(controller)
            raise StartError(f"the servers did not start: {cause(error)} (logs: {runtime.state}/logs)") from None
    addresses = tuple(a for s in status["servers"] for a in s["addresses"])
    return replace(runtime, addresses=addresses, cluster=status["cluster"], metrics=status["metrics"])


def start_controller(
    runtime: Runtime, config: Config, runtime_file: Path, name: str = "controller", restarts: int = -1
) -> Any:
    """Start a controller on this host; for a driver of the cluster's Ray. restarts: -1 is without end."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ps.controller.actor import ControllerActor
    from ps.server import Setup

    environment = {
        **(ray_environment(config.ray, runtime.ray_token_path) if runtime.ray_token_path else {}),
        "NUMBA_CACHE_DIR": str(kernel_cache()),
        "PYTHONPATH": _python_path(),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    setup = Setup(
        asdict(config),
        runtime.state,
        runtime.scratch,
        read_token(runtime.token_path),
        runtime.namespace,
        str(ROOT),
        environment,
        str(runtime_file),
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ControllerActor
    return actor.options(
        name=name, namespace=runtime.namespace, lifetime="detached", max_concurrency=8, max_restarts=restarts,
        scheduling_strategy=here, runtime_env={"env_vars": environment},
    ).remote(setup)  # fmt: skip


NAMESPACE = "embring"


def _started(controller: Any, servers: int, report: Report) -> dict[str, Any]:
    """The controller's status once every server is in the view; a line for each step. Raises RayError, TimeoutError."""
    import ray

    begun = controller.start.remote()
    deadline = time.monotonic() + START_TIMEOUT_S
    seen = -1
    while time.monotonic() < deadline:
        done, _ = ray.wait([begun], timeout=PROGRESS_S)
        if done:
            break
        asked, _ = ray.wait([controller.status.remote()], timeout=PROGRESS_S)
        up = sum(s["state"] == "alive" for s in ray.get(asked[0])["servers"]) if asked else seen
        if up != seen:
            report(f"starting servers: {up} of {servers} are up")
            seen = up
    status: dict[str, Any] = ray.get(begun, timeout=max(0.0, deadline - time.monotonic()))
    return status


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and gives it to nobody afterwards: it would end a command that has started a
    cluster, and leave the cluster."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and callable(kept):
            signal.signal(signal.SIGTERM, kept)


@contextlib.contextmanager
def _driver(runtime: Runtime) -> Iterator[None]:
    """This process as a driver of the cluster's Ray, from the state folder.

    Ray puts the folder that a driver stands in first on the path of its actors: it must be one that holds no modules.
    """
    environment: dict[str, str] = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    if runtime.ray_token_path:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": runtime.ray_token_path}
    before = {key: os.environ.get(key) for key in environment}
    stood = os.getcwd()
    os.environ.update(environment)
    try:
        import ray

        # Ray reads both once, at its import; this process may have imported it before, for another cluster.
        raylet: Any = ray._raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        if ray.is_initialized():
            raise ConfigError("this process already uses Ray: start and ask a cluster from a process of its own")
        os.chdir(runtime.state)
        try:
            with _sigterm_kept():
                ray.init(
                    address=runtime.ray_address, namespace=NAMESPACE, log_to_driver=False,
                    logging_level=logging.ERROR, configure_logging=False,
                )  # fmt: skip
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise NotApplied(f"Ray at {runtime.ray_address} does not answer: {cause(error)}") from None
        finally:
            os.chdir(stood)
        try:
            yield
        finally:
            with _sigterm_kept():
                ray.shutdown()
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def controller(runtime: Runtime) -> Iterator[Callable[..., dict[str, Any]]]:
    """`ask(verb, **fields)` of the controller, through Ray: works while no server answers.

    Raises NotApplied where Ray or the controller does not answer, PerhapsApplied where it may have heard of a change
    that was asked for, and what the controller answers.
    """
    with _driver(runtime):
        import ray

        from ps.server import LOOKS, unanswered

        try:
            actor = ray.get_actor("controller", runtime.namespace)
        except ValueError:
            raise NotApplied("the cluster's Ray runs, but its controller is gone") from None

        def ask(verb: str, **fields: Any) -> dict[str, Any]:
            sent = False
            try:
                if verb not in LOOKS:
                    # Ray does not say whether a call that failed had begun: see first that the controller is there.
                    ray.get(actor.status.remote(), timeout=CALL_TIMEOUT_S)
                    sent = True
                reply: Any = ray.get(actor.admin.remote(verb, fields), timeout=CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                raise unanswered(verb, sent, cause(error)) from None
            if "error" in reply:
                raise_error(reply["error"])
            return reply["ok"]

        yield ask


def find(path: Path | None = None) -> Runtime | None:
    """The running cluster of the runtime file, or None where there is none.

    Raises NotApplied where its Ray head has died: what it left may still run, but nobody commands it.
    """
    target = path or runtime_path()
    if not target.exists():
        return None
    runtime = read_runtime(target)
    if runtime.head_pid and start_time(runtime.head_pid) != runtime.head_started:
        raise NotApplied(
            f"the Ray head of the cluster in {runtime.state} has died: `embring down` ends what it left, "
            "then `embring up` begins again"
        )
    return runtime


def stop(runtime: Runtime, *, runtime_file: Path | None = None, keep_views: bool = False) -> int:
    """End the cluster's own processes and nothing else; how many had to be killed.

    Its rows are gone with it, so its view log goes too, unless `keep_views`: then the next start in this state folder
    knows the tables, and that their rows are lost.
    """
    killed = 0
    if runtime.head_pid:
        mark = Path(runtime.scratch).name
        killed = end_head(runtime.head_pid, runtime.head_started, mark)
        if left := marked(mark):
            raise NotApplied(f"processes {', '.join(map(str, left))} of the cluster do not end")
    else:
        _stop_actors(runtime)
    shutil.rmtree(runtime.scratch, ignore_errors=True)
    if not keep_views:
        shutil.rmtree(Path(runtime.state) / "views", ignore_errors=True)
    shutil.rmtree(Path(runtime.state) / "servers", ignore_errors=True)
    (runtime_file or runtime_path()).unlink(missing_ok=True)
    return killed


def _stop_actors(runtime: Runtime) -> None:
    """In a Ray that is not ours: end the actors only."""
    with _driver(runtime):
        import ray

        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            actor = ray.get_actor("controller", runtime.namespace)
            ray.get(actor.stop_servers.remote(), timeout=CALL_TIMEOUT_S)
            ray.kill(actor)
        deadline = time.monotonic() + 10
        while (left := named_actors(runtime.namespace)) and time.monotonic() < deadline:
            for name in left:  # routers; the others are on their way out
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(name, runtime.namespace))
            time.sleep(0.05)


def named_actors(namespace: str) -> list[str]:
    """Names of the actors of a cluster that live or are started again; for a driver of its Ray."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(n["name"] for n in named if n["namespace"] == namespace)


def last_state() -> Path:
    """The state folder of the running or the last cluster."""
    runtime = read_runtime() if runtime_path().exists() else None
    return Path(runtime.state) if runtime else state_folder()


def end_leftovers() -> None:
    """End what this user's cluster left behind after its Ray head died. Its view log stays."""
    stop(read_runtime(), keep_views=True)
