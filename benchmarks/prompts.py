"""Prompts of random tokens that share what those of real tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
