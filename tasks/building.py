"""Long prompts, made once on a machine where several processes share an evaluation.

A backend whose processes can make them together says so by its attribute `builders`; with any other
each process makes all, as does one that is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from .evaluated_model import evaluated

T = TypeVar("T")
Unit = TypeVar("Unit")
Key = TypeVar("Key")
Text = TypeVar("Text")


class Builders(Protocol):
    """What a backend's `builders` do: see `yoco_eval.building`."""

    busy: bool

    @property
    def count(self) -> int: ...

    def collect(self, own: T) -> list[T]: ...

    def build(
        self,
        units: Sequence[Unit],
        make: Callable[[Unit], tuple[T, Mapping[Key, Text]]],
        bar: str | None = None,
    ) -> tuple[list[T], Mapping[Key, Text]]: ...


def build(
    units: Sequence[Unit],
    make: Callable[[Unit], tuple[T, Mapping[Key, Text]]],
    bar: str | None = None,
) -> tuple[list[T], Mapping[Key, Text]]:
    """What all units come to, made by this process or others.

    Args:
        units: what there is to make, such as samples.
        make: gives what every process needs of a unit, and long texts by keys of its own.
        bar: name of a progress bar; None: there is none.

    Returns:
        What every process needs, in the order of units, and all texts.
    """
    if (builders := _builders()) is not None:
        return builders.build(units, make, bar)
    found: list[T] = []
    texts: dict[Key, Text] = {}
    for unit in tqdm(units, bar, leave=False, delay=1, disable=bar is None):
        everyones, own = make(unit)
        found.append(everyones)
        texts |= own
    return found, texts


def count_builders() -> int:
    """How many processes have a share each of what is built, on the machine that has most: all of a
    run are told the same, 1 where each builds all."""
    builders = _builders()
    return 1 if builders is None else builders.count


def dealt(rank: int, size: int, find: Callable[[int, int], dict[int, Any]]) -> dict[int, Any]:
    """What is found of all documents of a run by their number, of each by one process.

    Args:
        rank, size: of this process, and how many there are, as lm-eval deals documents out.
        find: finds it of every `size`-th document from `rank` on.
    """
    builders = _builders()
    if builders is None:
        return find(0, 1)
    found: dict[int, Any] = {}
    for part in builders.collect(find(rank, size)):
        found |= part
    return {number: found[number] for number in sorted(found)}


def _builders() -> Builders | None:
    """Those that share in what this process is to build now."""
    builders = getattr(evaluated(), "builders", None)
    return None if builders is None or builders.busy else builders
