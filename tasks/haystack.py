"""Haystacks: long texts that say nothing about any city's number.

Three sources, one interface (`Haystack.text`): sentences made here from word lists, without end
and without a repeated paragraph; the essays that lm-eval's RULER tasks use; local text files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

ESSAYS = "baber/paul_graham_essays"  # the Hugging Face data set of lm-eval's RULER tasks

# Words of the synthetic haystack, some of which other tasks use. No digits, no number words and no
# city: nothing here can be taken for a needle, and the tests hold the lists to that.
_NAMES = """Ada Amir Anna Bela Boris Carla Cyrus Dario Diana Edith Elias Emma Farid Felix Flora
Gwen Hana Hugo Ida Igor Ines Irma Jonas Josef Judith Karim Lena Leon Lucia Magda Marek Marta Mina
Nadia Nils Nora Olga Omar Otto Paula Petra Quinn Rafael Rosa Rufus Samir Selma Silas Sonja Tariq
Thea Tomas Ursula Vera Viktor Wanda Yara Yusuf Zelda Zora""".split()
_ROLES = """baker beekeeper blacksmith botanist bricklayer carpenter clerk cobbler cook dancer
doctor farmer ferryman fisherman gardener glassblower goldsmith hunter innkeeper joiner judge
librarian locksmith mason merchant miller miner musician nurse painter pharmacist pilot potter
printer sailor scholar shepherd surveyor tailor tanner teacher weaver""".split()
_PLACES = """abbey archive attic bakery barn boathouse brewery brickyard cabin castle cellar chapel
churchyard cloister courtyard dockyard farmhouse forge foundry gallery garden granary greenhouse
harbour hayloft hospital inn kitchen library lighthouse market meadow mill monastery museum nursery
observatory orchard parish pasture quarry refectory school stable station tavern theatre tower
valley vineyard warehouse washhouse watermill windmill woodland workshop""".split()
THINGS = """apron axe barrel basket bell blanket bonnet book bottle bowl broom bucket cabinet
candle canvas carpet chair chest clock coat compass cradle cup curtain desk diary drum fiddle flag
flute globe hammer harp hat jar kettle key kite ladder lamp lantern letter loom map mirror necklace
oar painting parcel plough portrait quilt rope rug saddle sail scarf shovel sieve spoon statue stove
sword table teapot telescope trunk umbrella vase violin wagon wheelbarrow whistle""".split()
QUALITIES = """ancient blue brass brittle broken bronze carved clumsy copper crooked curious damp
delicate dusty elegant empty faded famous fragile gilded golden green grey handsome heavy hidden
hollow humble iron ivory leather light lost modest narrow oaken odd old ordinary painted pale
patched plain polished precious quiet rare red round rusty scarlet silent silver simple smooth
sturdy velvet weathered white wooden woollen worn yellow""".split()
_DEEDS = """admired arranged borrowed bought carried cleaned copied covered described discovered
dropped examined exchanged fetched forgot found hid inspected kept labelled lent lifted measured
mended moved noticed offered packed painted polished praised recognised remembered repaired replaced
restored returned sketched sold studied traded unpacked washed weighed wrapped""".split()
_WAYS = """absently bravely briskly calmly carefully cheerfully eagerly gently gladly gracefully
grudgingly hastily honestly kindly lazily loudly neatly nervously patiently politely proudly quietly
reluctantly secretly silently sleepily slowly solemnly stubbornly thoughtfully wearily""".split()
_WHEN = """after breakfast|after the harvest|after the storm|all afternoon|at dawn|at dusk|at noon|
before sunrise|before supper|before the frost|during the festival|during the fair|early that spring|
for most of the evening|in the autumn|in the early hours|in the middle of winter|late that summer|
long after midnight|on a market day|on the longest day|once the rain had stopped|that same morning|
the following week|towards evening|when the bells rang|when the snow melted|while it was raining|
with the first light|years later""".replace("\n", "").split("|")
_WEATHER = (
    """a cold wind|a light drizzle|a low sun|a pale moon|a sudden gust|a thin mist|a warm
