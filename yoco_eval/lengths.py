"""Context lengths as people write them: binary thousands and millions of tokens.

This module imports nothing, so that every room of the project may use it.
"""

import re

_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def parse_length(value: int | str) -> int:
    """The number of tokens that 65536, "65536", "64k" (65536) or "1m" (1048576) stands for.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+)(?:\.0)?([km]?)", str(value).strip().lower())
    if match is None or int(match[1]) < 1:
        raise ValueError(f"{value!r} is not a length; write 65536, 64k or 1m")
    return int(match[1]) * _UNITS[match[2]]


def format_length(tokens: int) -> str:
    """A length with a binary prefix where that is exact: 4K, 1.5M, but 3000, 10000.

    Multiples of 1000 stay as they are (128000 is not written 125K).
    """
    if tokens % 1000 == 0 or tokens % 2**10:
        return str(tokens)
    if tokens >= 2**20 and tokens % 2**19 == 0:
        return f"{tokens / 2**20:g}M"
    return f"{tokens // 2**10}K"
