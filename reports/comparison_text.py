"""A comparison in the terminal, in Markdown, and as LaTeX tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from yoco_eval.printable import printable

from .cells import Cell, Section, Table
from .comparison import Comparison
from .sections import sections

_PAPER_COLUMNS = 9  # of a LaTeX table or a Markdown table, besides the labels
_NARROW_COLUMNS = 14  # if there is nothing in the cells but figures
_GAP = 2  # columns of the terminal between those of a table
_TONES = {"": "", "better": "green", "worse": "bold red"}
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&",
    "#": r"\#", "$": r"\$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "–": "--",
    "−": "$-$",
    "[": "{[}", "]": "{]}", '"': r"\textquotedbl{}", "*": r"\textasteriskcentered{}",
    "†": r"\textdagger{}", "‡": r"\textdaggerdbl{}",
}  # fmt: skip


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints it; tables too wide for the console are continued below."""
    if comparison.single:
        console.print(Text(f"{printable(comparison.title)}\n", "bold"))
    for index, section in enumerate(sections(comparison)):
        console.print(*[""] * bool(index), Text(section.title.upper(), "bold"), sep="\n")
        for line in _wrap(section.text, console.width):
            console.print(Text(line))
        _print_list(section.alarms, console)
        tables = [table for table in section.tables if not table.folded]
        for table in tables:
            _print_table(table, console)
        if tables and section.items:
            console.print()
        _print_list(section.items, console)
        for line in _wrap(_left_out(section), console.width):
            console.print(Text(line, "dim"))


def markdown(comparison: Comparison) -> str:
    """The whole comparison as Markdown, with GitHub's tables."""
    lines = [f"# {escaped(comparison.title)}", ""]
    for section in sections(comparison):
        lines += [f"## {section.title}", ""]
        lines += [escaped(section.text), ""] if section.text else []
        lines += _markdown_list(section.alarms)
        for table in section.tables:
            told = [*markdown_table(table)]
            lines += _folded(escaped(table.title), told[2:]) if table.folded else [*told, ""]
        lines += _markdown_list(section.items)
        if section.folded:
            lines += _folded(_all(section), _markdown_list(section.folded))
    return "\n".join(lines)


def _markdown_list(items: tuple[str, ...]) -> list[str]:
    return [*(f"- {escaped(item)}" for item in items), *[""] * bool(items)]


def _all(section: Section) -> str:
    return f"All {len(section.folded)}, pair by pair"


