"""Profiles as JSON, tables and figures: what a reader sees, and where something is missing."""

import io
import json
import math
import os
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console

from yoco_eval.reports.profile import (
    DECODE,
    GIB,
    PREFILL,
    THROUGHPUT,
    Gain,
    NotAProfile,
    Profile,
    ProfileRow,
    Throughput,
    describe,
    describe_row,
    load_profile,
    print_profile,
)
from yoco_eval.reports.profile_figure import profile_figure
from yoco_eval.reports.profile_files import check_output, save_profile
from yoco_eval.reports.results import ResultsError
from yoco_eval.reports.style import color, set_scale

LENGTHS = [2**n for n in range(15, 21)]


def rows(model, layers, prefill, decode, outcomes):
    made = []
    for length, outcome, seconds, speed in zip(LENGTHS, outcomes, prefill, decode, strict=True):
        weights, cache = 6 * GIB, layers * length * 4096
        row = ProfileRow(model, length, outcome, weights, cache)
        if outcome == "measured":
            row = replace(
                row,
                peak_bytes=weights + cache + GIB // 2,
                prefill_seconds=seconds,
                decode_tokens_per_second=speed,
            )
        made.append(row)
    return made


YOCO = rows(
    "YOCO", 1, [0.15, 0.3, 0.6, 1.25, 2.5, 5.0], [260, 250, 200, 140, 80, 40], ["measured"] * 6
)
TRANSFORMER = rows(
    "Transformer",
    26,
    [0.75, 1.8, 6.0, 22.5, 0, 0],
    [180, 120, 75, 42, 0, 0],
    ["measured"] * 4 + ["out of patience", "out of memory"],
)
PROFILE = Profile(
    name="YOCO-3B, random weights",
    shapes={"YOCO": {"dim": 3072}, "Transformer": {"dim": 3072}},
    dtype="bfloat16",
    device="NVIDIA H100 80GB HBM3",
    device_bytes=79 * GIB,
    versions={"torch": "2.11.0", "triton": "3.6.0"},
    prefill_chunk=8192,
    decode_steps=16,
    patience=120.0,
    seed=0,
    rows=(*YOCO, *TRANSFORMER),
)
ALONE = replace(PROFILE, rows=tuple(YOCO))
ON_A_CPU = replace(
    PROFILE, device_bytes=None, rows=tuple(replace(row, peak_bytes=None) for row in PROFILE.rows)
)


def with_batches(row, distinct, shared):
    """A row with throughput at batch sizes: tokens per second, or why there are none."""
    throughput = []
    for whether, speeds in ((False, distinct), (True, shared)):
        for batch, speed in speeds.items():
            outcome = speed if isinstance(speed, str) else "measured"
            given = None if isinstance(speed, str) else speed
            throughput.append(Throughput(batch, whether, outcome, given))
    return replace(row, throughput=tuple(throughput))


def in_batches(rows, *batches):
    done = [with_batches(row, *of) for row, of in zip(rows, batches, strict=False)]
    return [*done, *rows[len(batches) :]]


BATCHED = replace(
    PROFILE,
    rows=(
        *in_batches(
            YOCO,
            ({8: 1100, 64: 1570, 497: 1670}, {8: 2470, 64: 15900, 1024: 2345678}),
            ({8: 670, 64: 840, 267: 820}, {8: 2100, 64: 13900, 1024: 56800}),
            ({8: 380, 64: 420, 138: 425}, {8: 1600, 64: 11100, 1024: 53400}),
            ({8: 200, 64: 210, 70: 215}, {8: 1100, 64: 7900, 1024: 47600}),
            ({8: 104, 35: 106}, {8: 670, 64: 5000, 1024: "out of memory"}),
            ({8: 52, 17: 53}, {8: 380, 64: "out of patience"}),
        ),
        *in_batches(
            TRANSFORMER,
            ({8: 675, 22: 780}, {8: 2200, 64: 17200, 1024: 80700}),
            ({8: 380, 11: 390}, {8: 1600, 64: 13100, 1024: 70700}),
            ({5: 194}, {8: 1100, 64: 8900, 1024: 60700}),
            ({2: "out of memory"}, {8: 670, 64: 5400, 1024: 50700}),
        ),
    ),
    largest_batch=1024,
)


def terminal(profile):
    console = Console(width=80, file=io.StringIO(), highlight=False)
    print_profile(profile, console)
    return console.file.getvalue().splitlines()


