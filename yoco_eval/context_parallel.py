"""Which of a run's processes hold texts together (context parallelism)."""

from __future__ import annotations

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


def own_group(count: int, ranks: Ranks | None, device: torch.device) -> Group | None:
    """The `count` processes, neighbours by rank, that hold texts together with this one.

    All processes call it at the same time. On GPUs they talk through NCCL, whose memory is taken
    here.

    Returns:
        None where each process is alone.
    """
    if ranks is None or count == 1:
        return None
    own = None
    for first in range(0, ranks.size, count):
        members = list(range(first, first + count))
        host = dist.new_group(members, backend="gloo", timeout=FOREVER)
        processes = host
        if device.type == "cuda":
            processes = dist.new_group(members, backend="nccl")
        if ranks.rank in members:
            own = Group(processes, host, page_size(device), ranks.unless_lost)
    assert own is not None
    own.gather(torch.zeros(1, device=device))
    return own
