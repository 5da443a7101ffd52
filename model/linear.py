"""Linear maps of one input whose weights lie one behind the other, for a single matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ALIGNMENT = 8  # rows are padded to a multiple, so that every row of the output starts aligned


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias; nothing in the model has one."""
    return nn.Linear(inputs, outputs, bias=False)


class Stack:
    """The weights of several linear maps of one input as one matrix.

    The maps keep their weights as parameters under their own names: after `allocate` these are
    views of the one matrix, before it the matrix is put together whenever it is asked for.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        self._linears = linears
        self._whole: Tensor | None = None
        rows = sum(part.out_features for part in linears)
        self._sizes = [part.out_features for part in linears] + [-rows % _ALIGNMENT]

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Gives the maps new weights, not yet set, within one matrix."""
        columns = self._linears[0].in_features
        self._whole = torch.empty(sum(self._sizes), columns, device=device, dtype=dtype)
        self._whole[sum(self._sizes[:-1]) :].zero_()
        for part, weight in zip(self._linears, self._whole.split(self._sizes), strict=False):
            part.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """[outputs of all maps, padded to a multiple of 8; inputs]"""
        first = self._linears[0].weight
        # A copied or moved model has weights of its own again; gradients belong to the maps.
        whole = self._whole
        if whole is not None and whole.data_ptr() == first.data_ptr() and not first.requires_grad:
            return whole
        weights = [part.weight for part in self._linears]
        if self._sizes[-1]:
            weights.append(first.new_zeros(self._sizes[-1], first.shape[1]))
        return torch.cat(weights)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The output [T, rows] of the matrix product, cut into the maps' own: views."""
        return y.split(self._sizes, dim=-1)[: len(self._linears)]


def allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a model that was built on the meta device weights, not yet set and stacked."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Stack):
                value.allocate(device, dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, device=device, dtype=dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
