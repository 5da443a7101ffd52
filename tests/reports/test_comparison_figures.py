"""Figures of comparisons: what is drawn of whom, in which colours, and that it fits."""

import logging
import math
import re
import xml.etree.ElementTree as ET

import pytest
from made_results import LENGTHS, needle_results, results, trained_to, write
from matplotlib.colors import same_color, to_hex
from matplotlib.image import imread

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_files import save_comparison
from yoco_eval.reports.panels import stack
from yoco_eval.reports.profile import Profile, ProfileRow
from yoco_eval.reports.profile_files import save_profile
from yoco_eval.reports.results import ResultsError
from yoco_eval.reports.runs import load_checkpoints
from yoco_eval.reports.sections import panels
from yoco_eval.reports.style import PAGE_WIDTH, color, figure_style, series, spacing


@pytest.fixture(autouse=True)
def style():
    with figure_style():
        yield


@pytest.fixture
def full(family):
    """The family with RULER and losses for three of the four, profiles for two."""
    for k, folder in enumerate(family):
        scores = {
            "yoco_ruler": {"acc@0004096,none": 0.9, "acc@0008192,none": 0.5 + k / 10},
            "yoco_babilong": {"acc@0000000,none": 0.6, "acc@0001024,none": 0.4},
            "yoco_long_loss_book": {"loss@0001024,none": 4.0 - k, "loss_to@0001024,none": 5.0},
        }
        if k:
            write(folder, results(scores, folder.name), "results_2.json")
        if k > 1:
            cost = [
                ProfileRow("YOCO", n, "measured", 2**30, n * 512, 2**31, n / 1e5, 1e6 / n)
                for n in LENGTHS
            ]
            save_profile(
                Profile("tiny", {}, "bfloat16", "GPU", None, {}, 64, 16, 1.0, 0, tuple(cost)),
                folder / "profile.json",
            )
    return compare(load_checkpoints(family))


def axes(panel):
    figure = panel.figure()
    figure.draw_without_rendering()
    (part,) = figure.subfigs
    return part.axes


def labels(ax):
    return [tick.get_text() for tick in ax.get_xticklabels()]


def test_every_kind_has_a_figure(full):
    assert [(p.section, p.name) for p in panels(full)] == [
        ("Needles", "yoco_needle-heatmaps"), ("Needles", "needles"),
        ("By context length", "curves"), ("Costs", "costs"),
    ]  # fmt: skip


@pytest.mark.slow
def test_heatmaps_stand_side_by_side_on_one_scale(full):
    *maps, bar = axes(panels(full)[0])
    assert len(maps) == 4
    assert len({(round(ax.bbox.y0), round(ax.bbox.width)) for ax in maps}) == 1
    for ax, result in zip(maps, full.needles[0].results, strict=True):
        (mesh,) = (c for c in ax.collections if c.get_array() is not None)
        assert mesh.get_clim() == (0, 1) and mesh.get_array().shape == (11, 9)
        assert mesh.get_array()[0, 8] == result.run.cells[8 * 11].accuracy
        assert labels(ax) == ["4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M"]
    assert [t.get_text() for t in maps[1].texts[-2:]] == ["demo-64k", "mean 0.69, effective 64K"]
    assert bar.get_ylabel() == "Accuracy" and not maps[1].get_yticks().size


def test_grids_that_differ_are_drawn_on_a_common_one(tmp_path):
    write(tmp_path / "a", needle_results(lambda *_: 1.0, lengths=LENGTHS[:2]))
    write(tmp_path / "b", needle_results(lambda *_: 1.0, lengths=LENGTHS[1:3], depths=[0.5]))
    first, second, _ = axes(panels(compare(load_checkpoints([tmp_path / "a", tmp_path / "b"])))[0])
    assert labels(first) == labels(second) == ["4K", "8K", "16K"]
    for ax, cells in ((first, 22), (second, 2)):
        (mesh,) = (c for c in ax.collections if c.get_array() is not None)
        assert mesh.get_array().count() == cells and ax.patch.get_hatch()


