"""How the next token is drawn: settings, and the draw, for the texts of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from yoco_eval.model import to_device


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the likeliest one at temperature 0, else from the `top_p`,
    `top_k` nucleus of the tempered distribution.

    All draws of an answer follow from `seed`, so that it depends neither on which others are made
    beside it nor on how many.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature {self.temperature} is not a number from 0 on; 0 decodes greedily"
            )
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside 0..1; 1 leaves every token in")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is below 0; 0 leaves every token in")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is below 0")

    def generator(self, device: torch.device) -> torch.Generator:
        """That an answer is drawn with; on a CPU, PyTorch's takes 32 bits of a seed and no more."""
        (seed,) = np.random.SeedSequence(self.seed).generate_state(1)
        return torch.Generator(device).manual_seed(int(seed))


def draw(logits: Tensor, how: Sequence[Sampling], noise: Tensor) -> Tensor:
    """Draws a token for each row, at temperatures above 0.

    The token with the largest tempered logit less the logarithm of a number drawn from the
    exponential distribution is one drawn from their softmax (the Gumbel-max trick). Other ways,
    along the cumulative distribution, would let the rounding of one logit decide on all tokens.

    Args:
        logits: [n, vocabulary].
        how: of each row.
        noise: [n, vocabulary], drawn from the exponential distribution with mean 1.

    Returns:
        int64 [n].
    """
    wide = torch.promote_types(logits.dtype, torch.float32)

    def column(numbers: Sequence[float]) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=wide), logits.device)[:, None]

    tempered = logits.to(wide) / column([one.temperature for one in how])
    vocabulary = logits.shape[1]
    kept = [min(one.top_k, vocabulary) or vocabulary for one in how]
    if min(kept) < vocabulary:
        most = max(number for number in kept if number < vocabulary)
        largest = tempered.topk(most, dim=-1).values
        last = largest.gather(1, column(kept).long().clamp(max=most) - 1)
        full = column(kept) == vocabulary
        tempered = tempered.masked_fill((tempered < last) & ~full, -math.inf)
    if any(one.top_p < 1 for one in how):
        ordered = tempered.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(-1)
        # The smallest set of likeliest tokens whose probability reaches top_p, the first in any
        # case, and those that tie with the last.
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = -1.0
        inside = (before < column([one.top_p for one in how])).sum(-1, keepdim=True)
        last = ordered.gather(1, inside - 1)
        tempered = tempered.masked_fill(tempered < last, -math.inf)
    return (tempered - noise.log()).argmax(-1)
