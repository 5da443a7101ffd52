"""Comparisons of more checkpoints than there are sentences for: pairs, words, stages, tables."""

import csv
import io
import json
from pathlib import Path

import pytest
from made_results import needle_results, results, write
from rich.console import Console

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_files import save_comparison
from yoco_eval.reports.comparison_text import print_comparison
from yoco_eval.reports.results import ResultsError
from yoco_eval.reports.runs import load_checkpoints
from yoco_eval.reports.sections import panels, sections
from yoco_eval.reports.stages import step_in

STEPS = [1000, 2000, 3000, 4000, 5000, 10000]
GRID = {"lengths": [4096, 8192, 16384], "depths": [0, 0.25, 0.5, 0.75, 1], "samples": 12}
LIMITS = [0, 4096, 4096, 16384, 4096, 16384]  # the fifth is worse than the fourth
ARC = [0.3, 0.3, 0.3, 0.3, 0.6, 0.6]


def write_run(folder):
    folders = []
    for step, limit, arc in zip(STEPS, LIMITS, ARC, strict=True):
        path = folder / f"step-{step}"
        write(path, needle_results(lambda n, _, limit=limit: float(n <= limit), **GRID))
        scores = {"arc": {"acc,none": arc, "acc_stderr,none": 0.01}}
        write(path, results(scores), "results_2.json")
        folders.append(path)
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def many(folders):
    return compare(load_checkpoints(folders))


def terminal(comparison, width=80):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    print_comparison(comparison, console)
    return console.file.getvalue()


def texts(rows):
    return [[cell.text for cell in row] for row in rows]


def test_words_are_of_the_one_before_and_the_first(many):
    differences = sections(many)[0]
    assert differences.alarms == (
        "REGRESSION: step-5000 is worse than the one before, step-4000: "
        "yoco_needle at 8K–16K (p < 0.001)",
    )
    assert differences.items == (
        "step-2000 is better than the one before, step-1000: yoco_needle at 4K (p < 0.001)",
        "step-4000 is better than the one before, step-3000: yoco_needle at 8K–16K (p < 0.001)",
        "step-5000 is better than the one before, step-4000: arc by 0.3 (p < 0.001)",
        "step-10000 is better than the one before, step-5000: yoco_needle at 8K–16K (p < 0.001)",
        "step-3000 is better than the first, step-1000: yoco_needle at 4K (p < 0.001)",
        "step-4000 is better than the first, step-1000: yoco_needle at 4K–16K (p < 0.001)",
        "step-5000 is better than the first, step-1000: yoco_needle at 4K, arc by 0.3 (p < 0.001)",
        "step-10000 is better than the first, step-1000: yoco_needle at 4K–16K, arc by 0.3 "
        "(p < 0.001)",
        "not told apart from the one before: step-3000",
    )
    assert len(differences.folded) == len(set(differences.folded)) > len(differences.items)


def test_pairs_are_a_matrix(many):
    counts, needles, arc = sections(many)[0].tables
    assert counts.header == (
        "checkpoint",
        "step-1000",
        "step-2000",
        "step-3000",
        "step-4000",
        "step-5000",
    )
    assert texts(counts.rows) == [
        ["step-2000", "+1", "", "", "", ""],
        ["step-3000", "+1", "=", "", "", ""],
        ["step-4000", "+1", "+1", "+1", "", ""],
        ["step-5000", "+2", "+1", "+1", "+1 −1", ""],
        ["step-10000", "+2", "+2", "+2", "+1", "+1"],
    ]
    assert counts.rows[3][4].tone == "worse" and counts.rows[3][3].tone == "better"
    assert needles.title == "yoco_needle: pairs" and needles.folded and arc.folded
    assert texts(needles.rows)[3] == ["step-5000", "+4K", "=", "=", "−8K–16K", ""]
    assert texts(needles.rows)[4] == ["step-10000", "+4K–16K", "+8K–16K", "+8K–16K", "=", "+8K–16K"]
    assert texts(arc.rows)[3] == ["step-5000", "+0.3", "+0.3", "+0.3", "+0.3", ""]


def test_pairs_that_are_neither_are_counted_and_those_without_tests_named(tmp_path):
    folders = write_run(tmp_path)
    (folders[1] / "results_2.json").unlink()
    data = results({"arc": {"acc,none": 0.1, "acc_stderr,none": 0.01}})
    write(folders[3], data, "results_2.json")
    data = needle_results(lambda *_: 1.0, haystack="essays", **GRID)
    write(folders[1], data)
    comparison = compare(load_checkpoints(folders))
    differences = sections(comparison)[0]
    assert differences.alarms[-1] == (
        "REGRESSION: step-4000 is worse than the first, step-1000: arc by 0.2 (p < 0.001)"
    )
    assert "not compared with the one before: step-2000, step-3000" in differences.items
    table = next(table for table in differences.tables if table.title.startswith("yoco_needle"))
    assert texts(table.rows)[0][1] == "-"
    (folders[4] / "results_2.json").unlink()
    data = needle_results(lambda n, _: float(n <= 8192), **GRID)
    write(folders[4], data)
    write(folders[5], needle_results(lambda *_: 0.0, **GRID))
    alarms = sections(compare(load_checkpoints(folders)))[0].alarms
    assert alarms[-1] == (
        "REGRESSION: the later one of 2 more pairs is worse: step-10000 than step-3000 "
        "(yoco_needle); step-10000 than step-4000 (yoco_needle)"
    )