def _folded(summary: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def latex(comparison: Comparison) -> str:
    """The tables of the comparison, for a document that uses the package booktabs."""
    tables = [
        "\n".join(_latex_table(part))
        for section in sections(comparison, floating=True)
        for table in section.tables
        for part in _parts(table)
    ]
    return "\n\n".join([r"% Needs \usepackage{booktabs}.", *tables]) + "\n"


def _left_out(section: Section) -> str:
    """How much there is that only those want to see who open a file."""
    tables = [table for table in section.tables if table.folded]
    parts = [f"all {len(section.folded)} sentences"] * bool(section.folded)
    parts += [f"{len(tables)} more table{'s' * (len(tables) > 1)}"] * bool(tables)
    return f"Left out here: {' and '.join(parts)}; -o FILE.html or .md has them." if parts else ""


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(printable(text), width)


def _print_list(items: tuple[str, ...], console: Console) -> None:
    for item in items:
        for line in textwrap.wrap(f"- {printable(item)}", console.width, subsequent_indent="  "):
            console.print(Text(line))


def _print_table(table: Table, console: Console) -> None:
    console.print(Text(f"\n{printable(table.title)}", "italic"))
    labels = [row[0].text for row in (*table.body, *table.apart)]
    widths = [
        min(max(map(len, [*labels, table.apart_title * bool(table.apart)])), _label_width(console))
    ]
    for column, name in list(enumerate(table.header))[1:]:
        cells = [_plain(row[column]) for row in (*table.body, *table.apart)]
        widths.append(max(map(len, [*cells, *name.split("\n")])))
    for columns in _blocks(widths, console.width):
        console.print(_rich_table(table, columns, console))
    for note in table.notes:
        for line in textwrap.wrap(printable(note), console.width):
            console.print(Text(line, "dim"))


def _blocks(widths: list[int], width: int) -> Iterator[list[int]]:
    """The columns that stand side by side, each time behind the labels."""
    block: list[int] = []
    for column in range(1, len(widths)):
        needed = widths[0] + sum(widths[c] + _GAP for c in (*block, column))
        if block and needed > width:
            yield block
            block = []
        block.append(column)
    yield block


def _label_width(console: Console) -> int:
    return 2 * console.width // 5


def _rich_table(table: Table, columns: list[int], console: Console) -> RichTable:
    drawn = RichTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in (0, *columns):
        justify: JustifyMethod = "right" if column else "left"
        header = Text(printable(table.header[column]), justify=justify)
        drawn.add_column(
            header, justify=justify, overflow="fold", vertical="bottom",
            max_width=None if column else _label_width(console),
        )  # fmt: skip
    for row in table.body:
        if any(row[column].text for column in columns):  # of a triangle not all rows go on
            drawn.add_row(*(_rich_cell(row[column]) for column in (0, *columns)))
    if table.apart:
        drawn.add_row(Text(table.apart_title, "italic"))
        for row in table.apart:
            drawn.add_row(*(_rich_cell(row[column]) for column in (0, *columns)))
    return drawn


def _rich_cell(cell: Cell) -> Text:
    return Text(printable(_plain(cell)), "bold" if cell.best else _TONES[cell.tone])


def _plain(cell: Cell) -> str:
    return f"{cell.text} {cell.detail}".strip()


def markdown_table(table: Table) -> Iterator[str]:
    """A table of GitHub's Markdown, with title and notes, as lines."""
    yield f"### {escaped(table.title)}"
    for part in _parts(table):
        yield ""
        yield _markdown_row(part.header)
        yield "|---|" + "---:|" * (len(part.header) - 1)
        for row in part.body:
            yield _markdown_row([_plain(cell) for cell in row], [cell.best for cell in row])
        if part.apart:
            yield f"| *{part.apart_title}* |" + " |" * (len(part.header) - 1)
            for row in part.apart:
                yield _markdown_row([_plain(cell) for cell in row])
    for note in table.notes:
        yield ""
        yield escaped(note)


def _markdown_row(texts: list[str] | tuple[str, ...], bold: list[bool] | None = None) -> str:
    cells = [escaped(text).replace("\n", "<br>") for text in texts]
    for index, strong in enumerate(bold or []):
        if strong:
            cells[index] = f"**{cells[index]}**"
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """The text with what Markdown or HTML would take for markup escaped."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", text)


def _parts(table: Table) -> Iterator[Table]:
    """A table of many columns as several, each with the labels."""
    details = any(cell.detail for row in (*table.body, *table.apart) for cell in row)
    most = _PAPER_COLUMNS if details else _NARROW_COLUMNS
    for begin in range(1, len(table.header), most):
        columns = [0, *range(begin, min(begin + most, len(table.header)))]
        yield Table(
            table.title,
            tuple(table.header[c] for c in columns),
            tuple(tuple(row[c] for c in columns) for row in table.rows),
            tuple(table.foot[c] for c in columns if table.foot),
            tuple(tuple(row[c] for c in columns) for row in table.apart),
            table.apart_title,
            table.notes,
        )


def _latex_table(table: Table) -> Iterator[str]:
    columns = len(table.header)
    yield r"\begin{table}"
    yield r"\centering"
    yield rf"\caption{{{' '.join(map(_latex, (f'{table.title}.', *table.notes)))}}}"
    yield rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}"
    yield r"\toprule"
    lines = [name.split("\n") for name in table.header]
    for place in range(max(map(len, lines))):
        cells = [line[place] if place < len(line) else "" for line in lines]
        yield rf"{' & '.join(map(_latex, cells))} \\"
    yield r"\midrule"
    yield from map(_latex_row, table.body)
    if table.apart:
        yield r"\midrule"
        yield rf"\multicolumn{{{columns}}}{{l}}{{\emph{{{_latex(table.apart_title)}}}}} \\"
        yield from map(_latex_row, table.apart)
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table}"


def _latex_row(row: tuple[Cell, ...]) -> str:
    cells = []
    for cell in row:
        text = rf"\textbf{{{_latex(cell.text)}}}" if cell.best else _latex(cell.text)
        cells.append(rf"{text} {{\scriptsize {_latex(cell.detail)}}}" if cell.detail else text)
    return rf"{' & '.join(cells)} \\"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))
