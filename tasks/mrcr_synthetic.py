"""The group yoco_mrcr_synthetic: conversations as in OpenAI's MRCR, made here, of any length.

A user asks for pieces of writing, "write a poem about violins", and an assistant answers each with
a text made of the synthetic haystack's word lists. One request comes as often as there are needles,
each time with another answer; the user's last message asks for the i-th of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from .building import build
from .conversations import (
    DOUBLED,
    NEEDLES,
    ConversationGroup,
    ConversationTask,
    Message,
    needle_counts,
)
from .haystack import MATTERS, QUALITIES, THINGS, paragraph
from .prompts import SLACK
from .settings import counts, lengths, samples_at, setting, whole

_VERSE = ("ballad", "hymn", "lullaby", "poem", "riddle", "song")  # a line for each sentence
_PROSE = ("diary entry", "fable", "letter", "news report", "short scene", "speech")
_FORMS = sorted(_VERSE + _PROSE)
_SENTENCES = 24  # of a text, at most
_STANZA = 4  # sentences after which a text has an empty line
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_STRING = 10  # letters of the random string
# The shortest context length holds the largest number of needles so many times over.
_SHARE = 3
_PROBED = 16  # turns whose mean tokens tell how many there are room for
_ROOMED = 20  # conversations, at least, whose right answers tell the room that an answer has
_TRIES = 20  # of another number of turns or words
_ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}

Draw = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """What a user can set of the tasks.

    Attributes:
        context_lengths: tokens of a prompt and the room for its answer, counted with the model's
            own tokenizer.
        needles: of 2, 4 and 8, those that are evaluated.
        samples: conversations per context length and number of needles; one number, or one by
            context length.
        seed: of all that is drawn.
    """

    context_lengths: list[int] = setting(lengths, [4096, 8192, 16384, 32768])
    needles: list[int] = setting(needle_counts, list(NEEDLES))
    samples: int | dict[int, int] = setting(counts, 10)
    seed: int = setting(whole, 0)


@dataclass(frozen=True)
class Turn:
    """A request of the user's, and the assistant's answer."""

    form: str
    topic: str
    answer: str

    @property
    def messages(self) -> list[Message]:
        request = f"write a {self.form} about {self.topic}"
        return [
            {"role": "user", "content": request},
            {"role": "assistant", "content": self.answer},
        ]


class Conversation:
    """What is drawn of one conversation, all of it from `seed`.

    Args:
        seed: of the generator.
        needles: how many requests are alike.
        asked: which of their answers is asked for, from 1.
        sentences: of a text, at most.

    Attributes:
        needles: the turns with that request, in their order.
        string: what the right answer begins with.
        question: the user's last message.
    """

    def __init__(self, seed: str, needles: int, asked: int, sentences: int) -> None:
        self._sentences = sentences
        draw = Random(seed).random
        self.form, self.topic = _pick(draw, _FORMS), _pick(draw, MATTERS)
        self.string = "".join(_pick(draw, _LETTERS) for _ in range(_STRING))
        self.needles: list[Turn] = []
        while len(self.needles) < needles:
            turn = self._turn(draw, self.form, self.topic)
            if turn not in self.needles:
                self.needles.append(turn)
        self._places = sorted(draw() for _ in range(needles))
        ordinal = _ORDINALS.get(asked, f"{asked}th")
        self.question = (
            f"Prepend {self.string} to the {ordinal} (1 indexed) {self.form} about {self.topic}. "
            "Do not include any other text in your response."
        )
        self.answer = self.string + self.needles[asked - 1].answer
        # The first of the others is long enough to be cut to whatever is left.
        self._elastic = self._other(draw, 2 * sentences + 2)
        self._others = self._endless(draw)
        self._known: list[Turn] = []

    @property
    def elastic(self) -> str:
        """The longest text that the first of the other turns can have."""
        return self._elastic.answer

    def other(self, index: int) -> Turn:
        """A turn that is no needle, by its number."""
        while len(self._known) <= index:
            self._known.append(next(self._others))
        return self._known[index]

    def messages(self, others: int, elastic: str) -> list[Message]:
        """The conversation with so many other turns and, before them, one with the text `elastic`.

        Needles stand where they were drawn, as a share of the others.
        """
        first = Turn(self._elastic.form, self._elastic.topic, elastic)
        rest = [first, *(self.other(index) for index in range(others))]
        placed = [((index + 0.5) / len(rest), turn) for index, turn in enumerate(rest)]
        placed += zip(self._places, self.needles, strict=True)
        turns = [turn for _, turn in sorted(placed, key=lambda one: one[0])]
        told = [message for turn in turns for message in turn.messages]
        return [*told, {"role": "user", "content": self.question}]

    def _endless(self, draw: Draw) -> Iterator[Turn]:
        while True:
            yield self._other(draw, self._sentences)

    def _other(self, draw: Draw, sentences: int) -> Turn:
        """A turn with another request; in every second the form or the topic is the needles'."""
        form, topic = self.form, self.topic
        while (form, topic) == (self.form, self.topic):
            kept = draw()
            form = self.form if kept < 0.25 else _pick(draw, _FORMS)
            topic = self.topic if 0.25 <= kept < 0.5 else _pick(draw, MATTERS)
        if sentences > self._sentences:
            return Turn(form, topic, _text(draw, form, topic, sentences))
        return self._turn(draw, form, topic)

    def _turn(self, draw: Draw, form: str, topic: str) -> Turn:
        fewest = (self._sentences + 1) // 2
        sentences = fewest + int((self._sentences - fewest + 1) * draw())
        return Turn(form, topic, _text(draw, form, topic, sentences))


