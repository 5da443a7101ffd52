"""Shapes of models by name, and random weights, for measuring cost without a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from .config import YocoConfig

SHAPES = {
    "3b": YocoConfig(
        dim=3072,
        n_layers=26,
        hidden_dim=8192,
        n_self_heads=24,
        n_attn_heads=24,
        n_attn_kv_heads=8,
        vocab_size=100288,
        rope_theta=8e7,
        max_position_embeddings=2**20,
    ),
}


def find_shape(name: str) -> YocoConfig:
    """The shape of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown; choose from {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def set_random_weights(model: nn.Module, seed: int) -> None:
    """Sets weights where they lie: matrices normal with deviation 0.02, norms' weights 1."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(1)
