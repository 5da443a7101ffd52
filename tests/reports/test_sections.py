"""A section is one file, listed once: then it is in every form of a report."""

import pytest
import toy_section
from made_results import needle_results, trained_to, write

from yoco_eval.cli import main
from yoco_eval.reports import sections


@pytest.fixture
def folders(tmp_path):
    """Two checkpoints; only of the first is it known how long its evaluation took."""
    for name, seconds in {"a": {"total_evaluation_time_seconds": "61.5"}, "b": {}}.items():
        data = needle_results(trained_to(2**14), name, lengths=[4096, 8192], samples=1)
        write(tmp_path / name, data | seconds)
    return tmp_path


def report(folders, *suffixes):
    outputs = [x for suffix in suffixes for x in ("-o", str(folders / f"report.{suffix}"))]
    assert main(["compare", str(folders / "a"), str(folders / "b"), *outputs]) == 0


def test_a_section_is_in_every_form(folders, monkeypatch, capsys):
    monkeypatch.setattr(sections, "PARTS", (*sections.PARTS, toy_section.PART))
    report(folders, "html", "md", "tex", "csv", "svg")
    assert "\nTIMES\n\nevaluation, s\ncheckpoint  all tasks\na                  62\nb" in (
        capsys.readouterr().out
    )
    read = {path.suffix: path.read_text() for path in folders.glob("report.*")}
    assert "\n## Times\n" in read[".md"] and "evaluation, s" in read[".tex"]
    page = read[".html"].partition('id="times"')[2]
    assert "<svg" in page and ">62<" in page.replace("\n", "")
    assert "\ntime,a,,,,,8192,,,61.5," in read[".csv"]
    assert "evaluation, s" in read[".svg"]


def test_a_section_that_has_nothing_to_say_is_left_out(folders, monkeypatch, capsys):
    (old,) = (folders / "a").glob("*.json")
    old.write_text(old.read_text().replace("total_evaluation_time_seconds", "x"))
    report(folders, "svg")
    before = capsys.readouterr().out, (folders / "report.svg").read_text().count("<path")
    monkeypatch.setattr(sections, "PARTS", (*sections.PARTS, toy_section.PART))
    report(folders, "svg")
    assert (capsys.readouterr().out, (folders / "report.svg").read_text().count("<path")) == before
