"""How names and values from a file stand in an error message: harmless, and never too long."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from itertools import islice

_MOST = 8  # names in a list
_LONGEST = 100  # characters of a name


def shown(value: object) -> str:
    """The value as Python writes it, shortened."""
    return reprlib.repr(value)


def listed(names: Collection[str]) -> str:
    """The names, the first of them where there are many, separated by commas."""
    text = ", ".join(
        name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in islice(names, _MOST)
    )
    return f"{text} and {len(names) - _MOST} more" if len(names) > _MOST else text


def one_line(text: str) -> str:
    """The text with line breaks, control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
