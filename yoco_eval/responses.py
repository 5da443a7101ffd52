"""The files of --use_cache: one of each process, and all that any of them holds in each.

So a run goes on from what another one has stored, whichever number of processes either has.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlitedict import SqliteDict

    from .ranks import Ranks

_NAME = re.compile(r"(.*_rank)\d+\.db")  # as lm-eval names them
# Beside the responses' own keys: under these lies whose they are, which files of older versions
# tell by a fingerprint alone.
_KEY, _SETTINGS = "yoco_eval", "yoco_eval settings"
_PATIENCE = 60.0  # seconds for another process to finish with a file


def unite_files(
    own: SqliteDict, fingerprint: str, settings: dict[str, str], ranks: Ranks | None
) -> None:
    """Adds to a process's file what other processes' files of the same name hold.

    Args:
        own: the file, open.
        fingerprint: of all that responses depend on.
        settings: by name, what of that can be told.
        ranks: the processes of this run, all of which are here; None: there is one.

    Raises:
        ValueError: a file holds responses with another fingerprint.
    """
    rows: dict[str, bytes] = {}
    for file in _siblings(Path(own.filename)):
        found = _read(file)
        if found and (_KEY not in found or own.decode(found[_KEY]) != fingerprint):
            theirs = own.decode(found[_SETTINGS]) if _SETTINGS in found else {}
            raise ValueError(
                f"{file}: holds responses of {_others(theirs, settings)}; name another file with "
                "--use_cache"
            )
        rows |= found
    if ranks is not None:
        ranks.wait()  # nobody writes what another one has yet to read
    with closing(sqlite3.connect(own.filename, timeout=_PATIENCE)) as connection, connection:
        connection.executemany("INSERT OR IGNORE INTO unnamed VALUES (?, ?)", rows.items())
    own[_KEY], own[_SETTINGS] = fingerprint, settings


def _others(theirs: Mapping[str, str], mine: Mapping[str, str]) -> str:
    """Whose responses a file holds that are not this model's; of older files that is not known."""
    if not theirs:
        return "another model, or of this one with other settings"
    differing = [
        f"{name} was {theirs.get(name, 'not set')}, and is {mine.get(name, 'not set')}"
        for name in dict.fromkeys((*theirs, *mine))
        if theirs.get(name) != mine.get(name)
    ]
    told = f"other settings ({'; '.join(differing)}), or " if differing else ""
    return f"{told}another model or tokenizer"


def _siblings(file: Path) -> list[Path]:
    """The file itself, and those of other processes."""
    own = _NAME.fullmatch(file.name)
    if own is None:
        return [file]
    named = ((_NAME.fullmatch(path.name), path) for path in file.parent.iterdir())
    return sorted(path for name, path in named if name is not None and name[1] == own[1])


def _read(file: Path) -> dict[str, bytes]:
    """What a file holds, as it is stored."""
    with closing(sqlite3.connect(file, timeout=_PATIENCE)) as connection:
        tables = "SELECT count(*) FROM sqlite_master WHERE name = 'unnamed'"
        if not connection.execute(tables).fetchone()[0]:  # its process has ended too soon
            return {}
        return dict(connection.execute("SELECT key, value FROM unnamed"))
