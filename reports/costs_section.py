"""The section on costs: what `yoco-eval profile` measured, beside the results of evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from yoco_eval.printable import VALUE, listed, one_line

from .cells import CHECKPOINT, NOTHING, Cell, Section, Table, transposed
from .comparison import Comparison
from .curve_plots import Plot, plot_panels
from .panels import Panel
from .part import Part
from .profile import bytes_unit
from .section_notes import length_cell

COSTS = "Costs"
_QUANTITIES = {  # of profiles: what a reader calls them
    "peak_bytes": "peak memory",
    "cache_bytes": "cache",
    "prefill_seconds": "prefill, s",
    "decode_tokens_per_second": "decoding, tokens/s",
}


def _sections(comparison: Comparison) -> Iterator[Section]:
    yield Section(COSTS, tables=_profiles(comparison))


def _panels(comparison: Comparison) -> list[Panel]:
    return plot_panels(comparison, COSTS, "costs", COSTS, list(_cost_plots(comparison)))


def _profiles(comparison: Comparison) -> tuple[Table, ...]:
    profiles = comparison.profiles
    lengths = sorted({length for profile in profiles if profile for length in profile.lengths})
    devices = {(p.device, p.dtype) for p in profiles if p}
    notes = [f"{device}, {dtype}." for device, dtype in devices]
    if len(devices) > 1:
        where = ", ".join(
            f"{name} on {p.device} in {p.dtype}"
            for name, p in zip(comparison.names, profiles, strict=True)
            if p
        )
        notes = [f"Not comparable: {where}."]
    # Settings of the cache stand in a profile's name: they may not be those of the evaluation.
    named = zip(comparison.names, profiles, strict=True)
    measured = [f"{name}: {one_line(p.name, VALUE)}" for name, p in named if p]
    notes.append(f"Measured: {listed(measured, between='; ')}.")
    tables = []
    for quantity in _QUANTITIES:
        title, unit = _titled(comparison, quantity)
        rows = []
        for length in lengths:
            cells = [length_cell(length)]
            for profile in profiles:
                row = profile and profile.row(profile.models[0], length)
                value = row and getattr(row, quantity)
                shown = f"{value / unit:.3g}" if value else NOTHING
                cells.append(Cell(shown, value=value or None))
            rows.append(tuple(cells))
        if any(cell.text != NOTHING for row in rows for cell in row[1:]):
            header = ("context", *comparison.names)
            table = Table(title, header, tuple(rows), notes=tuple(notes))
            tables.append(transposed(table, CHECKPOINT) if comparison.many else table)
    return tuple(tables)


def _titled(comparison: Comparison, quantity: str) -> tuple[str, int]:
    """With the unit that its figures are told in."""
    title = _QUANTITIES[quantity]
    if not quantity.endswith("_bytes"):
        return title, 1
    rows = (row for profile in comparison.profiles if profile for row in profile.rows)
    largest = max((getattr(row, quantity) or 0 for row in rows), default=0)
    unit, name = bytes_unit(largest)
    return f"{title}, {name}", unit


def _cost_plots(comparison: Comparison) -> Iterator[Plot]:
    for quantity in _QUANTITIES:
        title, unit = _titled(comparison, quantity)
        curves = []
        for profile in comparison.profiles:
            rows = [profile.row(profile.models[0], n) for n in profile.lengths] if profile else []
            values = {row.length: getattr(row, quantity) for row in rows if row}
            curves.append({n: value / unit for n, value in values.items() if value} or None)
        if any(curves):
            yield Plot(title, curves, scale="log" if quantity == "prefill_seconds" else "linear")


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    names = comparison.names
    for name, profile in zip(names, comparison.profiles, strict=True):
        for row in profile.rows if profile else ():
            for metric in _QUANTITIES:
                if getattr(row, metric) is not None:
                    yield {
                        "kind": "profile", "checkpoint": name, "task": row.model,
                        "metric": metric, "context_length": row.length,
                        "value": getattr(row, metric),
                    }  # fmt: skip


PART = Part(_sections, _panels, _rows)
