"""Memory, prefill time and decode speed by context length: JSON, tables, a figure.

A profile is of one model, or of one and another that it is compared with. What could not be
measured, for want of memory or patience, is said where its figure would stand.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.console import Console
from rich.text import Text

from yoco_eval.lengths import format_length
from yoco_eval.printable import VALUE, one_line, shown

from .files import FIGURES, check_path, to_json, write_figure, write_text
from .results import ResultsError, read_json
from .style import (
    FONT,
    GRID,
    PAGE_WIDTH,
    SMALL_FONT,
    TITLE_FONT,
    color,
    figure_style,
    length_axis,
    series,
    set_scale,
    spacing,
)

MEASURED, OUT_OF_MEMORY, OUT_OF_PATIENCE = "measured", "out of memory", "out of patience"

KIND = "yoco-eval profile"  # stands in the JSON
HEIGHT = 3.0  # of the figure, in inches
PARTS = (("weights", 1.0), ("cache", 0.6), ("states, activations", 0.3))  # with their strength
_LONGEST = 79  # letters of a name
_MOST = 10**15  # of whatever is measured
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class ProfileRow:
    """One model at one context length. What is not known is None.

    length: tokens.
    outcome: "measured", "out of memory" or "out of patience".
    weights_bytes, cache_bytes: what they take; known even where memory ran out, as a rule.
    peak_bytes: the most that was allocated; None on a CPU.
    prefill_seconds: until the first prediction.
    decode_tokens_per_second: after `length` tokens, one text at a time.
    """

    model: str
    length: int
    outcome: str
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    prefill_seconds: float | None = None
    decode_tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        _check(self, "model", _is_text)
        _check(self, "length", _is_count)
        _check(self, "outcome", (MEASURED, OUT_OF_MEMORY, OUT_OF_PATIENCE).__contains__)
        for name in ("weights_bytes", "cache_bytes", "peak_bytes"):
            _check(self, name, _is_count, optional=True)
        for name in ("prefill_seconds", "decode_tokens_per_second"):
            _check(self, name, _is_figure, optional=True)
        if self.peak_bytes is not None and None in (self.weights_bytes, self.cache_bytes):
            raise ResultsError("peak_bytes without weights_bytes and cache_bytes")

    @property
    def parts(self) -> list[int | None]:
        """Bytes of weights, of the cache, and of all else at the peak."""
        weights, cache, peak = self.weights_bytes, self.cache_bytes, self.peak_bytes
        if peak is None or weights is None or cache is None:
            return [weights, cache, None]
        return [weights, cache, peak - weights - cache]


@dataclass(frozen=True)
class Profile:
    """Rows, and how they came about.

    name: of what was measured, for titles.
    shapes: of each model, its configuration.
    device: name of the card or processor; device_bytes: its memory, None on a CPU.
    versions: of the packages that matter.
    prefill_chunk, decode_steps: tokens fed at a time; tokens decoded under the clock.
    patience: seconds of prefill that were the limit; infinite if there was none.
    seed: of random weights and tokens.
    rows: by model, then length.
    """

    name: str
    shapes: dict[str, dict[str, Any]]
    dtype: str
    device: str
    device_bytes: int | None
    versions: dict[str, str]
    prefill_chunk: int
    decode_steps: int
    patience: float
    seed: int
    rows: tuple[ProfileRow, ...]

    def __post_init__(self) -> None:
        for name in ("name", "dtype", "device"):
            _check(self, name, _is_text)
        for name in ("prefill_chunk", "decode_steps"):
            _check(self, name, _is_count)
        _check(self, "device_bytes", _is_count, optional=True)
        _check(self, "patience", lambda found: found == math.inf or _is_figure(found))
        _check(self, "versions", _is_flat)
        _check(self, "shapes", _is_table)
        for shape in self.shapes.values():
            if not _is_flat(shape):
                raise ResultsError(f"a shape is {shown(shape)}")
        if not self.rows or len(self.models) > 2:
            raise ResultsError(f"rows of {len(self.models)} models, not of one or two")
        if len({(row.model, row.length) for row in self.rows}) < len(self.rows):
            raise ResultsError("two rows of one model at one length")

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def lengths(self) -> list[int]:
        return sorted({row.length for row in self.rows})

    def row(self, model: str, length: int) -> ProfileRow | None:
        rows = [row for row in self.rows if (row.model, row.length) == (model, length)]
        return rows[0] if rows else None

    def gain(self, quantity: str, length: int) -> float | None:
        """How many times better the first model is than the second, where both were measured.

        quantity: "peak_bytes", "prefill_seconds" or "decode_tokens_per_second".
        """
        rows = [self.row(model, length) for model in self.models[:2]]
        values: list[Any] = [getattr(row, quantity) if row else None for row in rows]
        if len(values) < 2 or not all(values):
            return None
        first, second = values
        return first / second if quantity == "decode_tokens_per_second" else second / first


class NotAProfile(ResultsError):
    """A file of another kind."""


def load_profile(path: str | Path) -> Profile:
    """Reads what `save_profile` wrote.

    Raises ResultsError if it cannot be read or is damaged, NotAProfile if it is something else.
    """
    try:
        data = read_json(Path(path))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.pop("kind", None) != KIND:
        raise NotAProfile(f"{path}: not a profile; yoco-eval profile -o FILE.json writes one")
    try:
        rows = tuple(ProfileRow(**row) for row in data.pop("rows"))
        if data.get("patience", 0) is None:
            data["patience"] = math.inf
        return Profile(**data, rows=rows)
    except (ResultsError, TypeError, KeyError) as error:
        reason = shown(error.args[0]) if isinstance(error, KeyError) else error
        raise ResultsError(f"{path}: a damaged profile ({reason}); measure it again") from error


def _check(of: Any, name: str, holds: Callable[[Any], bool], optional: bool = False) -> None:
    found = getattr(of, name)
    if not (optional and found is None or holds(found)):
        raise ResultsError(f"{name} is {shown(found)}")


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _is_count(found: Any) -> bool:
    return isinstance(found, int) and _is_figure(found)


def _is_figure(found: Any) -> bool:
    """Whether it may have been measured, and can be drawn."""
    return isinstance(found, int | float) and not isinstance(found, bool) and 0 < found < _MOST


def _is_table(found: Any) -> bool:
    return isinstance(found, dict)


def _is_flat(found: Any) -> bool:
    plain = str | int | float | None
    return _is_table(found) and all(isinstance(one, plain) for one in found.values())


def check_output(path: Path) -> None:
    """Raises ResultsError if `save_profile` cannot write to such a path."""
    check_path(path, (".json", *FIGURES))


def save_profile(profile: Profile, path: str | Path) -> None:
    """Writes the profile to `path`, whose suffix says how: .json, .png, .svg or .pdf.

    Raises ResultsError for another suffix or a folder that is not there.
    """
    path = Path(path)
    check_output(path)
    if path.suffix.lower() == ".json":
        write_text(path, to_json({"kind": KIND, **asdict(profile)}, indent=2) + "\n")
        return
    with figure_style():
        write_figure(path, profile_figure(profile))


def describe_row(row: ProfileRow) -> str:
    """One line, for those who wait for the rest."""
    start = f"{row.model}, {format_length(row.length)} tokens"
    if row.outcome != MEASURED:
        return f"{start}: {row.outcome}"
    return (
        f"{start}: prefill {_number(row.prefill_seconds)} s, "
        f"decode {_number(row.decode_tokens_per_second)} tokens/s"
    )


def describe(profile: Profile) -> str:
    """The line below the title: the device, the data type, versions, how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    what = one_line(f"{profile.device}, {profile.dtype}, {versions}", VALUE)
    peak = "" if profile.device_bytes else "; peaks of memory are measured on GPUs only"
    return (
        f"{what}; prefill {format_length(profile.prefill_chunk)} tokens at a time, "
        f"decode at batch 1{peak}"
    )