def cells(profile):
    """Of each table, the lines of figures by length."""
    lines = [line.split() for line in terminal(profile)]
    names = ["32K", "64K", "128K", "256K", "512K", "1M"]
    found = [line[1:] for line in lines if line and line[0] in names]
    tables = [found[i : i + 6] for i in range(0, len(found), 6)]
    return [dict(zip(names, table, strict=True)) for table in tables]


def test_tables():
    memory, speed = cells(PROFILE)
    assert memory["32K"] == "6.00 0.12 0.50 6.62 6.00 3.25 0.50 9.75 1.5x".split()
    assert memory["512K"] == "6.00 2.00 0.50 8.50 6.00 52.00 out of patience ≥6.8x".split()
    assert memory["1M"] == "6.00 4.00 0.50 10.50 6.00 104.00 out of memory ≥10.5x".split()
    assert speed["256K"] == "1.25 140 22.5 42.0 18.0x 3.3x".split()
    assert speed["1M"] == "5.00 40.0 out of memory - -".split()


def test_tables_of_throughput():
    *_, distinct, shared = cells(BATCHED)
    assert distinct["32K"] == "260 1100 1570 497 1670 180 675 - 22 780 2.1x".split()
    # A larger batch may be slower; the gain is of the fastest ones.
    assert distinct["64K"] == "250 670 840 267 820 120 380 - 11 390 2.2x".split()
    assert distinct["128K"] == "200 380 420 138 425 75.0 - - 5 194 2.2x".split()
    assert distinct["256K"] == "140 200 210 70 215 42.0 out of memory 5.1x".split()
    assert distinct["1M"] == "40.0 52.0 - 17 53.0 out of memory -".split()
    assert shared["32K"][:5] == "260 2470 15900 1024 2345678".split()
    assert shared["512K"] == "80.0 670 5000 64 5000 out of patience -".split()
    assert shared["1M"] == "40.0 380 out of patience out of memory -".split()
    for profile in (PROFILE, ALONE):
        assert len(cells(profile)) == 2 and not any("hroughput" in t for t in terminal(profile))
    assert "decode at batch 1, throughput at batches of up to 1024" in describe(BATCHED)


def test_batches_of_one_model_only():
    """Older rows beside newer ones: what was not tried is no throughput, not even of one text."""
    *_, distinct, _ = cells(replace(BATCHED, rows=(*BATCHED.rows[:6], *TRANSFORMER)))
    assert distinct["32K"] == "260 1100 1570 497 1670 - - - - - -".split()


def test_tables_fit_80_columns():
    lines = terminal(BATCHED)
    assert max(map(len, lines)) <= 80
    tables = [line for line in lines if line.startswith(" ")]
    assert len(tables) == 4 * (1 + 6)  # none was wrapped
    for i in range(0, len(tables), 7):
        assert len({len(line) for line in tables[i : i + 7]}) == 1


def test_table_of_one_model():
    memory, speed = cells(ALONE)
    assert memory["32K"] == "6.00 0.12 0.50 6.62".split() and speed["32K"] == ["0.150", "260"]
    assert not any("gain" in line or "≥" in line for line in terminal(ALONE))


def test_table_without_peaks():
    memory, _ = cells(ON_A_CPU)
    assert memory["32K"] == "6.00 0.12 - - 6.00 3.25 - - -".split()


def test_small_models_are_in_mib():
    row = ProfileRow("YOCO", 2048, "measured", 2**20, 2**19, None, 1.0, 10.0)
    lines = terminal(replace(PROFILE, rows=(row,)))
    assert any("Memory in MiB" in line for line in lines)
    assert any(line.split() == ["2K", "1.00", "0.50", "-", "-"] for line in lines)


def test_gains():
    assert PROFILE.gain("prefill_seconds", 2**15) == Gain(5)
    assert PROFILE.gain("decode_tokens_per_second", 2**15) == Gain(260 / 180)
    assert PROFILE.gain("peak_bytes", 2**15) == Gain(9.75 / 6.625)
    assert PROFILE.gain("prefill_seconds", 2**20) is None
    assert ALONE.gain("prefill_seconds", 2**15) is None
    assert str(Gain(260 / 180)) == "1.4x" and str(Gain(0.25)) == "0.25x"


