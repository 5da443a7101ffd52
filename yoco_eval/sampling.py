"""How the next token is drawn: settings, and the draw, for the texts of a batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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

    def draws(self, count: int) -> np.ndarray:
        """The uniform numbers, float64 [count] in [0, 1), that decide on the first tokens."""
        return np.random.Generator(np.random.Philox(self.seed)).random(count)


def draw(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor
) -> Tensor:
    """Draws a token for each row.

    Args:
        logits: [n, vocabulary].
        temperature: [n], above 0.
        top_p: [n], from 0 to 1.
        top_k: int64 [n]; 0 leaves every token in.
        uniform: [n] in [0, 1): where in the distribution, its likeliest tokens first, to draw.

    Returns:
        int64 [n].
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    tempered = logits.to(wide) / temperature.to(wide)[:, None]
    ordered, tokens = tempered.sort(descending=True, stable=True)
    vocabulary = logits.shape[1]
    last = torch.where(top_k == 0, vocabulary, top_k).clamp(max=vocabulary) - 1
    out = ordered < ordered.gather(1, last[:, None])  # those that tie with the last one are in
    probabilities = ordered.masked_fill(out, -math.inf).softmax(-1)
    # The smallest set of likeliest tokens whose probability reaches top_p, the first in any case.
    before = probabilities.cumsum(-1) - probabilities
    before[:, 0] = -1.0
    probabilities.masked_fill_(before >= top_p.to(wide)[:, None], 0.0)
    reached = probabilities.cumsum(-1)
    total = reached[:, -1:]
    # Rounding may take a number just below 1 to the total, behind the last token that is in.
    inside = (probabilities > 0).sum(-1, keepdim=True).clamp(min=1) - 1
    place = torch.searchsorted(reached, uniform.to(wide)[:, None] * total, right=True)
    return tokens.gather(1, torch.minimum(place, inside))[:, 0]
