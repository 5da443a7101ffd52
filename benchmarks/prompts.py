"""Prompts of random tokens that share what those of real tasks share, of about their lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yoco_eval.rounds import Ask, Generate
from yoco_eval.sampling import Sampling

INTRODUCTION, NEEDLE, QUESTION = 40, 16, 24  # tokens of yoco_needle's prompts beside the haystack


def needle_grid(
    lengths: Sequence[int], depths: int, samples: int, vocabulary: int, seed: int = 0
) -> list[np.ndarray]:
    """Prompts in the order of yoco_needle's documents: by length, sample and depth. int32 each.

    Those of a sample have one haystack, of which a longer prompt has more, and all of one length
    end it at the same place; so two share it up to the shallower needle. All begin with one
    introduction, and end in a question.
    """
    random = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return random.integers(vocabulary, size=count, dtype=np.int32)

    introduction, question = tokens(INTRODUCTION), tokens(QUESTION)
    haystacks = [tokens(max(lengths)) for _ in range(samples)]
    prompts = []
    for length in lengths:
        size = length - INTRODUCTION - NEEDLE - QUESTION
        for haystack in haystacks:
            for depth in np.linspace(0, 1, depths):
                place = round(depth * size)
                parts = haystack[:place], tokens(NEEDLE), haystack[place:size]
                prompts.append(np.concatenate((introduction, *parts, question)))
    return prompts


# Of RULER's 13 tasks, as lm-eval makes them: how many needles lie in a text that all samples of the
# task share up to the first one (0: each sample has a text of its own), and new tokens.
RULER = {
    "niah_single_1": (1, 128),
    "niah_single_2": (1, 128),
    "niah_single_3": (1, 128),
    "niah_multikey_1": (4, 128),
    "niah_multikey_2": (0, 128),
    "niah_multikey_3": (0, 128),
    "niah_multivalue": (4, 128),
    "niah_multiquery": (4, 128),
    "vt": (0, 30),
    "cwe": (0, 120),
    "fwe": (0, 50),
    "qa_squad": (0, 32),
    "qa_hotpot": (0, 32),
}
# Of the tasks of yoco_zero_shot: questions, answers, and tokens of a question and an answer.
ZERO_SHOT = {
    "arc_challenge": (1172, 4, 30, 6),
    "arc_easy": (2376, 4, 27, 5),
    "boolq": (3270, 2, 150, 1),
    "hellaswag": (10042, 4, 75, 25),
    "openbookqa": (500, 4, 13, 6),
    "piqa": (1838, 2, 15, 22),
    "winogrande": (1267, 2, 18, 9),
    "sciq": (1000, 4, 110, 3),
}
SUBJECTS, EXAMPLES, ASKED = 57, (400, 2400), (40, 200)  # of MMLU; tokens of examples and questions
PROBLEMS, SOLVED, TOLD = 1319, 900, (25, 150)  # of GSM8K; tokens of examples and problems


class Maker:
    """Makes random tokens and requests."""

    def __init__(self, vocabulary: int) -> None:
        self.random, self._vocabulary = np.random.default_rng(0), vocabulary

    def tokens(self, count: float) -> np.ndarray:
        return self.random.integers(self._vocabulary, size=max(1, round(count)), dtype=np.int32)

    def about(self, count: float) -> np.ndarray:
        """So many tokens on average, as spread as the lengths of questions are."""
        return self.tokens(count * self.random.lognormal(-0.08, 0.4))

    def between(self, least: int, most: int) -> np.ndarray:
        return self.tokens(self.random.integers(least, most))


def generated(parts: Sequence[np.ndarray], new: int) -> Ask:
    """Asks for so many tokens after some parts of a prompt."""
    ids = np.concatenate(parts)
    return Ask(ids, len(ids), Generate(new, (), Sampling()))


def scored(parts: Sequence[np.ndarray]) -> Ask:
    """Asks for the log-likelihood of the last part."""
    ids = np.concatenate(parts)
    return Ask(ids, len(ids) - len(parts[-1]))


def ruler(length: int, samples: int, vocabulary: int) -> list[Ask]:
    """The prompts of all tasks of RULER at one context length."""
    make, asks = Maker(vocabulary), []
    for needles, new in RULER.values():
        introduction, haystack = make.tokens(30), make.tokens(length)
        for _ in range(samples):
            room = length - new - len(introduction) - QUESTION
            if needles:
                size = room - needles * NEEDLE
                places = sorted(make.random.integers(40, size=needles) * size // 40)
                cuts = zip([0, *places], [*places, size], strict=True)
                texts = [haystack[first:end] for first, end in cuts]
                spread = [part for text in texts for part in (text, make.tokens(NEEDLE))][:-1]
            else:
                spread = [make.tokens(room)]
            asks.append(generated((introduction, *spread, make.tokens(QUESTION)), new))
    return asks


def zero_shot(vocabulary: int) -> list[Ask]:
    """Questions with a few answers each, which share a question."""
    make, asks = Maker(vocabulary), []
    for questions, answers, asked, answer in ZERO_SHOT.values():
        for _ in range(questions):
            question = make.about(asked)
            asks += [scored((question, make.about(answer))) for _ in range(answers)]
    return asks


def mmlu(vocabulary: int) -> list[Ask]:
    """14042 questions behind five examples of their subject; four letters are the answers."""
    make, asks = Maker(vocabulary), []
    letters = [make.tokens(1) for _ in range(4)]
    ends = np.linspace(0, 14042, SUBJECTS + 1).astype(int)
    for first, end in zip(ends, ends[1:], strict=False):
        examples = make.between(*EXAMPLES)
        for _ in range(first, end):
            question = make.between(*ASKED)
            asks += [scored((examples, question, letter)) for letter in letters]
    return asks


def gsm8k(vocabulary: int) -> list[Ask]:
    """Problems behind the same eight examples, up to 256 new tokens each."""
    make = Maker(vocabulary)
    examples = make.tokens(SOLVED)
    return [generated((examples, make.between(*TOLD)), 256) for _ in range(PROBLEMS)]
