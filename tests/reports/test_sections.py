"""A section is one file, listed once: then it is in every form of a report."""

from dataclasses import replace

import pytest
import toy_section
from made_results import needle_results, trained_to, write

from yoco_eval.cli import main
from yoco_eval.reports import sections
from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_text import latex, markdown
from yoco_eval.reports.runs import load_checkpoints


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


def test_a_section_counts_all_files_of_a_run(folders, monkeypatch, capsys):
    data = needle_results(trained_to(2**14), "a", lengths=[16384], samples=1, date=1.6e9)
    older = data | {"total_evaluation_time_seconds": "30.5"}
    write(folders / "a", older, "results_2024-01-02T03-04-05.678901.json")
    monkeypatch.setattr(sections, "PARTS", (*sections.PARTS, toy_section.PART))
    report(folders, "csv")
    assert "checkpoint  all tasks\na                  92\nb" in capsys.readouterr().out
    told = (folders / "report.csv").read_text()
    assert "\ntime,a,,,,,8192,,,61.5," in told and "\ntime,a,,,,,16384,,,30.5," in told


def test_a_column_that_there_is_not_is_told_with_its_section(folders, monkeypatch):
    part = replace(toy_section.PART, rows=wrong_rows)
    monkeypatch.setattr(sections, "PARTS", (*sections.PARTS, part))
    with pytest.raises(ValueError, match="test_sections: a row has seconds, not in CSV_COLUMNS"):
        list(sections.rows(compare(load_checkpoints([folders / "a"]))))


def wrong_rows(comparison):
    yield {"kind": "time", "seconds": 61.5}


def test_a_note_stands_once_in_a_section(tmp_path):
    for task in ("yoco_needle", "yoco_passkey"):
        for name in ("a", "b"):
            data = needle_results(trained_to(2**14), name, lengths=[4096], samples=1, task=task)
            write(tmp_path / name, data, f"results_{task[5]}.json")
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    assert markdown(comparison).count("Effective: ") == 1
    assert latex(comparison).count("Effective: ") == 2  # its tables float


def test_a_section_that_has_nothing_to_say_is_left_out(folders, monkeypatch, capsys):
    (old,) = (folders / "a").glob("*.json")
    old.write_text(old.read_text().replace("total_evaluation_time_seconds", "x"))
    report(folders, "svg")
    before = capsys.readouterr().out, (folders / "report.svg").read_text().count("<path")
    monkeypatch.setattr(sections, "PARTS", (*sections.PARTS, toy_section.PART))
    report(folders, "svg")
    assert (capsys.readouterr().out, (folders / "report.svg").read_text().count("<path")) == before
