"""Fits a run to the free memory of its device, or refuses it before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from yoco_eval.model import YocoConfig
from yoco_eval.model.footprint import (
    Footprint,
    cache_bytes,
    footprint,
    state_bytes,
    weight_bytes,
)

from .lengths import format_length

# Tokens fed at a time. On a GPU the matrix products of more are hardly faster, and fewer leave more
# memory to the cache. 12672 is 96 for each of an H100's 132 multiprocessors, so that the products'
# tiles fill whole rounds of them.
_CHUNKS = {"cuda": (12672, 8448, 4224, 2112, 1056, 528, 264)}
_CPU_CHUNKS = (1024, 512, 256)
_LOGITS = 4096  # for each token of a chunk, so many logits may exist at a time
_MARGIN = 0.95  # of the free memory; allocators lose some between blocks


@dataclass(frozen=True)
class Budget:
    """Tokens fed at a time, logits at a time, and states of packed texts held at a time."""

    chunk: int
    logits: int
    states: int


def budget(
    config: YocoConfig, dtype: torch.dtype, device: torch.device, length: int,
    chunk: int | None = None,
) -> Budget:
    """What a loaded model can afford with a cache for texts of `length` tokens.

    Args:
        chunk: tokens to feed at a time; None: as many as pay and fit.

    Raises:
        ValueError: even the smallest chunk does not fit; the message has the figures.
    """
    free = int(free_bytes(device) * _MARGIN)
    chunks = (chunk,) if chunk else chunk_sizes(device)
    for size in chunks:
        # A packed batch of a chunk's size may lie behind what its texts share.
        need = footprint(config, dtype, length + size, size, size * _LOGITS)
        left = free - (need.total - need.weights)
        if left >= 0:
            states = 1 + left // (2 * state_bytes(config, dtype))
            return Budget(size, size * _LOGITS, states)
    raise ValueError(refusal(config, dtype, device, length, need, free))


def check_weights(config: YocoConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Says so if a model's weights do not fit, before they are loaded.

    Raises:
        ValueError: with the figures.
    """
    need, free = weight_bytes(config, dtype), free_bytes(device)
    if need > free:
        raise ValueError(
            f"the weights take {_gib(need)} in {str(dtype).removeprefix('torch.')}, and "
            f"{_gib(free)} are free on {device}; take a smaller dtype, or a device with more memory"
        )


def chunk_sizes(device: torch.device) -> tuple[int, ...]:
    """Of the chunks that a prompt may be fed in, the fastest first."""
    return _CHUNKS.get(device.type, _CPU_CHUNKS)


def free_bytes(device: torch.device) -> int:
    """Memory that PyTorch can still allocate on the device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def refusal(
    config: YocoConfig, dtype: torch.dtype, device: torch.device, length: int, need: Footprint,
    free: int,
) -> str:
    """Says what a run with contexts of `length` tokens lacks, and what would make it fit."""
    besides = need.states + need.activations
    per_token = cache_bytes(config, dtype, 1)
    fitting = max(0, free - besides) // per_token
    mend = (
        f"contexts of up to {format_length(fitting)} tokens fit (max_length={fitting})"
        if fitting
        else "no context fits"
    )
    return (
        f"contexts of {format_length(length)} tokens need {_gib(need.cache + besides)} beside the "
        f"weights on {device} ({_gib(need.cache)} for the cache, {_gib(besides)} for states and "
        f"activations), and {_gib(free)} are free; {mend}, or take a device with more memory"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
