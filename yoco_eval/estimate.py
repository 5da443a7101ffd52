"""What a run will take, before it is started: memory by parts, and bounds on its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from yoco_eval.model import YocoConfig
from yoco_eval.model.footprint import (
    Footprint,
    cache_bytes,
    decode_bytes,
    footprint,
    prefill_operations,
)

from .lengths import format_length
from .memory import chunk_sizes, free_bytes

GIB = 2**30
_SECONDS = 0.3  # for which each of the device's two speeds is measured
_COPY = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes copied at a time


@dataclass(frozen=True)
class Estimate:
    """Of evaluating texts of `length` tokens, one at a time.

    Attributes:
        chunk: tokens fed at a time: the largest useful number that fits, else the smallest.
        memory: at the peak, in bytes.
        free: bytes that the device has free.
        fitting: the longest text, in tokens, that fits into them; 0 if none does.
        prefill_seconds: what the matrix products of the prefill take alone.
        decode_tokens_per_second: at which the weights and the cache can be read after `length`.
    """

    length: int
    chunk: int
    memory: Footprint
    free: int
    fitting: int
    prefill_seconds: float
    decode_tokens_per_second: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.free


def estimate(
    config: YocoConfig, dtype: torch.dtype, device: torch.device, length: int,
    chunk: int | None = None,
) -> Estimate:
    """Nothing is run but a matrix product and a copy, whose speeds on the device are measured."""
    free = free_bytes(device)
    for size in (chunk,) if chunk else chunk_sizes(device):
        memory = footprint(config, dtype, length, size)
        if memory.total <= free:
            break
    besides = memory.total - memory.cache
    return Estimate(
        length=length,
        chunk=size,
        memory=memory,
        free=free,
        fitting=max(0, free - besides) // cache_bytes(config, dtype, 1),
        prefill_seconds=prefill_operations(config, length)
        / _product_rate(config, dtype, device, min(size, length)),
        decode_tokens_per_second=_copy_rate(device) / decode_bytes(config, dtype, length),
    )


def print_estimate(result: Estimate, name: str, device: torch.device, console: Console) -> None:
    """A table of the memory, and what follows from it."""
    console.print(f"{name}, {format_length(result.length)} tokens on {device}\n")
    table = Table(box=None, padding=(0, 4, 0, 0))
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    for part in ("weights", "cache", "states", "activations", "total"):
        table.add_row(part, f"{getattr(result.memory, part) / GIB:.2f}")
    table.add_row("free", f"{result.free / GIB:.2f}")
    console.print(table)
    console.print()
    if result.fits:
        console.print(f"It fits, fed {result.chunk} tokens at a time.")
    elif result.fitting:
        console.print(
            f"It does not fit; texts of up to {result.fitting} tokens do. Take a device with more "
            "memory, or shorter texts."
        )
    else:
        console.print("It does not fit, whatever the length. Take a device with more memory.")
    console.print(
        f"Prefill takes {result.prefill_seconds:.3g} s at least, what its matrix products take;\n"
        f"decoding yields {result.decode_tokens_per_second:.3g} tokens/s at most, what memory "
        "bandwidth allows."
    )


def _product_rate(
    config: YocoConfig, dtype: torch.dtype, device: torch.device, tokens: int
) -> float:
    """Operations per second of a feed-forward layer's first product."""
    x = torch.randn(tokens, config.dim, dtype=dtype, device=device)
    weight = torch.randn(2 * config.hidden_dim, config.dim, dtype=dtype, device=device)
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
