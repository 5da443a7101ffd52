"""How packed sequences are cut for the programs of a kernel: into blocks, or into segments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .sequences import Sequences, to_device


def blocks(sequences: Sequences, size: int) -> Tensor:
    """The sequences in blocks of so many tokens, the last of each sequence maybe shorter.

    Returns:
        int32 [.., 5] on the device, of each block: its first token; its sequence's first token, end
        token, number, and the state that it continues.
    """

    def table() -> Tensor:
        firsts, counts = [], []
        for start, end in zip(sequences.offsets, sequences.offsets[1:], strict=False):
            firsts.append(torch.arange(start, end, size))
            counts.append(len(firsts[-1]))
        count = len(sequences.lengths)
        offsets = torch.tensor(sequences.offsets)
        number = torch.arange(count)
        source = number if sequences.sources is None else torch.tensor(sequences.sources)
        rows = torch.stack([offsets[:-1], offsets[1:], number, source], dim=1)
        rows = rows.repeat_interleave(torch.tensor(counts), dim=0)
        rows = torch.cat([torch.cat(firsts)[:, None], rows], dim=1)
        return to_device(rows.int(), sequences.device)

    return sequences.table(("blocks", size), table)


def segments(
    sequences: Sequences, rows: int, chunk: int, shortest: int, programs: int
) -> tuple[int, int, Tensor]:
    """Cuts the sequences into segments of whole chunks, so that `programs` programs have work.

    Args:
        rows: programs that work on each segment.
        chunk: tokens of a chunk.
        shortest: tokens of a segment, at least, of sequences that are cut.
        programs: how many there should be.

    Returns:
        How many segments are not the last of their sequence; how many sequences have such; and,
        on the device, int32 [.., 4]:
        - first those segments in order, then the last segment of each sequence: first token, end
          token, the segment before it (-1: none), the state that its sequence continues;
        - then for each sequence of several segments: its first segment, the end of those that are
          not its last, the state that it continues, 0.
    """
    target = max(shortest, sequences.total * rows / programs)
    inner: list[tuple[int, int, int, int]] = []
    last, scans = [], []
    for i, length in enumerate(sequences.lengths):
        source = i if sequences.sources is None else sequences.sources[i]
        first, end = sequences.offsets[i], sequences.offsets[i + 1]
        chunks = -(-length // chunk)
        count = max(1, min(chunks, round(length / target)))
        begin = len(inner)
        for j in range(1, count):
            cut = sequences.offsets[i] + chunks * j // count * chunk
            inner.append((first, cut, len(inner) - 1 if j > 1 else -1, source))
            first = cut
        last.append((first, end, len(inner) - 1 if count > 1 else -1, source))
        if count > 1:
            scans.append((begin, len(inner), source, 0))
    table = torch.tensor(inner + last + scans, dtype=torch.int32)
    return len(inner), len(scans), to_device(table, sequences.device)


def whole_segments(
    sequences: Sequences, rows: int, chunk: int, shortest: int, programs: int
) -> tuple[int, Tensor]:
    """Cuts the only sequence, of whole chunks, into segments of which each is summed up.

    Args:
        rows, chunk, shortest, programs: as in `segments`.

    Returns:
        How many there are, and their lines of `segments`' table, none of which is a first one.
    """
    (length,) = sequences.lengths
    target = max(shortest, length * rows / programs)
    chunks = length // chunk
    count = max(1, min(chunks, round(length / target)))
    cuts = [chunks * j // count * chunk for j in range(count + 1)]
    table = torch.tensor([(first, end, 0, 0) for first, end in pairwise(cuts)], dtype=torch.int32)
    return count, to_device(table, sequences.device)
