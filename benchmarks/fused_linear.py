"""Matrix products fused with SwiGLU or rotation, against the library's product and the two apart.

    python benchmarks/fused_linear.py [--tokens 512,1k,2k,4k,12672] [--output fused_linear.json]

The shapes are those of YOCO-3B's feed-forward layers and of its queries and keys, in bfloat16. The
kernels are timed for few tokens, too, where the model does not use them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from common import count, environment, in_turns, lengths, report, require_gpu
from torch import Tensor

from yoco_eval.kernels.fused_linear import MIN_TOKENS, fuses_swiglu
from yoco_eval.kernels.rotary import rotary_angles, rotate
from yoco_eval.kernels.swiglu import swiglu
from yoco_eval.model.shapes import SHAPES


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=lengths, default="512,1k,2k,4k,12672", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--turns", type=count, default=5, help="of each; their median counts (default: 5)"
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    device = require_gpu()
    config = SHAPES["3b"]
    if not fuses_swiglu(MIN_TOKENS, config.dim, config.hidden_dim, torch.bfloat16, device):
        sys.exit("error: the kernels are for Hopper GPUs, such as the H100, and need Triton 3.4")
    from yoco_eval.kernels import fused_linear_triton as kernels  # which loads only there

    rows = [
        {"fused with": name, "tokens": tokens} | compare(forms(kernels, tokens, device), args.turns)
        for name, forms in (("SwiGLU", swiglu_forms), ("rotation", rotation_forms))
        for tokens in args.tokens
    ]
    title = "A matrix product and what follows it, YOCO-3B shape, bfloat16"
    report(title, rows, environment(), args.output)


Forms = dict[str, Callable[[], Tensor]]


def swiglu_forms(kernels: ModuleType, tokens: int, device: torch.device) -> Forms:
    x, weight = operands(tokens, 2 * SHAPES["3b"].hidden_dim, device)
    return {
        "fused": lambda: kernels.swiglu_linear(x, weight),
        "apart": lambda: swiglu(F.linear(x, weight)),
        "product": lambda: F.linear(x, weight),
    }


def rotation_forms(kernels: ModuleType, tokens: int, device: torch.device) -> Forms:
    config = SHAPES["3b"]
    dim = config.self_decoder.head_dim(config.dim)
    x, weight = operands(tokens, 2 * config.dim, device)
    positions = torch.arange(tokens, device=device)
    angles = rotary_angles(positions, dim, config.rope_theta, x.dtype)

    def apart() -> Tensor:
        heads = F.linear(x, weight).unflatten(1, (-1, dim))
        return rotate(heads, angles, in_place=True)

    return {
        "fused": lambda: kernels.rotary_linear(x, weight, angles),
        "apart": apart,
        "product": lambda: F.linear(x, weight),
    }


def operands(tokens: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = SHAPES["3b"].dim
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    return x, torch.randn(columns, width, device=device, dtype=torch.bfloat16) / width**0.5


def compare(forms: Forms, turns: int) -> dict[str, float]:
    times = in_turns(forms, turns)
    return {
        **{f"{name} ms": time * 1e3 for name, time in times.items()},
        "fused / apart": times["fused"] / times["apart"],
        "fused / product": times["fused"] / times["product"],
    }


if __name__ == "__main__":
    sys.exit(main())
