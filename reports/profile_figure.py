"""Draws a profile: memory, prefill time, decode speed and throughput by context length."""

import math
from collections import Counter
from textwrap import wrap

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from yoco_eval.lengths import format_length
from yoco_eval.printable import one_line

from .profile import (
    BATCHES,
    CONTEXTS,
    DECODE,
    LONGEST,
    MEASURED,
    PEAK,
    PREFILL,
    THROUGHPUT,
    Profile,
    describe,
    explain_gain,
    memory_unit,
)
from .style import (
    FONT,
    GRID,
    PAGE_WIDTH,
    SMALL_FONT,
    TITLE_FONT,
    color,
    length_axis,
    series,
    set_scale,
    spacing,
)

HEIGHT, SECOND_ROW = 3.0, 2.6  # of the figure, in inches, and what throughput adds to it
_LETTERS = 165  # of a note below the panels, in a line as wide as these
PARTS = (("weights", 1.0), ("cache", 0.6), ("states, activations", 0.3))  # with their strength


def profile_figure(profile: Profile) -> Figure:
    """Panels, a page wide: memory and its parts, prefill time, decode speed; below, throughput.

    Below each context length stands the gain of the first model over the second.
    """
    height = HEIGHT + SECOND_ROW * profile.has_throughput
    figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    # Each row is laid out by itself: what stands beside its axes has different widths.
    rows = figure.subfigures(1 + profile.has_throughput, squeeze=False).flat
    memory, prefill, decode = rows[0].subplots(1, 3)
    _draw_memory(profile, memory)
    _draw_line(profile, prefill, "Prefill (s)", PREFILL, "log")
    _draw_line(profile, decode, "Decode (tokens/s)", DECODE, "linear")
    for ax, quantity in zip(figure.axes, (PEAK, PREFILL, DECODE), strict=True):
        _label_lengths(profile, ax, quantity)
    if profile.has_throughput:
        for ax, shared in zip(rows[1].subplots(1, 2), CONTEXTS, strict=True):
            _draw_throughput(profile, ax, shared)
            _label_lengths(profile, ax, THROUGHPUT[shared])
    handles: list[Artist] = [
        Line2D([], [], label=one_line(model, LONGEST), **series(index))
        for index, model in enumerate(profile.models)
    ]
    handles += [
        Patch(color=_tint("#000000", strength), label=part) for part, strength in _parts(profile)
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=FONT,
        title=one_line(profile.name, LONGEST),
        title_fontproperties={"size": TITLE_FONT, "weight": "bold"},
    )
    notes = [describe(profile), *explain_gain(profile)]
    if profile.has_throughput:
        batches = " and ".join(map(str, BATCHES[1:]))
        fastest = "throughput: of the fastest batch, whose size stands at the point"
        notes.append(f"{fastest}; thin lines: of batches of {batches}")
    lines = [line for note in notes for line in wrap(note, _LETTERS)]
    figure.supxlabel("\n".join(lines), size=SMALL_FONT, color="0.3")
    return figure


def _parts(profile: Profile) -> tuple[tuple[str, float], ...]:
    """Those that a profile tells: the rest of a peak where peaks are measured."""
    return PARTS if any(row.peak_bytes for row in profile.rows) else PARTS[:2]


def _draw_memory(profile: Profile, ax: Axes) -> None:
    """Stacked bars; a dashed outline is what weights and cache would have taken."""
    unit, unit_name = memory_unit(profile)
    ax.set_title(f"Memory ({unit_name})", size=FONT)
    models = profile.models
    width = 0.84 * spacing(profile.lengths) / len(models)
    tallest = 0.0
    for index, model in enumerate(models):
        hue = color(index)
        for row in (row for row in profile.rows if row.model == model):
            x = math.log2(row.length) + (index - (len(models) - 1) / 2) * width
            bottom = 0.0
            if row.outcome == MEASURED:
                for part, (_, strength) in zip(row.parts, PARTS, strict=True):
                    height = (part or 0) / unit
                    ax.bar(x, height, 0.94 * width, bottom, color=_tint(hue, strength))
                    bottom += height
            elif row.weights_and_cache is not None:
                bottom = row.weights_and_cache / unit
                ax.bar(
                    x, bottom, 0.94 * width,
                    fill=False, edgecolor=hue, linestyle=":", linewidth=0.8,
                )  # fmt: skip
            if row.outcome != MEASURED:
                ax.annotate(
                    row.outcome,
                    (x, 0),
                    (0, 3),
                    textcoords="offset points",
                    size=SMALL_FONT,
                    color=hue,
                    rotation=90,
                    ha="center",
                    va="bottom",
                )
            tallest = max(tallest, bottom)
    limit = (profile.device_bytes or 0) / unit
    if 0 < limit < 2 * tallest:
        ax.axhline(limit, color="0.4", linewidth=0.6, linestyle="--")
        ax.annotate(
            "the card's memory",
            (0, limit),
            (2, 2),
            size=SMALL_FONT,
            color="0.4",
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )
        tallest = max(tallest, limit)
    ax.set_ylim(0, 1.08 * tallest or 1)


