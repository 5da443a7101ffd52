"""Python's garbage collection, kept from holding up what is timed in fractions of a second."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_new_only() -> Iterator[None]:
    """Python does not look through what exists already: with torch and transformers some 400 000
    objects, for which a GPU and all other processes would wait 0.1 to 0.3 s now and then."""
    if gc.get_freeze_count():  # somebody else's doing
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
