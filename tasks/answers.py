"""What a model's answer says: what follows its thinking, and the first number there."""

from __future__ import annotations

import re
from unicodedata import decimal

# Digits in groups of three, with one and the same mark between them, are one number: a comma (also
# LaTeX's "{,}" and "\,"), a full stop, an apostrophe, an underscore or a blank of any width.
_NUMBER = re.compile(
    r"\d{1,3}(?P<mark>\{?\\?,\}?|[.'’_，．،٬ \u00a0\u2007\u2009\u202f])\d{3}"
    r"(?:(?P=mark)\d{3})*(?!\d)|\d+"
)
_THOUGHTS = (("<think>", "</think>"), ("<|channel>", "<channel|>"))  # the latter are Gemma's


def after_thinking(answer: str | None) -> str:
    """What an answer says behind its last `</think>`, and before a `<think>` that has no end.

    So with Gemma's marks, where a backend leaves them in. Backends give None for an answer that
    there is not.
    """
    said = answer or ""
    for begin, end in _THOUGHTS:
        said = said.rpartition(end)[2].partition(begin)[0]
    return said


def first_number(text: str) -> str | None:
    """The first number in a text, in the digits 0 to 9; None if there is none.

    "12,345" and "12 345" are one number, "12345,54321" and "12, 345" are two. Digits of all scripts
    are read, decimals are not: "12345.0" is 12345, as it is at the end of a sentence.
    """
    match = _NUMBER.search(text)
    return match and "".join(str(decimal(c)) for c in match[0] if c.isdecimal())
