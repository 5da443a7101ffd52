"""What all decoder layers are made of: the norm, the feed-forward part, the residual frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from yoco_eval.kernels.matvec import linear_add, norm_swiglu_linear

from .linear import Stack, linear


class RMSNorm(nn.Module):
    """Holds the weight; whoever reads the normed input applies the norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class FeedForward(nn.Module):
    """fc2( silu(fc1 z) * gate(z) )"""

    def __init__(self, dim: int, hidden_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.fc1 = linear(dim, hidden_dim)
        self.gate = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim)
        # Two equal halves, as SwiGLU cuts them: no padding behind the second.
        self.stack = Stack(self, "fc1", "gate", alignment=1)

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        hidden = norm_swiglu_linear(x, norm, self.stack.weight, self.eps)
        return linear_add(hidden, self.fc2.weight, x)


M = TypeVar("M", bound=nn.Module)


class DecoderLayer(nn.Module, Generic[M]):
    """x + mixer(norm(x)), then x + ffn(norm(x)); both parts take x itself and the norm's weight."""

    def __init__(self, dim: int, hidden_dim: int, eps: float, mixer: M) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm = RMSNorm(dim)
        self.ffn = FeedForward(dim, hidden_dim, eps)
        self.final_layer_norm = RMSNorm(dim)

    def mix(self, x: Tensor, *args: Any) -> Any:
        """What the mixer returns of x and `args`."""
        return self.mixer(x, self.mixer_layer_norm.weight, *args)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(x, self.final_layer_norm.weight)


class Layers(nn.ModuleList, Generic[M]):
    """Decoder layers with mixers of one class, one behind the other."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[DecoderLayer[M]]: ...
