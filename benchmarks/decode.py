"""Decoding one token at a time at the YOCO-3B shape against the bytes that a step must read.

    python benchmarks/decode.py [--lengths 64k,512k,1m] [--output decode.json]

The limit is those bytes (every weight once, the shared cache once for each layer of the
cross-decoder, the states) over the speed of a large copy, measured in the same run. The cache holds
random numbers, since cost does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common import copy_bandwidth, environment, lengths, report, require_gpu, seconds

from yoco_eval.lengths import format_length
from yoco_eval.model import Yoco
from yoco_eval.model.cache import SelfState
from yoco_eval.model.shapes import SHAPES, set_random_weights
from yoco_eval.model.yoco_cache import YocoCache

STEPS = 32


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", type=lengths, default="64k,512k,1m", help="in tokens (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    device = require_gpu()
    config = SHAPES["3b"]
    model = Yoco.empty(config, device, torch.bfloat16)
    set_random_weights(model, 0)

    rows = []
    for length in args.lengths:
        step = step_seconds(model, length)[0]
        bandwidth = copy_bandwidth()
        moved = model.costs.decode_bytes(torch.bfloat16, length)
        rows.append(
            {
                "tokens": format_length(length),
                "tokens/s": 1 / step,
                "limit tokens/s": bandwidth / moved,
                "share of limit": moved / bandwidth / step,
                "copy TB/s": bandwidth / 1e12,
            }
        )
        torch.cuda.empty_cache()
    report("Decoding, YOCO-3B shape, bfloat16, batch 1", rows, environment(), args.output)


def step_seconds(model: Yoco, length: int) -> tuple[float, YocoCache]:
    """Of decoding one token after `length`, and the cache, of noise, that is read."""
    config, device = model.config, model.device
    cache = model.new_cache(length + 2 * STEPS)
    cache.fill_with_noise()
    heads, dim = config.self_decoder.n_self_heads, config.self_decoder.head_dim(config.dim)
    states = tuple(
        torch.randn(1, heads, dim, dim, device=device) for _ in range(config.self_layers)
    )
    cache.restore(SelfState((length,), states))
    decoder = model.decoder(cache)
    decoder.start(0)
    for _ in range(3):  # kernels are compiled, and a graph is captured
        decoder.step()
    return seconds(lambda: [decoder.step() for _ in range(STEPS)]) / STEPS, cache


if __name__ == "__main__":
    sys.exit(main())
