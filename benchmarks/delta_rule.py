"""The gated delta rule and its convolution, bfloat16, against their limits, reference and peer.

    python benchmarks/delta_rule.py [--tokens 32768] [--heads 9] [--dims 256,512]
                                    [--output delta_rule.json]

The limit is the larger of two times: that in which a copy, measured in the same run, moves what the
operation must read and write once (q, k, v, output, gate, last states), and that in which a large
matrix product, measured likewise, does the operations of the chunkwise form in chunks of 64. The
heads' decays lie as flash-linear-attention draws them: a_log from log 1/20 to log 16, time steps
from 0.001 to 0.1. Open decays are those times e^-9: nothing is forgotten. The peer is that package,
where it is installed. The step of decoding is timed in a CUDA graph of many, each with a state of
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

from yoco_eval.kernels.delta_rule import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
    gated_delta_rule_step_reference,
)
from yoco_eval.kernels.sequences import Sequences
from yoco_eval.kernels.short_convolution import short_convolution, short_convolution_reference

PACKED = 512  # tokens of each sequence of the packed case
CHUNK = 64
WIDTH = 4
STEPS = 128

Row = dict[str, "str | float | None"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=context_length, default=32768, help=f"a multiple of {PACKED}"
    )
    parser.add_argument("--heads", type=count, default=9)
    parser.add_argument("--dims", default="256,512", help="of a head of q and k, and of v")
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    if args.tokens % PACKED:
        parser.error(f"--tokens {args.tokens}: must be a multiple of {PACKED}")
    device = require_gpu()
    shape = (args.heads, *map(count, args.dims.split(",")))
    rates = copy_bandwidth(), product_rate()
    one, many = (args.tokens,), (PACKED,) * (args.tokens // PACKED)
    rows = [
        prefill(f"{args.tokens} tokens", one, shape, rates, device),
        prefill("with open decays", one, shape, rates, device, still=9),
        prefill("with norm and gate", one, shape, rates, device, bare=False),
        prefill(f"{len(many)} x {PACKED} tokens packed", many, shape, rates, device),
        convolution("convolution", one, shape, rates, device),
        step("1 token", shape, rates, device),
    ]
    title = f"Gated delta rule, {shape[0]} heads of {shape[1]} / {shape[2]}, bfloat16; "
    title += f"copy {rates[0] / 1e12:.2f} TB/s, products {rates[1] / 1e12:.0f} TFLOP/s"
    report(title, rows, environment("flash-linear-attention"), args.output)


def product_rate() -> float:
    """Operations per second of a matrix product of 8192 by 8192 bfloat16 numbers."""
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / measure(lambda: x @ y)


def prefill(
    case: str,
    lengths: tuple[int, ...],
    shape: tuple[int, int, int],
    rates: tuple[float, float],
    device: torch.device,
    bare: bool = True,
    still: float = 0,
) -> Row:
    heads, key_dim, value_dim = shape
    sequences = Sequences(lengths, (0,) * len(lengths), device)
    q, k, v, gate, a, b, a_log, dt_bias, weight = inputs(sequences.total, shape, device)
    rest = (a, b, a_log - still, dt_bias, sequences, None)
    if not bare:
        rest += (gate, weight)
    moved = 2 * q.nbytes + (2 if bare else 3) * v.nbytes
    moved += len(lengths) * heads * key_dim * value_dim * 4
    operations = 6 * key_dim * value_dim + CHUNK * (6 * key_dim + 4 * value_dim)
    return row(
        case,
        lambda: gated_delta_rule(q, k, v, *rest)[0],
        lambda: gated_delta_rule_reference(q, k, v, *rest)[0],
        peer_rule(q, k, v, *rest),
        moved / rates[0],
        sequences.total * heads * operations / rates[1],
    )


def convolution(
    case: str,
    lengths: tuple[int, ...],
    shape: tuple[int, int, int],
    rates: tuple[float, float],
    device: torch.device,
) -> Row:
    channels = shape[0] * (2 * shape[1] + shape[2])
    sequences = Sequences(lengths, (0,) * len(lengths), device)
    x = torch.randn(sequences.total, channels, device=device, dtype=torch.bfloat16)
    weight = torch.randn(channels, WIDTH, device=device, dtype=torch.bfloat16)
    return row(
        case,
        lambda: short_convolution(x, weight, sequences)[0],
        lambda: short_convolution_reference(x, weight, sequences)[0],
        peer_convolution(x, weight),
        2 * x.nbytes / rates[0],
        2 * WIDTH * x.numel() / rates[1],
    )


def step(
    case: str, shape: tuple[int, int, int], rates: tuple[float, float], device: torch.device
) -> Row:
    q, k, v, gate, *rest, weight = inputs(1, shape, device)
    states = torch.randn(STEPS, 1, *shape, device=device)

    before = states.clone()
    reset = measure(lambda: states.copy_(before))
    kernel, reference = (
        graphed(lambda state, f=function: f(q, k, v, *rest, state, gate, weight), states, before)
        for function in (gated_delta_rule_step, gated_delta_rule_step_reference)
    )
    moved, operations = 2 * states[0].nbytes + q.nbytes + 4 * v.nbytes, 7 * states[0].numel()
    result = row(case, kernel, reference, None, moved / rates[0], operations / rates[1])
    for name in ("kernel ms", "reference ms"):
        result[name] = (result[name] - reset * 1e3) / STEPS
    result["kernel / limit"] = result["kernel ms"] / max(result["bytes ms"], result["products ms"])
    return result


def row(
    case: str,
    kernel: Callable[[], Tensor],
    reference: Callable[[], Tensor],
    peer: Callable[[], object] | None,
    moving: float,
    multiplying: float,
) -> Row:
    expected = reference().float()
    error = ((kernel().float() - expected).norm() / expected.norm()).item()
    time = measure(kernel)
    return {
        "case": case,
        "kernel ms": time * 1e3,
        "bytes ms": moving * 1e3,
        "products ms": multiplying * 1e3,
        "kernel / limit": time / max(moving, multiplying),
        "fla ms": None if peer is None else measure(peer) * 1e3,
        "reference ms": measure(reference, repeats=3) * 1e3,
        "error to reference": error,
    }


def inputs(tokens: int, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v as parts of one convolution's output; gate, a, b; a_log, dt_bias and weight."""
    heads, key_dim, value_dim = shape
    numbers = {"device": device, "dtype": torch.bfloat16}
    widths = [heads * key_dim] * 2 + [heads * value_dim]
    q, k, v = torch.randn(tokens, sum(widths), **numbers).split(widths, dim=1)
    gate = torch.randn(tokens, heads, value_dim, **numbers)
    a, b = torch.randn(2, tokens, heads, **numbers)
    a_log = torch.linspace(0.05, 16, heads, device=device).log()
    time_step = torch.logspace(-1, -3, heads, device=device)
    return (
        *(x.unflatten(1, (heads, -1)) for x in (q, k, v)),
        gate,
        a,
        b,
        a_log,
        time_step.expm1().log(),  # softplus of it is the time step
        torch.ones(value_dim, **numbers),
    )


def peer_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    states: None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
) -> Callable[[], object] | None:
    try:
        from fla.modules import FusedRMSNormGated
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    q, k, v, a, b = (x.contiguous()[None] for x in (q, k, v, a, b))
    offsets = None
    if len(sequences.lengths) > 1:
        offsets = torch.tensor(sequences.offsets, device=q.device)
    norm = FusedRMSNormGated(v.shape[-1], device=v.device, dtype=v.dtype)

    def rule() -> Tensor:
        out, _ = chunk_gated_delta_rule(
            q, k, v, a, b,
            output_final_state=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, use_gate_in_kernel=True,
            A_log=a_log, dt_bias=dt_bias, state_v_first=True, cu_seqlens=offsets,
        )  # fmt: skip
        return out if gate is None else norm(out, gate[None])

    return rule


def peer_convolution(x: Tensor, weight: Tensor) -> Callable[[], object] | None:
    try:
        from fla.modules.convolution import causal_conv1d
    except ImportError:
        return None
    return lambda: causal_conv1d(x[None], weight, activation="silu")


if __name__ == "__main__":
    sys.exit(main())
