"""Models by shape, with random weights, for measuring cost without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from .config import YocoConfig
from .interface import Blueprint, Config
from .mixers import GatedRetentionSettings
from .transformer import Transformer, TransformerConfig
from .yoco import Yoco

Kind = TypeVar("Kind", Yoco, Transformer)

SEED = 0  # of the weights

SHAPES = {
    "3b": YocoConfig(
        dim=3072,
        n_layers=26,
        hidden_dim=8192,
        n_attn_heads=24,
        n_attn_kv_heads=8,
        vocab_size=100288,
        self_decoder=GatedRetentionSettings(n_self_heads=24, self_rope_theta=8e7),
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


def with_random_weights(config: YocoConfig) -> Blueprint:
    """A YOCO model of this shape."""
    return Blueprint(config, Yoco.costs_of(config), _maker(partial(Yoco.empty, config)))


def transformer_beside(config: Config) -> Blueprint:
    """The Transformer that a YOCO model is compared with: as wide and deep, random weights.

    Raises:
        ValueError: it is no YOCO model.
    """
    if not isinstance(config, YocoConfig):
        raise ValueError("against=transformer: is for YOCO models; leave it out")
    plain = TransformerConfig.like(config)
    return Blueprint(plain, Transformer.costs_of(plain), _maker(partial(Transformer.empty, plain)))


def _maker(
    allocate: Callable[[torch.device, torch.dtype], Kind],
) -> Callable[[torch.device, torch.dtype], Kind]:
    def make(device: torch.device, dtype: torch.dtype) -> Kind:
        model = allocate(device, dtype)
        set_random_weights(model, SEED)
        return model

    return make


def set_random_weights(model: Yoco | Transformer, seed: int) -> None:
    """Sets weights where they lie: matrices normal with deviation 0.02, norms' weights 1."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(1)