def explain_gain(profile: Profile) -> str:
    """What a gain divides by what, of a profile of two models."""
    first, second = (one_line(model, _LONGEST) for model in profile.models)
    return f"gain: {second} / {first} of memory and time, {first} / {second} of tokens/s"


def print_profile(profile: Profile, console: Console) -> None:
    """Prints two tables of at most 80 columns: memory and its parts, and speed."""
    console.print(Text(one_line(profile.name, VALUE), style="bold"))
    console.print(Text(describe(profile)))
    unit, unit_name = _memory_unit(profile)

    def memory(row: ProfileRow) -> list[str]:
        numbers = [
            "-" if part is None else f"{part / unit:.2f}" for part in (*row.parts, row.peak_bytes)
        ]
        return numbers if row.outcome == MEASURED else [*numbers[:2], row.outcome]

    def speed(row: ProfileRow) -> list[str]:
        if row.outcome != MEASURED:
            return [row.outcome]
        return [_number(row.prefill_seconds), _number(row.decode_tokens_per_second)]

    console.print()
    console.print(Text(f"Memory in {unit_name}: weights + cache + rest = peak", style="bold"))
    columns = [("weights", 8), ("cache", 7), ("rest", 8), ("peak", 8)]
    _print_table(profile, console, columns, memory, [("peak", "peak_bytes")])
    console.print()
    console.print(Text("Prefill in seconds, decode in tokens per second", style="bold"))
    columns = [("prefill", 9), ("decode", 9)]
    gains = [("prefill", "prefill_seconds"), ("decode", "decode_tokens_per_second")]
    _print_table(profile, console, columns, speed, gains)
    if len(profile.models) > 1:
        console.print()
        console.print(Text(explain_gain(profile)))


