"""Rotary position embedding as a layer's setting, and its angles, made once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_eval.kernels.rotary import Angles, rotary_angles
from yoco_eval.kernels.sequences import Sequences, Step


@dataclass(frozen=True)
class Rotary:
    """Of heads of `head_dim` channels; the arguments of `rotary_angles`."""

    head_dim: int
    theta: float
    endpoint: bool = True
    turned: int | None = None

    def at(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """cos and sin [T, head_dim / 2] at positions [T]."""
        return rotary_angles(
            positions, self.head_dim, self.theta, dtype, self.endpoint, self.turned
        )

    def of(self, tokens: Sequences | Step, dtype: torch.dtype) -> Angles:
        """The same at the tokens' positions, for all layers of a pass that have these settings."""
        return tokens.table((self, dtype), lambda: self.at(tokens.positions, dtype))


def neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of heads, channel j of which is turned with channel j + head_dim / 2, in the order in
    which neighbours are turned.

    Where queries, keys and the weights of their norms are all put in that order, no product of a
    query with a key changes.
    """
    if not weight.dim() or len(weight) % head_dim:
        return weight  # which will be refused for its shape
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(weight.shape)
