"""Linear maps and the embedding, and maps of one input stacked for a single matrix product.

On the meta device modules leave their weights alone: there is nothing to set, and PyTorch would
load its compiler to find that out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_ALIGNMENT = 8  # rows are padded to a multiple, so that every row of the output starts aligned


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
    """A linear map. A bias is added by whoever multiplies with the weight."""
    return Linear(inputs, outputs, bias)


class Stack(nn.Module):
    """The weights of several linear maps of one input as one matrix.

    The maps keep their weights as parameters under their own names. Without gradients these are
    views of the one matrix, which nothing else holds: wherever they were moved, converted, copied
    or replaced, they are brought together again when the matrix is next asked for.

    Args:
        owner: the module that has the maps.
        names: of the maps in it.
    """

    def __init__(self, owner: nn.Module, *names: str, alignment: int = _ALIGNMENT) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, hence not a submodule
        self._names = names
        sizes = [part.out_features for part in self._linears]
        self._sizes = [*sizes, -sum(sizes) % alignment]
        self._shape = (sum(self._sizes), self._linears[0].in_features)

    @property
    def _linears(self) -> list[nn.Linear]:
        return [getattr(self._owner[0], name) for name in self._names]

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Gives the maps new weights, not yet set, within one matrix."""
        whole = torch.empty(self._shape, device=device, dtype=dtype)
        *views, padding = whole.split(self._sizes)
        padding.zero_()
        for part, view in zip(self._linears, views, strict=True):
            part.weight = nn.Parameter(view, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """[outputs of all maps, padded to a multiple of the alignment; inputs]"""
        weights = [part.weight for part in self._linears]
        if any(weight.requires_grad for weight in weights):
            return self._joined(weights)  # through which gradients reach the maps
        if not self._stacked(weights):
            weights = self._restacked(weights)
        return weights[0].as_strided(self._shape, (self._shape[1], 1))

    def _restacked(self, weights: list[Tensor]) -> list[Tensor]:
        """Moves the maps' weights into one matrix."""
        with torch.inference_mode(False):  # they outlive it
            views = self._joined(weights).split(self._sizes)
            for part, view in zip(self._linears, views, strict=False):
                if part.weight.is_inference():  # which cannot be given other data
                    part.weight = nn.Parameter(view, requires_grad=False)
                else:
                    part.weight.data = view
        return [part.weight for part in self._linears]

    def _joined(self, weights: list[Tensor]) -> Tensor:
        padding = weights[0].new_zeros(self._sizes[-1], self._shape[1])
        return torch.cat((*weights, padding))

    def _stacked(self, weights: list[Tensor]) -> bool:
        """Whether the weights lie one behind the other in memory of the matrix's size.

        What has an address within that memory is a view of it.
        """
        memory = weights[0].untyped_storage()
        address = memory.data_ptr()
        for weight in weights:
            if weight.data_ptr() != address:
                return False
            address += weight.nbytes
        return memory.nbytes() == self._shape[0] * self._shape[1] * weights[0].itemsize

    def split(self, y: Tensor, first: int = 0) -> tuple[Tensor, ...]:
        """The output [T, rows] of the matrix product, cut into the maps' own: views.

        Args:
            first: the map with which y begins, where it is the product with part of the matrix.
        """
        return y.split(self._sizes[first:], dim=-1)[: len(self._linears) - first]


def allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a model that was built on the meta device weights, not yet set and stacked."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.allocate(device, dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, device=device, dtype=dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies to a model, whose weights take no gradients, others that have its parameters' names,
    of any dtype and on any device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
