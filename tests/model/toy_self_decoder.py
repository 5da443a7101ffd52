"""A moving average as a kind of self-decoder: a toy, which has all that the contract asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from yoco_eval.kernels.matvec import linear_add, norm_linear
from yoco_eval.kernels.sequences import Sequences, Step
from yoco_eval.model.checks import check_count
from yoco_eval.model.linear import linear
from yoco_eval.model.mixers.contract import Mixer, Settings


@dataclass(frozen=True)
class MovingAverageSettings(Settings):
    """The mean of the values of `average_window` tokens, its own one included; zeros before."""

    kind: ClassVar[str] = "moving_average"

    average_window: int

    def __post_init__(self) -> None:
        check_count("average_window", self.average_window, 2**16)

    def build(self, dim: int, eps: float) -> MovingAverage:
        return MovingAverage(self.average_window, dim, eps)

    def state_bytes(self, dim: int, dtype: torch.dtype) -> int:
        return (self.average_window - 1) * dim * dtype.itemsize

    def activations(self, dim: int, dtype: torch.dtype, fast: bool) -> int:
        # Values, the same behind those before them, means of each text's, of all; or, in the norm,
        # the input and the output widened and what is made of them.
        return (4 if fast else 5) * dim


class MovingAverage(Mixer[Tensor]):
    """Its state [n, window - 1, dim] is the last values of each text, zeros where it is shorter."""

    def __init__(self, window: int, dim: int, eps: float) -> None:
        super().__init__()
        self.window, self.eps = window, eps
        self.v_proj = linear(dim, dim)
        self.out_proj = linear(dim, dim)

    def forward(
        self, x: Tensor, norm: Tensor, sequences: Sequences, state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        values = norm_linear(x, norm, self.v_proj.weight, self.eps)
        count = len(sequences.lengths)
        if state is None:
            state = values.new_zeros(count, self.window - 1, values.shape[1])
        means, after = [], []
        sources = range(count) if sequences.sources is None else sequences.sources
        for own, source in zip(values.split(sequences.lengths), sources, strict=True):
            longer = torch.cat((state[source], own))
            means.append(longer.unfold(0, self.window, 1).mean(-1))
            if keep:
                after.append(longer[len(own) :])
        x = linear_add(torch.cat(means), self.out_proj.weight, x)
        return x, torch.stack(after) if keep else None

    def memory(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        width = self.v_proj.out_features
        return torch.zeros(size, self.window - 1, width, device=device, dtype=dtype)

    def step(self, x: Tensor, norm: Tensor, step: Step, memory: Tensor) -> Tensor:
        value = norm_linear(x, norm, self.v_proj.weight, self.eps)
        longer = torch.cat((memory, value[:, None]), 1)
        memory.copy_(longer[:, 1:])
        return linear_add(longer.mean(1), self.out_proj.weight, x)
