"""Files are written whole or not at all, where they are asked for; nothing in them is obeyed."""

import csv
import io
import json
import math
import os
import signal
import stat

import pytest

from yoco_eval.reports.files import check_path, to_csv, to_json, write_atomically, write_text
from yoco_eval.reports.results import ResultsError


def test_a_link_is_followed(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = tmp_path / "a.csv"
    link.symlink_to("elsewhere/target.csv")
    for text in ("new", "newer"):  # the target is missing, then there
        check_path(link, (".csv", ".png"))
        write_text(link, text)
        assert link.is_symlink() and (folder / "target.csv").read_text() == text
    assert [path.name for path in folder.iterdir()] == ["target.csv"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "lost.csv").symlink_to("none/a.csv")
    (tmp_path / "device.csv").symlink_to(os.devnull)
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("loop", "lost", "device", "folder", "pipe"):
        path = tmp_path / f"{name}.csv"
        for write in (lambda p: check_path(p, (".csv", ".png")), lambda p: write_text(p, "a")):
            with pytest.raises(ResultsError, match=rf"{name}\.csv: cannot be written \("):
                write(path)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert len(list(tmp_path.iterdir())) == 5


def test_permissions_are_those_of_other_files(tmp_path):
    path, other = tmp_path / "a.csv", tmp_path / "b"
    before = os.umask(0o027)
    try:
        write_text(path, "a")
        other.write_text("b")
        assert path.stat().st_mode == other.stat().st_mode
    finally:
        os.umask(before)
    path.chmod(0o600)
    write_text(path, "private")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_long_names(tmp_path):
    path = tmp_path / f"{'n' * 250}.csv"  # as long as names can be, almost
    write_text(path, "a")
    assert path.read_text() == "a"


def test_what_killed_runs_left_is_removed(tmp_path):
    def die(file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        write_atomically(tmp_path / "a.csv", die)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()

    def write(file):
        assert not left.exists()
        write_text(tmp_path / "b.csv", "b")  # while this one is being written
        file.write(b"a")

    write_atomically(tmp_path / "a.csv", write)
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "b.csv"}


def test_texts_that_utf8_lacks(tmp_path):
    write_text(tmp_path / "a.md", "a\ud800b\udcffc \U0001f600")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "a\ufffdb\ufffdc \U0001f600"


def test_cells_cannot_become_formulas():
    texts = ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", "＝1", " =1"]
    (*rows, last) = csv.DictReader(
        io.StringIO(to_csv(["name", "value"], [{"name": t, "value": -0.5} for t in [*texts, "a"]]))
    )
    assert all(row["name"].startswith("'") and row["value"] == "-0.5" for row in rows)
    assert len(rows) == len(texts) and last["name"] == "a"


def test_json_has_no_numbers_that_json_lacks():
    text = to_json({"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf}})
    data = json.loads(text, parse_constant=pytest.fail)
    assert data == {"a": [None, [1.5, None]], "b": {"c": None}}


def test_json_is_harmless_in_a_terminal():
    data = {"名": ["\x1b\x9b[31m\x7f", "\u202egnp", "\udcff\ud800", "\U000f0000", "é\n"]}
    text = to_json(data, indent=1)
    assert text.replace("\n", "").isprintable() and "名" in text and "é" in text
    assert json.loads(text) == data
