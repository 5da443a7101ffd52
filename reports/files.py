"""Writes the files of reports, whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from matplotlib.figure import Figure

from .results import ResultsError


def check_path(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises ResultsError if a file with one of these suffixes cannot be written there."""
    if path.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ResultsError(f"{path}: unknown suffix {path.suffix!r}; use {known}")
    if not path.parent.is_dir():
        raise ResultsError(f"{path}: no such folder {path.parent}; create it first")


def write_figure(path: Path, figure: Figure) -> None:
    """Writes a .png or .svg; the same figure makes the same file. Raises as `write_atomically`."""
    kind = path.suffix.lower()[1:]
    metadata = {"Date": None} if kind == "svg" else None
    write_atomically(path, lambda file: figure.savefig(file, format=kind, metadata=metadata))


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