def test_computed_gains_of_memory():
    """At least as much as weights and cache is what the second model would have taken."""
    for length, cache in ((2**19, 52), (2**20, 104)):
        gain = PROFILE.gain("peak_bytes", length)
        assert gain == Gain((6 + cache) / (6.5 + length * 4096 / GIB), at_least=True)
        assert PROFILE.gain("decode_tokens_per_second", length) is None
    assert str(Gain(10.5, at_least=True)) == "≥10.5x"
    # A bound of the first model's peak says nothing of a gain; nor is one made of two bounds.
    swapped = replace(PROFILE, rows=(*TRANSFORMER, *YOCO))
    assert swapped.gain("peak_bytes", 2**20) is None
    neither = tuple(replace(row, outcome="out of memory", peak_bytes=None) for row in YOCO)
    assert replace(PROFILE, rows=(*neither, *TRANSFORMER)).gain("peak_bytes", 2**20) is None
    unknown = tuple(replace(row, weights_bytes=None, peak_bytes=None) for row in TRANSFORMER)
    assert replace(PROFILE, rows=(*YOCO, *unknown)).gain("peak_bytes", 2**20) is None
    for length in LENGTHS:
        assert ON_A_CPU.gain("peak_bytes", length) is None


def test_the_mark_of_computed_gains_is_explained():
    legend = "≥: at least; weights + cache of Transformer, computed, stand for its peak"
    assert terminal(PROFILE)[-1] == legend
    assert profile_figure(PROFILE).get_supxlabel().splitlines()[-1] == legend
    measured = replace(PROFILE, rows=(*YOCO[:4], *TRANSFORMER[:4]))
    for profile in (measured, ON_A_CPU):
        assert not any("≥" in line for line in terminal(profile))
        assert "≥" not in profile_figure(profile).get_supxlabel()


def test_describe_row():
    assert describe_row(YOCO[0]) == "YOCO, 32K tokens: prefill 0.150 s, decode 260 tokens/s"
    assert describe_row(TRANSFORMER[-1]) == "Transformer, 1M tokens: out of memory"
    assert describe_row(BATCHED.rows[1]).endswith(
        "decode 250 tokens/s, 840 at batch 64 (distinct contexts), "
        "56800 at batch 1024 (one shared context)"
    )


def test_bars():
    memory = profile_figure(PROFILE).axes[0]
    stacks = {}
    for bar in memory.patches:
        if bar.get_fill():
            x = bar.get_x() + bar.get_width() / 2
            stacks.setdefault(round(x, 3), []).append((bar.get_height(), bar.get_facecolor()))
    assert len(stacks) == 10
    for x, row in zip(
        sorted(stacks),
        (
            r
            for pair in zip(YOCO, TRANSFORMER, strict=True)
            for r in pair
            if r.outcome == "measured"
        ),
        strict=True,
    ):
        heights, colors = zip(*stacks[x], strict=True)
        assert abs(x - math.log2(row.length)) < 0.5
        assert sum(heights) == pytest.approx(row.peak_bytes / GIB)
        assert heights[1] == pytest.approx(row.cache_bytes / GIB)
        assert to_hex(colors[0]) == color(row.model == "Transformer")
        assert len(set(colors)) == 3
    outlines = [bar.get_height() for bar in memory.patches if not bar.get_fill()]
    assert outlines == pytest.approx([58, 110])  # what it would have taken
    assert memory.get_ylim()[1] > 110
    assert "the card's memory" in [text.get_text() for text in memory.texts]


def test_lines():
    figure = profile_figure(PROFILE)
    for ax, quantity in zip(
        figure.axes[1:], ("prefill_seconds", "decode_tokens_per_second"), strict=True
    ):
        for line, expected in zip(ax.lines, (YOCO, TRANSFORMER[:4]), strict=True):
            assert list(line.get_xdata()) == [math.log2(row.length) for row in expected]
            assert list(line.get_ydata()) == [getattr(row, quantity) for row in expected]
        said = {text.xy[0]: text.get_text() for text in ax.texts}
        assert said == {19: "out of patience ×", 20: "out of memory ×"}
    assert figure.axes[1].get_yscale() == "log"
    assert figure.axes[2].get_ylim()[0] == 0


