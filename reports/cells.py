"""What a report is made of before it is text or a page: sections, tables, cells."""

from __future__ import annotations

from dataclasses import dataclass, replace

CHECKPOINT = "checkpoint"  # heading of a column of their names
NOTHING = "-"  # where there is no figure


@dataclass(frozen=True)
class Cell:
    """A figure with what stands behind it, such as its standard error.

    best: set in bold. value: of the figure, by which it is sorted; None for words.
    tone: "better" or "worse", which stand out; else empty.
    """

    text: str
    detail: str = ""
    best: bool = False
    value: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of which is a label.

    header: its cells may have a second line.
    rows: the measured ones; foot: what follows from them, by column; apart: others that are set
        apart from them, under `apart_title`.
    folded: whether it is looked at by those alone who want to know it all.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    foot: tuple[Cell, ...] = ()
    apart: tuple[tuple[Cell, ...], ...] = ()
    apart_title: str = ""
    notes: tuple[str, ...] = ()
    folded: bool = False

    @property
    def body(self) -> tuple[tuple[Cell, ...], ...]:
        """The rows and, last, the foot."""
        return (*self.rows, *[self.foot] * bool(self.foot))


@dataclass(frozen=True)
class Section:
    """What stands under one heading: an introduction, a list, tables; each may be empty.

    alarms: items that stand first and stand out. folded: those for whom wants to know it all.
    """

    title: str
    text: str = ""
    alarms: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def transposed(table: Table, corner: str) -> Table:
    """A column of the table, such as a checkpoint's, as a row, without the cells' details.

    corner: heading of the first column.
    """
    columns = table.body
    rows = (
        (Cell(name), *(replace(column[place], detail="") for column in columns))
        for place, name in enumerate(table.header)
        if place
    )
    header = (corner, *(column[0].text for column in columns))
    return replace(table, header=header, rows=tuple(rows), foot=())
