"""TLS from files to clients: who trusts whom, and one clear sentence where only one side speaks it."""

import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import uvloop

import ps
from ps.config import TlsConfig, annotated, config_from_plain, load_config
from ps.errors import AuthError, ConfigError, NotApplied
from ps.fabric.tls import CA, serving, trusting
from ps.runtime import Runtime, runtime_path, write_runtime
from tests.certificates import certificate
from tests.ps.cluster_fixture import TOKEN, local_cluster
from tests.ps.fabric_server import WAIT_S, WELCOME, echo_server
from tests.ps.test_fabric import ask, shells


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> TlsConfig:
    return certificate(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(scope="module")
def server(files):
    with echo_server(tls=serving(files)) as running:
        yield running


# -- files and settings


def test_no_files_mean_no_tls():
    assert serving(TlsConfig()) is None
    assert trusting(None) is None
    assert trusting("") is None
    context = ssl.create_default_context()
    assert trusting(context) is context


def test_files_that_cannot_be_used_are_named(files, tmp_path):
    other = certificate(tmp_path / "other")
    locked = certificate(tmp_path / "locked", password="secret")
    for wrong, sentence in [
        (replace(files, certificate="/no/cert.pem"), r"/no/cert\.pem cannot be read: No such file"),
        (replace(files, key="/no/key.pem"), r"/no/key\.pem cannot be read: No such file"),
        (replace(files, key=other.key), r"cannot be used: .*key values mismatch"),
        (replace(files, key=files.certificate), r"cannot be used"),
        (locked, r"key\.pem cannot be used"),  # and nobody is asked for a password
    ]:
        with pytest.raises(ConfigError, match=sentence):
            serving(wrong)
    with pytest.raises(ConfigError, match=r"/no/ca\.pem cannot be read"):
        trusting("/no/ca.pem")
    with pytest.raises(ConfigError, match=r"key\.pem cannot be used"):
        trusting(files.key)


def test_the_section_is_whole_or_absent_and_its_paths_lie_beside_it(tmp_path):
    for wrong in ({"certificate": "c"}, {"key": "k"}, {"ca": "a"}):
        with pytest.raises(ConfigError, match=r"tls\.certificate and tls\.key go together"):
            config_from_plain({"tls": wrong})
    path = tmp_path / "cluster.toml"
    path.write_text('[tls]\ncertificate = "c.pem"\nkey = "/etc/k.pem"\n')
    config = load_config(path)
    assert config.tls == TlsConfig(str(tmp_path / "c.pem"), "/etc/k.pem")
    assert config.tls.trusted == str(tmp_path / "c.pem")
    assert replace(config.tls, ca="/ca").trusted == "/ca"
    assert TlsConfig().trusted == ""
    (tmp_path / "again").write_text(annotated(config))
    assert load_config(tmp_path / "again") == config


# -- one connection


@shells
def test_requests_of_every_size_over_tls(server, files, shell):
    connection = shell(server.tcp, tls=trusting(files.trusted))
    for n in (10, 3_000_000):
        reply = ask(connection, "echo", {}, {"ids": np.arange(n)})
        np.testing.assert_array_equal(reply.arrays["ids"], np.arange(n))
    numbers = [connection.send("echo", {"i": i}, {"ids": np.arange(300_000)}, WAIT_S) for i in range(5)]
    assert [connection.receive(n, WAIT_S).fields["i"] for n in numbers] == list(range(5))
    connection.close()


@shells
def test_a_unix_socket_stays_plain(server, files, shell):
    for tls in (None, trusting(files.trusted)):
        connection = shell(server.unix, tls=tls)
        assert connection.welcome == WELCOME
        connection.close()


@shells
def test_a_plain_client_is_told_that_the_server_speaks_tls(server, shell):
    with pytest.raises(ConfigError, match=rf"tcp:127\.0\.0\.1:\d+ speaks TLS: give tls=.*{CA}"):
        shell(server.tcp)


@shells
def test_a_tls_client_is_told_that_the_server_does_not(files, shell):
    with echo_server() as plain, pytest.raises(ConfigError, match=r"tcp:127\.0\.0\.1:\d+ does not speak TLS"):
        shell(plain.tcp, tls=trusting(files.trusted))


@shells
def test_a_certificate_of_another_authority_or_name_is_not_trusted(server, files, shell, tmp_path):
    other = certificate(tmp_path / "other", "127.0.0.1")
    with pytest.raises(AuthError, match=r"certificate of tcp:.* is not trusted: self.signed certificate"):
        shell(server.tcp, tls=trusting(other.trusted))
    nameless = certificate(tmp_path / "nameless")
    with (
        echo_server(tls=serving(nameless)) as elsewhere,
        pytest.raises(AuthError, match=r"is not trusted: IP address mismatch"),
    ):
        shell(elsewhere.tcp, tls=trusting(nameless.trusted))


@contextmanager
def hanging_up():
    """A TCP server that closes every connection at once, as one does that is ending: neither plain nor TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    listening.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)


@shells
def test_a_server_that_hangs_up_may_be_asked_again(files, shell):
    with hanging_up() as address:
        for tls in (None, trusting(files.trusted)):
            with pytest.raises(NotApplied):
                shell(address, tls=tls)


@shells
def test_a_silent_server_ends_a_tls_handshake_at_the_deadline(files, shell):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(NotApplied):
        shell(f"127.0.0.1:{silent.getsockname()[1]}", tls=trusting(files.trusted), timeout=0.1)


# -- clients of a cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, files):
    with local_cluster(tmp_path_factory.mktemp("c"), servers=2, tls=files) as running:
        yield running


def test_clients_over_tls(cluster, files):
    with ps.connect(cluster.addresses, TOKEN, tls=files.trusted) as client:
        client.create_table("item", dim=4)
        client.assign("item", np.arange(100), np.ones((100, 4)))
        assert (client.pull("item", np.arange(100)) == 1).all()
    assert all(cluster.rows("item").values())


def test_the_environment_and_the_runtime_file_name_the_authority(cluster, files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    (tmp_path / "token").write_text(TOKEN)
    write_runtime(Runtime(tuple(cluster.addresses), str(tmp_path / "token"), tls_ca=files.trusted), runtime_path())
    for settings in ({}, {"EMBRING_ADDRESS": cluster.addresses[0], "EMBRING_TOKEN": TOKEN, CA: files.trusted}):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        ps.connect().close()

    async def main():
        for tls in (None, files.trusted, trusting(files.trusted)):
            await (await ps.AsyncClient.connect(tls=tls)).close()

    uvloop.run(main())
    monkeypatch.setenv(CA, "/no/ca.pem")
    with pytest.raises(ConfigError, match=r"/no/ca\.pem cannot be read"):
        ps.connect()


def test_what_cannot_succeed_is_not_tried_until_the_deadline(cluster, files):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="speaks TLS"):
        ps.connect(cluster.addresses, TOKEN, timeout=10 * WAIT_S)
    with pytest.raises(AuthError, match="not trusted"):
        ps.connect(cluster.addresses, TOKEN, tls=ssl.create_default_context(), timeout=10 * WAIT_S)
    assert time.monotonic() - began < 10 * WAIT_S


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
def test_the_runbooks_commands_make_what_the_settings_want(tmp_path):
    text = (Path(__file__).parents[2] / "deploy" / "RUNBOOK.md").read_text()
    commands, settings = re.search(r"```sh\n(openssl.*?)```\s*```toml\n(.*?)```", text, re.DOTALL).groups()
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True, timeout=WAIT_S)
    (tmp_path / "cluster.toml").write_text(settings)
    tls = load_config(tmp_path / "cluster.toml").tls
    with echo_server(tls=serving(tls)) as server:
        server.connect(server.tcp, tls=trusting(tls.trusted)).close()
