"""The contract of models: all that the engine, the memory plan and the backend ask of one.

The engine plans, counts and packs; a model computes. What stands between them knows of no layer:

- a `State` is what a model remembers of texts beside the keys and values in its `Cache`. It is
  never changed in place, so that holding it is a snapshot;
- `Rows` are what `feed` hands over for each token, to be given to `predict` for the tokens whose
  prediction is asked for, in any order and company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from yoco_eval.kernels.group import Group
from yoco_eval.kernels.sequences import Sequences, Spans

from .decoder import Decoder
from .states import Cache, S
from .traffic import Traffic

# One number of rows or more [T, ...] in each tensor; what they are is the model's business.
Rows = Tensor | tuple[Tensor, ...]


def take(rows: Rows, index: slice | Tensor) -> Rows:
    """The rows of some tokens."""
    return rows[index] if isinstance(rows, Tensor) else tuple(part[index] for part in rows)


def split(rows: Rows, sizes: Sequence[int]) -> list[Rows]:
    """Rows cut into stretches of `sizes` tokens."""
    if isinstance(rows, Tensor):
        return list(rows.split(list(sizes)))
    return list(zip(*(part.split(list(sizes)) for part in rows), strict=True))


def concatenate(stretches: Sequence[Rows]) -> Rows:
    """Stretches of rows behind each other."""
    if isinstance(stretches[0], Tensor):
        return torch.cat(cast("list[Tensor]", stretches))
    return tuple(torch.cat(parts) for parts in zip(*stretches, strict=True))


C = TypeVar("C", bound=Cache)
R = TypeVar("R", bound=Rows)


class Costs(Protocol):
    """What models of one configuration take: bytes and operations, known without the weights."""

    @property
    def typical_product(self) -> tuple[int, int]:
        """Inputs and outputs of a linear map that much of the work is like."""

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Of all parameters."""

    def cache_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Of the cache of `length` tokens."""

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Of the state of one text: what a snapshot takes."""

    def passing_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """What each sequence of a packed batch takes, beside its tokens, while it is fed."""

    def activation_bytes(
        self, dtype: torch.dtype, length: int, chunk: int, logits: int, device: torch.device
    ) -> int:
        """Of intermediate results: the most while `chunk` tokens are fed to a cache of `length`,
        predicted, or turned into so many logits at a time."""

    def prefill_operations(self, length: int) -> int:
        """Floating-point operations of the matrix products that feed `length` tokens."""

    def decode_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Bytes that decoding one token after `length` tokens moves at least."""


class PartCosts(Costs, Protocol):
    """`Costs` as one of several processes has them that hold texts together."""

    def part_operations(self, length: int) -> int:
        """Its part of `prefill_operations`."""

    def feeding(self, dtype: torch.dtype, chunk: int) -> Traffic:
        """What they tell each other while a text's next `chunk` tokens are fed."""

    def stepping(self, dtype: torch.dtype) -> Traffic:
        """What they tell each other while one token is decoded, the likeliest one."""


class Config(Protocol):
    """What a model's configuration says to everybody."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int | None:
        """The context length that the model was trained for, in tokens; None: it does not say."""

    def to_dict(self) -> dict[str, Any]:
        """Its settings by name, plain values all of them."""


class Model(Protocol[S, C, R]):
    """A language model whose tokens can be fed without asking for predictions.

    It takes the states, caches and rows of its own making, and no others.
    """

    @property
    def config(self) -> Config: ...

    @property
    def costs(self) -> Costs: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def group(self) -> Group | None:
        """The processes that hold texts together with this one, which feed and predict the same in
        lockstep, each of them a part of it. None: this one is alone."""

    @property
    def block(self) -> int:
        """So many slots of the cache, from a multiple of it on, are read or not read together.

        A text's tokens lie in blocks of their own, from the first one on, where that is above 1;
        and spans say their `start`, all of them. What is read is then a matter of the text alone.
        """

    def new_cache(self, capacity: int) -> C:
        """An empty cache for up to `capacity` tokens, in the state before a text's first token."""

    def feed(
        self, input_ids: Tensor, sequences: Sequences, state: S, cache: C, keep: bool = True
    ) -> tuple[R, S | None]:
        """Feeds packed tokens [T], and adds their keys and values to the cache in the same order.

        Args:
            sequences: how they are packed, and which of the texts of `state` each one continues.
            keep: whether the state after the sequences is asked for.

        Raises:
            ValueError: the cache has no room for them.
        """

    def prefill(self, input_ids: Tensor, cache: C, asked: bool = True) -> R:
        """Feeds tokens [T] that follow those of the cache's text, whose state it keeps.

        Args:
            asked: whether the rows are asked for; otherwise any may be returned.
        """

    def predict(self, rows: R, positions: Tensor, cache: C, spans: Spans) -> Tensor:
        """The output [T, ...] of T cached tokens, which `logits` turns into predictions.

        Args:
            rows: of these tokens. Their memory may be used for something else.
            positions: int64 [T], of the tokens in their texts.
            cache: what they read, and
            spans: which part of it.
        """

    def logits(self, output: Tensor) -> Tensor:
        """Logits [T, vocab_size] of what `predict` returned, or some rows of it."""

    def decoder(self, cache: C, size: int = 1, room: int | None = None) -> Decoder[S]:
        """Decodes up to `size` texts side by side, whose keys and values are in the cache, each up
        to `room` tokens; None: as many as the cache has room for."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights, each once."""

    def state_dict(self) -> dict[str, Any]:
        """All weights by name."""


@dataclass(frozen=True)
class Blueprint:
    """A model that can be made: of a checkpoint, or of a shape with random weights.

    Attributes:
        config, costs: what is known of it beforehand.
        make: makes it on a device in a dtype; raises what reading its weights does.
    """

    config: Config
    costs: Costs
    make: Callable[[torch.device, torch.dtype], Model]


def default_dtype(device: torch.device) -> torch.dtype:
    """What models are evaluated in on a device: bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def count(model: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
