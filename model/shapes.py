"""Models by shape, with random weights, for measuring cost without a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from yoco_eval.printable import VALUE, shortened

from .config import YocoConfig
from .families import model_class, read_shape
from .fla import fla_config
from .interface import Blueprint, Config, Model
from .mixers import GatedRetentionSettings
from .transformer import Transformer, TransformerConfig

SEED = 0  # of the weights


def _like_3b(dim: int, n_layers: int, hidden_dim: int) -> YocoConfig:
    """What YOCO-3B is in other sizes: heads of 128 channels in both decoders, 8 of keys and values;
    its vocabulary; its rotary embedding for contexts of 1M tokens."""
    heads = dim // 128
    return YocoConfig(
        dim=dim,
        n_layers=n_layers,
        hidden_dim=hidden_dim,
        n_attn_heads=heads,
        n_attn_kv_heads=8,
        vocab_size=100288,
        self_decoder=GatedRetentionSettings(n_self_heads=heads, self_rope_theta=8e7),
        rope_theta=8e7,
        max_position_embeddings=2**20,
    )


# 3b is the published model. The others of its kind are chosen here, in the range of the paper's
# scaling figures: 7b and 13b as wide and deep as LLaMA 7B and 13B (arXiv:2302.13971, table 2), 1.6b
# as Pythia 1.4B (arXiv:2304.01373, table 1), whose vocabulary is half as large; feed-forward layers
# 8/3 times as wide as the model, in multiples of 256. fla-1.3b-gdn is the configuration that
# flash-linear-attention has by default, of 1.21e9 parameters.
SHAPES = {
    "1.6b": _like_3b(2048, 24, 5632),
    "3b": _like_3b(3072, 26, 8192),
    "7b": _like_3b(4096, 32, 11008),
    "13b": _like_3b(5120, 40, 13824),
    "fla-1.3b-gdn": fla_config({"hidden_size": 2048}),
}


def find_shape(name: str) -> Config:
    """The shape of a name; or else of a path, as `read_shape` reads it.

    Raises:
        ValueError: there is none, or a CheckpointError, the file is of no model known here.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = os.path.expanduser(name)
    if not os.path.exists(path):  # whatever the system has against such a name
        raise ValueError(
            f"shape {shortened(repr(name), VALUE)} is unknown; choose from {', '.join(SHAPES)}, or "
            "give the path of a config.json or params.json, or of a folder with one"
        )
    return read_shape(Path(path))


def with_random_weights(config: Config) -> Blueprint:
    """The model of this shape."""
    kind = model_class(config)
    return Blueprint(config, kind.costs_of(config), _maker(partial(kind.empty, config)))


def transformer_beside(config: Config) -> Blueprint:
    """The Transformer that a YOCO model is compared with: as wide and deep, random weights.

    Raises:
        ValueError: it is no YOCO model.
    """
    if not isinstance(config, YocoConfig):
        raise ValueError("--against transformer is for YOCO models; leave it out")
    plain = TransformerConfig.like(config)
    return Blueprint(plain, Transformer.costs_of(plain), _maker(partial(Transformer.empty, plain)))


def _maker(
    allocate: Callable[[torch.device, torch.dtype], Any],
) -> Callable[[torch.device, torch.dtype], Model]:
    def make(device: torch.device, dtype: torch.dtype) -> Model:
        model: Model = allocate(device, dtype)
        set_random_weights(model, SEED)
        return model

    return make


def set_random_weights(model: Any, seed: int) -> None:
    """Sets a model's weights where they lie: matrices normal with deviation 0.02, norms' weights 1,
    biases 0, and what else modules with a `draw` have as they draw it."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(0 if name.endswith("bias") else 1)
        for module in model.modules():
            if hasattr(module, "draw"):
                module.draw(generator)
