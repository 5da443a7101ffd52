"""The two speeds of a device on which the time of a run rests: of products, and of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from yoco_eval.model import Costs

from .memory import out_of_memory

_SECONDS = 0.3  # for which each of them is measured
_COPY = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes copied at a time
_TOKENS = 2048  # multiplied at a time


@dataclass(frozen=True)
class Speeds:
    """Of a device.

    Attributes:
        products: floating-point operations per second, of matrix products.
        memory: bytes per second that are read, or written.
    """

    products: float
    memory: float


def measured(
    costs: Costs, dtype: torch.dtype, device: torch.device, tokens: int = _TOKENS
) -> Speeds | None:
    """Of a device that is there, as it is now: by a matrix product like a model's, of up to
    `tokens` tokens, and a copy. None: its memory is too short for these."""
    try:
        products = _product_rate(costs, dtype, device, min(tokens, _TOKENS))
        return Speeds(products, _copy_rate(device))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None


def _product_rate(costs: Costs, dtype: torch.dtype, device: torch.device, tokens: int) -> float:
    """Operations per second of a linear map that much of the work is like."""
    inputs, outputs = costs.typical_product
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    seconds = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * tokens * weight.numel() / seconds


def _copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written."""
    source = torch.zeros(_COPY.get(device.type, _COPY["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Mean time of a run, over many."""

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    timed(3)
    return timed(max(1, round(_SECONDS / timed(3))))
