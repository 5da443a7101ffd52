"""The contract of mixers: all that a self-decoder kind is asked for.

A kind is one file: its `Settings`, which a configuration file states, and its `Mixer`, the module
of one layer; and one line in the table of `yoco_eval.model.mixers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from yoco_eval.kernels.sequences import Sequences, Step

from ..traffic import Traffic

# Of n texts, [n, ...] in each tensor.
MixerState = Tensor | tuple[Tensor, ...]

S = TypeVar("S", bound=MixerState)


class Mixer(nn.Module, Generic[S]):
    """One layer's token mixing, of an input x [T, dim] that is not normed yet.

    Both `forward` and `step` return x + mixing(RMSNorm(x) * norm), in x's memory if they like where
    no gradient is asked for. All tensors that a layer is made with are parameters: it is built on
    the meta device, and buffers would stay there.
    """

    def forward(
        self, x: Tensor, norm: Tensor, sequences: Sequences, state: S | None, keep: bool
    ) -> tuple[Tensor, S | None]:
        """Mixes packed tokens, with gradients where they are asked for.

        Args:
            x: [T, dim].
            norm: [dim], the weight of the norm before this layer.
            sequences: how the T tokens are packed, and which text of `state` each one continues.
            state: after earlier tokens; None: every sequence begins its text. Not changed.
            keep: whether the state after the sequences is asked for.

        Returns:
            [T, dim], and the state after each of the n sequences, in new memory, or None.
        """
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> None:
        """Draws weights that are neither matrices nor norms' nor biases, for models with random
        weights: such that they cost what trained ones do."""

    def memory(self, size: int, device: torch.device, dtype: torch.dtype) -> Any:
        """What decoding `size` texts changes in place: tensors [size, ...], in whatever tuples and
        lists; dtype is x's."""
        raise NotImplementedError

    def begin(self, memory: Any, rows: Tensor, state: S | None, lengths: Sequence[int]) -> None:
        """Sets rows of the memory to n texts' states, in place of what earlier texts left there.

        A memory that is shaped like a state, with zeros before the first token, needs no more than
        this.

        Args:
            rows: int64 [n], on the device.
            state: of the n texts. None: before the first token.
            lengths: of each, the tokens that the state is after.
        """
        parts = (memory,) if isinstance(memory, Tensor) else memory
        contents = (state,) if isinstance(state, Tensor) else state or (None,) * len(parts)
        for part, content in zip(parts, contents, strict=True):
            set_rows(part, rows, content)

    def step(self, x: Tensor, norm: Tensor, step: Step, memory: Any) -> Tensor:
        """`forward` of one token of each of B texts, [B, dim] to [B, dim], in a CUDA graph if need
        be; `memory` has B rows."""
        raise NotImplementedError


def set_rows(memory: Tensor, rows: Tensor, content: Tensor | None) -> None:
    """Sets rows of a memory to those of `content` [n, ...]; None: to zero."""
    if content is None:
        memory.index_fill_(0, rows, 0)
    else:
        memory.index_copy_(0, rows, content)


@dataclass(frozen=True)
class Settings:
    """What a configuration file states of a kind of self-decoder, beside the model's width.

    A kind's fields have the names under which files state them, beside those of `YocoConfig`, and
    hold numbers, strings, booleans or None. ValueError in `__post_init__` or `check` refuses them.
    """

    kind: ClassVar[str]
    # Stages of a state's size that exist at a time while a sequence passes a layer: with Triton
    # kernels, and without.
    stages: ClassVar[tuple[int, int]] = (4, 10)
    # How often decoding a token moves a state: it is read; where it changes as a whole, written.
    moves: ClassVar[int] = 2
    # Whether `forward` heeds `Sequences.relay`. Otherwise each process of a group feeds all tokens.
    relays: ClassVar[bool] = False

    def check(self, dim: int) -> None:
        """Raises ValueError where they do not go with a model of this width."""

    def build(self, dim: int, eps: float) -> Mixer:
        """A layer's mixer; `eps` is of the norms."""
        raise NotImplementedError

    def state_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Of one layer's state of one text; `dtype` is that of x."""
        raise NotImplementedError

    def activations(self, dim: int, dtype: torch.dtype, fast: bool) -> int:
        """Numbers of `dtype` for each token at the widest point, beside the layer's input.

        These are all tensors of T rows that are alive there, copies widened to float32 among them,
        which count twice in bfloat16. What grows with the number of sequences is in `stages`.

        Args:
            fast: whether Triton kernels run, which keep less.
        """
        raise NotImplementedError

    def shared(self, dim: int) -> int:
        """Numbers for each token that all layers share, such as rotary angles."""
        return 0

    def workspace_bytes(self, dim: int, fast: bool) -> int:
        """What a layer takes while tokens pass it, however many they are."""
        return 0

    def relayed(self, dim: int, dtype: torch.dtype, parts: int) -> Traffic:
        """What goes from process to process in a layer while `parts` of them feed one text, where
        `forward` heeds `Sequences.relay`."""
        return Traffic()

    def operations(self, dim: int) -> int:
        """Floating-point operations of a layer's matrix products for each token."""
        return _operations(self, dim)


@cache
def _operations(settings: Settings, dim: int) -> int:
    """Of all linear maps of a layer's mixer."""
    with torch.device("meta"):
        mixer = settings.build(dim, eps=1e-5)
    return sum(2 * part.weight.numel() for part in mixer.modules() if isinstance(part, nn.Linear))
