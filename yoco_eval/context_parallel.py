"""Which of a run's processes hold texts together (context parallelism)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from yoco_eval.kernels.group import Group

from .pages import page_size
from .ranks import FOREVER, Ranks


def check_divides(count: int, ranks: Ranks | None) -> None:
    """Raises ValueError unless groups of `count` are all processes there are."""
    size = 1 if ranks is None else ranks.size
    if size % count:
        started = f"started with torchrun --nproc_per_node {count}, for instance"
        raise ValueError(
            f"context_parallel={count} needs a number of processes that it divides, {started}; "
            f"there {'are' if size > 1 else 'is'} {size}"
        )


def check_alike(count: int, cards: Sequence[tuple[str, tuple[int, int]]]) -> None:
    """Raises ValueError where groups of `count` would have cards whose kernels take other memory,
    so that their plans would differ.

    cards: of each process, by rank: name and compute capability.
    """
    for rank, (name, capability) in enumerate(cards):
        first = rank - rank % count
        if capability != cards[first][1]:
            raise ValueError(
                f"context_parallel={count} needs cards of one generation in each group: process "
                f"{first} has {cards[first][0]}, process {rank} {name}; start them on like "
                "cards, or leave it out"
            )


def own_group(count: int, ranks: Ranks | None, device: torch.device) -> Group | None:
    """The `count` processes, neighbours by rank, that hold texts together with this one.

    All processes call it at the same time. On GPUs they talk through NCCL, whose memory is taken
    here.

    Returns:
        None where each process is alone.

    Raises:
        ValueError: of `check_alike`.
    """
    if ranks is None or count == 1:
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        check_alike(count, ranks.collect((torch.cuda.get_device_name(device), capability)))
    own = None
    for first in range(0, ranks.size, count):
        members = list(range(first, first + count))
        host = dist.new_group(members, backend="gloo", timeout=FOREVER)
        processes = host
        if device.type == "cuda":
            processes = dist.new_group(members, backend="nccl", timeout=FOREVER)
        if ranks.rank in members:
            own = Group(processes, host, page_size(device), ranks.unless_lost)
    assert own is not None
    # Each kind of call connects the processes when it is first made.
    sent, received = torch.zeros(2, count, 1, device=device)
    own.exchange(sent, [1] * count, [1] * count)
    others = [rank for rank in range(count) if rank != own.rank]
    own.hand_over({to: sent[to] for to in others}, {source: received[source] for source in others})
    own.gather(sent)
    return own