def test_the_terminal_leaves_out_what_is_folded(many):
    text = terminal(many)
    assert max(map(len, text.splitlines())) <= 80
    assert "needle: pairs" not in text and "95 % intervals" not in text.split("Effective")[0]
    told = f"Left out here: all {len(sections(many)[0].folded)} sentences and 2 more tables; -o"
    assert told in " ".join(text.split())
    lines = [line.split() for line in text.splitlines()]
    assert ["checkpoint", "4K", "8K", "16K", "effective"] in lines
    assert ["step-4000", "1.00", "1.00", "1.00", "16K"] in lines
    # Of a triangle that is continued below, rows without a cell are not repeated.
    matrix = terminal(many, 50).partition("against earlier")[2].partition("+:")[0]
    assert [matrix.count(f"\nstep-{n} ") for n in (3000, 10000)] == [1, 2]
    assert matrix.count("\nstep-2000 ") == 1


def test_files_have_all(many, tmp_path):
    for suffix in ("md", "csv", "json", "tex", "html"):
        save_comparison(many, tmp_path / f"c.{suffix}")
    markdown = (tmp_path / "c.md").read_text()
    assert markdown.startswith("# 6 checkpoints: step-1000 to step-10000\n")
    assert markdown.count("<details>") == markdown.count("</details>") == 4
    folded = markdown.split("<details>")[1].splitlines()
    assert folded[0] == "<summary>yoco\\_needle: pairs</summary>"
    assert folded[1] == "" and folded[2].startswith("| checkpoint | step-1000 |")
    assert r"$-$8K--16K" in (tmp_path / "c.tex").read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "c.csv").read_text())))
    assert len([row for row in rows if row["kind"] == "test"]) == len(many.tests)
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["stages"] == {"order": "given", "steps": [1, 2, 3, 4, 5, 6]}
    page = (tmp_path / "c.html").read_text()
    assert page.count("<details>") == 5 and 'class="worse"' in page


def axes(comparison):
    panel = next(panel for panel in panels(comparison) if panel.name == "effective-length")
    figure = panel.figure()
    figure.draw_without_rendering()
    return figure.subfigs[0].axes


def test_effective_lengths_against_the_stage(many, folders):
    (ax,) = axes(many)
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"step-{n}" for n in STEPS]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["none", "4K", "8K", "16K"]
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert ax.lines[0].get_ydata().tolist() == [11, 12, 12, 14, 12, 14]
    few = compare(load_checkpoints(folders[:4]))
    assert few.stages is None and "effective-length" not in {p.name for p in panels(few)}
    asked = compare(load_checkpoints(folders[:3]), order="given")
    assert "effective-length" in {panel.name for panel in panels(asked)}
    pair = compare(load_checkpoints(folders[:2]), order="given")
    assert "effective-length" not in {panel.name for panel in panels(pair)}


def test_in_the_order_of_steps(folders):
    comparison = compare(load_checkpoints(sorted(folders, key=str)), order="step")
    assert comparison.names == [f"step-{n}" for n in STEPS]
    (ax,) = axes(comparison)
    assert ax.lines[0].get_xdata().tolist() == STEPS and ax.get_xlabel() == "Training step"
    assert {"2k", "10k"} <= {label.get_text() for label in ax.get_xticklabels()}


def test_steps_that_are_not_told(tmp_path, folders):
    for name, revision in (("base", "step3000"), ("tuned", "step512"), ("last", None)):
        data = results({"arc": {"acc,none": 0.5}}, model="pythia")
        if revision:
            data["config"]["model_args"]["revision"] = revision
        write(tmp_path / name, data)
    paths = [tmp_path / name for name in ("base", "tuned", "last")]
    assert compare(load_checkpoints(paths[:2]), order="step").names == ["tuned", "base"]
    with pytest.raises(ResultsError, match="no number in last; give names that have one"):
        compare(load_checkpoints(paths), order="step")
    with pytest.raises(ResultsError, match="a-1 and b-1 are both of step 1"):
        compare(load_checkpoints(paths[:2], ["a-1", "b-1"]), order="step")


@pytest.mark.parametrize(
    ("name", "step"),
    [("step-4000", 4000), ("7b/checkpoint_12000", 12000), ("qwen-7b-step3k-bf16", 3000),
     ("demo-64k", 64000), ("tokens-2.5B", 2.5e9), ("iter_0005000", 5000), ("base", None),
     ("model7x", None)],
)  # fmt: skip
def test_the_step_in_a_name(name, step):
    assert step_in(name) == step


def test_a_table_of_twelve_checkpoints_fits_the_terminal(tmp_path):
    lengths = [2**n for n in range(12, 21)]
    folders = [
        write(tmp_path / f"step-{k}000", needle_results(lambda *_: 0.5, lengths=lengths,
              depths=[0.5], samples=2)).parent
        for k in range(1, 13)
    ]  # fmt: skip
    lines = terminal(compare(load_checkpoints(folders))).splitlines()
    assert max(map(len, lines)) <= 80
    (header,) = [line for line in lines if line.startswith("checkpoint ")]
    assert header.split()[1:] == [*"4K 8K 16K 32K 64K 128K 256K 512K 1M effective".split()]
    assert Path(folders[0]).name in {line.split()[0] for line in lines if line}
