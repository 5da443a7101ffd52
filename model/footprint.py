"""The memory at the peak of a run, by parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .interface import Costs

_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Footprint:
    """Memory in bytes at the peak of a run.

    Attributes:
        weights: all parameters.
        cache: keys and values.
        states: what is remembered beside them: at a chunk's start, at its end, and while decoding.
        activations: intermediate results of one chunk, or of scoring.
    """

    weights: int
    cache: int
    states: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.states + self.activations


def footprint(
    costs: Costs,
    dtype: torch.dtype,
    length: int,
    chunk: int,
    logits: int = 0,
    device: torch.device = _GPU,
) -> Footprint:
    """The peak of feeding a text of `length` tokens, `chunk` at a time, and decoding after it.

    Args:
        costs: of the model.
        dtype: of weights, cache and activations.
        length: tokens that the cache has room for.
        chunk: tokens fed at a time.
        logits: how many logits exist at a time where many positions are scored.
        device: on which it runs. Where Triton kernels do, less exists at a time.
    """
    return Footprint(
        weights=costs.weight_bytes(dtype),
        cache=costs.cache_bytes(dtype, length),
        states=3 * costs.state_bytes(dtype),
        activations=costs.activation_bytes(dtype, length, min(chunk, length), logits, device),
    )
