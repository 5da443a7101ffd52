"""Writes the files of reports, whole or not at all, and what texts and figures stand in them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from yoco_eval.printable import one_line

from .results import ResultsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # which takes long to import, and most files need none

try:
    import fcntl
except ImportError:  # Windows, where a file that is open can neither be removed nor replaced
    fcntl = None  # type: ignore[assignment]  # a module's name

FIGURES = (".png", ".svg", ".pdf")
_TEMPORARY = (".yoco-eval-", ".tmp")  # the names of files that are being written
_FORMULAS = tuple("=+-@＝＋－＠")  # at the start of a cell, to spreadsheets


def check_path(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises ResultsError if a file with one of these suffixes cannot be written there."""
    if path.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ResultsError(f"{path}: unknown suffix {path.suffix!r}; use {known}")
    if not path.parent.is_dir():
        raise ResultsError(f"{path}: no such folder {path.parent}; create it first")
    try:
        temporary, file = _open_temporary(_target(path).parent)
        file.close()
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_figure(path: Path, *pages: Figure) -> None:
    """Writes a figure; the same one makes the same file. Raises as `write_atomically`.

    pages: one, or, for a .pdf, any number.
    """
    kind = path.suffix.lower()
    if kind == ".pdf":
        write_atomically(path, lambda file: _write_pdf(file, pages))
        return
    (figure,) = pages
    metadata = {"Date": None} if kind == ".svg" else None
    write_atomically(path, lambda file: figure.savefig(file, format=kind[1:], metadata=metadata))


def _write_pdf(file: BinaryIO, pages: Sequence[Figure]) -> None:
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(file, metadata={"CreationDate": None}) as pdf:
        for figure in pages:
            pdf.savefig(figure)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, where lone surrogates, which it lacks, are U+FFFD; as `write_atomically`."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    write_atomically(path, lambda file: file.write(whole.encode()))


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table with a header. Columns that a row lacks are empty; texts cannot become formulas."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(v) if isinstance(v, str) else v for k, v in row.items()})
    return table.getvalue()


def _cell(text: str) -> str:
    line = one_line(text)
    return f"'{line}" if line.startswith(_FORMULAS) else line


def to_json(data: Any, **options: Any) -> str:
    """JSON of plain data, as `json.dumps`. What JSON lacks, NaN and infinities, is null.

    Letters stand as they are; what is not printable is escaped.
    """
    text = json.dumps(_finite(data), allow_nan=False, ensure_ascii=False, **options)
    return re.sub(r"[^\x20-\x7e\n]", _escaped, text)


def _escaped(letter: re.Match) -> str:
    if letter[0].isprintable():
        return letter[0]
    units = letter[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` fill a temporary file, which then takes the place of `path`.

    Where `path` is a link, that is what it leads to. A new file has the permissions of any other,
    one that was there keeps its own. Raises ResultsError, naming the path, if that cannot be done.
    """
    try:
        target = _target(path)
        _remove_leftovers(target.parent)
        temporary, file = _open_temporary(target.parent)
        try:
            with file:
                write(file)
                file.flush()
                if target.exists():
                    os.chmod(temporary, target.stat().st_mode & 0o7777)
                if not fcntl:
                    file.close()
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ResultsError:
    return ResultsError(f"{path}: cannot be written ({error.strerror or error})")


def _target(path: Path) -> Path:
    """The file that is written when one writes to `path`. Raises OSError if that cannot be."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError("a link that leads to itself")
    if not target.parent.is_dir():
        raise OSError(f"it leads to {target.parent}, which is no folder")
    if target.is_dir():
        raise OSError("Is a directory")
    if target.exists() and not target.is_file():
        raise OSError("not an ordinary file")
    if not all(os.access(place, os.W_OK) for place in (target.parent, target) if place.exists()):
        raise OSError("Permission denied")
    return target


def _open_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file, locked for as long as it is open."""
    while True:
        path = folder / secrets.token_hex(4).join(_TEMPORARY)
        file = path.open("xb")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # no locks on this file system: there, leftovers stay
            return path, file
        if path.exists():  # else another run has taken it for a leftover, before it was locked
            return path, file
        file.close()


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of runs that were killed: those that nobody has locked."""
    for path in folder.glob("*".join(_TEMPORARY)):
        try:
            if not fcntl:
                path.unlink()
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # it is being written, or not ours
            pass
