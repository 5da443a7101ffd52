"""The heatmap: what a reader sees in the figure, the table and the terminal."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from made_results import needle_results, of_cache, write
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from yoco_eval.cli import main
from yoco_eval.reports import heatmap
from yoco_eval.reports.heatmap import (
    cell_figures,
    draw_heatmap,
    format_depths,
    heatmap_figure,
    print_heatmap,
    save_heatmap,
)
from yoco_eval.reports.results import NeedleCell, NeedleRun, ResultsError

COLOR = re.compile(r"\x1b\[[0-9;]*m")


def needle_run(lengths, depths, samples=5, drop=(), model="yoco-3b"):
    """A run whose accuracy falls with length and rises with depth, through all values."""
    cells = []
    for i, length in enumerate(lengths):
        for j in range(depths):
            depth = j / (depths - 1) if depths > 1 else 0.5
            correct = max(0, min(samples, samples - i + j))
            if (i, j) not in drop:
                cells.append(NeedleCell(length, depth, samples, correct))
    return NeedleRun(model, "yoco_needle", Path("r.json"), datetime(2025, 1, 2), tuple(cells))


TYPICAL = needle_run([2**n for n in range(12, 17)], 11)
HOLES = needle_run([4096, 8192, 10000], 3, drop={(1, 0), (2, 2)})


def drawn(run, size=(4, 4)):
    figure = Figure(figsize=size)
    ax = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    return ax, draw_heatmap(run, ax)


def shown_text(ax):
    """{(column, row): text} of the figures in the cells."""
    return {tuple(int(x) for x in t.get_position()): t.get_text() for t in ax.texts}


def terminal(run, width=80, title=None, **options):
    console = Console(width=width, file=io.StringIO(), highlight=False, **options)
    print_heatmap(run, console, title)
    return console.file.getvalue()


def test_axes_and_cells():
    ax, mesh = drawn(TYPICAL)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["4K", "8K", "16K", "32K", "64K"]
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(10 * i) for i in range(11)]
    assert ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert mesh.get_clim() == (0, 1)
    accuracy = np.asarray(mesh.get_array())
    assert accuracy.shape == (11, 5)
    texts = shown_text(ax)
    assert len(texts) == 55
    for cell in TYPICAL.cells:
        column = TYPICAL.context_lengths.index(cell.context_length)
        row = TYPICAL.depths.index(cell.depth)
        assert accuracy[row, column] == cell.accuracy
        assert texts[column, row] == f"{cell.accuracy:.1f}"


def test_missing_cells_are_hatched_not_zero():
    ax, mesh = drawn(HOLES)
    assert np.ma.getmaskarray(mesh.get_array()).tolist() == [
        [False, True, False],
        [False, False, False],
        [False, False, True],
    ]
    assert ax.patch.get_hatch()
    assert set(shown_text(ax)) == {(0, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2)}
    assert "hatched: no result" in [t.get_text() for t in heatmap_figure(HOLES).texts]
    ax, _ = drawn(TYPICAL)
    assert not ax.patch.get_hatch()


def test_figures_are_readable_on_their_cells():
    def luminance(color):
        c = np.asarray(to_rgb(color))
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    run = needle_run(range(1000, 42000, 1000), 2, samples=40)
    ax, mesh = drawn(run, (20, 4))
    colors = mesh.to_rgba(mesh.get_array())
    assert len(ax.texts) == 82
    for text in ax.texts:
        column, row = (int(x) for x in text.get_position())
        pair = luminance(text.get_color()), luminance(colors[row, column][:3])
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "depths", "width"),
    [
        ([4096], 1, heatmap.COLUMN_WIDTH),
        ([2**n for n in range(12, 17)], 11, heatmap.COLUMN_WIDTH),
        ([2**n for n in range(10, 21)], 21, heatmap.COLUMN_WIDTH),
        ([1024 * n for n in range(1, 31)], 21, heatmap.PAGE_WIDTH),
    ],
)
def test_everything_fits_the_figure(lengths, depths, width):
    """No text leaves the figure or its cell, and none is too small to read."""
    figure = heatmap_figure(needle_run(lengths, depths, samples=8))
    assert figure.get_figwidth() == width
    figure.draw_without_rendering()
    ax, bar = figure.axes
    page = figure.bbox
    labels = [*figure.texts, ax.xaxis.label, ax.yaxis.label, bar.yaxis.label]
    labels += [*ax.get_xticklabels(), *ax.get_yticklabels(), *bar.get_yticklabels()]
    for text in labels:
        box = text.get_window_extent()
        assert box.width > 0
        assert page.x0 <= box.x0 and box.x1 <= page.x1, text
        assert page.y0 <= box.y0 and box.y1 <= page.y1, text
    assert len(ax.texts) == len(lengths) * depths
    for text in ax.texts:
        assert text.get_size() >= 4.5
        assert text.get_window_extent().width < 0.95 * ax.bbox.width / len(lengths)
    heights = [(t.get_window_extent().y0, t.get_window_extent().y1) for t in ax.get_yticklabels()]
    assert all(above[0] >= below[1] for above, below in zip(heights, heights[1:], strict=False))


def test_figures_too_small_to_read_are_left_out(caplog):
    ax, mesh = drawn(needle_run(range(1000, 81000, 1000), 50))
    assert not ax.texts and mesh.get_array().size == 80 * 50
    assert "80 x 50 cells are drawn without figures" in caplog.text
    assert 1 < len(ax.get_xticklabels()) < 80 and 1 < len(ax.get_yticklabels()) < 50


def test_title():
    lines = [text.get_text() for text in heatmap_figure(TYPICAL).texts]
    mean = TYPICAL.accuracy
    assert lines == ["yoco-3b", f"mean accuracy {mean:.3f}, 5 samples per cell, 275 prompts"]
    assert heatmap_figure(TYPICAL, "Mine").texts[0].get_text() == "Mine"
    mixed = NeedleRun("m", "t", Path(), datetime.now(), (NeedleCell(9, 0, 1, 1),))
    assert heatmap.describe(mixed) == "mean accuracy 1.000, 1 sample per cell, 1 prompt"
    mixed = NeedleRun("m", "t", Path(), datetime.now(), (*mixed.cells, NeedleCell(9, 1, 3, 0)))
    assert heatmap.describe(mixed) == "mean accuracy 0.250, 1 to 3 samples per cell, 4 prompts"


def test_long_and_odd_model_names(tmp_path):
    name = "a-long-name-" * 8 + "$x_1$"
    figure = heatmap_figure(needle_run([4096], 2, model=name))
    assert "".join(t.get_text() for t in figure.texts[:-1]) == name
    for drawing in (figure, heatmap_figure(TYPICAL, "M" * 80)):
        drawing.draw_without_rendering()
        assert all(t.get_window_extent().width < drawing.bbox.width for t in drawing.texts)
    save_heatmap(needle_run([4096], 2, model="$broken_{math"), tmp_path / "a.svg")
    assert "$broken_{math" in (tmp_path / "a.svg").read_text()


def test_png(tmp_path):
    save_heatmap(TYPICAL, tmp_path / "a.PNG")
    image = imread(tmp_path / "a.PNG", format="png")
    assert image.shape[1] == round(300 * heatmap.COLUMN_WIDTH)
    best = np.array([*heatmap.COLORS(1.0)[:3]])
    assert (abs(image[:, :, :3] - best).max(-1) < 0.01).mean() > 0.1
    assert [file.name for file in tmp_path.iterdir()] == ["a.PNG"]


def test_svg_is_text_and_repeatable(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_heatmap(TYPICAL, tmp_path / name, title="A <title>")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    root = ET.parse(tmp_path / "a.svg").getroot()
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"A <title>", "64K", "0.8", "Accuracy", "Needle depth (%)"} <= set(texts)


def test_csv(tmp_path):
    save_heatmap(HOLES, tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "model,task,context_length,depth,samples,correct,accuracy,cut_to"
    assert ",".join(rows[0]) == columns
    assert len(rows) == 7
    assert rows[1] == dict(
        zip(columns.split(","), "yoco-3b,yoco_needle,4096,0.5,5,5,1.0,".split(","), strict=True)
    )


def test_lengths_of_cut_prompts_are_marked(tmp_path):
    cells = [replace(cell, cut_to=2047) if cell.context_length > 2048 else cell
             for cell in needle_run([2048, 4096, 8192], 2).cells]  # fmt: skip
    run = replace(TYPICAL, cells=tuple(cells))
    lines = terminal(run).splitlines()
    assert lines[2] == "‡: prompts cut to 2047 tokens, the backend's max_length"
    assert lines[4].split() == ["depth", "2K", "4K‡", "8K‡"]
    figure = heatmap_figure(run)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["2K", "4K‡", "8K‡"]
    assert figure.texts[-1].get_text() == lines[2]
    save_heatmap(run, tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = [(row["context_length"], row["cut_to"]) for row in csv.DictReader(file)]
    assert rows == [(n, "2047" * (n != "2048")) for n in ("2048", "4096", "8192") for _ in range(2)]
    assert "‡" not in terminal(TYPICAL)


def test_what_is_read_of_a_cache_is_in_the_title(tmp_path, capsys):
    data = needle_results(lambda *_: 1.0, "org/small", lengths=[4096], depths=[0])
    write(tmp_path / "r", of_cache(data, sparse=64, cache_dtype="fp8"))
    assert main(["heatmap", str(tmp_path / "r")]) == 0
    assert capsys.readouterr().out.startswith("small sparse=64 cache_dtype=fp8\n")
    for suffix in ("svg", "csv"):
        file = tmp_path / f"needle.{suffix}"
        assert main(["heatmap", str(tmp_path / "r"), "-o", str(file)]) == 0
        assert "small sparse=64 cache_dtype=fp8" in file.read_text()


def test_settings_of_matplotlib_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    save_heatmap(TYPICAL, tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


def test_refused_outputs(tmp_path):
    with pytest.raises(ResultsError, match=r"a\.gif: unknown suffix '\.gif'; use \.png, "):
        save_heatmap(TYPICAL, tmp_path / "a.gif")
    with pytest.raises(ResultsError, match="no such folder .*none; create it first"):
        save_heatmap(TYPICAL, tmp_path / "none" / "a.png")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(ResultsError, match=r"a\.csv: cannot be written \(Is a directory\)"):
        save_heatmap(TYPICAL, tmp_path / "a.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("old")

    def fail(self, file, **_):
        file.write(b"half")
        raise RuntimeError

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError):
        save_heatmap(TYPICAL, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_cell_figures():
    def figures(*counts):
        cells = tuple(NeedleCell(9 + i, 0, n, k) for i, (k, n) in enumerate(counts))
        return list(cell_figures(NeedleRun("m", "t", Path(), datetime.now(), cells)).values())

    assert figures((5, 5), (1, 5), (1, 2)) == ["1.0", "0.2", "0.5"]
    assert figures((5, 5), (1, 4), (0, 5)) == ["1.00", "0.25", "0.00"]
    assert figures((399, 400), (1, 400)) == ["0.99", "0.01"]


def test_format_depths():
    assert format_depths([0.0, 0.25, 1 / 3, 1.0]) == ["0", "25", "33.3", "100"]
    assert format_depths([0.9991, 0.9994]) == ["99.91", "99.94"]


def test_terminal_without_colour():
    lines = terminal(HOLES).split("\n")
    assert lines == [
        "yoco-3b",
        "mean accuracy 0.914, 5 samples per cell, 35 prompts, -: no result",
        "",
        "depth    4K    8K 10000 ",
        "  0 %   1.0     -   0.6 ",
        " 50 %   1.0   1.0   0.8 ",
        "100 %   1.0   1.0     - ",
        "",
    ]
    assert terminal(HOLES, title="[bold]Mine").startswith("[bold]Mine\n")


def test_terminal_colour():
    plain = terminal(TYPICAL)
    colored = terminal(TYPICAL, force_terminal=True, color_system="truecolor", no_color=False)
    assert COLOR.sub("", colored) == plain
    best = ";".join(str(round(255 * x)) for x in heatmap.COLORS(1.0)[:3])
    assert f"48;2;{best}m  1.0 " in colored
    without = terminal(TYPICAL, force_terminal=True, color_system="truecolor", no_color=True)
    assert "48;2" not in without and COLOR.sub("", without) == plain


@pytest.mark.parametrize(("width", "blocks"), [(80, 3), (40, 6), (10, 30)])
def test_wide_grids_wrap_in_the_terminal(width, blocks):
    run = needle_run([1024 * n for n in range(1, 31)], 21, samples=8)
    lines = terminal(run, width=width).splitlines()
    assert all(len(line) <= max(width, 13) for line in lines)
    assert sum(line.startswith("depth") for line in lines) == blocks
    if width >= 40:
        body = [line.split() for line in lines[2:]]
        assert sum(len(row) - 1 for row in body if row and row[0] == "depth") == 30
        assert sum(len(row) - 2 for row in body if row and row[1:2] == ["%"]) == 30 * 21
