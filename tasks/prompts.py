"""Prompts of an exact number of tokens: an introduction, notes, a needle in them, a question.

The notes of a sample are tokenised once, and every prompt is cut from them. What the needle adds at
its place, and how the text ends in the question, is counted on some hundred characters there:
tokens depend on the text nearby alone, so the count equals that of the whole prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from yoco_eval.encoding import Encoder

from .haystack import sentence_starts

SLACK = 16  # tokens that a prompt may fall short of its size
_NEAR = 256  # characters beyond which a change of the text leaves the tokens alone
_WORD = 8  # tokens in which the end of a word is looked for, to cut the notes there
_SENTENCE = 64  # tokens from the wanted place beyond which a needle goes between words instead


class TokenCounter:
    """Counts tokens as a backend with this tokenizer will.

    Args:
        tokenizer: a fast tokenizer.
        add_bos_token: whether the backend puts a BOS token before the text in any case.

    Attributes:
        front: special tokens before a text.
        special: special tokens before and after a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos_token: bool = False) -> None:
        self._encoder = Encoder(tokenizer)
        text, whole = self._encoder.encode("a"), tokenizer("a")["input_ids"]
        self.front = whole.index(text[0])
        self.special = len(whole) - len(text)
        if add_bos_token and whole[0] != tokenizer.bos_token_id:
            self.front, self.special = self.front + 1, self.special + 1

    def count(self, text: str) -> int:
        """The number of tokens of `text`, special tokens not counted."""
        return len(self._encoder.encode(text))

    def ends(self, text: str) -> np.ndarray:
        """For each token of `text`, the position of the character after it: int64, ascending."""
        return self._encoder.ends(text)


@dataclass(frozen=True)
class Prompt:
    """A prompt, its tokens (special ones included), and those before the needle."""

    text: str
    tokens: int
    needle_position: int


class Notes:
    """The introduction and the haystack of one sample, from which its prompts are cut.

    Args:
        counter: counts with the evaluated model's tokenizer.
        introduction: the text before the haystack; it must end in whitespace.
        haystack: gives the haystack's first so many characters, fewer if it has no more.
        tokens: tokens that are needed; `tokens` of the object tells how many there are.
    """

    def __init__(
        self,
        counter: TokenCounter,
        introduction: str,
        haystack: Callable[[int], str],
        tokens: int,
    ) -> None:
        self._counter = counter
        needed = tokens + _NEAR  # so that the last tokens do not depend on where the text breaks
        probe = haystack(1 << 14)[: 1 << 14]
        size = needed * len(probe) // max(1, counter.count(probe))
        while True:
            size += size // 32 + len(introduction) + _NEAR
            text = haystack(size)
            self._text = introduction + text[:size]
            self._ends = counter.ends(self._text)
            if len(self._ends) >= needed or len(text) < size:
                break
            size = size * needed // len(self._ends)
        self._begin = len(introduction)
        starts = sentence_starts(self._text[self._begin :])
        self._starts = np.array(starts, dtype=np.int64) + self._begin
        self._tokens_at_starts = self._kept(self._starts)

    @property
    def tokens(self) -> int:
        return len(self._ends)

    def prompt(self, size: int, depth: float, needle: str, question: str, reserve: int) -> Prompt:
        """A prompt of `size` tokens, or up to `SLACK` tokens shorter.

        Args:
            size: tokens, special ones included; introduction, needle and question must fit.
            depth: share of the haystack's tokens that come before the needle, 0 to 1.
            needle: a sentence, put before the sentence that starts nearest to this depth.
            question: the end of the prompt.
            reserve: tokens set aside for needle and question. All prompts of one size and reserve
                end their notes at the same place, unless they would be too long or short by this.
        """
        wanted = size - self._counter.special - reserve
        cut, place, tokens = self._plan(wanted, depth, needle, question)
        if not size - SLACK <= tokens <= size:
            wanted = int(self._kept(cut)) + size - tokens
            cut, place, tokens = self._plan(wanted, depth, needle, question)
            while tokens > size:
                wanted -= 1
                cut, place, tokens = self._plan(wanted, depth, needle, question)
        text = self._text[:place] + self._tail(place, cut, needle, question)
        return Prompt(text, tokens, self._counter.front + int(self._kept(place)))

    def _plan(self, wanted: int, depth: float, needle: str, question: str) -> tuple[int, int, int]:
        """Where notes of about so many tokens end, where the needle goes, the prompt's tokens."""
        cut = self._cut(wanted)
        place = self._place(cut, depth)
        return cut, place, self._count(place, cut, needle, question)

    def _tail(self, place: int, cut: int, needle: str, question: str) -> str:
        blank = " " if place < cut else ""
        return needle + blank + self._text[place:cut] + question

    def _kept(self, position):
        """The number of tokens that end at or before the position(s)."""
        return np.searchsorted(self._ends, position, side="right")

    def _cut(self, tokens: int) -> int:
        """Where to end the notes after about so many tokens of introduction and haystack."""
        return max(self._begin, self._word_end(min(tokens, len(self._ends))))

    def _word_end(self, tokens: int) -> int:
        """Where about so many tokens end: after a word, if the last few of them hold one's end."""
        for end in self._ends[tokens - 1 : max(0, tokens - 1 - _WORD) : -1]:
            before, after = self._text[end - 1 : end], self._text[end : end + 1]
            if after.isspace() and not before.isspace():
                return int(end)
        return int(self._ends[tokens - 1])

    def _place(self, cut: int, depth: float) -> int:
        """The start of the sentence, else of the word, at this depth in the notes before `cut`."""
        first, last = self._kept(self._begin), self._kept(cut)
        wanted = first + depth * (last - first)
        count = max(1, np.searchsorted(self._starts, cut))
        nearest = int(np.abs(self._tokens_at_starts[:count] - wanted).argmin())
        if abs(self._tokens_at_starts[nearest] - wanted) <= _SENTENCE:
            return int(self._starts[nearest])
        position = int(self._ends[round(wanted) - 1])
        begin = max(self._begin, position - _NEAR)
        words = list(re.finditer(r"(?<=\s)\S", self._text[begin:position]))
        return begin + words[-1].start() if words else position

    def _count(self, place: int, cut: int, needle: str, question: str) -> int:
        """The tokens of the prompt, special ones included."""
        count, text, special = self._counter.count, self._text, self._counter.special
        if cut - place <= 2 * _NEAR:
            begin = max(0, place - _NEAR)
            end = text[begin:place] + self._tail(place, cut, needle, question)
            return special + self._before(begin) + count(end)
        begin = max(0, place - _NEAR)
        before, after = text[begin:place], text[place : place + _NEAR]
        added = count(f"{before}{needle} {after}") - count(before + after)
        begin = cut - _NEAR
        return special + added + self._before(begin) + count(text[begin:cut] + question)

    def _before(self, begin: int) -> int:
        """What to add to the tokens of a text that begins at `begin` to count it from the start.

        That is the tokens before, less what tokenisation adds at the beginning of any text. Both
        show in the tokens up to the end of a word soon after.
        """
        if begin == 0:
            return 0
        end = self._word_end(self._kept(begin + _NEAR // 2))
        return int(self._kept(end)) - self._counter.count(self._text[begin:end])
