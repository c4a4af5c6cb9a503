"""The command itself: help, errors and what needs no cluster."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from deploy.cli import COMMANDS, _ended_in_order, app
from ps.config import config_from_plain, load_config
from ps.errors import NotApplied, RequestError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "numba", "grpc", "numpy", "msgpack")


def run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("EMBRING_", "RAY_", "XDG_"))}
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True, text=True, timeout=100, cwd=home, stdin=subprocess.DEVNULL,
        env={**inherited, "HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
    )  # fmt: skip


def test_help_lists_every_command_and_imports_none(tmp_path):
    program = (
        "import sys; from deploy.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, (_, line) in COMMANDS.items():
        assert name in done.stdout
        assert line in done.stdout
    assert "LOADED []" in done.stdout


def every_command() -> list[tuple[str, ...]]:
    """The words of every command, those of groups too, and of the groups themselves; () is `embring` itself."""
    found: list[tuple[str, ...]] = [()]
    for name, (target, _) in COMMANDS.items():
        module, _, attribute = target.partition(":")
        loaded = getattr(import_module(module), attribute)
        found.append((name,))
        if isinstance(loaded, typer.Typer):
            found += [(name, c.name or c.callback.__name__) for c in loaded.registered_commands]
    return found


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_every_command_has_help_with_an_example(command):
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="embring", env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    assert re.search(rf"Example: +embring {' '.join(command)}", shown.output)
    assert "completion" not in shown.output
    if "COMMAND" not in shown.output:
        assert "--json" in shown.output


def test_help_fills_its_lines():
    """A paragraph of a docstring is one paragraph, however its source was broken."""
    shown = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "80"})
    lines = [line.strip() for line in shown.output.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("Three servers"))
    assert all(len(line) > 60 for line in lines[at : at + 3]), shown.output


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("status",), 1, "no cluster is running: start one with `embring up`"),
        (("recover",), 1, "no cluster is running: start one with `embring up`"),
        (("logs",), 1, "there are no logs in"),
        (("up", "--config", "missing.toml"), 1, "the configuration missing.toml cannot be read"),
        (("up", "--servers", "0"), 1, "server.servers is 0; it must be 1 to 256 (processes)"),
        (("up", "--replicas", "4"), 1, "server.replicas is 4; it must be 1 to 3, the number of servers"),
        (
            ("up", "--host", "192.0.2.1"),
            1,
            "server.host: cannot listen on 192.0.2.1:0: Cannot assign requested address",
        ),
        (("up", "--servers", "three"), 2, "Invalid value for '--servers'"),
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("up", "--restore", "latest"), 2, "--restore needs the directory of [checkpoint]"),
        (("checkpoint", "save", "nowhere://x"), 1, "no cluster is known here"),
        (("checkpoint", "verify", "missing"), 1, "missing is missing"),
        (("checkpoint", "prune", "missing", "--keep", "2"), 1, "missing is missing"),
        (("checkpoint", "verify", ""), 1, "the place of checkpoints is empty"),
        (("table", "import", "item", "rows.csv"), 1, "no cluster is running"),
        (("checkpoint", "list", "missing"), 1, "missing"),
        (("serve", "models", "--name", "a b"), 1, "--name is 'a b'; it must be up to 63 letters, digits, '.', '_' and"),
        (("serve", "models", "--name", "server-0"), 1, "--name is 'server-0'"),
        (("bench", "checkpoint", "--folder", "nodir"), 1, "--folder: the folder nodir does not exist"),
        (("bench", "placement", "--html", "nodir/x.html"), 1, "cannot write nodir/x.html: the folder nodir does not"),
        (("demo", "--data", "foo"), 1, "data set 'foo' is unknown; there is movielens"),
    ],
)
def test_an_error_is_one_sentence_and_a_status(arguments, status, sentence, tmp_path):
    done = run(*arguments, home=tmp_path)
    assert done.returncode == status
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["a", "router-9", "A.b_c-1", "x" * 63, "", "a b", "-a", "a/b", "x" * 64, "controller"])
def test_a_router_may_have_the_names_of_servers_and_of_routers(name):
    from deploy.cli_serve import check_name
    from hashring.view import View
    from ps.controller.outlook import names_for

    def refused(check: Callable[[], object]) -> bool:
        try:
            check()
        except RequestError:
            return True
        return False

    of_servers = refused(lambda: names_for(View.empty(1), (name,), 0)) and not name.startswith("router-")
    assert refused(lambda: check_name(name)) == of_servers


def test_a_damaged_checkpoint_is_listed_as_an_error_beside_the_others(tmp_path):
    (tmp_path / "backups" / "broken").mkdir(parents=True)
    (tmp_path / "backups" / "broken" / "manifest").write_bytes(b"EMBR")
    for flags, shown in (((), ""), (("--json",), "[]\n")):
        done = run("checkpoint", "list", "backups", *flags, home=tmp_path)
        assert (done.returncode, done.stdout) == (1, shown)
        assert re.fullmatch(r"error: .*/backups/broken/manifest is damaged, .*\n", done.stderr)


def test_down_without_a_cluster_is_no_error(tmp_path):
    done = run("down", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "no cluster is running\n")


@pytest.mark.parametrize("dead", [False, True])
def test_down_refuses_before_it_saves_where_nobody_can_be_asked(monkeypatch, dead):
    """Also where the Ray head has died: servers live on without it, with every row."""
    done = []

    def find():
        if dead:
            raise NotApplied("the Ray head of the cluster has died")
        return "a runtime"

    monkeypatch.setattr("ps.cluster.find", find)
    monkeypatch.setattr("ps.cluster.stop", lambda runtime: done.append("stop") or 0)
    monkeypatch.setattr("ps.cluster.end_leftovers", lambda: done.append("stop"))
    monkeypatch.setattr("deploy.cli_checkpoint.save", lambda folder: done.append(f"save {folder}"))
    refused = CliRunner().invoke(app, ["down", "--checkpoint", "backups"])
    assert "say --yes where nobody can be asked" in str(refused.exception)
    assert done == []
    assert CliRunner().invoke(app, ["down", "--checkpoint", "backups", "--yes"]).exit_code == 0
    assert done == ["save backups", "stop"]


def test_what_a_dead_cluster_left_is_not_ended_where_it_cannot_be_saved(monkeypatch):
    done = []

    def find():
        raise NotApplied("the Ray head of the cluster has died")

    def save(folder):
        raise NotApplied("no server of the cluster answers")

    monkeypatch.setattr("ps.cluster.find", find)
    monkeypatch.setattr("ps.cluster.end_leftovers", lambda: done.append("stop"))
    monkeypatch.setattr("deploy.cli_checkpoint.save", save)
    assert isinstance(CliRunner().invoke(app, ["down", "--checkpoint", "x", "--yes"]).exception, NotApplied)
    assert done == []
    assert json.loads(CliRunner().invoke(app, ["down", "--yes", "--json"]).stdout) == {"ended": True}
    assert done == ["stop"]


def test_config_prints_what_up_reads(tmp_path):
    (tmp_path / "mine.toml").write_text("[server]\nservers = 7\n")
    printed = run("config", "mine.toml", home=tmp_path)
    assert printed.returncode == 0
    assert "\nservers = 7\n" in printed.stdout
    (tmp_path / "all.toml").write_text(printed.stdout)
    assert run("config", "all.toml", home=tmp_path).stdout == printed.stdout
    plain = json.loads(run("config", "all.toml", "--json", home=tmp_path).stdout)
    assert config_from_plain(plain) == load_config(tmp_path / "mine.toml")


def test_logs_of_one_process_or_of_all_as_text_and_as_json(tmp_path):
    folder = tmp_path / ".local" / "state" / "embring" / "logs"
    folder.mkdir(parents=True)
    (folder / "ray.log").write_text("started\n")
    (folder / "server-0.log").write_text("one\ntwo\nthree\n")
    assert run("logs", "-n", "2", home=tmp_path).stdout == "ray: started\nserver-0: two\nserver-0: three\n"
    assert run("logs", "server-0", "-n", "1", home=tmp_path).stdout == "three\n"
    told = json.loads(run("logs", "-n", "2", "--json", home=tmp_path).stdout)
    assert told == {"ray": ["started"], "server-0": ["two", "three"]}


def test_lines_that_come_later_are_followed_as_text_and_as_json(monkeypatch, tmp_path):
    log = tmp_path / "logs" / "ray.log"
    log.parent.mkdir()
    monkeypatch.setattr("ps.cluster.last_state", lambda: tmp_path)

    def sleep(_):
        if "new" in log.read_text():
            raise KeyboardInterrupt
        log.write_text("old\nnew\n")

    monkeypatch.setattr("deploy.logs.time.sleep", sleep)
    log.write_text("old\n")
    assert CliRunner().invoke(app, ["logs", "--follow"]).stdout == "old\nnew\n"
    log.write_text("old\n")
    shown = CliRunner().invoke(app, ["logs", "--follow", "--json"]).stdout.splitlines()
    assert [json.loads(line) for line in shown] == [{"ray": ["old"]}, {"ray": ["new"]}]


def test_doctor_reports_each_thing_and_fails_on_an_error(tmp_path):
    done = run("doctor", "--json", home=tmp_path)
    findings = {f["what"]: f for f in json.loads(done.stdout)}
    assert {"huge pages", "overcommit", "open files", "memory", "scratch", "ports", "python", "ray"} <= set(findings)
    assert done.returncode == int(any(f["state"] == "error" for f in findings.values()))
    long = tmp_path / ("x" * 60)
    long.mkdir()
    (tmp_path / "long.toml").write_text(f'[ray]\nscratch = "{long}"\n')
    done = run("doctor", "--config", "long.toml", home=tmp_path)
    assert done.returncode == 1
    assert "too long for the path of a Unix socket" in done.stdout


def test_the_file_for_ray_up_is_valid_by_rays_own_check():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text()))
    validate_config(config)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        text = " ".join(commands)
        assert "RAY_AUTH_MODE=token" in text
        assert "RAY_gcs_rpc_server_reconnect_timeout_s=315360000" in text
        assert "ray stop" not in text


@pytest.mark.slow
def test_the_start_commands_of_the_file_for_ray_up_start_ray(tmp_path):
    """Run both, as `ray up` would over ssh; then a driver with the token sees two nodes, one without is refused."""
    from ps.rayhead import MARK, end_marked, ensure_token, marked

    config = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    home = tmp_path / "home"
    ensure_token(home / ".ray" / "auth_token")
    (home / "ray_bootstrap_config.yaml").write_text(
        yaml.safe_dump({"cluster_name": "x", "max_workers": 0, "provider": {"type": "readonly"}})
    )
    scratch = Path("/tmp") / f"eb-{tmp_path.parent.name[-4:]}-{os.getpid()}"
    scratch.mkdir(mode=0o700)
    mark = scratch.name
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", MARK: mark,
        "EMBRING_RAY_PORT": str(_free_port()), "RAY_HEAD_IP": _own_address(), "RAY_TMPDIR": str(scratch),
    }  # fmt: skip
    try:
        for command in (config["head_start_ray_commands"][0], config["worker_start_ray_commands"][0]):
            done = subprocess.run(
                ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=100, cwd=home
            )
            assert done.returncode == 0, done.stdout + done.stderr
        address = f"{environment['RAY_HEAD_IP']}:{environment['EMBRING_RAY_PORT']}"
        program = (
            f"import ray; ray.init(address={address!r}, logging_level='error', log_to_driver=False)\n"
            "print('NODES', sum(n['Alive'] for n in ray.nodes()))"
        )
        asked = {**environment, "RAY_AUTH_MODE": "token"}
        deadline = time.monotonic() + 60
        while True:
            done = _python(program, asked)
            if "NODES 2" in done.stdout or time.monotonic() > deadline:
                break
        assert "NODES 2" in done.stdout, done.stderr[-2000:]
        (tmp_path / "stranger").mkdir()
        refused = _python(program, {**asked, "HOME": str(tmp_path / "stranger")})
        assert refused.returncode != 0
        assert "NODES" not in refused.stdout
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGTERM)
        end_marked(mark)
        shutil.rmtree(scratch, ignore_errors=True)
    assert marked(mark) == []


def _python(program: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _own_address() -> str:
    import ray.util

    return ray.util.get_node_ip_address()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_as_an_exception_does(number: int) -> None:
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, _ended_in_order():
            signal.raise_signal(number)
        assert ended.value.code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with _ended_in_order():
            signal.raise_signal(number)  # as under nohup
    finally:
        signal.signal(number, before)