def test_accuracy_has_intervals_and_the_threshold(full):
    (ax,) = axes(panels(full)[1])
    assert len(ax.lines) == 5 and len(ax.collections) == 4
    for index, result in enumerate(full.needles[0].results):
        line, bars = ax.lines[index], ax.collections[index]
        assert list(line.get_ydata()) == [one.accuracy for one in result.by_length]
        assert same_color(line.get_color(), color(index))
        spans = [segment[:, 1].tolist() for segment in bars.get_segments()]
        assert spans == [list(one.interval) for one in result.by_length]
    assert set(ax.lines[4].get_ydata()) == {full.threshold}
    assert labels(ax) == ["4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M"]


def test_a_checkpoint_has_one_color_in_all_figures(full):
    for panel in panels(full)[1:]:
        figure = panel.figure()
        (legend,) = figure.subfigs[0].legends
        for text, handle in zip(legend.get_texts(), legend.get_lines(), strict=True):
            index = full.names.index(text.get_text())
            assert same_color(handle.get_color(), color(index))
    costs = axes(panels(full)[3])
    assert [to_hex(line.get_color()) for line in costs[0].lines] == [color(2), color(3)]


def test_curves(full):
    titles = [ax.get_title() for ax in axes(panels(full)[2])]
    assert titles == [
        "yoco_ruler: accuracy", "yoco_babilong: accuracy",
        "yoco_long_loss_book: loss, nats per token",
        "yoco_long_loss_book: loss of all up to there",
    ]  # fmt: skip
    ruler, babilong, loss, _ = axes(panels(full)[2])
    assert [line.get_ydata()[1] for line in ruler.lines] == [0.6, 0.7, 0.8]
    assert labels(babilong) == ["1K"]  # 0K has no place on a logarithmic axis
    assert ruler.get_ylim() == babilong.get_ylim() == (-0.02, 1.02)
    assert [line.get_ydata()[0] for line in loss.lines] == [3.0, 2.0, 1.0]


@pytest.mark.slow
def test_long_names_are_told_apart(tmp_path):
    folders = [
        write(tmp_path / f"yoco-3b-pretrained-step-{k}000-lr-3e-4", needle_results(lambda *_: 1.0))
        for k in (9, 10)
    ]
    *maps, _ = axes(panels(compare(load_checkpoints(folders)))[0])
    assert [ax.texts[-2].get_text() for ax in maps] == ["…9000…", "…10000…"]


@pytest.mark.slow
def test_many_checkpoints_stand_at_their_lengths(tmp_path):
    """However many there are and however close the lengths, points stay by their length."""
    lengths = [4096, 6144, 8192, 12288, 16384, 2**19, 3 * 2**18, 2**20]
    folders = [
        write(tmp_path / f"c{k}", needle_results(lambda *_: 0.5, lengths=lengths)).parent
        for k in range(12)
    ]
    found = {panel.name: panel for panel in panels(compare(load_checkpoints(folders)))}
    (ax,) = axes(found["needles"])
    for line in ax.lines[:12]:
        assert ax.get_xlim()[0] < line.get_xdata()[0] and line.get_xdata()[-1] < ax.get_xlim()[1]
        for x, length in zip(line.get_xdata(), lengths, strict=True):
            assert abs(x - math.log2(length)) < 0.3 * spacing(lengths)
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert "1M" in labels(ax) and "4K" in labels(ax)
    looks = {(s["color"], s["marker"], s["linestyle"]) for s in map(series, range(36))}
    assert len(looks) == 36


@pytest.mark.slow
@pytest.mark.parametrize("name", ["short", "a-checkpoint-s-name-as-long-as-some-people-like-them",
                                  "and-longer-" * 12])  # fmt: skip
