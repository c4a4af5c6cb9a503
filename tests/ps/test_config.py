"""cluster.toml: every setting explained, everything else refused in one sentence."""

import tomllib
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.config import ClusterConfig, Config, ServerConfig, annotated, config_from_plain, load_config
from ps.errors import ConfigError


def test_the_printed_default_reads_back_as_the_default(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(annotated())
    assert load_config(path) == Config() == load_config(None)


@given(st.integers(6, 16), st.integers(0, 2**63 - 1), st.integers(1, 256), st.booleans(), st.floats(20, 3600))
def test_any_settings_survive_being_printed(slot_bits, seed, servers, restart, silent):
    config = config_from_plain(
        {
            "cluster": {"slot_bits": slot_bits, "seed": seed},
            "server": {"servers": servers, "silent_s": silent},
            "control": {"restart": restart},
        }
    )
    assert config_from_plain(tomllib.loads(annotated(config))) == config
    assert config_from_plain(config.to_plain()) == config


def test_every_setting_is_explained():
    text = annotated()
    for section in fields(Config):
        assert f"[{section.name}]" in text
        for setting in fields(getattr(Config(), section.name)):
            assert setting.metadata["unit"]
            assert setting.metadata["why"]
            assert f"\n{setting.name} = " in text
            assert isinstance(setting.default, str | bool) or setting.metadata["low"] is not None


@pytest.mark.parametrize(
    ("plain", "sentence"),
    [
        ({"servre": {}}, "unknown section 'servre'; the sections are cluster, server"),
        ({"server": {"serverz": 3}}, "unknown setting server.serverz; [server] has servers"),
        ({"server": 3}, "server is 3; it must be a section"),
        ({"server": {"servers": "3"}}, "server.servers is '3'; it must be a whole number"),
        ({"server": {"servers": True}}, "server.servers is True; it must be a whole number"),
        ({"server": {"servers": 2.0}}, "server.servers is 2.0; it must be a whole number"),
        ({"server": {"servers": 0}}, "server.servers is 0; it must be 1 to 256 (processes)"),
        ({"server": {"replicas": 4}}, "server.replicas is 4; it must be 1 to 3, the number of servers"),
        ({"server": {"silent_s": float("nan")}}, "server.silent_s is nan; it must be 20 to 3600 (seconds)"),
        ({"server": {"host": ""}}, "server.host is empty; it must be an address"),
        ({"ray": {"scratch": ""}}, "ray.scratch is empty; it must be a folder"),
        ({"control": {"restart": 1}}, "control.restart is 1; it must be true or false"),
        ({"cluster": {"slot_bits": 17}}, "cluster.slot_bits is 17; it must be 6 to 16"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(plain, sentence):
    with pytest.raises(ConfigError) as caught:
        config_from_plain(plain)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "cluster.toml"
    with pytest.raises(ConfigError, match=r"cluster\.toml cannot be read"):
        load_config(path)
    path.write_text("[server\n")
    with pytest.raises(ConfigError, match=r"cluster\.toml is not TOML"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cluster\.toml is not TOML"):
        load_config(path)
    path.write_text("[server]\nservers = -1\n")
    with pytest.raises(ConfigError, match=r"cluster\.toml: server\.servers is -1"):
        load_config(path)


def test_only_the_cluster_section_is_fingerprinted():
    base = Config()
    assert len(base.fingerprint) == 16
    for setting in fields(ClusterConfig):
        assert (
            base.with_settings("cluster", **{setting.name: setting.metadata["low"] + 1}).fingerprint != base.fingerprint
        )
    assert base.with_settings("server", servers=7).fingerprint == base.fingerprint
    assert base.with_settings("control", restart=False).fingerprint == base.fingerprint


def test_with_settings_checks():
    assert Config().with_settings("server", servers=5).server == ServerConfig(servers=5)
    with pytest.raises(ConfigError, match="unknown setting"):
        Config().with_settings("server", nothing=5)


def test_the_default_fingerprint_is_part_of_the_format():
    # Golden: clusters on disk carry it. It changes only together with a hash function or a default of [cluster].
    assert Config().fingerprint == "adaaad62dc2a8bee"