@pytest.mark.slow
def test_words_hang_above_the_lines():
    figure = profile_figure(BATCHED)
    figure.draw_without_rendering()
    for ax, quantity in zip(figure.axes[1:], (PREFILL, DECODE, *THROUGHPUT.values()), strict=True):
        words = [text for text in ax.texts if text.get_text().startswith("out of")]
        assert len(words) == 2
        for text in words:
            x, bottom = text.xy[0], text.get_window_extent().y0
            y = getattr(BATCHED.row("YOCO", 2**x), quantity)
            assert ax.transData.transform((x, y))[1] < bottom


def test_lines_of_throughput():
    """The fastest batch of each length, whose size stands beside it, and batches of 8 and 64."""
    figure = profile_figure(BATCHED)
    distinct, _ = figure.axes[3:]
    given = [list(line.get_ydata()) for line in distinct.lines if line.get_marker() == "."]
    assert given == [
        [1100, 670, 380, 200, 104, 52], [1570, 840, 420, 210], [675, 380], [],
    ]  # fmt: skip
    fastest = [list(line.get_ydata()) for line in distinct.lines if line.get_marker() != "."]
    assert fastest == [[1670, 840, 425, 215, 106, 53], [780, 390, 194, 42]]
    sizes = {text.xy: text.get_text() for text in distinct.texts if text.get_text().isdigit()}
    assert sizes[15, 1670] == "497" and sizes[16, 840] == "64" and sizes[18, 42] == "1"
    assert [t.get_text() for t in distinct.get_xticklabels()][3:] == [
        "256K\n5.1x",
        "512K\n-",
        "1M\n-",
    ]
    assert "thin lines: of batches of 8 and 64" in figure.get_supxlabel()


def test_words_of_two_models_stand_side_by_side():
    out = [
        replace(
            YOCO[-1], outcome="out of memory", prefill_seconds=None, decode_tokens_per_second=None
        )
    ]
    figure = profile_figure(replace(PROFILE, rows=(*YOCO[:-1], *out, *TRANSFORMER)))
    figure.draw_without_rendering()
    for ax in figure.axes[1:]:
        yoco, transformer = (text.get_window_extent() for text in ax.texts if text.xy[0] == 20)
        assert yoco.x1 < transformer.x0


