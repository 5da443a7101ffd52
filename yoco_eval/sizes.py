"""What people write of cards that are not there: their memory, and how fast they are.

A card that is sold as one of 80 GB has 80 GiB, so that 80g, 80gb and 80GiB are all the same.

This module imports nothing heavy, so that the command line may use it.
"""

from __future__ import annotations

import re
from reprlib import repr as short_repr

GIB = 2**30
_NUMBER = r"(\d{1,30}(?:\.\d{1,30})?)"
_MOST = 2**20  # of each number; beyond all cards


def parse_memory(text: str) -> int:
    """The bytes that "80g", "80GB", "80GiB" or "79.5g" stands for.

    Raises:
        ValueError: it is none of these, or no card's.
    """
    match = re.fullmatch(f"{_NUMBER} ?g(?:i?b)?", text.strip().lower())
    size = float(match[1]) if match else 0.0
    if not 1 / GIB <= size <= _MOST:
        raise ValueError(f"{short_repr(text)} is not a card's memory; write 80g, for 80 GiB")
    return int(size * GIB)


def parse_speeds(text: str) -> tuple[float, float]:
    """Operations and bytes per second, of "700,2900": TFLOP/s of products, GB/s of memory.

    Raises:
        ValueError: it is not that.
    """
    match = re.fullmatch(f"{_NUMBER},{_NUMBER}", "".join(text.split()))
    products, memory = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not (0.001 <= products <= _MOST and 0.001 <= memory <= _MOST):
        raise ValueError(
            f"{short_repr(text)} is not a card's speeds; write 700,2900, for 700 TFLOP/s of matrix "
            "products and 2900 GB/s of memory"
        )
    return products * 1e12, memory * 1e9


def parse_count(text: str, what: str = "number", mend: str = "8") -> int:
    """A number of cards or of machines.

    Args:
        what, mend: as the error calls it, and says what to write.

    Raises:
        ValueError: it is not one from 1 to 65536.
    """
    match = re.fullmatch(r"\d{1,5}", text.strip())
    number = int(text) if match else 0
    if not 1 <= number <= 2**16:
        raise ValueError(f"{short_repr(text)} is no {what} from 1 to 65536; write {mend}")
    return number


def parse_blocks(text: str) -> int:
    """How many blocks of the cache a token chooses.

    Raises:
        ValueError: it is not a number from 1 to 65536.
    """
    return parse_count(text, "number of blocks", "64, or leave it out, and a token reads all")
