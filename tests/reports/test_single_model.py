"""A comparison of one checkpoint: what stands beside a model card."""

import io

from made_results import needle_results, of_cache, results, trained_to, write
from rich.console import Console

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_files import save_comparison
from yoco_eval.reports.comparison_text import print_comparison
from yoco_eval.reports.runs import load_checkpoints
from yoco_eval.reports.sections import sections
from yoco_eval.reports.single_model import evaluated


def write_model(folder):
    for task, lengths in (("yoco_needle", [4096, 8192]), ("yoco_passkey", [8192, 16384])):
        data = needle_results(trained_to(8192), lengths=lengths, samples=20, task=task)
        write(folder, data, f"results_{task}.json")
    scores = {
        "arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.01},
        "loss_a": {"loss@0001024,none": 3.0, "loss@0002048,none": 2.0},
        "loss_b": {"loss@0002048,none": 2.5},
    }
    write(folder, results(scores), "results_2.json")
    return folder


def texts(table):
    return [list(table.header), *([cell.text for cell in row] for row in table.body)]


def test_columns_are_tasks_and_nothing_is_said_of_differences(tmp_path):
    comparison = compare(load_checkpoints([write_model(tmp_path / "small")]), published=True)
    found = {section.title: section for section in sections(comparison)}
    assert list(found) == [
        "Needles", "Benchmarks", "By context length", "How it was evaluated", "Sources",
    ]  # fmt: skip
    (needles,) = found["Needles"].tables
    assert texts(needles) == [
        ["context", "yoco_needle", "yoco_passkey"],
        ["4K", "1.00", "-"],
        ["8K", "1.00", "1.00"],
        ["16K", "-", needles.rows[2][2].text],
        ["effective", "8K", "8K"],
    ]
    assert needles.rows[1][1].detail == "0.98–1.00"
    (losses,) = found["By context length"].tables
    assert losses.title == "loss, nats per token" and not found["By context length"].text
    # The first tokens of loss_b do not begin at 1K; by itself that is its only length.
    assert texts(losses) == [["context", "loss_a", "loss_b"], ["1K", "3.000", "-"],
                             ["2K", "2.000", "2.500"]]  # fmt: skip
    (benchmarks,) = found["Benchmarks"].tables
    assert benchmarks.header[:2] == ("task", "small") and len(benchmarks.header) > 2
    assert benchmarks.rows[0][0].text == "arc_easy, 0-shot acc"
    assert benchmarks.title.endswith("; published, not measured here: the others")
    setup = found["How it was evaluated"].items
    assert setup[:2] == ("dtype: float32", "lm-eval: 0.4.13")
    assert "haystack: synthetic (yoco_needle, yoco_passkey)" in setup


def test_what_is_read_of_a_cache_is_told_first(tmp_path):
    data = needle_results(trained_to(8192), lengths=[4096])
    write(tmp_path / "a", of_cache(data, sparse=64, cache_dtype="fp8"))
    write(tmp_path / "b", of_cache(needle_results(trained_to(8192), lengths=[4096]), sparse=8))
    alone = {one.title: one for one in sections(compare(load_checkpoints([tmp_path / "a"])))}
    setup = alone["How it was evaluated"].items
    assert setup[:3] == ("sparse: 64", "cache_dtype: fp8", "dtype: float32")
    several = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    sources = next(one for one in sections(several) if one.title == "Sources").items
    assert ", yoco sparse=64 cache_dtype=fp8, 20" in sources[0]
    assert ", yoco sparse=8, 20" in sources[1]


def test_the_model_is_named_first(tmp_path):
    comparison = compare(load_checkpoints([write_model(tmp_path / "small")]))
    console = Console(width=80, file=io.StringIO(), highlight=False)
    print_comparison(comparison, console)
    text = console.file.getvalue()
    assert text.startswith("small\n\nNEEDLES\n") and "iffer significantly" not in text
    save_comparison(comparison, tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "<title>small</title>" in page and "Differences" not in page


def test_a_group_stands_for_its_members_where_they_are_alike(tmp_path):
    names = ("a", "b", "c", "g")
    data = results({name: {"acc,none": 0.5} for name in names}, group_subtasks={"g": ["a", "b"]})
    for name, seed, haystack in (("a", 1, "synthetic"), ("b", 1, "essays"), ("c", 2, "essays")):
        data["configs"][name]["metadata"] = {"seed": seed, "haystack": haystack}
    write(tmp_path, data)
    (model,) = load_checkpoints([tmp_path])
    items = [*evaluated([*model.tasks.values()])]
    assert {"seed: 1 (g)", "seed: 2 (c)", "haystack: synthetic (a)", "haystack: essays (b, c)"} <= {
        *items
    }
    # Not where its results are from before theirs.
    data["config"]["limit"] = 10
    write(tmp_path, {**data, "date": 1.6e9}, "results_0.json")
    del data["results"]["g"], data["config"]["limit"]
    write(tmp_path, data)
    (model,) = load_checkpoints([tmp_path])
    assert "limit: 10 (g)" in [*evaluated([*model.tasks.values()])]
