"""Processes that hold one text together, each a part of it, and what they tell each other.

All of a group run the same plan in lockstep, so that each call here is one of all. On a GPU they
are NCCL's collectives, which a CUDA graph may hold, and wait for nothing on the host unless it says
so here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .stripes import Stripes

Result = TypeVar("Result")


def rows_each(count: int, processes: int) -> int:
    """How many of a matrix's rows each process computes products with; the last one takes what is
    left, where there are as many rows as any model's vocabulary has."""
    return -(-count // processes)


def _at_once(call: Callable[[], Result]) -> Result:
    return call()


class Group:
    """A group of processes, this one among them.

    Args:
        processes: in torch.distributed, for tensors on the models' devices.
        host: the same processes, in a group for numbers on the host; None: `processes` serves.
        block: tokens of a text, and slots of a cache, that are never divided.
        guard: makes each call; may know better than the call's own error why it fails.

    Attributes:
        rank, size: of this process, and how many there are.
    """

    def __init__(
        self,
        processes: Any,
        host: Any = None,
        block: int = 1,
        guard: Callable[[Callable[[], Any]], Any] = _at_once,
    ) -> None:
        self._processes, self._host = processes, processes if host is None else host
        self.rank: int = dist.get_rank(processes)
        self.size: int = dist.get_world_size(processes)
        self.block, self._guard = block, guard
        # By rank here, the rank among all processes, as torch.distributed asks for it.
        self._global = [dist.get_global_rank(processes, rank) for rank in range(self.size)]

    @cached_property
    def stripes(self) -> Stripes:
        """The slots of a cache that this process holds."""
        return Stripes(self.rank, self.size, self.block)

    def parts(self, length: int) -> tuple[int, ...] | None:
        """How many of `length` tokens in a row each process takes, whole blocks but for the last
        one's rest; None: they are too few for all."""
        blocks = -(-length // self.block)
        if blocks < self.size:
            return None
        counts = [blocks // self.size + (rank < blocks % self.size) for rank in range(self.size)]
        lengths = [count * self.block for count in counts]
        lengths[-1] -= blocks * self.block - length
        return tuple(lengths)

    # -- tensors -----------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's x, of one shape: [size, *shape]."""
        every = x.new_empty(self.size, *x.shape)
        flat, own = every.view(-1), x.contiguous().view(-1)
        # Its name from PyTorch 2.13 on, and before.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._guard(lambda: gather(flat, own, group=self._processes))
        return every

    def rows(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Everyone's rows behind each other: [sum of lengths, ...] of x [lengths[rank], ...]."""
        longest = max(lengths)
        if len(x) < longest:
            x = torch.cat((x, x.new_zeros(longest - len(x), *x.shape[1:])))
        every = self.gather(x)
        return torch.cat([own[:length] for own, length in zip(every, lengths, strict=True)])

    def own_rows(self, matrix: Tensor) -> Tensor:
        """The rows [n <= rows_each, K] of a matrix [N, K] that are this process's."""
        each = rows_each(len(matrix), self.size)
        return matrix[self.rank * each : (self.rank + 1) * each]

    def columns(self, x: Tensor, count: int) -> Tensor:
        """Everyone's products x [T, n] with their `own_rows` of `count`, beside each other:
        [T, count], not contiguous if some have fewer."""
        short = rows_each(count, self.size) - x.shape[1]
        every = self.gather(F.pad(x, (0, short)) if short else x)
        return every.transpose(0, 1).flatten(1)[:, :count]

    def share(self, x: Tensor, source: int) -> Tensor:
        """x [...], contiguous, changed in place to that of process `source`."""
        self._guard(lambda: dist.broadcast(x, self._global[source], group=self._processes))
        return x

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Sends the first sent[0] rows of x to the first process, and so on, and returns what each
        has for this one: received[0] rows of the first, and so on."""
        out, x = x.new_empty(sum(received), *x.shape[1:]), x.contiguous()
        sizes = list(received), list(sent)
        self._guard(lambda: dist.all_to_all_single(out, x, *sizes, group=self._processes))
        return out

    def hand_over(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """Sends tensors to some processes and fills others, contiguous, with what some have."""
        whole = {to: x.contiguous() for to, x in sent.items()}
        operations = [
            dist.P2POp(dist.isend, x, self._global[to], self._processes) for to, x in whole.items()
        ]
        operations += [
            dist.P2POp(dist.irecv, x, self._global[source], self._processes)
            for source, x in received.items()
        ]

        def call() -> None:
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        if operations:
            self._guard(call)

    # -- numbers on the host -----------------------------------------------------------------------

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of everyone's, number by number. Waits."""
        highest = torch.tensor(numbers, dtype=torch.int64)
        self._guard(lambda: dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._host))
        return highest.tolist()

    def least(self, number: int) -> int:
        """The smallest of everyone's. Waits."""
        (least,) = self.most([-number])
        return -least
