"""Python's garbage collection, kept from holding up what is timed in fractions of a second."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Runs under way. To tell by what is frozen, Python would look at each object.
_running = 0


@contextmanager
def collecting_new_only() -> Iterator[None]:
    """Python does not look through what exists already: with torch and transformers some 400 000
    objects, for which a GPU and all other processes would wait 0.1 to 0.3 s now and then.

    It does so again afterwards, at what was frozen before, too: in Python 3.12 some hundred objects
    of its own always are, which look like somebody else's.
    """
    global _running
    if not _running:
        gc.freeze()
    _running += 1
    try:
        yield
    finally:
        _running -= 1
        if not _running:
            gc.unfreeze()