def _print_table(
    profile: Profile,
    console: Console,
    columns: Sequence[tuple[str, int]],
    cells: Callable[[ProfileRow], Sequence[str]],
    gains: Sequence[tuple[str, str]],
) -> None:
    """A line per length. `cells` gives a row's texts, of which the last one may be wider."""
    gains = gains if len(profile.models) > 1 else []
    width = sum(width for _, width in columns)
    models = [one_line(model, width - 3) for model in profile.models]
    groups = [f"{'':7}"] + [f" {f' {model} ':─^{width - 1}}" for model in models]
    names = [f"{'context':>7}"]
    names += ["".join(f"{name:>{width}}" for name, width in columns)] * len(profile.models)
    if gains:
        groups.append(f"  {' gain ':─^{9 * len(gains) - 2}}")
        names.append("".join(f"{name:>9}" for name, _ in gains))
    console.print(Text("".join(groups)))
    console.print(Text("".join(names)))
    for length in profile.lengths:
        line = Text(f"{format_length(length):>7}")
        for model in profile.models:
            row = profile.row(model, length)
            texts = cells(row) if row else ["-"]
            padded = [f"{t:>{w}}" for t, (_, w) in zip(texts[:-1], columns, strict=False)]
            line.append("".join(padded))
            missing = row is None or row.outcome != MEASURED
            room = width - sum(map(len, padded))
            line.append(f"{texts[-1]:>{room}}", style="dim" if missing else "")
        for _, quantity in gains:
            gain = profile.gain(quantity, length)
            line.append(f"{_gain(gain):>9}", style="bold" if gain else "dim")
        console.print(line)


def profile_figure(profile: Profile) -> Figure:
    """Three panels, a page wide: memory and its parts, prefill time, decode speed.

    Below each context length stands the gain of the first model over the second.
    """
    figure = Figure(figsize=(PAGE_WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots(1, 3)
    _draw_memory(profile, axes[0])
    _draw_line(profile, axes[1], "Prefill (s)", "prefill_seconds", "log")
    _draw_line(profile, axes[2], "Decode (tokens/s)", "decode_tokens_per_second", "linear")
    for ax, quantity in zip(
        axes, ("peak_bytes", "prefill_seconds", "decode_tokens_per_second"), strict=True
    ):
        _label_lengths(profile, ax, quantity)
    handles: list[Artist] = [
        Line2D([], [], label=one_line(model, _LONGEST), **series(index))
        for index, model in enumerate(profile.models)
    ]
    handles += [Patch(color=_tint("#000000", strength), label=part) for part, strength in PARTS]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=FONT,
        title=one_line(profile.name, _LONGEST),
        title_fontproperties={"size": TITLE_FONT, "weight": "bold"},
    )
    notes = [describe(profile)]
    if len(profile.models) > 1:
        notes.append(explain_gain(profile))
    figure.supxlabel("\n".join(notes), size=SMALL_FONT, color="0.3")
    return figure


def _draw_memory(profile: Profile, ax: Axes) -> None:
    """Stacked bars; a dashed outline is what weights and cache would have taken."""
    unit, unit_name = _memory_unit(profile)
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
            elif row.weights_bytes is not None and row.cache_bytes is not None:
                bottom = (row.weights_bytes + row.cache_bytes) / unit
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


def _draw_line(profile: Profile, ax: Axes, title: str, quantity: str, scale: str) -> None:
    """A line per model; where one was not measured, the top of the panel says why."""
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
        room = ax.transScale.inverted().transform((1, low + (top - low) / 0.45))[1]
        ax.set_ylim(top=max(room, ax.get_ylim()[1]))
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.set_axisbelow(True)


def _label_lengths(profile: Profile, ax: Axes, quantity: str) -> None:
    lengths = profile.lengths
    compared = len(profile.models) > 1
    labels = None
    if compared:
        labels = [f"{format_length(n)}\n{_gain(profile.gain(quantity, n))}" for n in lengths]
    size = FONT - 1 if len(lengths) <= 6 else max(3.5, (FONT - 1) * 6 / len(lengths))
    length_axis(ax, lengths, labels, size)
    if compared:
        ax.set_xlabel(ax.get_xlabel() + " and gain", size=FONT)


def _memory_unit(profile: Profile) -> tuple[int, str]:
    """GiB, or MiB where all is less than one GiB."""
    known = [
        row.peak_bytes or (row.weights_bytes or 0) + (row.cache_bytes or 0) for row in profile.rows
    ]
    return (GIB, "GiB") if max(known) >= GIB else (MIB, "MiB")


def _number(value: float | None) -> str:
    """Three digits or so, without an exponent; a dash for None."""
    if value is None:
        return "-"
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def _gain(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{2 if value < 1 else 1}f}x"


def _tint(color: str, strength: float) -> tuple[float, float, float]:
    """The colour mixed with white: all of it at strength 1."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(color))
    return red, green, blue
