"""Texts from files, paths and command lines made fit to be shown: harmless, and not too long.

This module imports nothing of the project, so that every room of it may use this one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

SCREENFUL = 23 * 80  # characters; longer lines would hide what stands above them
VALUE = 200  # characters of a single value among others
_ROOM = 80  # characters that a count may be among
PLAIN = "yoco-eval-plain"  # how streams encode what they lack; a name for `open(errors=...)`

# The marks of our own tables, where an encoding lacks them.
_PLAIN = {
    "–": "-",
    "─": "-",
    "±": "~",
    "×": "x",
    "†": "+",
    "‡": "#",
    "…": "...",
    "≥": ">=",
    "−": "-",
}


def printable(text: str, most: int = SCREENFUL) -> str:
    """The text without what would move a terminal's cursor or hide letters, as `shortened`.

    Line breaks stay, other blanks are spaces. Terminal escapes, marks of direction, lone surrogates
    and all else that is not printable become U+FFFD, so that UTF-8 has all of it.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"
        for c in shortened(text, most)
    )


def one_line(text: str, most: int = SCREENFUL) -> str:
    """The printable text without line breaks, for titles and labels."""
    return " ".join(printable(text, most).split())


def message(text: object) -> str:
    """What is told in one line: an error or a note, whatever names are in it."""
    return printable("; ".join(str(text).splitlines()))


def shortened(text: str, most: int) -> str:
    """The text; of one longer than `most` characters the middle is left out.

    How much that is is told where there is room for it.
    """
    if len(text) <= most:
        return text
    kept = most - (40 if most >= _ROOM else 1)
    mark = f" … {len(text) - kept} characters left out … " if most >= _ROOM else "…"
    return f"{text[: kept // 2]}{mark}{text[len(text) - (kept - kept // 2) :]}"


def shown(anything: object) -> str:
    """How a value of a foreign file stands in a message."""
    try:
        return shortened(repr(anything), VALUE)
    except (RecursionError, ValueError):  # ValueError: an integer of very many digits
        return f"a {type(anything).__name__} too large to be shown"


def with_settings(name: str, **settings: object) -> str:
    """A model's name, and what was set beside it, where it is not None: "3b sparse=64"."""
    told = (f"{key}={value}" for key, value in settings.items() if value is not None)
    return " ".join([name, *told])


def listed(items: Sequence[str] | Iterable[str], most: int = 4, between: str = ", ") -> str:
    """The first of the items, and how many more there are."""
    items = list(items)
    named = between.join(items[:most])
    return named if len(items) <= most else f"{named} and {len(items) - most} more"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in lacking), error.end


codecs.register_error(PLAIN, _plain)
