"""Fits a run to the free memory of its device, or refuses it before it starts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from yoco_eval.model import Costs
from yoco_eval.model.footprint import Footprint, footprint

from .lengths import format_length
from .pages import rounded
from .prefixes import Limits, Step

# Tokens fed at a time. On a GPU the matrix products of more are hardly faster, and fewer leave more
# memory to the cache. 12672 is 96 for each of an H100's 132 multiprocessors, so that the products'
# tiles fill whole rounds of them. Of small models it takes more tokens until the device has more to
# do than the host, which launches as many kernels however large they are.
CHUNKS = {
    "cuda": (50688, 25344, 12672, 8448, 4224, 2112, 1056, 528, 264),
    "cpu": (1024, 512, 256),
}
_MANY, _OPERATIONS = 12672, 42e12  # tokens of a chunk, or operations, beyond which more do not pay
_LOGITS = 4096  # for each token of a chunk, so many logits may exist at a time
MARGIN = 0.95  # of the free memory; allocators lose some between blocks


class OutOfMemory(ValueError):
    """An allocation failed that was planned to fit; the message is one line."""


@dataclass(frozen=True)
class Fit:
    """How a run with contexts of up to `length` tokens lies in the memory of a device.

    Attributes:
        prefill_chunk: tokens to feed at a time, as asked for; None: it was left to `fit`.
        chunk: tokens fed at a time: the largest useful number that fits, else the smallest.
        parts: processes that feed a chunk together.
        logits: how many may exist at a time.
        memory: at the peak, in bytes.
        need: what of it is still to be allocated.
        free: bytes that may be allocated.
        longest: the longest context, in tokens, that fits; 0 if none does.
        device: of which memory.
    """

    length: int
    prefill_chunk: int | None
    chunk: int
    parts: int
    logits: int
    memory: Footprint
    need: int
    free: int
    longest: int
    device: torch.device

    @property
    def fits(self) -> bool:
        return self.need <= self.free

    @property
    def packed(self) -> int:
        """Tokens that each of the processes feeds or predicts at a time: one's part of a chunk."""
        return -(-self.chunk // self.parts)

    def feeds_alone(self, step: Step, limits: Limits) -> bool:
        """Whether the nodes of a step are one text that is better fed chunk by chunk than as a
        packed batch, of which processes that feed a chunk together each feed all."""
        (first, *others) = step.nodes
        if others or first.children:
            return False
        return self.parts > 1 or not limits.allow(first.size)

    def limits(self, items: int | None, costs: Costs, dtype: torch.dtype, spare: int = 0) -> Limits:
        """Of packed batches of up to `items` sequences, behind each of which `spare` slots may be
        lost: half of what is left is for snapshots."""
        return Limits(
            items=items or self.packed,
            tokens=self.packed,
            room=(self.free - self.need) // 2,
            state=costs.state_bytes(dtype),
            passing=costs.passing_bytes(dtype, self.device),
            spare=spare,
        )

    def check(self) -> None:
        """Raises ValueError, with the figures and what would fit, unless this does."""
        if self.fits:
            return
        besides = self.memory.states + self.memory.activations
        shorter = f"shorten them to {self.longest} tokens, or have them cut by "
        shorter += f"max_length={self.longest}"
        mends = (shorter,) if self.longest else ()
        raise ValueError(
            f"contexts of {format_length(self.length)} tokens need {gib(self.need)} beside the "
            f"weights on {self.device} ({gib(self.memory.cache)} for the cache, {gib(besides)} for "
            f"states and activations), and {gib(self.free)} are free; {self._mends(*mends)}"
        )

    def check_snapshots(self, size: int, room: int = 0) -> None:
        """Raises ValueError unless `size` bytes of snapshots fit beside all else and `room`."""
        left = self.free - self.need - room
        if size > left:
            raise ValueError(
                f"where prompts branch, {gib(size)} of states have to be kept, and {gib(left)} "
                f"are free for them on {self.device}; {self._mends()}"
            )

    def watch(self, need: int | None = None, *mends: str) -> AbstractContextManager[None]:
        """Turns an allocation that fails meanwhile into OutOfMemory.

        Args:
            need: bytes that were planned, if that is more than for one text.
            mends: what else to do.
        """
        return allocating(
            self.device,
            f"{gib(need or self.need)} were planned beside the weights, of {gib(self.free)} that "
            "were free",
            self._mends(*mends, "shorten contexts", "end what else takes memory"),
        )

    def _mends(self, *mends: str) -> str:
        if self.prefill_chunk and self.prefill_chunk > _chunks(self.device)[-1]:
            mends += (f"lower prefill_chunk={self.prefill_chunk}",)
        return ", or ".join((*mends, "take a device with more memory"))


def fit(
    costs: Costs,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    chunk: int | None = None,
    loaded: bool = False,
    tokens: int | None = None,
    spare: int = 0,
    logits: int = _LOGITS,
    parts: int = 1,
    free: int | None = None,
    sharing: int = 1,
) -> Fit:
    """Fits a run into the free memory as well as possible.

    Args:
        costs: of the model, as one of `parts` processes has them.
        length: tokens of the longest context, with what is generated after it.
        chunk: tokens to feed at a time; None: as many as pay and fit.
        loaded: whether the weights are on the device already.
        tokens: of all contexts together, of which several may be fed at a time; None: one context
            is fed at a time.
        spare: slots of the cache that no token takes.
        logits: that may exist at a time for each token that one process feeds.
        parts: processes that feed a chunk together, each on a device of its own.
        free: what all of them have; None: what this device has.
        sharing: how many processes share the free memory.
    """
    free = int((free_bytes(device) if free is None else free) * MARGIN) // sharing

    def needs(length: int, most: int) -> tuple[int, Footprint, int]:
        total = tokens or length
        size = max(1, min(most, total))
        one = -(-size // parts)
        # A packed batch of that size may lie behind what its texts share.
        capacity = min(length + one, total) + spare
        memory = footprint(costs, dtype, capacity, size, one * logits, device)
        return size, memory, memory.total - (memory.weights if loaded else 0)

    for most in (chunk,) if chunk else (parts * size for size in chunk_sizes(costs, device)):
        size, memory, need = needs(length, most)
        if need <= free:
            break
    beyond = range(1, max(0, free) // costs.cache_bytes(dtype, 1) + 2)
    longest = bisect_right(beyond, free, key=lambda length: needs(length, most)[2])
    shown = -(-size // parts) * logits
    return Fit(length, chunk, size, parts, shown, memory, need, free, longest, device)


@dataclass(frozen=True)
class Stored:
    """Slots of a cache that the texts of a run take, in whole pages.

    Attributes:
        own: of each text what it shares with no other, with all that it may generate.
        shared: what is shared, in all.
        longest: all of the longest text, with what it may generate.
        room: tokens that one text may generate at most.
        states: snapshots that are kept at a time.
        page: slots of a page.
    """

    own: list[int]
    shared: int
    longest: int
    room: int
    states: int
    page: int


@dataclass(frozen=True)
class Batch:
    """How many texts are decoded side by side, and what they have.

    Attributes:
        size: texts in flight at most.
        items: prompts, and branches of several, that are fed as a packed batch at most.
        slots: of the cache.
        need: bytes that are still to be allocated for all of it.
    """

    size: int
    items: int
    slots: int
    need: int

    def limits(self, fitted: Fit, costs: Costs, dtype: torch.dtype) -> Limits:
        """Of packed batches of prompts, after each of which its state is kept."""
        each = costs.state_bytes(dtype) + costs.passing_bytes(dtype, fitted.device)
        return Limits(items=self.items, tokens=fitted.packed, room=self.items * each, passing=each)


def fit_batch(
    fitted: Fit, costs: Costs, dtype: torch.dtype, vocabulary: int, stored: Stored, most: int
) -> Batch:
    """As many texts side by side as fit beside what is fitted for one, up to `most`.

    A text in flight takes a state, its own slots and its logits. Few of the texts are fed as a
    batch, which takes their states once more: so that few rows wait for it, empty.
    """
    device, state = fitted.device, costs.state_bytes(dtype)
    each = state + costs.passing_bytes(dtype, device)
    slot = costs.cache_bytes(dtype, 1)
    mean = -(-sum(stored.own) // len(stored.own))
    everything = stored.shared + sum(stored.own)

    def beside(size: int) -> int:
        """Bytes of all but the cache."""
        need = fitted.need - fitted.memory.cache + (_items(size) - 1) * each
        need += (size - 1 + stored.states) * state
        need += size * stored.room * 8  # the slots that it is told of
        # Of processes that decode together, each feeds all tokens.
        rows, shown = size * fitted.parts, size * vocabulary
        step = costs.activation_bytes(dtype, 1, rows, shown, device)
        # What graphs compute with is theirs alone.
        apart = device.type == "cuda" and size > 1
        return need + max(0, step - (0 if apart else fitted.memory.activations))

    def cache(size: int) -> int:
        """Slots with which so many typical texts have room."""
        return min(everything, stored.longest + (size - 1) * mean)

    most = min(most, len(stored.own))
    sizes = range(2, most + 1)
    size = 1 + bisect_right(sizes, fitted.free, key=lambda n: beside(n) + cache(n) * slot)
    items, largest, page = _items(size), max(stored.own), stored.page
    # Beside those in flight there are others that wait; and what is shared may all be in use.
    slots = stored.shared + stored.longest + (size + items) * largest
    room = (fitted.free - beside(size)) // slot // page * page - page
    slots = max(stored.longest, min(everything, rounded(slots, page), room))
    while items > 1:
        fed = stored.shared + items * largest, fitted.packed + items * (stored.room + 4 * page)
        if stored.longest + min(fed) <= slots or slots == everything:
            break
        items //= 2
    slots += page  # the decoder's
    return Batch(size, items, slots, beside(size) + slots * slot)


def _items(size: int) -> int:
    return max(1, min(size // 4, 8), size // 8)


def chunk_sizes(costs: Costs, device: torch.device) -> tuple[int, ...]:
    """Of the chunks that a prompt may be fed in, the fastest first."""
    most = max(_MANY, _OPERATIONS / costs.prefill_operations(1))
    return tuple(size for size in _chunks(device) if size <= most)


def _chunks(device: torch.device) -> tuple[int, ...]:
    return CHUNKS.get(device.type, CHUNKS["cpu"])


def check_weights(costs: Costs, dtype: torch.dtype, device: torch.device) -> None:
    """Says so if a model's weights do not fit, before they are loaded.

    Raises:
        ValueError: with the figures.
    """
    need, free = costs.weight_bytes(dtype), free_bytes(device)
    if need > free:
        raise ValueError(
            f"the weights take {gib(need)} in {str(dtype).removeprefix('torch.')}, and "
            f"{gib(free)} are free on {device}; take a smaller dtype, or a device with more memory"
        )


@contextmanager
def loading_weights(costs: Costs, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """`check_weights`; and what is then allocated for them may raise OutOfMemory."""
    check_weights(costs, dtype, device)
    planned = f"the weights take {gib(costs.weight_bytes(dtype))}"
    with allocating(device, planned, "take a smaller dtype, or a device with more memory"):
        yield


@contextmanager
def allocating(device: torch.device, planned: str, mends: str) -> Iterator[None]:
    """Turns an allocation that fails within, though it should not, into OutOfMemory.

    Args:
        device: of which memory.
        planned: what was to be taken, and what was there.
        mends: what to do.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(
            f"memory ran out on {device}: {planned}, and {gib(free_bytes(device))} are free now; "
            f"{mends}"
        ) from None


def free_bytes(device: torch.device) -> int:
    """Memory that PyTorch can still allocate on the device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return host_free_bytes()


def host_free_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still allocate on the CPU: the least that anybody leaves it.

    That is the machine, each control group that the process is in, and its own limit on addresses
    (`ulimit -v`).

    Args:
        root: where /proc and /sys are; control groups are a matter of Linux.
    """
    left = [psutil.virtual_memory().available, *_left_by_groups(root)]
    if hasattr(psutil, "RLIMIT_AS"):  # not every system has it
        process = psutil.Process()
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            left.append(limit - process.memory_info().vms)
    return max(0, min(left))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Of every control group with a limit, from this process's own up, what is left of that."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mount, files, cached = "", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            mount = "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cached = "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / mount
        # In a container, the group is mounted as the top, and the rest of its path is not there.
        names = [name for name in path.split("/") if name not in ("", "..")]
        for depth in range(len(names), -1, -1):
            group = top.joinpath(*names[:depth])
            limit, used = (_number(next(_lines(group / name), "")) for name in files)
            if limit is not None and used is not None:
                # Pages of files count as used, though the kernel drops them where memory is short.
                stat = dict(line.partition(" ")[::2] for line in _lines(group / "memory.stat"))
                yield limit - used + (_number(stat.get(cached, "")) or 0)


def _lines(path: Path) -> Iterator[str]:
    """Of a file, none if it cannot be read."""
    try:
        yield from path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return


def _number(text: str) -> int | None:
    """None where it says "max" or nothing."""
    return int(text) if text.strip().isdecimal() else None


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that; beside PyTorch's own class of it, allocators have words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