def test_everything_fits(tmp_path, name):
    """No text leaves the page or its neighbours' place, whatever the number of checkpoints."""
    folders = []
    for k in range(9):
        data = needle_results(trained_to(2 ** (12 + k)), samples=8, depths=[0.0, 0.5, 1.0])
        folders.append(write(tmp_path / f"{name}-{k}", data).parent)
    for number in (1, 2, 9):
        comparison = compare(load_checkpoints(folders[:number]))
        found = panels(comparison)
        figure = stack(found)
        figure.draw_without_rendering()
        assert figure.get_figwidth() == PAGE_WIDTH
        for part in figure.subfigs:
            texts = [*part.texts, *(t for legend in part.legends for t in legend.get_texts())]
            for ax in part.axes:
                texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
                texts += [*ax.get_xticklabels(), *ax.get_yticklabels()]
            for text in filter(lambda text: text.get_text(), texts):
                box = text.get_window_extent()
                assert part.bbox.x0 - 1 <= box.x0 and box.x1 <= part.bbox.x1 + 1, text
                assert part.bbox.y0 - 1 <= box.y0 and box.y1 <= part.bbox.y1 + 1, text
        heatmaps = figure.subfigs[-1 if comparison.many else 0]
        maps = [ax for ax in heatmaps.axes if ax.get_xlabel()]
        assert len(maps) == number
        captions = [ax.texts[-2] for ax in maps]
        boxes = [caption.get_window_extent() for caption in captions]
        for left, right in zip(boxes, boxes[1:], strict=False):
            assert left.x1 < right.x0 or left.y0 > right.y1


@pytest.mark.slow
def test_files(tmp_path):
    for name in "ab":
        data = needle_results(lambda *_: 0.5, lengths=LENGTHS[:2], depths=[0.0, 1.0])
        data["results"]["ruler"] = {"4096,none": 0.5}
        write(tmp_path / name, data)
    full = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    for suffix in ("png", "svg", "pdf"):
        for name in ("a", "b"):
            save_comparison(full, tmp_path / f"{name}.{suffix}")
        first, second = (tmp_path / f"{name}.{suffix}" for name in "ab")
        assert first.read_bytes() == second.read_bytes()
    assert imread(tmp_path / "a.png").shape[1] == PAGE_WIDTH * 300
    texts = [e.text for e in ET.parse(tmp_path / "a.svg").iter() if e.tag.endswith("}text")]
    assert {"a", "b", "yoco_needle", "By context length", "Accuracy"} <= set(texts)
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "a.pdf").read_bytes())) == 3


def test_hostile_names(tmp_path):
    harm = "$\\frac{1}{0}$ <b>&\x1b[31m\n_^" + "\N{HORIZONTAL ELLIPSIS}"
    write(tmp_path / "a", needle_results(trained_to(4096), lengths=LENGTHS[:2], task=harm))
    comparison = compare(load_checkpoints([tmp_path / "a"], [harm]))
    save_comparison(comparison, tmp_path / "c.svg")
    texts = [e.text for e in ET.parse(tmp_path / "c.svg").iter() if e.tag.endswith("}text")]
    assert "$\\frac{1}{0}$ <b>&\N{REPLACEMENT CHARACTER}[31m _^…" in texts
    assert re.fullmatch(r"[\w.-]+", panels(comparison)[0].name)


def test_letters_that_no_font_has_are_told_once(tmp_path, caplog, recwarn):
    write(tmp_path / "a", needle_results(lambda *_: 0.5, lengths=LENGTHS[:2]))
    comparison = compare(load_checkpoints([tmp_path / "a"], ["\N{CUNEIFORM SIGN A}" * 3]))
    with caplog.at_level(logging.WARNING):
        save_comparison(comparison, tmp_path / "c.png")
    assert caplog.text.count("some letters are drawn as boxes") == 1
    assert not [one for one in recwarn if "missing from font" in str(one.message)]


def test_nothing_to_draw(tmp_path):
    write(tmp_path / "a", results({"arc_easy": {"acc,none": 0.5}}))
    with pytest.raises(ResultsError, match="c.png: nothing to draw"):
        save_comparison(compare(load_checkpoints([tmp_path / "a"])), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