breeze|distant thunder|dry leaves|falling snow|freezing rain|heavy clouds|long shadows|soft rain|
spring sunlight|the evening haze|the morning fog|the smell of hay|thick smoke|wood ash
""".replace("\n", " ")
    .replace("| ", "|")
    .strip()
    .split("|")
)
_BEASTS = """badger bear blackbird cat cow crow deer dog donkey duck eagle falcon finch fox frog
goat goose hare hawk hedgehog heron horse lamb lark lizard mole mouse otter owl ox partridge pigeon
pony rabbit raven robin rooster sheep snail sparrow squirrel stork swallow swan thrush toad trout
turtle weasel wolf wren""".split()
MATTERS = """apples astronomy barley beekeeping boats bookbinding botany bread butterflies candles
chess cider clay clocks clouds coins cooking copper dancing dyes embroidery fables ferns fishing
geese geometry glass grammar grapes herbs honey horses ink ironwork lace leather linen maps marble
medicine mosses mushrooms opera orchids paper pears pottery poultry proverbs railways rivers roses
salt seeds shells ships silk soap songs stars tea tides timber tulips violins wheat willow wine wool
""".split()

_WORDS = {
    "name": _NAMES,
    "other": _NAMES,
    "role": _ROLES,
    "place": _PLACES,
    "site": _PLACES,
    "thing": THINGS,
    "item": THINGS,
    "quality": QUALITIES,
    "look": QUALITIES,
    "deed": _DEEDS,
    "act": _DEEDS,
    "way": _WAYS,
    "when": _WHEN,
    "weather": _WEATHER,
    "beast": _BEASTS,
    "matter": MATTERS,
    "topic": MATTERS,
}
_SENTENCES = """{name} the {role} {way} {deed} the {quality} {thing} in the {place}.
The {role} from the {place} {deed} a {quality} {thing} {when}.
Nobody at the {place} knew why {name} {deed} the {thing} {when}.
The {beast} slept beside the {quality} {thing} while {name} {way} {deed} the {item}.
In the {place} there stood a {quality} {thing}, and next to it a {look} {item}.
{name} wrote to {other} about {matter}, {topic} and the {thing} from the {place}.
{weather} passed over the {place} {when}, and the {role} {deed} the {thing}.
It was {name} who {way} {deed} the {quality} {thing} and {act} the {item}.
The {role} taught {name} about {matter} in the {quality} {place} {when}.
A {quality} {beast} crossed the {place} {when}, followed by a {look} {item} seller.
{name} and {other} talked about {matter} near the {place} until the {role} {deed} the {thing}.
Every {role} in the {place} had heard of the {quality} {thing} that {name} {deed}.
The {thing} was {quality}, but {name} {way} {deed} it and took it to the {place}.
{when}, {name} {deed} a {thing}, a {quality} {item} and a book on {matter}.
The road to the {place} led past a {quality} {site} where a {beast} watched the {role}.
{name} believed that {matter} mattered more than {topic}, and said so {way}.
Someone had left a {quality} {thing} in the {place}, so the {role} {way} {deed} it.
The {role} and the {beast} waited at the {place} {when}, but {name} never came.
Old letters say that {name} {deed} the {thing} of the {quality} {place} {when}.
{weather} reached the {place}, and {name} {way} {deed} the {quality} {thing}.
The {quality} {place} smelled of {matter}, and its {role} {deed} every {thing}.
{name} the {role} kept a {beast}, a {quality} {thing} and many notes on {matter}.""".split("\n")


def _compile(template: str) -> tuple[str, list[list[str]]]:
    slots = re.findall(r"\{(\w+)\}", template)
    return re.sub(r"\{\w+\}", "{}", template), [_WORDS[slot] for slot in slots]


_TEMPLATES = [_compile(template) for template in _SENTENCES]


def _sentence(draw: Callable[[], float]) -> str:
    template, slots = _TEMPLATES[int(len(_TEMPLATES) * draw())]
    chosen: list[str] = []
    for words in slots:
        word = words[int(len(words) * draw())]
        while word in chosen:  # nobody writes to themselves
            word = words[int(len(words) * draw())]
        chosen.append(word)
    sentence = template.format(*chosen)
    return sentence[0].upper() + sentence[1:]


def paragraph(draw: Callable[[], float], sentences: int) -> str:
    """So many sentences made of the word lists, on one line.

    Args:
        draw: `random` of a `Random`, the one whose sequence is the same in every Python.
    """
    text = " ".join(_sentence(draw) for _ in range(sentences))
    return re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", text)


class SyntheticHaystack:
    """An endless text made from word lists; every (seed, sample) is another text.

    Only `random.Random.random` is drawn from, whose sequence Python guarantees across versions.
    """

    name = "synthetic"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @lru_cache(maxsize=2)  # noqa: B019 - a haystack lives as long as its task
    def _text(self, sample: int, size: int) -> str:
        draw = random.Random(f"haystack/{self.seed}/{sample}").random
        paragraphs, length = [], 0
        while length < size:
            paragraphs.append(paragraph(draw, 4 + int(4 * draw())) + "\n")
            length += len(paragraphs[-1])
        return "".join(paragraphs)

    def text(self, sample: int, size: int) -> str:
        """The first `size` characters or a little more of the text of `sample`.

        A longer `size` continues the text of a shorter one.
        """
        step = 1 << max(16, size.bit_length() - 4)  # few distinct sizes, so that the cache hits
        return self._text(sample, -(-size // step) * step)


class TextHaystack:
    """A given text, entered at another sentence for each sample and read around its end."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._text = text
        self._entries = sentence_starts(text)

    def text(self, sample: int, size: int) -> str:
        """All of the text, rotated so that `sample` begins at a sentence of its own.

        It may be shorter than `size` characters: a finite text is never repeated.
        """
        # The golden ratio spreads any number of samples evenly over the text.
        share = (sample * 0.6180339887498949) % 1.0
        start = self._entries[int(share * len(self._entries))]
        return self._text if start == 0 else f"{self._text[start:].rstrip()}\n{self._text[:start]}"


