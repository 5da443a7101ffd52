"""The self-decoder: layers that mix tokens with a state of constant size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from yoco_eval.kernels.sequences import Sequences, Step

from .config import YocoConfig
from .layers import DecoderLayer, Layers
from .mixers import Mixer, MixerState


class SelfDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        layers = (self_layer(config) for _ in range(config.self_layers))
        self.layers: Layers[Mixer] = Layers(layers)

    def forward(
        self, x: Tensor, sequences: Sequences, states: tuple[MixerState | None, ...], keep: bool
    ) -> tuple[Tensor, tuple[MixerState | None, ...]]:
        """x: [T, dim], tokens that follow `states`. Returns the output and the layers' states."""
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer.mix(x, sequences, state, keep)
            x = layer.feed_forward(x)
            after.append(state)
        return x, tuple(after)

    def step(self, x: Tensor, step: Step, memory: list[Any]) -> Tensor:
        """One token of each of B texts, x [B, dim]; `memory` has that of each layer's mixer, which
        is changed in place."""
        for layer, part in zip(self.layers, memory, strict=True):
            x = layer.feed_forward(layer.mixer.step(x, layer.mixer_layer_norm.weight, step, part))
        return x


def self_layer(config: YocoConfig) -> DecoderLayer[Mixer]:
    mixer = config.self_decoder.build(config.dim, config.norm_eps)
    return DecoderLayer(config.dim, config.hidden_dim, config.norm_eps, mixer)
