"""How texts may be laid over several cards: each has its own, or groups hold them together.

For each number of cards that may be a group: what a text takes on each of them, and what goes from
card to card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from yoco_eval.model import Blueprint, Costs
from yoco_eval.model.families import check_together, costs_together
from yoco_eval.model.traffic import Traffic

from .estimate import (
    PARTS,
    Card,
    Estimate,
    duration,
    estimate,
    print_heading,
    print_positions,
    three_digits,
)
from .lengths import LONGEST
from .memory import Fit, fit
from .pages import page_size
from .sizes import GIB


@dataclass(frozen=True)
class Cluster:
    """Machines with as many cards each, all of them alike."""

    nodes: int
    gpus: int
    card: Card

    @property
    def size(self) -> int:
        return self.nodes * self.gpus

    @property
    def place(self) -> str:
        cards = f"{self.nodes} x {self.gpus}" if self.nodes > 1 else str(self.gpus)
        return f"{cards} cards {'like' if self.card.there else 'of'} {self.card.name}"

    def groups(self) -> Iterator[int]:
        """How many cards may hold a text together: some of one machine, or those of several."""
        yield from _divisors(self.gpus)
        yield from (self.gpus * nodes for nodes in _divisors(self.nodes)[1:])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass(frozen=True)
class Layout:
    """Groups of cards, each of which holds its texts together.

    Attributes:
        together: cards of a group; 1: each has texts of its own.
        estimate: of one card, with its part of a prefill's operations.
        longest: tokens of the longest text that fits, in whatever chunks.
        chunk_operations: its part of a chunk's; all of them, where that is too short to divide.
        feeding: what it receives while a chunk is fed.
        stepping: what it receives while a token is decoded.
    """

    together: int
    estimate: Estimate
    longest: int
    chunk_operations: int = 0
    feeding: Traffic = Traffic()
    stepping: Traffic = Traffic()


@dataclass(frozen=True)
class Layouts:
    """All layouts of a cluster, by the number of cards that hold a text together.

    Attributes:
        refusal: why there is but the one without groups; None: the model can have them.
    """

    cluster: Cluster
    every: tuple[Layout, ...]
    refusal: str | None = None

    @property
    def best(self) -> Layout | None:
        """That of the smallest groups that hold the text, which answers most texts at a time."""
        return next((layout for layout in self.every if layout.estimate.fit.fits), None)


def lay_out(
    blueprint: Blueprint, dtype: torch.dtype, cluster: Cluster, length: int, chunk: int | None
) -> Layouts:
    """Of evaluating texts of up to `length` tokens, one at a time in each group.

    Args:
        chunk: tokens that a group feeds at a time; None: as many as pay and fit.
    """
    card = cluster.card

    def fitted(costs: Costs, together: int, length: int) -> Fit:
        return fit(costs, dtype, card.device, length, chunk, parts=together, free=card.free)

    def of(together: int) -> Layout:
        costs = costs_together(blueprint.costs, together)
        own, longest = (fitted(costs, together, tokens) for tokens in (length, LONGEST))
        # A chunk of fewer blocks than cards is fed by all of them alike.
        divided = -(-own.chunk // page_size(card.device)) >= together
        operations = costs.part_operations if divided else costs.prefill_operations
        return Layout(
            together,
            Estimate(own, operations(length), costs.decode_bytes(dtype, length), card),
            longest.longest,
            operations(own.chunk),
            costs.feeding(dtype, own.chunk) if divided else Traffic(),
            costs.stepping(dtype),
        )

    alone = estimate(blueprint.costs, dtype, card, length, chunk)
    layout = Layout(1, alone, fitted(blueprint.costs, 1, LONGEST).longest)
    try:
        check_together(blueprint, f"context_parallel={cluster.size}")
    except ValueError as error:
        return Layouts(cluster, (layout,), str(error))
    return Layouts(cluster, (layout, *(of(n) for n in cluster.groups() if n > 1)))


def print_layouts(
    layouts: Layouts,
    name: str,
    dtype: torch.dtype,
    console: Console,
    positions: int | None = None,
) -> None:
    """A table of the memory, what to do, and a table of the time.

    `positions` is the longest text that the model is meant for, in tokens; None: it does not say.
    """
    first = layouts.every[0].estimate.fit
    print_heading(name, first.length, layouts.cluster.place, dtype, console)
    console.print(_memory(layouts))
    console.print(f"\nGiB of each card, which has {first.free / GIB:.2f} free.\n")
    console.print(_advice(layouts))
    if layouts.refusal is not None:
        console.print(layouts.refusal)
    print_positions(positions, first.length, console)
    if layouts.best is not None:
        console.print()
        console.print(_times(layouts))
        console.print(f"\n{_explained(layouts)}")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("context_\nparallel", *columns):
        table.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    return table


def _memory(layouts: Layouts) -> Table:
    table = _table("groups", *PARTS, "longest\ntext")
    for layout in layouts.every:
        fitted, groups = layout.estimate.fit, layouts.cluster.size // layout.together
        parts = (f"{getattr(fitted.memory, part) / GIB:.2f}" for part in PARTS)
        table.add_row(str(layout.together), str(groups), *parts, _rounded_down(layout.longest))
    return table


def _rounded_down(tokens: int) -> str:
    """A length as people write it, of three digits, and no longer than this."""
    tokens = min(tokens, LONGEST)
    unit, size = next((pair for pair in (("M", 2**20), ("K", 2**10)) if tokens >= pair[1]), ("", 1))
    tenths = 10 ** max(0, 3 - len(str(tokens // size)))
    return f"{tokens * tenths // size / tenths:g}{unit}"


def _advice(layouts: Layouts) -> str:
    cluster, best = layouts.cluster, layouts.best
    if best is None:
        return _mends(layouts)
    if best.together == 1:
        text = (
            f"One card holds such a text. Without context_parallel, each of {cluster.size} "
            "processes answers prompts of its own, which is quickest for many."
        )
        if layouts.refusal is None:
            together = cluster.gpus if cluster.gpus > 1 else cluster.nodes
            text += (
                f" For one that takes too long there is --model_args context_parallel={together}."
            )
        return text
    groups, nodes = cluster.size // best.together, best.together // cluster.gpus
    over = f", of {nodes} machines," if nodes > 1 else ""
    there = f"are {groups} groups, which answer different prompts" if groups > 1 else "is one group"
    return (
        f"One card does not hold such a text; {best.together}{over} do. With --model_args "
        f"context_parallel={best.together} there {there}."
    )


def _mends(layouts: Layouts) -> str:
    """Where no layout holds the text."""
    most = max((layout.estimate.fit for layout in layouts.every), key=lambda fit: fit.longest)
    if most.memory.weights > most.free:
        return (
            "It does not fit: every card has all weights, however many there are. A smaller dtype, "
            "or cards with more memory may help."
        )
    up_to = f"texts of up to {most.longest} tokens" if most.longest else "no text"
    there = f"With context_parallel={most.parts}, {up_to}" if most.parts > 1 else up_to.capitalize()
    more = ", more cards" if layouts.refusal is None else ""
    return (
        f"It does not fit. {there} would. Shorter texts, a smaller chunk or dtype{more}, or cards "
        "with more memory may help."
    )


def _times(layouts: Layouts) -> Table:
    """Of the layouts that fit: what a card does, what it receives of others, and when that takes
    longer."""
    known = layouts.cluster.card.speeds is not None
    columns = ["chunk", "prefill"] if known else ["chunk", "prefill\nPFLOP"]
    columns += ["decoding\ntokens/s" if known else "decoding\nGB/token"]
    if len(layouts.every) > 1:
        columns += ["received\nMB/chunk", *["rules\n< GB/s"] * known]
        columns += ["received\nMB/token", *["rules\n> us"] * known]
    table = _table(*columns)
    for layout in layouts.every:
        if layout.estimate.fit.fits:
            table.add_row(str(layout.together), *_row(layout))
    return table


def _row(layout: Layout) -> Iterator[str]:
    result, speeds = layout.estimate, layout.estimate.card.speeds
    feeding, stepping = layout.feeding, layout.stepping
    yield str(result.fit.chunk)
    seconds, rate = result.prefill_seconds, result.decode_tokens_per_second
    if seconds is None or rate is None:
        yield three_digits(result.prefill_operations / 1e15)
        yield three_digits(result.decode_bytes / 1e9)
    else:
        yield from (duration(seconds), three_digits(rate))
    if layout.together == 1:
        return
    yield three_digits(feeding.received / 1e6)
    if speeds is not None:
        computing = layout.chunk_operations / speeds.products
        yield three_digits(feeding.received / computing / 1e9)
    yield three_digits(stepping.received / 1e6)
    if speeds is not None:
        reading = result.decode_bytes / speeds.memory
        yield three_digits(reading / stepping.calls * 1e6)


def _explained(layouts: Layouts) -> str:
    card, grouped = layouts.cluster.card, layouts.every[1:]
    if card.speeds is None:
        text = "Matrix products of a card, and what it moves in its memory."
    else:
        text = f"Of matrix products and of memory alone, {card.at}."
    if grouped:
        fed = max(layout.feeding.calls for layout in grouped)
        stepped = grouped[0].stepping.calls
        text += (
            f" What a card receives of others comes in {fed} exchanges for each "
            f"chunk, and {stepped} for each step of decoding."
        )
        if card.speeds is None:
            text += " --speeds turns this into times, and tells where passing rules."
        else:
            text += (
                " Passing rules, that is, takes longer than the rest, over links of fewer GB/s "
                "and where an exchange takes more us."
            )
    return text
