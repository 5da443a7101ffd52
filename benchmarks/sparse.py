"""Decoding with sparse attention at the YOCO-3B shape, beside decoding with the whole cache.

    python benchmarks/sparse.py [--lengths 64k,512k,1m,10m] [--sparse 16,64,256]
        [--cache-dtypes model,fp8] [--output FILE]

Tokens are decoded one at a time; the limit is as benchmarks/decode.py has it, of the bytes that a
step must read. The two parts are measured alone, too: the choice, which is made once a token, and
attention over what is chosen, which each of the 13 layers makes. The cache holds random numbers,
since cost does not depend on them. benchmarks/sparse_accuracy.py tells what is lost by it.

With fp8 among --cache-dtypes, all of it is measured with a cache in eight bits, too; `times` is of
the first row of a length, the whole cache in the dtype that is named first. `--sparse 0` leaves
sparse attention out.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import (
    clear,
    copy_bandwidth,
    counts,
    environment,
    lengths,
    measure,
    report,
    require_gpu,
)
from decode import step_seconds

from yoco_eval.kernels.sparse_attention import choose_blocks, listed_attention
from yoco_eval.kernels.text_blocks import texts_of
from yoco_eval.lengths import format_length
from yoco_eval.model import Span, Spans, Yoco
from yoco_eval.model.shapes import SHAPES, set_random_weights
from yoco_eval.model.sparse_cache import SparseCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths",
        type=lengths,
        default="64k,512k,1m,10m",
        help="in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--sparse",
        type=lambda text: [] if text == "0" else counts(text),
        default="16,64,256",
        help="blocks that a token chooses; 0: none but the whole cache (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-dtypes",
        type=lambda text: text.split(","),
        default="model",
        help="model, fp8, or both (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    if unknown := set(args.cache_dtypes) - {"model", "fp8"}:
        parser.error(f"--cache-dtypes: {', '.join(sorted(unknown))} is neither model nor fp8")
    device = require_gpu()
    model = Yoco.empty(SHAPES["3b"], device, torch.bfloat16)
    set_random_weights(model, 0)
    rows = []
    for length in args.lengths:
        whole = None
        for kind, most in product(args.cache_dtypes, (None, *args.sparse)):
            model.sparse, model.eight_bits = most, kind == "fp8"
            row = decoding(model, length)
            whole = whole or row["tokens/s"]
            rows.append({**row, "times": row["tokens/s"] / whole})
            clear()
    title = "Decoding with sparse attention, YOCO-3B shape, bfloat16, batch 1"
    report(title, rows, environment(), args.output)


@torch.inference_mode()
def decoding(model: Yoco, length: int) -> dict[str, Any]:
    """A row of the table."""
    config, device = model.config, model.device
    step, cache = step_seconds(model, length)
    limit = copy_bandwidth() / model.costs.decode_bytes(torch.bfloat16, length)
    row = {
        "tokens": format_length(length),
        "cache": "fp8" if model.eight_bits else "bfloat16",
        "sparse": "" if model.sparse is None else model.sparse,
        "tokens/s": 1 / step,
        "share of limit": 1 / step / limit,
        "cache, GiB": model.costs.cache_bytes(torch.bfloat16, length) / 2**30,
        "choice, us": "",
        "attention, us": "",
    }
    if isinstance(cache, SparseCache):
        q = torch.randn(1, config.n_attn_heads, config.attn_head_dim, device=device).bfloat16()
        positions = torch.tensor([length - 1], device=device)
        texts = texts_of(Spans((Span(0, 1, 0, length, causal=True, start=0),)), positions)
        most, keys, values = cache.most, cache.keys, cache.values
        chosen = choose_blocks(q, cache.summaries, texts, most)
        row["choice, us"] = 1e6 * measure(lambda: choose_blocks(q, cache.summaries, texts, most))
        row["attention, us"] = 1e6 * measure(
            lambda: listed_attention(q, keys, values, chosen, positions)
        )
    return row


if __name__ == "__main__":
    sys.exit(main())
