"""Mamba's selective scan, bfloat16, against its limits, reference and peer.

    python benchmarks/selective_scan.py [--tokens 32768] [--channels 5120] [--states 16]
                                        [--output selective_scan.json]

The limit is the larger of two times: that in which a copy, measured in the same run, moves what the
operation must read and write once (x, time steps, gate, output, last states), and that in which the
card does one exponential for each state of each token and channel, and four more for softplus and
silu, at 16 per cycle and multiprocessor and 1.75 GHz. Rates are those that Mamba begins with, -1 to
-16, and time steps lie from 0.001 to 0.1. The peer is mamba_ssm, where it is installed, in the
layout that it asks for. The step of decoding is timed in a CUDA graph of many, each with states of
its own.
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
    count,
    environment,
    graphed,
    measure,
    report,
    require_gpu,
)
from torch import Tensor

from yoco_eval.kernels.selective_scan import (
    selective_scan,
    selective_scan_reference,
    selective_scan_step,
    selective_scan_step_reference,
)
from yoco_eval.kernels.sequences import Sequences

PACKED = 512  # tokens of each sequence of the packed case
REFERENCE = 1024  # tokens of which the reference is computed: it goes one by one
STEPS = 32
CLOCK = 1.75e9

Row = dict[str, "str | float | None"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=context_length, default=32768, help=f"a multiple of {PACKED}"
    )
    parser.add_argument("--channels", type=count, default=5120)
    parser.add_argument("--states", type=count, default=16)
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    if args.tokens % PACKED:
        parser.error(f"--tokens {args.tokens}: must be a multiple of {PACKED}")
    device, shape = require_gpu(), (args.channels, args.states)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    rates = copy_bandwidth(), 16 * CLOCK * multiprocessors
    one, many = (args.tokens,), (PACKED,) * (args.tokens // PACKED)
    rows = [
        prefill(f"{args.tokens} tokens", one, shape, rates, device),
        prefill("without a gate", one, shape, rates, device, gated=False),
        prefill(f"{len(many)} x {PACKED} tokens packed", many, shape, rates, device),
        prefill(f"{PACKED} tokens", (PACKED,), shape, rates, device),
        step("1 token", 1, shape, rates, device),
        step("1 token of each of 64", 64, shape, rates, device),
    ]
    title = f"Selective scan, {args.channels} channels of {args.states} states, bfloat16; "
    title += f"copy {rates[0] / 1e12:.2f} TB/s"
    report(title, rows, environment("mamba_ssm"), args.output)


def prefill(
    case: str,
    lengths: tuple[int, ...],
    shape: tuple[int, int],
    rates: tuple[float, float],
    device: torch.device,
    gated: bool = True,
) -> Row:
    channels, states = shape
    sequences = Sequences(lengths, (0,) * len(lengths), device)
    args = inputs(sequences.total, shape, device)
    gate = torch.randn_like(args[0]) if gated else None
    first = Sequences((min(lengths[0], REFERENCE),), (0,), device)

    def reference() -> Tensor:
        tokens = slice(first.total)
        x, dt, a, b, c, *rest = args
        parts = (x[tokens], dt[tokens], a, b[tokens], c[tokens], *rest)
        own = None if gate is None else gate[tokens]
        return selective_scan_reference(*parts, first, gate=own)[0]

    moved = (4 if gated else 3) * args[0].nbytes + len(lengths) * channels * states * 4
    exponentials = sequences.total * channels * (states + (4 if gated else 2))
    return row(
        case,
        lambda: selective_scan(*args, sequences, gate=gate)[0],
        reference,
        peer(*args, gate) if len(lengths) == 1 else None,
        moved / rates[0],
        exponentials / rates[1],
    )


def step(
    case: str,
    texts: int,
    shape: tuple[int, int],
    rates: tuple[float, float],
    device: torch.device,
) -> Row:
    args = inputs(texts, shape, device)
    gate = torch.randn_like(args[0])
    states = torch.randn(STEPS, texts, *shape[::-1], device=device)

    before = states.clone()
    reset = measure(lambda: states.copy_(before))
    kernel, reference = (
        graphed(lambda state, f=function: f(*args, state, gate), states, before)
        for function in (selective_scan_step, selective_scan_step_reference)
    )
    moved = 2 * states[0].nbytes + args[2].nbytes + 4 * args[0].nbytes
    result = row(case, kernel, reference, None, moved / rates[0], states[0].numel() / rates[1])
    result["kernel ms"] = (result["kernel ms"] - reset * 1e3) / STEPS
    result["kernel / limit"] = result["kernel ms"] / max(result["bytes ms"], result["exp ms"])
    return result


def row(
    case: str,
    kernel: Callable[[], Tensor],
    reference: Callable[[], Tensor],
    other: Callable[[], object] | None,
    moving: float,
    exponentials: float,
) -> Row:
    expected = reference().float()
    error = ((kernel()[: len(expected)].float() - expected).norm() / expected.norm()).item()
    time = measure(kernel)
    return {
        "case": case,
        "kernel ms": time * 1e3,
        "bytes ms": moving * 1e3,
        "exp ms": exponentials * 1e3,
        "kernel / limit": time / max(moving, exponentials),
        "mamba_ssm ms": None if other is None else measure(other) * 1e3,
        "error to reference": error,
    }


def inputs(tokens: int, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """x, dt, a, b, c, d and dt_bias, b and c being parts of one projection's output."""
    channels, states = shape
    numbers = {"device": device, "dtype": torch.bfloat16}
    x, dt = torch.randn(tokens, channels, **numbers), torch.randn(tokens, channels, **numbers) / 4
    b, c = torch.randn(tokens, 2 * states, **numbers).chunk(2, dim=1)
    a = -torch.arange(1.0, states + 1, device=device)[:, None].expand(states, channels).contiguous()
    time_step = torch.logspace(-1, -3, channels, device=device)
    return x, dt, a, b, c, torch.ones(channels, device=device), time_step.expm1().log()


def peer(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    gate: Tensor | None,
) -> Callable[[], object] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    x, dt, b, c = (part.T.contiguous()[None] for part in (x, dt, b, c))
    z = None if gate is None else gate.T.contiguous()[None]
    a = a.T.contiguous()
    return lambda: selective_scan_fn(
        x, dt, a, b, c, d, z, dt_bias, delta_softplus=True, return_last_state=True
    )


if __name__ == "__main__":
    sys.exit(main())
