"""Comparisons as people and programs read them: terminal, Markdown, LaTeX, CSV, JSON."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
from made_results import LENGTHS, needle_results, of_cache, results, trained_to, write
from rich.console import Console

from yoco_eval.printable import one_line
from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_files import save_comparison
from yoco_eval.reports.comparison_text import print_comparison
from yoco_eval.reports.profile import Profile, ProfileRow
from yoco_eval.reports.profile_files import save_profile
from yoco_eval.reports.results import ResultsError
from yoco_eval.reports.runs import load_checkpoints
from yoco_eval.reports.sections import panels

HOSTILE = "<script>alert(1)</script>|**x**_y_[bold]\x1b[31m\n\\input{/etc/passwd}$%&#"


def terminal(comparison, width=80, **options):
    console = Console(width=width, file=io.StringIO(), highlight=False, **options)
    print_comparison(comparison, console)
    return console.file.getvalue()


def saved(comparison, tmp_path, suffix):
    save_comparison(comparison, tmp_path / f"c.{suffix}")
    return (tmp_path / f"c.{suffix}").read_text()


@pytest.fixture
def full(family):
    """The family with benchmarks, RULER, losses, profiles, and a file that is no use."""
    for k, folder in enumerate(family):
        scores = {"arc_easy": {"acc,none": 0.5 + k / 10, "acc_stderr,none": 0.01},
                  "yoco_ruler": {"acc@0004096,none": 0.9, "acc@0008192,none": 0.8},
                  "yoco_long_loss_book": {"loss@0001024,none": 4.0 - k}}  # fmt: skip
        write(folder, results(scores, folder.name, seed=k), "results_2.json")
        row = ProfileRow("YOCO", 2**20, "measured", 2**30, 2**20, 2**31, 1.5 + k, 20.0)
        save_profile(
            Profile(f"tiny sparse={k}", {}, "bfloat16", "GPU", None, {}, 64, 16, 1.0, 0, (row,)),
            folder / "profile.json",
        )
    (family[0] / "half.json").write_text("{")
    return compare(load_checkpoints(family), published=True)


@pytest.fixture
def hostile(tmp_path):
    """Names from files and from folders that mean something to each format."""
    paths = []
    for name in "ab":
        data = needle_results(trained_to(2**12), lengths=LENGTHS[:2], samples=2, task=HOSTILE)
        data["results"]["harm " + HOSTILE] = {"acc,none": 0.5, f"{HOSTILE},none": 0.1}
        data["config"]["model_dtype"] = name + HOSTILE
        paths.append(write(tmp_path / name, data).parent)
    return compare(load_checkpoints(paths, [f"x{HOSTILE}", f"y{HOSTILE}"]))


def test_terminal(full):
    text = terminal(full)
    lines = [line.split() for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^DIFFERENCES\nSignificant at the 5 % level, corrected for \d+ tests", text)
    assert ["effective", "4K", "64K", "256K", "1M"] in lines
    assert "4K 1.00 0.93–1.00 1.00 0.93–1.00 1.00 0.93–1.00 1.00 0.93–1.00".split() in lines
    assert ["demo-4k", "0.500", "±0.010"] in lines
    assert ["YOCO-3B-1M", "0.747"] in lines and ["published,", "not", "measured", "here"] in lines
    assert ["1M", "1.5", "2.5", "3.5", "4.5"] in lines and "GPU, bfloat16." in text
    assert "Measured: demo-4k: tiny sparse=0; demo-64k: tiny sparse=1;" in " ".join(text.split())
    headings = re.findall(r"^[A-Z][A-Z ]+$", text, re.M)
    assert headings == [
        "DIFFERENCES", "NEEDLES", "BENCHMARKS", "BY CONTEXT LENGTH", "COSTS", "SOURCES",
        "SKIPPED FILES",
    ]  # fmt: skip
    assert "half.json: not readable as JSON" in " ".join(text.split())


def test_best_is_bold(full, tmp_path):
    colored = terminal(full, force_terminal=True, color_system="truecolor")
    assert re.findall(r"\x1b\[1m *(0\.\d+) ±", colored) == ["0.800"]
    assert re.findall(r"\*\*(.*?)\*\*", saved(full, tmp_path, "md")) == ["0.800 ±0.010"]
    assert re.findall(r"\\textbf\{(.*?)\}", saved(full, tmp_path, "tex")) == ["0.800"]


@pytest.mark.parametrize("width", [40, 80])
def test_wide_tables_are_continued_below(tmp_path, width):
    paths = []
    for index in range(4):
        scores = {f"a_benchmark_{n}": {"acc,none": 0.5, "acc_stderr,none": 0.01} for n in range(9)}
        paths.append(write(tmp_path / f"checkpoint-{index}", results(scores)).parent)
    text = terminal(compare(load_checkpoints(paths)), width)
    assert max(map(len, text.splitlines())) <= width
    columns = (width - len("checkpoint-0")) // len("  a_benchmark_0")
    rows = [line.split()[1:] for line in text.splitlines() if line.startswith("checkpoint-3 ")]
    assert [len(row) // 2 for row in rows] == [columns] * (9 // columns) + [9 % columns] * bool(
        9 % columns
    )


def test_markdown(full, tmp_path):
    lines = saved(full, tmp_path, "md").splitlines()
    assert lines[0] == "# demo-4k / demo-64k / demo-256k / demo-1m"
    assert "| context | demo-4k | demo-64k | demo-256k | demo-1m |" in lines
    assert "| effective | 4K | 64K | 256K | 1M |" in lines
    assert "| *published, not measured here* | |" in lines
    for header, rule in zip(lines, lines[1:], strict=False):
        if rule.startswith("|---"):
            assert header.count("|") == rule.count("|")


def test_latex(full, tmp_path):
    text = saved(full, tmp_path, "tex")
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 8
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 8
    assert r"effective & 4K & 64K & 256K & 1M \\" in text
    assert r"demo-4k & 0.500 {\scriptsize $\pm$0.010} \\" in text
    for row in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end", text, re.S):
        columns, body = len(row[0]), row[1]
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1
                   for line in lines if "multicolumn" not in line)  # fmt: skip


def test_csv(full, tmp_path):
    rows = list(csv.DictReader(io.StringIO(saved(full, tmp_path, "csv"))))
    kinds = {row["kind"] for row in rows}
    assert kinds == {
        "benchmark", "published", "cell", "by length", "effective length", "profile", "test",
    }  # fmt: skip
    effective = [row for row in rows if row["kind"] == "effective length"]
    needles = [row["value"] for row in effective if row["task"] == "yoco_needle"]
    assert needles == [str(2**n) for n in (12, 16, 18, 20)]
    assert len([row for row in rows if row["kind"] == "cell"]) == 4 * 9 * 11
    tests = [row for row in rows if row["kind"] == "test"]
    assert len(tests) == len(full.tests)
    assert float(tests[0]["p_corrected"]) == full.tests[0].corrected


def test_json(full, tmp_path):
    data = json.loads(saved(full, tmp_path, "json"))
    assert data["kind"] == "yoco-eval comparison"
    assert [one["name"] for one in data["checkpoints"]] == full.names
    (needles,) = data["needles"]
    assert needles["results"][3]["effective_length"] == 2**20
    assert set(needles["results"][3]["by_length"][0]) == {
        "context_length", "correct", "samples", "haystacks", "accuracy", "low", "high",
    }  # fmt: skip
    assert data["findings"][0]["sentence"] == full.sentence(full.findings[0])
    assert len(data["tests"]) == len(full.tests)


def test_hostile_names(hostile, tmp_path):
    text = terminal(hostile)
    assert "\x1b" not in text and "[bold]" in text  # shown, not obeyed
    markdown = saved(hostile, tmp_path, "md")
    assert "<script" not in markdown and "\x1b" not in markdown
    assert not re.search(r"(?<!\\)\*\*x", markdown)
    for header, rule in zip(markdown.splitlines(), markdown.splitlines()[1:], strict=False):
        if rule.startswith("|---"):
            assert len(re.findall(r"(?<!\\)\|", header)) == rule.count("|")
    latex = saved(hostile, tmp_path, "tex")
    assert r"\input" not in latex and r"\textbackslash{}input\{/etc/passwd\}" in latex
    rows = list(csv.DictReader(io.StringIO(saved(hostile, tmp_path, "csv"))))
    assert {row["checkpoint"] for row in rows} == {one_line(f"{name}{HOSTILE}") for name in "xy"}
    assert json.loads(saved(hostile, tmp_path, "json"))["checkpoints"][0]["name"] == f"x{HOSTILE}"


def test_intervals_are_explained(tmp_path):
    write(tmp_path / "a", needle_results(lambda *_: 0.5, lengths=[4096]))
    write(tmp_path / "b", needle_results(lambda *_: 0.5, lengths=[4096], answers=False))
    write(tmp_path / "c", needle_results(lambda *_: 0.5, lengths=[4096], samples=1))
    comparison = compare(load_checkpoints([tmp_path / name for name in "abc"]))
    text = " ".join(terminal(comparison).split())
    assert "widened where samples, each of which has a haystack of its own, differ" in text
    assert "Not told which prompts were right, taken for independent: b." in text
    assert "Of one sample, which tells nothing of other haystacks: c." in text


def test_restrictions_are_told(tmp_path):
    write(tmp_path / "a", needle_results(lambda *_: 0.5, seed=0))
    write(tmp_path / "b", needle_results(lambda *_: 0.5, seed=1))
    write(tmp_path / "c", needle_results(lambda *_: 0.5, haystack="essays"))
    text = terminal(compare(load_checkpoints([tmp_path / name for name in "abc"])), width=120)
    assert "- haystack (yoco_needle): a synthetic, b synthetic, c essays" in text
    assert "- seed (yoco_needle): a 0, b 1, c 0" in text
    assert "- a and b (yoco_needle): not paired: other prompts (another seed)" in text
    assert "- a and c; b and c (yoco_needle): not compared: another haystack" in text
    told = "yoco_needle does not compare: another haystack (a synthetic, b synthetic, c essays)."
    assert told in text
    pair = compare(load_checkpoints([tmp_path / name for name in "ac"]))
    assert "No tests were made: see below." in terminal(pair)


def test_large_differences_that_are_not_significant_are_told(tmp_path):
    """One sample, of which one model answers 6 of 11 depths at 8K, and the other all."""
    paths = []
    for name, length in (("short", 2**12), ("long", 2**20), ("longer", 2**20)):
        data = needle_results(trained_to(length), name, lengths=(4096, 8192), samples=1)
        paths.append(write(tmp_path / name, data).parent)
    text = " ".join(terminal(compare(load_checkpoints(paths[:2]))).split())
    assert (
        "None is significant at the 5 % level (5 tests, Holm). Nearest to it: yoco_needle at 8K "
        "(short 0.545, long 1; corrected, p = 0.31)." in text
    )
    text = " ".join(terminal(compare(load_checkpoints(paths[1:]))).split())
    assert "None is significant at the 5 % level (5 tests, Holm). NEEDLES" in text


def test_checkpoints_without_a_common_task(tmp_path):
    for name, task in (("a", "yoco_needle"), ("b", "yoco_many")):
        write(tmp_path / name, needle_results(lambda *_: 0.5, task=task))
    pair = compare(load_checkpoints([tmp_path / name for name in "ab"]))
    assert "No tests were made: no two have a task in common." in terminal(pair)
    for name in "cd":  # without standard errors
        write(tmp_path / name, results({"yoco_ruler": {"acc@0004096,none": 0.5}}))
    pair = compare(load_checkpoints([tmp_path / name for name in "cd"]))
    assert "No tests were made: see below." in terminal(pair)


def test_long_values_and_lists_are_cut_and_counted(tmp_path):
    for name, last in (("a", 7), ("b", 8)):
        data = needle_results(lambda *_: 0.5, lengths=[4096], depths=[0, 1])
        data["configs"]["yoco_needle"]["metadata"]["samples"] = [*range(10_000), last]
        data["config"]["gen_kwargs"] = {"until": [name * 10_000]}
        for i in range(100):
            write(tmp_path / name, "{", f"x{i:02}.json")
        write(tmp_path / name, data)
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    for text in (saved(comparison, tmp_path, "md"), terminal(comparison, width=10_000)):
        assert max(map(len, text.splitlines())) < 24 * 80
        assert "22, 23 and 9977 more, b " in text and "(not the same further on)" in text
        assert "aaa … " in text and " characters left out … bbb" in text
        assert text.count("not readable as JSON") == 24
        assert re.search(r"a: 88 more; a \.json report names them", text)
    assert len(json.loads(saved(comparison, tmp_path, "json"))["checkpoints"][0]["skipped"]) == 100


def test_settings_that_a_file_does_not_tell(tmp_path):
    scores = {"arc_easy": {"acc,none": 0.5}}
    whole, bare = results(scores), results(scores, lm_eval_version=None)
    whole["config"]["limit"] = 40
    del bare["config"]["model_dtype"]
    for name, data in (("a", whole), ("b", bare)):
        write(tmp_path / name, data)
    text = terminal(compare(load_checkpoints([tmp_path / "a", tmp_path / "b"])))
    assert "- dtype (arc_easy): a float32, b not told" in text
    assert "- lm-eval (arc_easy): a 0.4.13, b not told" in text
    assert "- limit (arc_easy): a 40, b default" in text


def test_what_is_read_of_a_cache_is_told(tmp_path):
    full, sparse = (results({"arc_easy": {"acc,none": 0.5}}) for _ in range(2))
    for name, data in (("a", full), ("b", of_cache(sparse, sparse=64, cache_dtype="fp8"))):
        write(tmp_path / name, data)
    text = terminal(compare(load_checkpoints([tmp_path / "a", tmp_path / "b"])))
    assert "- sparse (arc_easy): a off, b 64" in text
    assert "- cache_dtype (arc_easy): a the model's, b fp8" in text


def test_every_needle_asked_for_in_turn(tmp_path):
    """The score stands beside the accuracy, where a checkpoint has it."""
    told = {"a": (1.0, 0.0), "b": (0.77, 0.038), "c": None}
    for name, score in told.items():
        task = "yoco_multi_needle_8" if score else "yoco_needle"
        data = needle_results(lambda length, depth: 1, lengths=LENGTHS[:1], samples=1, task=task)
        if score:
            scores = dict(zip(("acc_all,none", "acc_all_stderr,none"), score, strict=True))
            data["results"][task] |= scores
        write(tmp_path / name, data)
    several = compare(load_checkpoints([tmp_path / name for name in told]))
    [heading, row] = terminal(several).split("every needle of a text")[1].splitlines()[1:3]
    assert heading.split() == ["task", "a", "b", "c"]
    assert row.split() == ["yoco_multi_needle_8", "1.00", "0.77", "0.70–0.84", "-"]
    rows = list(csv.DictReader(saved(several, tmp_path, "csv").splitlines()))
    every = [one for one in rows if one["kind"] == "every needle"]
    assert [(one["checkpoint"], one["value"]) for one in every] == [("a", "1.0"), ("b", "0.77")]
    tested = [(one["task"], one["note"]) for one in rows if one["kind"] == "test"]
    assert tested.count(("yoco_multi_needle_8", "every needle")) == 1
    assert "yoco_multi_needle_8 (every needle): b is worse than the earlier a at 4K" in " ".join(
        terminal(several).split()
    )
    assert "Tested text by text where samples were logged" in terminal(several)
    alone = compare(load_checkpoints([tmp_path / "b"]))
    assert "Tested" not in terminal(alone)
    assert "yoco_multi_needle_8  0.77 0.70–0.84" in terminal(alone)
    assert "every needle" not in terminal(compare(load_checkpoints([tmp_path / "c"])))


def test_benchmarks_of_several_numbers_of_examples_are_told_apart(tmp_path):
    for name, score in (("a", 0.5), ("b", 0.7)):
        for shots in (0, 25):
            data = results({"arc": {"acc,none": score, "acc_stderr,none": 0.01}}, shots=shots)
            write(tmp_path / name, data, f"results_{shots}.json")
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    assert "b is better than a in arc (0-shot) (0.7 against 0.5), arc (25-shot)" in " ".join(
        terminal(comparison).split()
    )
    tests = [row for row in csv.DictReader(io.StringIO(saved(comparison, tmp_path, "csv")))
             if row["kind"] == "test"]  # fmt: skip
    assert [row["n_shot"] for row in tests] == ["0", "25"]


def test_effective_lengths_that_mislead_are_marked(tmp_path):
    """Of a checkpoint that was evaluated at a long context length alone."""
    write(tmp_path / "a", needle_results(trained_to(4096), lengths=LENGTHS[:3]))
    write(tmp_path / "b", needle_results(lambda *_: 1.0, lengths=[LENGTHS[2]]))
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    text = terminal(comparison)
    assert ["effective", "4K", "16K†"] in [line.split() for line in text.splitlines()]
    assert "†: shorter context lengths, at which others were evaluated, were left" in text
    assert r"16K\textdagger{}" in saved(comparison, tmp_path, "tex")
    rows = list(csv.DictReader(io.StringIO(saved(comparison, tmp_path, "csv"))))
    effective = [row for row in rows if row["kind"] == "effective length"]
    assert [(row["value"], row["note"]) for row in effective] == [
        ("4096", ""), ("16384", "shorter ones left out"),
    ]  # fmt: skip


def test_lengths_of_cut_prompts_are_marked(tmp_path):
    """The older of two runs, that are one grid, had a backend that cut at 8K."""
    runs = {"a": [(8192, LENGTHS[:3]), (2**20, LENGTHS[3:5])], "b": [(2**20, LENGTHS[:5])]}
    for name, parts in runs.items():
        for i, (limit, lengths) in enumerate(parts):
            data = needle_results(lambda *_: 1.0, name, lengths=lengths, date=1.7e9 + i)
            data["max_length"] = limit
            write(tmp_path / name, data, f"results_{i}.json")
    ruler = {f"acc@{n:07},none": 0.9 for n in LENGTHS[:3]}
    for name in "ab":
        data = results({"yoco_ruler": ruler}, name, max_length=5000 if name == "a" else 2**14)
        data["configs"]["yoco_ruler"]["metadata"] = {"by_length": ["acc"]}
        write(tmp_path / name, data, "results_ruler.json")
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    text = terminal(comparison)
    lines = [line.split() for line in text.splitlines()]
    assert ["16K", "1.00‡", "0.93–1.00", "1.00", "0.93–1.00"] in lines
    assert ["32K", "1.00", "0.93–1.00", "1.00", "0.93–1.00"] in lines
    assert ["effective", "8K‡", "64K"] in lines
    assert ["8K", "0.900‡", "0.900"] in lines and ["effective", "4K‡", "16K"] in lines
    told = "‡: prompts cut to the backend's max_length (a 8192 tokens)"
    assert told in " ".join(text.split())
    assert "- a and b (yoco_needle): not tested at 16K: prompts were cut" in text
    assert r"1.00\textdaggerdbl{}" in saved(comparison, tmp_path, "tex")
    rows = list(csv.DictReader(io.StringIO(saved(comparison, tmp_path, "csv"))))
    notes = {(row["checkpoint"], row["task"], row["context_length"])
             for row in rows if row["note"] == "prompts cut to 8192 tokens"}  # fmt: skip
    assert notes == {("a", "yoco_needle", "16384")}
    data = json.loads(saved(comparison, tmp_path, "json"))
    assert data["needles"][0]["results"][0]["cut"] == {"16384": 8192}
    assert data["curves"][0]["cut"] == [{"8192": 5000, "16384": 5000}, {}]
    assert data["curves"][0]["effective_lengths"] == [4096, 16384]
    assert ">8K‡<" in saved(comparison, tmp_path, "html").replace("\n", "")
    texts = {
        text.get_text()
        for panel in panels(comparison)
        for part in panel.figure().subfigs
        for text in [*part.texts, *legend_texts(part)]
    }
    legend = "prompts cut to the backend's max_length"
    assert {legend, f"‡: {legend}"} <= texts


def legend_texts(figure):
    return [text for legend in figure.legends for text in legend.get_texts()]


def test_bounds_tell_on_which_side_of_the_threshold_they_are(tmp_path):
    """That of 54 right answers of 55 is 0.904."""
    data = needle_results(lambda *_: 1.0, lengths=[4096])
    cell = data["configs"]["yoco_needle"]["metadata"]["cells"][0]
    cell |= {"correct": 4, "right": [0, 1, 2, 3], "wrong": [4]}
    write(tmp_path / "a", data)
    text = terminal(compare(load_checkpoints([tmp_path / "a"])))
    lines = [line.split() for line in text.splitlines()]
    assert ["4K", "0.98", "0.904–1.00"] in lines and ["effective", "4K"] in lines


def test_too_few_prompts_are_told(tmp_path):
    write(tmp_path, needle_results(lambda *_: 1.0, samples=2))
    comparison = compare(load_checkpoints([tmp_path], ["a"]))
    text = terminal(comparison)
    assert ["effective", "none*"] in [line.split() for line in text.splitlines()]
    assert "it takes 35 of each length" in " ".join(text.split())
    # On the page under the first table, too, and under the heatmaps.
    page = saved(comparison, tmp_path, "html")
    assert page.count("too few to tell") == 2
    texts = "".join(ET.fromstring(saved(comparison, tmp_path, "svg")).itertext())
    assert "*: more prompts might show a longer one" in texts
    (row,) = [
        row
        for row in csv.DictReader(io.StringIO(saved(comparison, tmp_path, "csv")))
        if row["kind"] == "effective length"
    ]
    assert (row["value"], row["note"]) == ("", "too few prompts")


def test_refused_outputs(full, tmp_path):
    with pytest.raises(ResultsError, match=r"use \.html, \.png, .*\.json or \.tex"):
        save_comparison(full, tmp_path / "c.doc")
    with pytest.raises(ResultsError, match="no such folder"):
        save_comparison(full, tmp_path / "none" / "c.md")
