"""What a benchmark knows of the checkpoints that it has saved."""

from types import SimpleNamespace

import pytest

from benchmarks.saves import Saves
from hashring.view import View
from ps.config import Config


@pytest.fixture
def saves(tmp_path):
    (tmp_path / "token").write_text("t")
    servers = SimpleNamespace(view=lambda: View.empty(7))
    made = Saves(tmp_path / "saves", SimpleNamespace(token_path=str(tmp_path / "token")), servers, Config())
    (tmp_path / "saves").mkdir()
    yield made
    made.close()


def test_a_save_that_fails_is_told_and_leaves_nothing_damaged(saves):
    assert saves.over()
    saves.begin()
    assert not saves.end()  # no server answers
    assert saves.over()
    told = saves.check()
    assert (told["saves"], told["saved"], told["damaged"]) == (1, 0, [])
    assert "no server of the cluster answers" in told["refused"][0]


def test_a_save_that_is_killed_is_one_that_did_not_save(saves):
    saves.begin()
    saves.close()
    assert not saves.end()
    assert saves.check()["refused"] == ["its process was killed"]


def test_what_was_told_saved_and_is_not_there_is_damaged(saves, tmp_path):
    saves.outcomes.append({"name": "gone"})
    assert saves.check()["damaged"] == ["gone"]
    assert not saves.writing()
    (tmp_path / "saves" / "new").mkdir()
    assert not saves.writing()
    (tmp_path / "saves" / "new" / "blocks-0").write_bytes(b"x")
    assert saves.writing()
