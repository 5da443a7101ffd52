"""Writes the files of reports, whole or not at all."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from .results import ResultsError

FIGURES = (".png", ".svg", ".pdf")


def check_path(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises ResultsError if a file with one of these suffixes cannot be written there."""
    if path.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ResultsError(f"{path}: unknown suffix {path.suffix!r}; use {known}")
    if not path.parent.is_dir():
        raise ResultsError(f"{path}: no such folder {path.parent}; create it first")


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
    with PdfPages(file, metadata={"CreationDate": None}) as pdf:
        for figure in pages:
            pdf.savefig(figure)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` fill a temporary file, which then takes the place of `path`.

    Raises ResultsError, naming the path, if that cannot be done.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
