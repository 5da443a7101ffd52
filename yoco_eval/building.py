"""What the processes of a machine make once for all of them: the long prompts of a run's tasks.

Each makes its share. The others find what it has made in its file, of which they read a text when
they need it: several gigabytes of prompts are in nobody's memory. All open all files at first, and
then there is no folder any more: what they take is free again when the processes have ended, in
whatever way they do.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from tqdm import tqdm

from .ranks import Ranks

T = TypeVar("T")
Unit = TypeVar("Unit")
Key = TypeVar("Key")
Text = TypeVar("Text")


class _Stretch(NamedTuple):
    """Bytes of a file."""

    begin: int
    size: int


class _Failure(NamedTuple):
    """The number of the unit that could not be made, and why."""

    unit: int
    reason: str


class Builders:
    """The processes of this machine, as those that make prompts together.

    All processes of the run call its methods, in the same order.

    Args:
        ranks: all processes of the run.

    Attributes:
        busy: whether this one is making its share, so that it makes alone whatever that needs.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._neighbours = ranks.neighbours
        self._files: list[IO[bytes]] = []  # of each neighbour, opened when first needed
        self._most = 0
        self.busy = False

    @property
    def count(self) -> int:
        """How many processes make a share each, on the machine that has most: all of the run are
        told the same."""
        self._open()
        return self._most

    def collect(self, own: T) -> list[T]:
        """What each process of the run has."""
        return self._ranks.collect(own)

    def build(
        self,
        units: Sequence[Unit],
        make: Callable[[Unit], tuple[T, Mapping[Key, Text]]],
        bar: str | None = None,
    ) -> tuple[list[T], Mapping[Key, Text]]:
        """What all units come to, each made by one process of the machine.

        Args:
            units: what there is to make: the same in all processes.
            make: gives what everybody is to have of a unit, and texts, which stay in files. Their
                keys are not those of any other unit.
            bar: name of a progress bar; None: there is none.

        Returns:
            What everybody has, in the order of units, and all texts.

        Raises:
            ValueError: that of the first unit that could not be made, in all processes.
        """
        self._open()
        count, place = len(self._neighbours), self._place
        shares = [range(first, len(units), count) for first in range(count)]
        told: _Stretch | _Failure
        self._ranks.working = self.busy = True
        error, unit = None, 0
        try:
            made = []
            for unit in tqdm(shares[place], bar, leave=False, delay=1, disable=bar is None):
                everyones, texts = make(units[unit])
                made.append((everyones, {key: self._write(texts[key]) for key in texts}))
            told = self._write(made)
        except ValueError as raised:  # what users are told: others end the run
            error, told = raised, _Failure(unit, str(raised))
        finally:
            self.busy = False
        everywhere = self._ranks.collect(told)
        self._ranks.working = False
        if failures := [one for one in everywhere if isinstance(one, _Failure)]:
            first = min(failures)
            raise error if error is not None and first == told else ValueError(first.reason)
        found: dict[int, T] = {}
        index: dict[Key, tuple[IO[bytes], _Stretch]] = {}
        for file, share, rank in zip(self._files, shares, self._neighbours, strict=True):
            stretch = everywhere[rank]
            assert isinstance(stretch, _Stretch)
            for number, (everyones, texts) in zip(share, _read(file, stretch), strict=True):
                found[number] = everyones
                index |= {key: (file, text) for key, text in texts.items()}
        return [found[number] for number in range(len(units))], _Texts(index)

    @property
    def _place(self) -> int:
        return self._neighbours.index(self._ranks.rank)

    def _write(self, thing: Any) -> _Stretch:
        """Appends to this process's file."""
        file, data = self._files[self._place], pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        try:
            begin = file.tell()
            file.write(data)
            file.flush()
        except OSError as error:
            raise ValueError(
                f"prompts cannot be written to {tempfile.gettempdir()} ({error.strerror}); set "
                "TMPDIR to a folder with more room"
            ) from None
        return _Stretch(begin, len(data))

    def _open(self) -> None:
        """Opens a file of each process of the machine, in a folder that is gone afterwards.

        Where not all see the folder, as in containers of their own, each makes everything alone.
        """
        if self._files:
            return
        ranks, first = self._ranks, self._neighbours[0]
        own = tempfile.mkdtemp(prefix="yoco-eval-") if ranks.rank == first else None
        try:
            folder = Path(ranks.collect(own)[first] or "")
            try:
                file = open(folder / str(ranks.rank), "x+b")
            except OSError:
                file = None
            seen = ranks.collect(file is not None)
            if file is None or not all(seen[rank] for rank in self._neighbours):
                self._neighbours, self._files = [ranks.rank], [tempfile.TemporaryFile()]
            else:
                self._files = [
                    file if rank == ranks.rank else open(folder / str(rank), "rb")
                    for rank in self._neighbours
                ]
            self._most = max(ranks.collect(len(self._neighbours)))  # and all have opened theirs
        finally:
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)


class _Texts(Mapping[Any, Any]):
    """Texts that are read when they are asked for.

    Args:
        index: in which files they are, and where.
    """

    def __init__(self, index: Mapping[Any, tuple[IO[bytes], _Stretch]]) -> None:
        self._index = index

    def __getitem__(self, key: Any) -> Any:
        return _read(*self._index[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def _read(file: IO[bytes], stretch: _Stretch) -> Any:
    return pickle.loads(os.pread(file.fileno(), stretch.size, stretch.begin))
