"""SwiGLU fused into its matrix product, against the library's product with and without SwiGLU.

    python benchmarks/swiglu.py [--tokens 2112,4224,12672] [--output swiglu.json]

The shape is that of YOCO-3B's feed-forward layers, in bfloat16. The three take turns of a quarter
of a second, so that each runs at the clock that the card's power limit leaves it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import environment, lengths, report, require_gpu, seconds

from yoco_eval.kernels.fused_linear import fuses_swiglu, swiglu_linear
from yoco_eval.kernels.swiglu import swiglu
from yoco_eval.model.shapes import SHAPES

TURN = 0.25  # seconds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=lengths, default="2112,4224,12672")
    parser.add_argument("--turns", type=int, default=5, help="of each; their median counts")
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    device = require_gpu()
    width, hidden = SHAPES["3b"].dim, SHAPES["3b"].hidden_dim
    torch.manual_seed(0)
    weight = torch.randn(2 * hidden, width, device=device, dtype=torch.bfloat16) / width**0.5
    rows = []
    for tokens in args.tokens:
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        if not fuses_swiglu(tokens, width, hidden, x.dtype, device):
            sys.exit(f"error: {tokens} tokens are not fused on this card")
        rows.append({"tokens": tokens} | compare(x, weight, args.turns))
    title = f"SwiGLU of a matrix product, K = {width}, F = {hidden}, bfloat16"
    report(title, rows, environment(), args.output)


def compare(x: torch.Tensor, weight: torch.Tensor, turns: int) -> dict[str, float]:
    forms = {
        "fused": lambda: swiglu_linear(x, weight),
        "apart": lambda: swiglu(F.linear(x, weight)),
        "product alone": lambda: F.linear(x, weight),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    repeats = 3
    for _ in range(turns + 1):
        for name, form in forms.items():
            times[name].append(seconds(lambda: [form() for _ in range(repeats)]) / repeats)  # noqa: B023
        repeats = max(1, round(TURN / times["apart"][-1]))
    medians = {name: median(taken[1:]) for name, taken in times.items()}
    rate = 2 * len(x) * weight.numel() / medians["fused"] / 1e12
    return {
        **{f"{name} ms": time * 1e3 for name, time in medians.items()},
        "fused / apart": medians["fused"] / medians["apart"],
        "fused / product": medians["fused"] / medians["product alone"],
        "fused TFLOP/s": rate,
    }


if __name__ == "__main__":
    sys.exit(main())
