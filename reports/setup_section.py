"""The sections on how checkpoints were evaluated: settings, what they restrict, and the sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from yoco_eval.printable import listed

from .cells import Section
from .comparison import Comparison
from .part import Part
from .section_notes import values_told

_SKIPPED = 12  # files of a checkpoint that are named


def _sections(comparison: Comparison) -> Iterator[Section]:
    yield Section("How it was evaluated", items=comparison.setup)
    yield Section("What else differs", items=tuple(_setup_differences(comparison)))
    yield Section("Comparisons restricted", items=tuple(_caveats(comparison)))
    yield Section("Sources", items=tuple(_sources(comparison)))
    yield Section("Skipped files", items=tuple(_skipped(comparison)))


def _setup_differences(comparison: Comparison) -> Iterable[str]:
    for difference in comparison.setup_differences:
        of = f"{difference.setting} ({listed(difference.tasks)})"
        yield f"{of}: {values_told(comparison, difference)}"


def _caveats(comparison: Comparison) -> Iterable[str]:
    tasks: dict[tuple[str, int, int], list[str]] = {}
    for caveat in comparison.caveats:
        key = caveat.reason, caveat.first, caveat.second
        tasks.setdefault(key, []).append(caveat.task)
    pairs: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, first, second), concerned in tasks.items():
        pair = f"{comparison.names[first]} and {comparison.names[second]}"
        pairs.setdefault((reason, tuple(concerned)), []).append(pair)
    for (reason, of_tasks), alike in pairs.items():
        yield f"{listed(alike, between='; ')} ({listed(of_tasks)}): {reason}"


def _sources(comparison: Comparison) -> Iterable[str]:
    for one in comparison.checkpoints:
        days = sorted({f"{date:%Y-%m-%d}" for date in one.dates or ()})
        backends = " ".join(["+".join(one.backends), *one.cache])
        told = [str(one.path), backends, " to ".join(days)]
        yield f"{one.name}: {', '.join(filter(None, told))}"


def _skipped(comparison: Comparison) -> Iterable[str]:
    for one in comparison.checkpoints:
        yield from (f"{skip.path}: {skip.reason}" for skip in one.skipped[:_SKIPPED])
        if len(one.skipped) > _SKIPPED:
            yield f"{one.path}: {len(one.skipped) - _SKIPPED} more; a .json report names them"


PART = Part(_sections)
