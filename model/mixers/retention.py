"""Retention: the state of each head decays by a factor of its own, the same for all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ..linear import Stack
from .gated_retention import GatedRetention, RetentionHeads


@dataclass(frozen=True)
class RetentionSettings(RetentionHeads):
    """gamma = 1 - 2^(-5 - h) in head h. RetNet, arXiv:2307.08621, equation 8."""

    kind: ClassVar[str] = "retention"

    def build(self, dim: int, eps: float) -> Retention:
        return Retention(self, dim, eps)


class Retention(GatedRetention):
    """Gated retention whose gates are constants in place of a projection."""

    def __init__(self, settings: RetentionSettings, dim: int, eps: float) -> None:
        super().__init__(settings, dim, eps)
        del self.gt_proj
        self.stack = Stack(self, "q_proj", "k_proj", "v_proj", "g_proj")

    def _cut(self, y: Tensor, first: int = 0) -> tuple[list[Tensor], Tensor]:
        parts = [self._heads(part) for part in self.stack.split(y, first)]
        gates = _gates(self.heads, self.temperature, y.dtype == torch.float64, y.device)
        return parts, gates.expand(len(y), -1)


@cache
def _gates(heads: int, temperature: float, exact: bool, device: torch.device) -> Tensor:
    """[heads], the gates' logits that make these decays; in float64 or float32, since bfloat16's
    decays would all be 1. Kept, so that a CUDA graph may hold what uses it."""
    h = torch.arange(heads, dtype=torch.float64)
    logits = ((1 - torch.exp2(-5 - h)) ** temperature).logit()
    return logits.to(device, torch.float64 if exact else torch.float32)
