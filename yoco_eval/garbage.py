"""Python's garbage collection, kept from holding up what is timed in fractions of a second."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_frozen = False  # known here, since Python counts frozen objects one by one, for some 20 ms


@contextmanager
def collecting_new_only() -> Iterator[None]:
    """Python does not look through what exists already: with torch and transformers some 400 000
    objects, for which a GPU and all other processes would wait 0.1 to 0.3 s now and then."""
    global _frozen
    if _frozen or gc.get_freeze_count():  # a caller's doing, or somebody else's
        yield
        return
    gc.freeze()
    _frozen = True
    try:
        yield
    finally:
        _frozen = False
        gc.unfreeze()