def _text(draw: Draw, form: str, topic: str, sentences: int) -> str:
    """A title with the topic in it, and so many sentences, in lines or paragraphs by the form."""
    title = f"The {_pick(draw, QUALITIES)} {_pick(draw, THINGS)} and {topic}"
    lines = [paragraph(draw, 1) for _ in range(sentences)]
    between = "\n" if form in _VERSE else " "
    stanzas = (lines[i : i + _STANZA] for i in range(0, sentences, _STANZA))
    return "\n\n".join([title, *map(between.join, stanzas)])


def _pick(draw: Draw, choices: Sequence[str]) -> str:
    return choices[int(len(choices) * draw())]


class SyntheticMrcr(ConversationTask):
    Settings = Settings

    def documents(self) -> list[dict[str, Any]]:
        """Makes the conversations.

        Raises:
            ValueError: a context length is too short for one.
        """
        lengths, samples = self.settings.context_lengths, self.settings.samples
        drawn = {length: self._conversations(length) for length in lengths}
        answers = {
            length: [self._counter.count(one.answer) for one in conversations]
            for length, conversations in drawn.items()
        }

        def make(
            unit: tuple[int, int],
        ) -> tuple[dict[str, Any], dict[tuple[int, int], list[Message]]]:
            length, sample = unit
            one = drawn[length][sample]
            room = self._answer_tokens() if self.budget_given else DOUBLED * max(answers[length])
            messages, tokens = self._fitted(one, length, room)
            document = {
                "context_length": length,
                "sample": sample,
                "needles": self.needles,
                "question": one.question,
                "random_string": one.string,
                "answer": one.answer,
                "prompt_tokens": tokens,
                "answer_tokens": answers[length][sample],
                "max_gen_toks": room,
            }
            return document, {unit: messages}

        units = [(n, sample) for n in lengths for sample in range(samples_at(samples, n))]
        documents, self._messages = build(units, make, f"{self.config.task}: making")
        return documents

    def messages(self, doc: Mapping[str, Any]) -> Sequence[Message]:
        return self._messages[doc["context_length"], doc["sample"]]

    def _conversations(self, length: int) -> list[Conversation]:
        """Those of a context length: samples ask for the first needle, the second, ... in turn.

        There are some more where samples are few, so that answers have the same room then.
        """
        settings = self.settings
        probe = paragraph(Random("sentences").random, 64)
        texts = _SHARE * max(NEEDLES) * self._counter.count(probe) / 64
        sentences = max(1, min(_SENTENCES, int(length / texts)))
        return [
            Conversation(
                f"mrcr/{settings.seed}/{length}/{self.needles}/{sample}",
                self.needles,
                1 + sample % self.needles,
                sentences,
            )
            for sample in range(max(_ROOMED, samples_at(settings.samples, length)))
        ]

    def _fitted(self, one: Conversation, length: int, room: int) -> tuple[list[Message], int]:
        """The messages that fill a context length up to `SLACK` tokens, and their tokens.

        The text of one turn is cut after the word that makes it so. How many other turns there are
        is estimated, tried and mended: tokens of texts add up but for those around their ends.
        """
        size, ends = length - room, self._counter.ends(one.elastic)
        least = one.messages(0, _cut(one.elastic, ends, 1))
        shortest = self.tokens(least)
        if shortest > size:
            raise ValueError(
                f"context_lengths: {length} is too short for {self.needles} needles, the question "
                f"and the answer; give at least {shortest + room}"
            )
        turn = (self.tokens(one.messages(_PROBED, _cut(one.elastic, ends, 1))) - shortest) / _PROBED
        others, kept = int((size - shortest) / turn), len(ends) // 2
        best = shortest, least
        for _ in range(_TRIES):
            messages = one.messages(others, _cut(one.elastic, ends, kept))
            tokens = self.tokens(messages)
            if best[0] < tokens <= size:
                best = tokens, messages
            if size - SLACK <= tokens <= size:
                break
            kept += size - tokens - (tokens > size)
            if not 1 <= kept <= len(ends):
                more = round((kept - len(ends) / 2) / turn) or (1 if kept > 1 else -1)
                more = max(more, -others)
                others, kept = others + more, kept - round(more * turn)
                kept = min(max(kept, 1), len(ends))
        tokens, messages = best
        return messages, tokens


def _cut(text: str, ends: np.ndarray, tokens: int) -> str:
    """The text up to the end of the last word within so many tokens, the first one at least."""
    end = int(ends[min(tokens, len(ends)) - 1])
    if end < len(text) and not text[end].isspace():
        end = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
    return text[:end].rstrip() if end > 0 else text.split(maxsplit=1)[0]


class SyntheticMrcrGroup(ConversationGroup):
    Task = SyntheticMrcr
