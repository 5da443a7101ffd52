"""The style of every figure: sizes on paper, and colours that the colour-blind can tell apart."""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from matplotlib.ticker import LogLocator, NullLocator

from yoco_eval.lengths import format_length

logger = logging.getLogger(__name__)

COLUMN_WIDTH, PAGE_WIDTH = 3.4, 7.0  # inches
FONT, TITLE_FONT, SMALL_FONT = 7, 8.5, 5.5  # points
GRID = "#e6e6e6"  # lines behind curves
# Names may need letters that the first font lacks. Fonts that are not there would be warned of.
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei")
_RC: dict[Any, Any] = {
    "font.family": [name for name in _FONTS if name in fontManager.get_font_names()],
    "font.size": FONT,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 300,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "yoco-eval",  # the same results make the same file
    "pdf.fonttype": 42,  # letters stay letters, where publishers ask for embedded fonts
    "text.usetex": False,
    "text.parse_math": False,
}

# Okabe and Ito's palette, without the yellow that vanishes on white and the black that does on
# black. Where there are more checkpoints than colours, marks and lines differ: seven marks do not
# repeat with six colours.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", ":")


@contextmanager
def figure_style(**more: Any) -> Iterator[None]:
    """Draws and saves figures in the common style.

    more: matplotlib's settings that differ. Letters that no font has are told in one line.
    """
    missing = "missing from font"
    with matplotlib.rc_context(_RC | more), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for one in caught:
        if missing not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if any(missing in str(one.message) for one in caught):
        logger.warning("some letters are drawn as boxes: no font that is installed has them")


def series(index: int) -> dict[str, Any]:
    """How the checkpoint or model in this place is drawn, in every figure of a report."""
    return {
        "color": color(index),
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index // len(_COLORS) % len(_LINES)],
        "linewidth": 1,
        "markersize": 3,
    }


def color(index: int) -> str:
    """The colour of the checkpoint or model in this place."""
    return _COLORS[index % len(_COLORS)]


def length_axis(
    ax: Axes, lengths: Sequence[int], labels: Sequence[str] | None = None, size: float = FONT - 1
) -> None:
    """Makes x the logarithm, base 2, of context lengths in tokens, with a tick at each.

    labels: of the ticks; by default the lengths with binary prefixes. size: of these, in points.
    """
    positions = [math.log2(length) for length in lengths]
    ax.set_xticks(positions, labels or [format_length(n) for n in lengths], size=size)
    room = 0.6 * spacing(lengths)
    ax.set_xlim(positions[0] - room, positions[-1] + room)
    ax.set_xlabel("Context length (tokens)", size=FONT)
    ax.tick_params(axis="x", length=2)
    ax.tick_params(axis="y", labelsize=FONT, length=2)
    ax.spines[["top", "right"]].set_visible(False)


def set_scale(ax: Axes, scale: str) -> None:
    """Makes y "linear" or "log", with plain numbers at its ticks."""
    ax.set_yscale(scale)
    if scale == "log":
        ax.yaxis.set_major_locator(_RoundNumbers())
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


class _RoundNumbers(LogLocator):
    """Ticks of a logarithmic axis: more to a decade where there are few decades."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        self.set_params(subs=(1, 2, 5) if vmax > 10 * vmin else (1, 1.5, 2, 3, 4, 5, 6, 8))
        return super().tick_values(vmin, vmax)


def spacing(lengths: Sequence[int]) -> float:
    """The smallest distance between neighbours on such an axis."""
    positions = [math.log2(length) for length in lengths]
    return min((b - a for a, b in zip(positions, positions[1:], strict=False)), default=1.0)