def sentence_starts(text: str) -> Sequence[int]:
    """Positions in `text`, ascending from 0, at which a sentence or a line begins."""
    ends = re.finditer(r"[.!?]['\"”’)\]]*\s+|[。！？][”’」』）]*\s*|\n\s*", text)
    return [0] + [end.end() for end in ends if end.end() < len(text)]


def load_haystack(source: str, seed: int = 0) -> SyntheticHaystack | TextHaystack:
    """The haystack that a task's `haystack` setting names.

    Args:
        source: "synthetic", "essays", or a path to a text file or to a folder of them.
        seed: seed of the synthetic text; given texts do not depend on it.

    Raises:
        ValueError: no such source, or no text in it.
    """
    if source == "synthetic":
        return SyntheticHaystack(seed)
    if source == "essays":
        return TextHaystack("essays", _essays())
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f"haystack {source!r} is neither 'synthetic', 'essays' nor a text file or folder; give "
            "one of these"
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_text_file(p))
    try:
        text = "\n".join(file.read_text(encoding="utf-8").strip() for file in files).strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack {source!r} holds a file that is not UTF-8 text") from error
    if not text:
        raise ValueError(f"haystack {source!r} is empty; give a file or folder with text in it")
    return TextHaystack(path.name, text + "\n")


def _is_text_file(path: Path) -> bool:
    return path.is_file() and path.suffix in {".txt", ".md", ".rst", ".text"}


def _essays() -> str:
    import datasets

    try:
        essays = datasets.load_dataset(ESSAYS, split="train")["text"]
    except Exception:  # the libraries raise whatever their transports do
        raise ValueError(
            f"haystack 'essays' could not be loaded from the Hugging Face hub ({ESSAYS}): connect "
            "once, or use haystack 'synthetic' or a text file"
        ) from None
    return re.sub(r"\s+", " ", " ".join(essays)).strip() + "\n"
