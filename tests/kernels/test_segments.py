"""Sequences are cut so that blocks, and segments, cover each of them."""

import pytest
import torch

from yoco_eval.kernels.segments import blocks, segments
from yoco_eval.kernels.sequences import Sequences


@pytest.mark.parametrize("lengths", [[1], [64], [65], [5000], [3000, 10, 640, 1], [64] * 50])
def test_segments_cover_the_sequences(lengths):
    sequences = Sequences(tuple(lengths), (0,) * len(lengths), torch.device("cpu"))
    inner, scanned, table = segments(sequences, 2, chunk=64, shortest=64, programs=16)
    rows = table[: inner + len(lengths)].tolist()
    scans = table[inner + len(lengths) :].tolist()
    assert len(scans) == scanned
    ends = {}  # of each sequence so far
    for i, (first, end, before, source) in enumerate(rows):
        assert first == ends.get(source, (sequences.offsets[source], -1))[0] < end
        assert before == ends.get(source, (0, -1))[1]
        assert i >= inner or (end - first) % 64 == 0
        ends[source] = (end, i)
    assert [ends[i][0] for i in range(len(lengths))] == list(sequences.offsets[1:])
    assert [ends[i][1] for i in range(len(lengths))] == list(range(inner, len(rows)))
    assert [s for begin, end, source, _ in scans for s in range(begin, end)] == list(range(inner))
    assert all(rows[s][3] == scan[2] for scan in scans for s in range(scan[0], scan[1]))
    assert inner > 0 or max(lengths) < 128


def test_blocks_cover_the_sequences():
    sequences = Sequences((3, 1, 4), (0, 0, 0), torch.device("cpu"), sources=(2, 0, 0))
    assert blocks(sequences, 2).tolist() == [
        [0, 0, 3, 0, 2],
        [2, 0, 3, 0, 2],
        [3, 3, 4, 1, 0],
        [4, 4, 8, 2, 0],
        [6, 4, 8, 2, 0],
    ]