def test_length_labels_carry_the_gains():
    memory, prefill, decode = profile_figure(PROFILE).axes
    labels = [[t.get_text() for t in ax.get_xticklabels()] for ax in (memory, prefill, decode)]
    assert labels[0][0] == "32K\n1.5x" and labels[1][3] == "256K\n18.0x"
    assert labels[0][5] == "1M\n≥10.5x" and labels[2][5] == "1M\n-"
    labels = [t.get_text() for t in profile_figure(ALONE).axes[0].get_xticklabels()]
    assert labels == ["32K", "64K", "128K", "256K", "512K", "1M"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "profile",
    [
        BATCHED,
        ALONE,
        ON_A_CPU,
        replace(PROFILE, rows=tuple(TRANSFORMER[-1:]), name="a$b$"),
        replace(PROFILE, rows=(ProfileRow("YOCO", 5, "out of memory"),)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figures_are_written(profile, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    save_profile(profile, path)
    if suffix == "svg":
        text = "".join(ET.parse(path).getroot().itertext())
        assert profile.name in text and "NVIDIA H100" in text
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_was_measured_is_in_the_legend():
    for profile, rest in ((PROFILE, ["states, activations"]), (ON_A_CPU, [])):
        (legend,) = profile_figure(profile).legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == [*profile.models, "weights", "cache", *rest]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.14, 0.5, [0.15, 0.2, 0.3, 0.4, 0.5]), (1, 101, [1, 2, 5, 10, 20, 50, 100])],
)
def test_a_logarithmic_axis_has_some_ticks(low, high, ticks):
    ax = Figure().add_subplot()
    ax.set_ylim(low, high)
    set_scale(ax, "log")
    assert [tick for tick in ax.get_yticks() if low <= tick <= high] == pytest.approx(ticks)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_profile_makes_the_same_file(suffix, tmp_path):
    first, second = paths = [tmp_path / f"{name}.{suffix}" for name in ("a", "b")]
    for path in paths:
        save_profile(ALONE, path)
    assert first.read_bytes() == second.read_bytes()


def test_json(tmp_path):
    path = tmp_path / "profile.json"
    save_profile(BATCHED, path)
    assert load_profile(path) == BATCHED
    data = json.loads(path.read_text())
    assert data["rows"][0]["throughput"][2] == {
        "batch": 497, "shared": False, "outcome": "measured", "tokens_per_second": 1670,
    }  # fmt: skip
    # As it was before there was throughput.
    del data["largest_batch"]
    for row in data["rows"]:
        del row["throughput"]
    path.write_text(json.dumps(data))
    assert load_profile(path) == PROFILE
    assert data["device"] == "NVIDIA H100 80GB HBM3" and data["rows"][0]["length"] == 32768


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("name", None), ("device", 5), ("dtype", []), ("device_bytes", "80"), ("versions", []),
        ("versions", {"torch": {}}), ("shapes", {"YOCO": []}), ("shapes", {"YOCO": {"dim": [1]}}),
        ("prefill_chunk", 0), ("patience", math.nan), ("rows", []), ("rows", 5), ("rows", ["x"]),
        ("rows", [{"name": 1}]), ("more", 1), ("rows/0/length", "32K"), ("rows/0/length", True),
        ("rows/0/length", 0), ("rows/0/model", None), ("rows/0/model", "a third"),
        ("rows/0/outcome", "well"), ("rows/0/outcome", []), ("rows/0/peak_bytes", -1),
        ("rows/0/cache_bytes", None), ("rows/0/prefill_seconds", math.nan),
        ("rows/0/prefill_seconds", math.inf), ("rows/0/prefill_seconds", 0),
        ("rows/0/decode_tokens_per_second", 1e300), ("rows/0/length", 65536),
        ("largest_batch", 0), ("rows/0/throughput", 5), ("rows/0/throughput", [5]),
        ("rows/0/throughput", [{}]), ("rows/0/throughput/0/batch", 1),
        ("rows/0/throughput/0/batch", 64), ("rows/0/throughput/0/shared", 1),
        ("rows/0/throughput/0/outcome", "well"), ("rows/0/throughput/0/outcome", []),
        ("rows/0/throughput/0/tokens_per_second", None),
        ("rows/0/throughput/0/tokens_per_second", 0), ("rows/0/throughput/0/more", 1),
    ],
)  # fmt: skip
def test_damaged_profiles_are_refused(place, value, tmp_path):
    path = tmp_path / "profile.json"
    save_profile(BATCHED, path)
    data = json.loads(path.read_text())
    *parents, last = [int(name) if name.isdigit() else name for name in place.split("/")]
    part = data
    for parent in parents:
        part = part[parent]
    part[last] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ResultsError, match=r"profile\.json: a damaged profile \(.*\); measure it"):
        load_profile(path)


def test_endless_patience_is_no_infinity_in_the_file(tmp_path):
    path = tmp_path / "profile.json"
    profile = replace(PROFILE, patience=math.inf)
    save_profile(profile, path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["patience"] is None
    assert load_profile(path) == profile


def test_odd_names_are_shown_harmlessly(tmp_path):
    odd = "m\x1b[2J\ud800$x$" + "long " * 2000
    rows = tuple(replace(row, model=odd) for row in ALONE.rows)
    profile = replace(ALONE, name=odd, device=odd, versions={odd: odd}, rows=rows)
    lines = terminal(profile)
    assert max(map(len, lines)) <= 80 and len(lines) < 40
    assert all(line.isprintable() for line in lines)
    for suffix in ("svg", "json"):
        save_profile(profile, tmp_path / f"a.{suffix}")
    ET.parse(tmp_path / "a.svg")
    assert "\x1b" not in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_refusals(tmp_path):
    path = tmp_path / "profile.json"
    with pytest.raises(ResultsError, match="cannot be read"):
        load_profile(path)
    os.mkfifo(tmp_path / "pipe.json")
    for other in ("pipe.json", "/dev/zero", "."):
        with pytest.raises(ResultsError, match=r"cannot be read \(not an ordinary file\)"):
            load_profile(tmp_path / other)
    for text in ("[]", "{}", '{"kind": "x"}'):
        path.write_text(text)
        with pytest.raises(NotAProfile, match="not a profile; yoco-eval profile -o FILE.json"):
            load_profile(path)
    for text in ("", "{", "[" * 5000):
        path.write_text(text)
        with pytest.raises(NotAProfile, match="profile.json: not readable as JSON"):
            load_profile(path)
    with pytest.raises(ResultsError, match="unknown suffix '.csv'; use .json, .png, .svg or .pdf"):
        check_output(tmp_path / "a.csv")
    with pytest.raises(ResultsError, match="no such folder"):
        check_output(tmp_path / "none" / "a.png")
