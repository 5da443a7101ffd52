"""What a run will take, before it is started: memory by parts, and time as the device allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from yoco_eval.model import Costs

from .lengths import format_length
from .memory import Fit, fit, free_bytes
from .printable import message
from .sizes import GIB
from .speeds import Speeds, measured

PARTS = ("weights", "cache", "states", "activations", "total")
# What the driver and CUDA keep of a card's memory: of an H100 with 80 GiB, 78.6 are free.
_KEPT = 3 * GIB // 2


@dataclass(frozen=True)
class Card:
    """A device, or a card that is not there.

    Attributes:
        name: what people call it, or its memory.
        device: itself, or one of its kind.
        free: bytes that a process may allocate there.
        speeds: None: they are not known.
        there: whether it is one that is there.
    """

    name: str
    device: torch.device
    free: int
    speeds: Speeds | None
    there: bool

    @property
    def place(self) -> str:
        return self.name if self.there else f"a card of {self.name}"

    @property
    def at(self) -> str:
        """At which speeds it is as fast as a plan says."""
        if self.there or self.speeds is None:
            return "as the device is now"
        products, memory = self.speeds.products / 1e12, self.speeds.memory / 1e9
        return f"at {three_digits(products)} TFLOP/s and {three_digits(memory)} GB/s"


def present_card(costs: Costs, dtype: torch.dtype, device: torch.device, tokens: int) -> Card:
    """A device as it is now; its speeds are measured, multiplying up to `tokens` tokens."""
    free = free_bytes(device)
    return Card(str(device), device, free, measured(costs, dtype, device, tokens), True)


def absent_card(memory: int, speeds: Speeds | None) -> Card:
    """A GPU with so many bytes, of which nobody else takes any."""
    return Card(
        f"{memory / GIB:g} GiB", torch.device("cuda"), max(0, memory - _KEPT), speeds, False
    )


@dataclass(frozen=True)
class Estimate:
    """Of evaluating texts of some length, one at a time.

    Attributes:
        fit: the memory that it takes, and whether the device has it.
        prefill_operations: of the matrix products of the prefill.
        decode_bytes: that decoding a token after the text moves at least.
        card: where.
    """

    fit: Fit
    prefill_operations: int
    decode_bytes: int
    card: Card

    @property
    def prefill_seconds(self) -> float | None:
        """What the products take alone; None where the card's speeds are not known."""
        speeds = self.card.speeds
        return None if speeds is None else self.prefill_operations / speeds.products

    @property
    def decode_tokens_per_second(self) -> float | None:
        """At which these bytes can be moved; None likewise."""
        speeds = self.card.speeds
        return None if speeds is None else speeds.memory / self.decode_bytes


def estimate(
    costs: Costs, dtype: torch.dtype, card: Card, length: int, chunk: int | None = None
) -> Estimate:
    """Nothing is run."""
    fitted = fit(costs, dtype, card.device, length, chunk, free=card.free)
    operations, moved = costs.prefill_operations(length), costs.decode_bytes(dtype, length)
    return Estimate(fitted, operations, moved, card)


def print_estimate(
    result: Estimate,
    name: str,
    dtype: torch.dtype,
    console: Console,
    positions: int | None = None,
) -> None:
    """A table of the memory, and what follows from it.

    `positions` is the longest text that the model is meant for, in tokens; None: it does not say.
    """
    fitted = result.fit
    print_heading(name, fitted.length, result.card.place, dtype, console)
    table = Table(box=None, padding=(0, 4, 0, 0))
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    for part in PARTS:
        table.add_row(part, f"{getattr(fitted.memory, part) / GIB:.2f}")
    table.add_row("available", f"{fitted.free / GIB:.2f}")
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
    print_positions(positions, fitted.length, console)
    seconds, rate = result.prefill_seconds, result.decode_tokens_per_second
    if seconds is None or rate is None:
        console.print(
            f"Its matrix products are {three_digits(result.prefill_operations / 1e15)} PFLOP of "
            f"prefill, and a decoded token moves {three_digits(result.decode_bytes / 1e9)} GB."
        )
    else:
        console.print(
            f"Its matrix products alone take about {duration(seconds)} of prefill, and memory\n"
            f"bandwidth allows about {three_digits(rate)} decoded tokens/s, {result.card.at}."
        )


def print_heading(name: str, length: int, place: str, dtype: torch.dtype, console: Console) -> None:
    kind = str(dtype).removeprefix("torch.")
    heading = f"{message(name)}, {format_length(length)} tokens on {place} in {kind}\n"
    console.print(Text(heading))


def print_positions(positions: int | None, length: int, console: Console) -> None:
    """Says so if texts are longer than the model is meant for."""
    if positions is not None and positions < length:
        console.print(
            f"The model states {positions} positions: longer texts are evaluated only with "
            f"--model_args max_length={length}."
        )


def duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds)} s"


def three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