def _draw_line(
    profile: Profile, ax: Axes, title: str, quantity: str, scale: str, words: float = 0.55
) -> None:
    """A line per model; where one was not measured, the top of the panel says why.

    words: the share of the panel's height that this takes.
    """
    ax.set_title(title, size=FONT)
    set_scale(ax, scale)
    missing = Counter(row.length for row in profile.rows if row.outcome != MEASURED)
    said: Counter[int] = Counter()
    highest = 0.0
    below = 0.0  # the highest value that such a word hangs over
    for index, model in enumerate(profile.models):
        rows = sorted((row for row in profile.rows if row.model == model), key=lambda r: r.length)
        measured = [row for row in rows if getattr(row, quantity) is not None]
        ax.plot(
            [math.log2(row.length) for row in measured],
            [getattr(row, quantity) for row in measured],
            **series(index),
        )
        highest = max([highest, *(getattr(row, quantity) for row in measured)])
        below = max([below, *(getattr(row, quantity) for row in measured if row.length in missing)])
        for row in rows:
            if row.outcome != MEASURED:
                aside = said[row.length] - (missing[row.length] - 1) / 2
                said[row.length] += 1
                ax.annotate(
                    f"{row.outcome} ×",
                    (math.log2(row.length), 0.98),
                    (1.3 * SMALL_FONT * aside, 0),
                    textcoords="offset points",
                    xycoords=ax.get_xaxis_transform(),
                    size=SMALL_FONT,
                    color=color(index),
                    rotation=90,
                    ha="center",
                    va="top",
                )
    if scale == "linear":
        ax.set_ylim(0, max(ax.get_ylim()[1], 1.04 * highest))  # room for the markers
    if below:  # leave the words room
        low, top = ax.transScale.transform([(1, ax.get_ylim()[0]), (1, below)])[:, 1]
        room = ax.transScale.inverted().transform((1, low + (top - low) / (1 - words)))[1]
        ax.set_ylim(top=max(room, ax.get_ylim()[1]))
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.set_axisbelow(True)


def _draw_throughput(profile: Profile, ax: Axes, shared: bool) -> None:
    """The highest throughput, at its batch size; a thin line for each given batch size above 1."""
    quantity = THROUGHPUT[shared]
    ax.margins(y=0.12)  # room for the sizes
    for index, model in enumerate(profile.models):
        rows = sorted((row for row in profile.rows if row.model == model), key=lambda r: r.length)
        for batch, strength in zip(BATCHES[1:], (0.4, 0.7), strict=True):
            known = [row for row in rows if batch in row.speeds(shared)]
            ax.plot(
                [math.log2(row.length) for row in known],
                [row.speeds(shared)[batch] for row in known],
                color=_tint(color(index), strength),
                linewidth=0.6,
                marker=".",
                markersize=2,
            )
        for row in rows:
            if fastest := row.fastest(shared):
                speed = row.speeds(shared)[fastest]
                others = (other for other in profile.rows if other.length == row.length)
                above = speed == max(getattr(other, quantity) or 0 for other in others)
                ax.annotate(
                    str(fastest),
                    (math.log2(row.length), speed),
                    (2, 2) if above else (-2, -3),
                    textcoords="offset points",
                    size=SMALL_FONT,
                    color=color(index),
                    ha="left" if above else "right",
                    va="bottom" if above else "top",
                )
    title = f"Throughput, {CONTEXTS[shared]} (tokens/s)"
    _draw_line(profile, ax, title, quantity, "log", words=0.48)
    ax.yaxis.set_major_formatter("{x:.9g}")  # a million has no exponent


def _label_lengths(profile: Profile, ax: Axes, quantity: str) -> None:
    lengths = profile.lengths
    compared = len(profile.models) > 1
    labels = None
    if compared:
        labels = [f"{format_length(n)}\n{profile.gain(quantity, n) or '-'}" for n in lengths]
    size = FONT - 1 if len(lengths) <= 6 else max(3.5, (FONT - 1) * 6 / len(lengths))
    length_axis(ax, lengths, labels, size)
    if compared:
        ax.set_xlabel(ax.get_xlabel() + " and gain", size=FONT)


def _tint(color: str, strength: float) -> tuple[float, float, float]:
    """The colour mixed with white: all of it at strength 1."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(color))
    return red, green, blue
