"""What a run will take, before it is started: memory by parts, and time as the device allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from yoco_eval.model import Costs

from .lengths import format_length
from .memory import Fit, fit, out_of_memory
from .printable import message

GIB = 2**30
_SECONDS = 0.3  # for which each of the device's two speeds is measured
_COPY = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes copied at a time
_TOKENS = 2048  # multiplied at a time


@dataclass(frozen=True)
class Estimate:
    """Of evaluating texts of some length, one at a time.

    Attributes:
        fit: the memory that it takes, and whether the device has it.
        prefill_seconds: what the matrix products of the prefill take alone; None where memory was
            too short to measure the device.
        decode_tokens_per_second: at which the weights and the cache can be read after the text;
            None likewise.
    """

    fit: Fit
    prefill_seconds: float | None
    decode_tokens_per_second: float | None


def estimate(
    costs: Costs,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    chunk: int | None = None,
) -> Estimate:
    """Nothing is run but a matrix product and a copy, whose speeds on the device are measured."""
    fitted = fit(costs, dtype, device, length, chunk)
    prefill = decode = None
    try:
        rate = _product_rate(costs, dtype, device, min(fitted.chunk, _TOKENS))
        prefill = costs.prefill_operations(length) / rate
        decode = _copy_rate(device) / costs.decode_bytes(dtype, length)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    return Estimate(fitted, prefill, decode)


def print_estimate(
    result: Estimate,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    console: Console,
    positions: int | None = None,
) -> None:
    """A table of the memory, and what follows from it.

    `positions` is the longest text that the model is meant for, in tokens; None: it does not say.
    """
    fitted = result.fit
    kind = str(dtype).removeprefix("torch.")
    heading = f"{message(name)}, {format_length(fitted.length)} tokens on {device} in {kind}\n"
    console.print(Text(heading))
    table = Table(box=None, padding=(0, 4, 0, 0))
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    for part in ("weights", "cache", "states", "activations", "total"):
        table.add_row(part, f"{getattr(fitted.memory, part) / GIB:.2f}")
    table.add_row("free", f"{fitted.free / GIB:.2f}")
    console.print(table)
    console.print()
    if fitted.fits:
        console.print(f"It fits, fed {fitted.chunk} tokens at a time.")
    else:
        up_to = f"texts of up to {fitted.longest} tokens" if fitted.longest else "no text"
        console.print(
            f"It does not fit. Fed {fitted.chunk} tokens at a time, {up_to} would. Shorter texts, "
            "a smaller chunk or dtype, or a device with more memory may help."
        )
    if positions is not None and positions < fitted.length:
        console.print(
            f"The model states {positions} positions: longer texts are evaluated only with "
            f"--model_args max_length={fitted.length}."
        )
    if result.prefill_seconds is not None and result.decode_tokens_per_second is not None:
        console.print(
            f"Its matrix products alone take about {_duration(result.prefill_seconds)} of prefill, "
            "and memory\nbandwidth allows about "
            f"{_three_digits(result.decode_tokens_per_second)} decoded tokens/s, as the device is "
            "now."
        )


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


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
