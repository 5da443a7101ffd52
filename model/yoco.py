"""The YOCO model: a self-decoder that fills one shared cache, a cross-decoder that reads it.

Tokens lie on one axis: x is [T, dim], with the texts of a batch packed one behind the other.
Parameter names are those of the published checkpoints. Equations: "You Only Cache Once:
Decoder-Decoder Architectures for Language Models", arXiv:2405.05254.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_eval.kernels.dispatch import use_triton
from yoco_eval.kernels.group import Group
from yoco_eval.kernels.matvec import norm_linear
from yoco_eval.kernels.norm import rms_norm
from yoco_eval.kernels.relay import Relay
from yoco_eval.kernels.rotary import rotate
from yoco_eval.kernels.sequences import Sequences, Spans, Step, to_device
from yoco_eval.kernels.text_blocks import BLOCK

from .cache import SelfState
from .config import YocoConfig
from .costs import YocoCosts
from .cross_decoder import CrossDecoder
from .decoder import Decoder
from .interface import take
from .layers import RMSNorm
from .linear import Embedding, allocate, linear, set_weights
from .rotary import Rotary
from .self_decoder import SelfDecoder
from .sparse_cache import SparseCache
from .states import Stretches
from .yoco_cache import YocoCache as Cache


class Yoco(nn.Module):
    """A YOCO language model. `model(input_ids)` gives logits; evaluation goes through a cache, as
    `interface.Model` has it.

    Attributes:
        group: as `interface.Model` has it; caches are held together by the group that is set when
            they are made.
        sparse: how many blocks of the cache a token chooses to read, beside those that all do;
            None: it reads all. Texts are not held together, then.
        eight_bits: whether the cache holds keys and values in eight bits: see `kernels.eight_bits`.
    """

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.config = config
        self.group: Group | None = None
        self.sparse: int | None = None
        self.eight_bits = False
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.self_decoder = SelfDecoder(config)
        self.cross_decoder = CrossDecoder(config)
        self.layer_norm = RMSNorm(config.dim)
        self.output_projection = linear(config.dim, config.vocab_size)
        self._tie()

    def _tie(self) -> None:
        if self.config.tied_embeddings:
            self.output_projection.weight = self.embed_tokens.weight

    @staticmethod
    def costs_of(config: YocoConfig) -> YocoCosts:
        return YocoCosts(config)

    @property
    def costs(self) -> YocoCosts:
        parts = 1 if self.group is None else self.group.size
        return YocoCosts(self.config, parts, self.sparse, self.eight_bits)

    @property
    def block(self) -> int:
        return 1 if self.sparse is None else BLOCK

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @classmethod
    def empty(cls, config: YocoConfig, device: torch.device, dtype: torch.dtype) -> Yoco:
        """A model for evaluation whose weights are allocated but not set."""
        with torch.device("meta"):
            model = cls(config)
        allocate(model, device, dtype)
        model._tie()
        return model.requires_grad_(False).eval()

    @classmethod
    def of_weights(
        cls,
        config: YocoConfig,
        weights: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Yoco:
        """A model for evaluation with copies of weights, which have its parameters' names."""
        model = cls.empty(config, device, dtype)
        set_weights(model, weights)
        return model

    def set_rope_theta(self, theta: float) -> None:
        """Gives all rotary embeddings another base, as extending the context asks for."""
        self.config = self.config.with_rope_theta(theta)
        for module in self.modules():
            rotary = getattr(module, "rotary", None)
            if isinstance(rotary, Rotary):
                vars(module)["rotary"] = replace(rotary, theta=theta)

    def forward(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Logits of a batch of whole texts, with gradients where they are asked for.

        Args:
            input_ids: [B, T], integers.
            first: position of the first prediction asked for. Tokens before it leave after the
                self-decoder (early exit) and have no logits.

        Returns:
            [B, T - first, vocab_size].

        Raises:
            ValueError: there is no token, or `first` is not from 0 to T.
        """
        batch, length = input_ids.shape
        if not input_ids.numel():
            raise ValueError(f"input_ids [{batch}, {length}] holds no token; give one at least")
        if not 0 <= first <= length:
            raise ValueError(f"first {first} is not from 0 to the number of tokens, {length}")
        sequences = Sequences((length,) * batch, (0,) * batch, input_ids.device)
        x, _ = self.self_decode(input_ids.flatten(), sequences, self._initial, keep=False)
        keys, values = self.cross_decoder.keys_values(x)
        cos, sin = angles = self.cross_decoder.angles(sequences.positions, x.dtype)
        asked = (sequences.positions >= first).nonzero().squeeze(-1)
        asked_angles = cos[asked], sin[asked]
        keys, values = (
            part.unflatten(0, (batch, length)).transpose(1, 2)
            for part in (rotate(keys, angles), values)
        )
        visible = torch.ones(length - first, length, dtype=torch.bool, device=x.device)
        visible = visible.tril(first)

        def attend(q: Tensor) -> Tensor:
            q = rotate(q, asked_angles).unflatten(0, (batch, -1)).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=visible, enable_gqa=keys.shape[1] < q.shape[1]
            )
            return out.transpose(1, 2).flatten(0, 1)

        x = self.cross_decoder(x[asked], attend)
        return self.logits(self._normed(x)).unflatten(0, (batch, -1))

    def new_cache(self, capacity: int) -> Cache:
        """One layer's worth: 2 * n_attn_kv_heads * head_dim numbers per token."""
        shape = (self.config.n_attn_kv_heads, capacity, self.config.attn_head_dim)
        start, dtype, device, eight_bits = self._initial, self.dtype, self.device, self.eight_bits
        if self.sparse is not None:
            return SparseCache(shape, start, dtype, device, self.sparse, eight_bits)
        return Cache(shape, start, dtype, device, self.group, eight_bits)

    @property
    def _initial(self) -> SelfState:
        """Of one text, before its first token."""
        return SelfState((0,), (None,) * self.config.self_layers)

    def _normed(self, x: Tensor) -> Tensor:
        """The cross-decoder's output [T, dim], ready for `output_projection`."""
        return rms_norm(x, self.layer_norm.weight, self.config.norm_eps)

    def self_decode(
        self, input_ids: Tensor, sequences: Sequences, state: SelfState, keep: bool = True
    ) -> tuple[Tensor, SelfState | None]:
        """Embeds packed tokens [T] that follow `state` and runs the self-decoder.

        Returns:
            Its output [T, dim], and the state after each sequence, or None unless `keep`.
        """
        x = math.sqrt(self.config.dim) * self.embed_tokens(input_ids)
        x, states = self.self_decoder(x, sequences, state.layers, keep)
        return x, SelfState(sequences.ends, states) if keep else None

    def feed(
        self,
        input_ids: Tensor,
        sequences: Sequences,
        state: SelfState,
        cache: Cache,
        keep: bool = True,
    ) -> tuple[Tensor, SelfState | None]:
        """`self_decode`, with the tokens' keys and values added to the cache in the same order."""
        stretches = cache.extend(len(input_ids))
        x, after = self.self_decode(input_ids, sequences, state, keep)
        self._store(x, sequences, cache, stretches)
        return x, after

    def _store(self, x: Tensor, sequences: Sequences, cache: Cache, stretches: Stretches) -> None:
        """Keys and values of the self-decoder's output, in the slots of `stretches`."""
        keys, values = self.cross_decoder.keys_values(x)
        angles = self.cross_decoder.angles(sequences.positions, x.dtype)
        cache.store(keys, values, angles, stretches, sequences.relay)

    def prefill(self, input_ids: Tensor, cache: Cache, asked: bool = True) -> Tensor:
        """Feeds tokens [T] of the cache's text, keeping their state: no cross-decoder, no logits.

        Each process of a group feeds a part of them, if they are enough for all.

        Args:
            asked: whether a prediction is asked of any of them.

        Returns:
            The self-decoder's output [T, dim]; of some tokens, unless `asked`.
        """
        start, count = cache.state.length, len(input_ids)
        lengths = None
        if self.group is not None and self.config.self_decoder.relays:
            lengths = self.group.parts(count)
        if self.group is None or lengths is None:
            sequences = Sequences((count,), (start,), input_ids.device)
            x, state = self.feed(input_ids, sequences, cache.state, cache)
            assert state is not None
            cache.state = state
            return x
        relay = Relay(self.group, lengths)
        own = relay.own
        sequences = Sequences(
            (lengths[self.group.rank],), (start + own.start,), input_ids.device, relay=relay
        )
        stretches = cache.extend(count)
        x, state = self.self_decode(input_ids[own], sequences, cache.state)
        assert state is not None
        self._store(x, sequences, cache, stretches)
        cache.state = replace(state, lengths=(start + count,))
        return self.group.rows(x, lengths) if asked else x

    def predict(self, x: Tensor, positions: Tensor, cache: Cache, spans: Spans) -> Tensor:
        """Runs the self-decoder's output of some cached tokens through the cross-decoder.

        Args:
            x: [T, dim]. Its memory may be used for something else.
            positions: int64 [T], of these tokens in their texts.
            cache: whose keys and values they read.
            spans: which of them.

        Returns:
            The normalised output [T, dim], of which `logits` makes predictions.
        """
        angles = self.cross_decoder.angles(positions, x.dtype)
        x = self.cross_decoder(x, cache.attention(spans, positions, angles))
        return self._normed(x)

    def logits(self, output: Tensor) -> Tensor:
        """[T, vocab_size]"""
        return self.output_projection(output)

    def decoder(self, cache: Cache, size: int = 1, room: int | None = None) -> Decoder[SelfState]:
        """Decodes up to `size` texts side by side, whose keys and values are in the cache."""
        mixers = [layer.mixer for layer in self.self_decoder.layers]
        memory = [mixer.memory(size, self.device, self.dtype) for mixer in mixers]

        def begin(rows: Tensor, state: SelfState, sources: Sequence[int]) -> None:
            index = to_device(torch.tensor(sources), self.device)
            lengths = [state.lengths[source] for source in sources]
            for mixer, part, layer in zip(mixers, memory, state.layers, strict=True):
                mixer.begin(part, rows, None if layer is None else take(layer, index), lengths)

        return Decoder(
            partial(self._step, cache=cache),
            begin,
            memory,
            cache,
            size,
            room,
            self.device,
            self.dtype,
            graph=use_triton(cache.keys, self.embed_tokens.weight),
            group=self.group,
        )

    def _step(self, tokens: Tensor, step: Step, memory: list[Any], cache: Cache) -> Tensor:
        """Logits [B, vocab_size] after tokens [B]."""
        x = math.sqrt(self.config.dim) * self.embed_tokens(tokens)
        x = self.self_decoder.step(x, step, memory)
        angles = self.cross_decoder.angles(step.positions, x.dtype)
        keys, values = self.cross_decoder.keys_values(x)
        cache.store_step(keys, values, angles, step)
        x = self.cross_decoder(x, cache.step_attention(step, angles))
        norm, weight, group = self.layer_norm.weight, self.output_projection.weight, self.group
        if group is None:
            return norm_linear(x, norm, weight, self.config.norm_eps)
        own = norm_linear(x, norm, group.own_rows(weight), self.config.norm_eps)
        return group.columns(own, len(weight))
