"""Gated retention, 24 heads of 128 in bfloat16, against its bytes, its reference and its peer.

    python benchmarks/retention.py [--tokens 32768] [--output retention.json]

The floor is the time in which a copy, measured in the same run, moves what the operation must read
and write once: q, k, v, output, the swish gate and the last states where there are any. The gates'
logits are normal numbers, with which a state forgets by 2^-126 in 1700 tokens: the kernels, which
ask every 1024 tokens, do not sum what is forgotten. Open gates are these numbers plus 8: nothing is
left out. The peer is flash-linear-attention's chunk_simple_gla, where that is installed; it gets
the logarithms of the gates ready-made, and neither normalises nor applies a gate. The step of
decoding is timed in a CUDA graph of many, each with a state of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    context_length,
    copy_bandwidth,
    environment,
    graphed,
    measure,
    report,
    require_gpu,
)
from torch import Tensor

from yoco_eval.kernels.retention import (
    gated_retention,
    gated_retention_reference,
    gated_retention_step,
    gated_retention_step_reference,
    retention_log_gate,
)
from yoco_eval.kernels.rotary import rotary_angles
from yoco_eval.kernels.sequences import Sequences

HEADS, DIM = 24, 128
PACKED = 512  # tokens of each sequence of the packed case
STEPS = 256
THETA = 80e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=context_length, default=32768, help=f"a multiple of {PACKED}"
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    if args.tokens % PACKED:
        parser.error(f"--tokens {args.tokens}: must be a multiple of {PACKED}")
    device = require_gpu()
    bandwidth = copy_bandwidth()
    one, many = (args.tokens,), (PACKED,) * (args.tokens // PACKED)
    rows = [
        prefill(f"{args.tokens} tokens", one, bandwidth, device, bare=True),
        prefill("with open gates", one, bandwidth, device, bare=True, open_by=8),
        prefill("with norm and swish", one, bandwidth, device, bare=False),
        prefill(f"{len(many)} x {PACKED} tokens packed", many, bandwidth, device, bare=True),
        step(bandwidth, device),
    ]
    title = f"Gated retention, {HEADS} heads of {DIM}, bfloat16; copy {bandwidth / 1e12:.2f} TB/s"
    report(title, rows, environment("flash-linear-attention"), args.output)


def prefill(
    case: str,
    lengths: tuple[int, ...],
    bandwidth: float,
    device: torch.device,
    bare: bool,
    open_by: float = 0,
) -> dict[str, str | float | None]:
    sequences = Sequences(lengths, (0,) * len(lengths), device)
    q, k, v, swish, gate = inputs(sequences.total, device)
    gate += open_by
    arguments = (q, k, v, gate, sequences, None, None if bare else swish)
    moved = (4 if bare else 5) * q.numel() * q.element_size() + gate.nbytes
    moved += len(lengths) * HEADS * DIM * DIM * 4
    peer = simple_gla(q, k, v, gate, sequences) if bare else None
    return row(
        case,
        lambda: gated_retention(*arguments)[0],
        lambda: gated_retention_reference(*arguments)[0],
        peer,
        moved / bandwidth,
    )


def step(bandwidth: float, device: torch.device) -> dict[str, str | float | None]:
    q, k, v, swish, gate = inputs(1, device)
    angles = rotary_angles(torch.tensor([1_000_000], device=device), DIM, THETA, q.dtype)
    states = torch.randn(STEPS, 1, HEADS, DIM, DIM, device=device)
    moved = 2 * states[0].nbytes + 5 * q.nbytes

    before = states.clone()
    reset = measure(lambda: states.copy_(before))
    kernel, reference = (
        graphed(lambda state, f=function: f(q, k, v, gate, state, angles, swish), states, before)
        for function in (gated_retention_step, gated_retention_step_reference)
    )
    result = row("1 token", kernel, reference, None, moved / bandwidth)
    for name in ("kernel", "reference"):
        result[f"{name} ms"] = (result[f"{name} ms"] - reset * 1e3) / STEPS
    result["kernel / floor"] = result["kernel ms"] / result["floor ms"]
    return result


def row(
    case: str,
    kernel: Callable[[], Tensor],
    reference: Callable[[], Tensor],
    peer: Callable[[], object] | None,
    floor: float,
) -> dict[str, str | float | None]:
    expected = reference().float()
    error = ((kernel().float() - expected).norm() / expected.norm()).item()
    time = measure(kernel)
    return {
        "case": case,
        "kernel ms": time * 1e3,
        "floor ms": floor * 1e3,
        "kernel / floor": time / floor,
        "simple_gla ms": None if peer is None else measure(peer) * 1e3,
        "reference ms": measure(reference, repeats=3) * 1e3,
        "error to reference": error,
    }


def inputs(tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v, swish [T, H, D] and gate [T, H], as parts of one projection's output."""
    width = HEADS * DIM
    y = torch.randn(tokens, 4 * width + HEADS, device=device, dtype=torch.bfloat16)
    *parts, gate = y.split((width, width, width, width, HEADS), dim=1)
    return *(x.unflatten(1, (HEADS, DIM)) for x in parts), gate


def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, sequences: Sequences
) -> Callable[[], object] | None:
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    q, k, v = (x.contiguous()[None] for x in (q, k, v))
    log_gate = retention_log_gate(gate)[None]
    offsets = None
    if len(sequences.lengths) > 1:
        offsets = torch.tensor(sequences.offsets, device=q.device)
    return lambda: chunk_simple_gla(
        q, k, v, g=log_gate, scale=DIM**-0.5, output_final_state=True, cu_seqlens=offsets
    )


if __name__ == "__main__":
    sys.exit(main())
