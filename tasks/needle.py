"""The task yoco_needle: a city's number hidden in a long text, and asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from .haystack import SyntheticHaystack, TextHaystack, load_haystack
from .needle_grid import GridSettings, Hidden, NeedleGrid
from .settings import setting, text
from .wording import ANSWER, CITIES, INTRODUCTION, NEEDLE, NUMBER_DIGITS, QUESTION


@dataclass(frozen=True)
class NeedleSettings(GridSettings):
    """What a user can set of the task, besides what every needle task has.

    Attributes:
        haystack: "synthetic", "essays", or a path to a text file or to a folder of them. Each
            sample has a haystack of its own.
    """

    haystack: str = setting(text, "synthetic")


class Needle(NeedleGrid):
    Settings = NeedleSettings
    settings: NeedleSettings
    introduction = INTRODUCTION
    answer_start = ANSWER

    def haystack(self) -> SyntheticHaystack | TextHaystack:
        return load_haystack(self.settings.haystack, self.settings.seed)

    def hidden(self, length: int, depth: float, sample: int) -> list[Hidden]:
        return draw_cities(self.settings.seed, length, depth, sample, count=1)

    def possible(self) -> Iterable[Hidden]:
        return [hide(0, city, "7" * NUMBER_DIGITS) for city in CITIES]


def draw_cities(seed: int, length: int, depth: float, sample: int, count: int) -> list[Hidden]:
    """Needles of `count` cities, the first at `depth`, the others anywhere.

    More of them begin with the same ones. No two have a city or a number in common.
    """
    draw = Random(f"needle/{seed}/{length}/{depth}/{sample}").random
    cities, numbers, needles = list(CITIES), set(), []
    for place in range(count):
        city = cities.pop(int(draw() * len(cities)))
        while (number := draw_number(draw)) in numbers:
            pass
        numbers.add(number)
        needles.append(hide(draw() if place else depth, city, number))
    return needles


def draw_number(draw: Callable[[], float]) -> str:
    """A number of `NUMBER_DIGITS` digits.

    Args:
        draw: `random` of a `Random`, the one whose sequence is the same in every Python.
    """
    smallest = 10 ** (NUMBER_DIGITS - 1)
    return str(smallest + int(draw() * 9 * smallest))


def hide(depth: float, city: str, number: str) -> Hidden:
    """A city's number as a needle at `depth`."""
    return Hidden(
        depth,
        {"city": city, "number": number},
        NEEDLE.format(city=city, number=number),
        QUESTION.format(city=city),
    )
