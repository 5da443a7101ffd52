"""Long documents, from the Hugging Face hub or from local files: books, and code by repository.

Each source gives names and texts one after the other, so that no more is read than is asked for.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import hub_data, repositories

BOOKS = "emozilla/pg19-test"  # PG-19's test split, as parquet
REPOSITORIES = "JetBrains-Research/lca-project-level-code-completion"  # Long Code Arena
_TEXTS = {".txt", ".md", ".rst", ".text"}
# Folders of Python's library that are no part of it, or not written by hand.
_BESIDES = set(
    "site-packages dist-packages test tests idlelib lib2to3 encodings pydoc_data".split()
)
_MOST_LOCAL = 64  # documents of one text


def books(task: str, data: str | None, longest: int) -> Iterator[tuple[str, str]]:
    """PG-19's books; or the text files of a folder, in the order of their paths.

    Args:
        task: name of the data set that comes before text files if `data` holds it.
        data: the setting of that name: a folder, or one text file.
        longest: tokens of a document that are wanted; of no matter here.

    Raises:
        ValueError: there is no such source; the error names it.
    """
    if data is None or _holds_data_set(data, task):
        for row in _rows(BOOKS, None, task, data):
            yield row["short_book_title"], row["text"]
        return
    folder = _existing(data)
    files = [folder] if folder.is_file() else _files(folder)
    files = [file for file in files if file.suffix in _TEXTS]
    if not files:
        raise ValueError(f"data: {data} holds no text files ({', '.join(sorted(_TEXTS))})")
    for file in files:
        try:
            yield file.name, file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {file} is not UTF-8 text") from error


def code(task: str, data: str | None, longest: int) -> Iterator[tuple[str, str]]:
    """The repositories of Long Code Arena, each once; or the sub-folders of a folder, by name.

    Arguments and errors as for `books`; `longest` decides between large and huge repositories.
    """
    if data is None or _holds_data_set(data, task):
        # The huge ones fill longer contexts, but come in gigabytes.
        size = "large_context" if longest <= 2**16 else "huge_context"
        seen = set()
        for row in _rows(REPOSITORIES, size, task, data, streaming=True):
            if row["repo"] not in seen:  # it is there at several commits
                seen.add(row["repo"])
                files = row["repo_snapshot"]
                contents = dict(zip(files["filename"], files["content"], strict=True))
                yield row["repo"], repositories.join(contents)
        return
    folders = (path for path in sorted(_existing(data).glob("*")) if path.is_dir())
    sources = {path: _sources(path) for path in folders if not path.name.startswith(".")}
    if not any(sources.values()):
        raise ValueError(f"data: {data} has no folders with source code, one per repository")
    for folder, files in sources.items():
        contents = {file.relative_to(folder).as_posix(): _read(file) for file in files}
        yield folder.name, repositories.join(contents)


def local(task: str, data: str | None, longest: int) -> Iterator[tuple[str, str]]:
    """One long text from local files, read from several places on, without a network.

    The files are joined in the order of their paths. The first document begins with them, the
    second in their middle, the others between, at the beginning of a line each; where the text
    ends, it begins anew. So a document begins alike however long it is to be, and whatever the
    number of others.

    Args:
        task, longest: of no matter here.
        data: a folder of text files, or of source code where there are none, or one file; None:
            the library of the Python that runs.

    Raises:
        ValueError: there is no such source; the error names it.
    """
    name, text = local_text(data)
    for index in range(_MOST_LOCAL):
        share = int(f"{index:b}"[::-1], 2) / (1 << index.bit_length())
        begin = text.find("\n", int(share * len(text))) + 1 if share else 0
        yield f"{name}, from {share:.1%} on", text[begin:] + text[:begin]


def local_text(data: str | None) -> tuple[str, str]:
    """What `local` reads, with a name.

    Raises:
        ValueError: as `local`.
    """
    if data is None:
        folder, name = Path(sysconfig.get_path("stdlib")), "Python's library"
        places = (file.relative_to(folder) for file in folder.rglob("*.py"))
        chosen = (place for place in places if not _BESIDES.intersection(place.parts))
        files = [folder / place for place in sorted(chosen)]
    else:
        folder, name = _existing(data), data
        found = [folder] if folder.is_file() else _files(folder)
        files = [file for file in found if file.suffix in _TEXTS] or [
            file for file in found if repositories.is_source(file.name)
        ]
    texts = [text for file in files if (text := _read(file).strip())]
    if not texts:
        raise ValueError(
            f"data: {data or folder} holds no texts ({', '.join(sorted(_TEXTS))}, or source code); "
            "name a folder that does with --metadata data=FOLDER"
        )
    return str(name), "\n\n".join(texts) + "\n"


def _holds_data_set(data: str, task: str) -> bool:
    return Path(data, task).expanduser().is_dir()


def _rows(path: str, name: str | None, task: str, data: str | None, **options: Any) -> Iterable:
    try:
        return hub_data.load(path, name, task, data, split="test", **options)
    except ValueError as error:
        if data is not None:
            raise
        raise ValueError(f"{error}, or a folder with texts of your own") from None


def _existing(data: str) -> Path:
    path = Path(data).expanduser()
    if not path.exists():
        raise ValueError(f"data: {data} does not exist; name a folder of texts")
    return path


def _files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, in the order of their paths."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _sources(folder: Path) -> list[Path]:
    return [file for file in _files(folder) if repositories.is_source(file.name)]


def _read(file: Path) -> str:
    """A file's text; none if it is not UTF-8, as some file of many may well be."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
