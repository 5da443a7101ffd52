"""Prompts of an exact number of tokens: an introduction, notes, needles in them, a question.

The notes of a sample are tokenised once, and every prompt is cut from them. What the needles add at
their places, and how the text ends in the question, is counted on some hundred characters there:
tokens depend on the text nearby alone, so the count equals that of the whole prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from yoco_eval.encoding import Encoder
from yoco_eval.tokenizers import SAMPLE, check_tokens

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

    Raises:
        ValueError: the tokenizer makes no tokens of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos_token: bool = False) -> None:
        check_tokens(tokenizer, tokenizer.name_or_path or "the tokenizer")
        self._encoder = Encoder(tokenizer)
        text, whole = self._encoder.encode(SAMPLE), tokenizer(SAMPLE, verbose=False)["input_ids"]
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
    """A prompt, its tokens (special ones included), and those before the first given needle."""

    text: str
    tokens: int
    needle_position: int


class _Edit(NamedTuple):
    """A needle, with what stands around it, in place of the characters `begin` to `end`.

    Edits sort in the order of the text, those at one place by their depth.
    """

    begin: int
    end: int
    depth: float
    text: str


class Notes:
    """The introduction and the haystack of one sample, from which its prompts are cut.

    Args:
        counter: counts with the evaluated model's tokenizer.
        introduction: the text before the haystack; it must end in whitespace.
        haystack: gives the haystack's first so many characters, fewer if it has no more.
        tokens: tokens that are needed; `tokens` of the object tells how many there are.
        starts: gives the positions in a haystack at which a needle may stand, ascending from 0.
        own_lines: whether each needle is a line of its own, or else a sentence before another.
    """

    def __init__(
        self,
        counter: TokenCounter,
        introduction: str,
        haystack: Callable[[int], str],
        tokens: int,
        starts: Callable[[str], Sequence[int]] = sentence_starts,
        own_lines: bool = False,
    ) -> None:
        self._counter = counter
        self._around = ("\n", "\n") if own_lines else ("", " ")
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
        self._starts = np.array(starts(self._text[self._begin :]), dtype=np.int64) + self._begin
        self._tokens_at_starts = np.searchsorted(self._ends, self._starts, side="right")

    @property
    def tokens(self) -> int:
        return len(self._ends)

    def prompt(
        self,
        size: int,
        needles: Sequence[tuple[float, str]],
        questions: Sequence[str],
        reserve: int,
    ) -> Prompt:
        """A prompt that ends in the first question, and stays within `size` with any of them.

        With any it has `size` tokens, or up to `SLACK` fewer, unless the tokens of the questions
        differ by more: then it has as many as there is room for with the longest.

        Args:
            size: tokens, special ones included; introduction, needles and question must fit.
            needles: each a sentence and, before it, the share of the haystack's tokens that come
                before the needle, 0 to 1: it is put where the nearest sentence starts.
            questions: ends of the prompt.
            reserve: tokens set aside for needles and question. All prompts of one size and reserve
                end their notes at the same place, unless they would be too long or short by this.
        """
        wanted = size - self._counter.special - reserve
        plan = self._plan(wanted, needles, questions)
        # Where notes that end with a word leave too much room, they end wherever a token does.
        for whole_words in (True, False):
            cut, _, tokens = plan
            if size - SLACK <= min(tokens) and max(tokens) <= size:
                break
            wanted = int(self._kept(cut)) + size - max(tokens)
            plan = self._plan(wanted, needles, questions, whole_words)
            while max(plan[2]) > size:
                wanted -= 1
                plan = self._plan(wanted, needles, questions, whole_words)
        cut, edits, tokens = plan
        first, ordered = edits[0], sorted(edits)
        position = self._counter.front + int(self._kept(first.begin))
        if earlier := ordered[: ordered.index(first)]:
            [before], [bare] = (self._count(cut, some, questions[:1]) for some in (earlier, []))
            position += before - bare
        return Prompt(self._edited(0, ordered, cut) + questions[0], tokens[0], position)

    def _plan(
        self,
        wanted: int,
        needles: Sequence[tuple[float, str]],
        questions: Sequence[str],
        whole_words: bool = True,
    ) -> tuple[int, list[_Edit], list[int]]:
        """Where notes of about so many tokens end, the needles, each question's prompt's tokens."""
        cut = self._cut(wanted, whole_words)
        edits = [self._edit(cut, depth, sentence) for depth, sentence in needles]
        return cut, edits, self._count(cut, sorted(edits), questions)

    def _edit(self, cut: int, depth: float, sentence: str) -> _Edit:
        before, after = self._around
        place = self._place(cut, depth)
        # A line ends before the blank that a sentence would have followed.
        blank = bool(before) and self._text[place - 1] == " "
        return _Edit(place - blank, place, depth, f"{before}{sentence}{after}")

    def _edited(self, begin: int, edits: Sequence[_Edit], end: int) -> str:
        """The text from `begin` to `end` with the edits, which are in the order of the text."""
        parts = []
        for edit in edits:
            parts += [self._text[begin : edit.begin], edit.text]
            begin = edit.end
        if edits and begin == end:  # nothing follows that the needle must be kept apart from
            parts[-1] = parts[-1].removesuffix(self._around[1])
        return "".join([*parts, self._text[begin:end]])

    def _kept(self, position: int) -> int:
        """The number of tokens that end at or before the position."""
        return int(np.searchsorted(self._ends, position, side="right"))

    def _cut(self, tokens: int, whole_words: bool) -> int:
        """Where to end the notes after about so many tokens of introduction and haystack."""
        tokens = min(tokens, len(self._ends))
        end = self._word_end(tokens) if whole_words else int(self._ends[tokens - 1])
        return max(self._begin, end)

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

    def _count(self, cut: int, edits: Sequence[_Edit], questions: Sequence[str]) -> list[int]:
        """The tokens of the prompt with each of the questions, special ones included."""
        count, tokens = self._counter.count, self._counter.special
        near: list[_Edit] = []
        # Edits near each other, or near the question, are counted together.
        for edit in [*edits, _Edit(cut, cut, 1, "")]:
            if near and edit.begin - near[-1].end > 2 * _NEAR:
                begin, end = max(0, near[0].begin - _NEAR), near[-1].end + _NEAR
                tokens += count(self._edited(begin, near, end)) - count(self._text[begin:end])
                near = []
            near.append(edit)
        begin, near = max(0, near[0].begin - _NEAR), near[:-1]
        tokens += self._before(begin)
        text = self._edited(begin, near, cut)
        return [tokens + count(text + question) for question in questions]

    def _before(self, begin: int) -> int:
        """What to add to the tokens of a text that begins at `begin` to count it from the start.

        That is the tokens before, less what tokenisation adds at the beginning of any text. Both
        show in the tokens up to the end of a word soon after.
        """
        if begin == 0:
            return 0
        end = self._word_end(self._kept(begin + _NEAR // 2))
        return self._kept(end) - self._counter.count(self._text[begin:end])
