"""Files of --use_cache: what any process has stored, all have, and no other model's."""

import sqlite3
from contextlib import closing

import pytest
from sqlitedict import SqliteDict

from yoco_eval.responses import unite_files

MINE = {"dtype": "torch.bfloat16", "max_length": "4096", "sparse": "64"}
NEW = {"yoco_eval": "mine", "yoco_eval settings": MINE}


def file(folder, rank, name="cache"):
    return SqliteDict(folder / f"{name}_rank{rank}.db", autocommit=True)


def content(folder, rank, name="cache"):
    with file(folder, rank, name) as found:
        return dict(found)


def fill(folder, rank, fingerprint="mine", name="cache", **responses):
    with file(folder, rank, name) as own:
        own["yoco_eval"] = fingerprint
        own.update(responses)
        own.commit()


@pytest.mark.parametrize("rank", [0, 2])
def test_responses_of_all_files(tmp_path, rank):
    fill(tmp_path, 0, a=(-1.5, True))
    fill(tmp_path, 1, b="text", c=-3.0)
    fill(tmp_path, 11, d=1)
    fill(tmp_path, 0, name="others", fingerprint="theirs", e=1)
    (tmp_path / "cache_rank3.db").touch()  # of a process that was killed at once
    (tmp_path / "cache_rank.db").write_text("no database")
    with file(tmp_path, rank) as own:
        unite_files(own, "mine", MINE, None)
        assert own["b"] == "text" and own["a"] == (-1.5, True)
    expected = {"a": (-1.5, True), "b": "text", "c": -3.0, "d": 1} | NEW
    assert content(tmp_path, rank) == expected
    assert set(content(tmp_path, 1)) == {"b", "c", "yoco_eval"}


def test_any_name_may_be_a_file(tmp_path):
    fill(tmp_path, 0, a=1)
    with SqliteDict(tmp_path / "mine.db", autocommit=True) as own:
        unite_files(own, "mine", MINE, None)
        assert dict(own) == NEW


@pytest.mark.parametrize("fingerprint", ["theirs", None])
def test_another_models_are_refused_wherever_they_are(tmp_path, fingerprint):
    fill(tmp_path, 1, fingerprint="theirs", a=1)
    if fingerprint is None:
        with closing(sqlite3.connect(tmp_path / "cache_rank1.db")) as connection, connection:
            connection.execute("DELETE FROM unnamed WHERE key = 'yoco_eval'")
    with (
        file(tmp_path, 0) as own,
        pytest.raises(ValueError, match="cache_rank1.db: holds responses of another model"),
    ):
        unite_files(own, "mine", MINE, None)
    assert content(tmp_path, 0) == {}


@pytest.mark.parametrize(
    "theirs, told",
    [
        ({}, "another model, or of this one with other settings"),
        (MINE, "another model or tokenizer"),
        (
            {"dtype": "torch.float32", "max_length": "4096", "think_end_token": "</think>"},
            "other settings (dtype was torch.float32, and is torch.bfloat16; think_end_token was "
            "</think>, and is not set; sparse was not set, and is 64), or another model or "
            "tokenizer",
        ),
    ],
)
def test_settings_that_differ_are_named(tmp_path, theirs, told):
    fill(
        tmp_path, 1, fingerprint="theirs", a=1, **({"yoco_eval settings": theirs} if theirs else {})
    )
    with file(tmp_path, 0) as own, pytest.raises(ValueError) as raised:
        unite_files(own, "mine", MINE, None)
    assert f"cache_rank1.db: holds responses of {told}; name another file" in str(raised.value)


def test_none_is_written_before_all_are_read(tmp_path):
    """Each of two processes reads what the other one is about to write."""

    class Other:
        def wait(self):
            assert content(tmp_path, 0) == {}
            fill(tmp_path, 1, late=1)

    with file(tmp_path, 0) as own:
        unite_files(own, "mine", MINE, Other())
        assert dict(own) == NEW
