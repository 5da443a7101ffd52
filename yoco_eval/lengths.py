"""Context lengths as people write them: binary thousands and millions of tokens.

This module imports nothing of the project, so that every room of it may use this one.
"""

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from reprlib import repr as short_repr
from typing import TypeVar

T = TypeVar("T")

LONGEST = 2**30  # tokens; no text is that long, and a slip would ask for more memory than there is

_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def parse_length(value: int | str) -> int:
    """The number of tokens that 65536, "65536", "64k" (65536) or "1.5m" (1572864) stands for.

    Raises:
        ValueError: it is none of these, not a positive whole number, or more than `LONGEST`.
    """
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)([km]?)", str(value).strip().lower())
    tokens = Fraction(match[1]) * _UNITS[match[2]] if match else Fraction(0)
    if tokens < 1 or tokens.denominator > 1:
        raise ValueError(f"{short_repr(value)} is not a length; write 65536, 64k or 1m")
    if tokens > LONGEST:
        raise ValueError(f"{short_repr(value)} is too long; 1024m, 2^30 tokens, is the longest")
    return int(tokens)


def as_argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` for a command line: argparse tells what it says where it refuses."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def format_length(tokens: int) -> str:
    """A length with a binary prefix where that is exact: 4K, 1.5M, but 3000, 10000.

    Multiples of 1000 stay as they are (128000 is not written 125K).
    """
    if tokens % 1000 == 0 or tokens % 2**10:
        return str(tokens)
    if tokens >= 2**20 and tokens % 2**19 == 0:
        return f"{tokens / 2**20:g}M"
    return f"{tokens // 2**10}K"


def parse_lengths(text: str) -> list[int]:
    """Lengths separated by commas, ascending; "..." doubles the one before up to the one behind.

    "32k,64k,...,1m" is 32K, 64K, 128K, 256K, 512K and 1M.

    Raises:
        ValueError: it is not that.
    """
    parts = [part.strip() for part in text.split(",")]
    lengths: list[int] = []
    for i, part in enumerate(parts):
        if part == "...":
            if not 0 < i < len(parts) - 1 or parts[i + 1] == "...":
                raise ValueError(
                    f"{short_repr(text)}: '...' stands between two lengths, as in 32k,...,1m"
                )
            end = parse_length(parts[i + 1])
            while 2 * lengths[-1] < end:
                lengths.append(2 * lengths[-1])
        else:
            lengths.append(parse_length(part))
    if any(a >= b for a, b in zip(lengths, lengths[1:], strict=False)):
        raise ValueError(
            f"{short_repr(text)}: write the lengths in ascending order, each of them once"
        )
    return lengths
