"""Prefill of the YOCO-3B shape against its matrix products run alone, and its peak of memory.

    python benchmarks/prefill.py [--model phi4flash] [--lengths 64k,1m] [--chunk 12672]
        [--output prefill.json]

The model phi4flash is Phi-4-mini-flash in place of YOCO-3B.

Both feed the same number of tokens in the same chunks through the same weights, in turns. The
products alone are the library's. What the ratio is above 1 is everything else, norms, retention
(or scans and windows), activation, cache, and by how much our fused products are slower or faster
than the library's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import count, environment, in_turns, lengths, report, require_gpu
from early_exit import MODELS
from torch import nn

from yoco_eval.lengths import format_length
from yoco_eval.memory import chunk_sizes
from yoco_eval.model import Model, Yoco
from yoco_eval.model.phi4flash import Phi4Flash
from yoco_eval.model.shapes import SHAPES, set_random_weights

GIB = 2**30


def yoco_3b(device: torch.device) -> tuple[Model, list[torch.Tensor]]:
    """The model, and the weights that every token is multiplied by."""
    model = Yoco.empty(SHAPES["3b"], device, torch.bfloat16)
    set_random_weights(model, 0)
    weights = []
    for layer in model.self_decoder.layers:
        weights += [layer.mixer.stack.weight, layer.mixer.out_proj.weight]
        weights += [layer.ffn.stack.weight, layer.ffn.fc2.weight]
    return model, [*weights, model.cross_decoder.stack.weight]


def phi4flash(device: torch.device) -> tuple[Model, list[torch.Tensor]]:
    """As `yoco_3b`."""
    config = MODELS["Phi-4-mini-flash"]
    model = Phi4Flash.empty(config, device, torch.bfloat16)
    set_random_weights(model, 0)
    weights = []
    for layer in (*model.mamba_layers, *model.window_layers, model.memory_layer):
        parts = [part.weight for part in layer.mixer.modules() if isinstance(part, nn.Linear)]
        weights += [*parts, layer.fc1.weight, layer.fc2.weight]
    return model, [*weights, model.cache_layer.mixer.projection.weight[config.hidden_size :]]


MAKERS: dict[str, Callable[[torch.device], tuple[Model, list[torch.Tensor]]]] = {
    "yoco-3b": yoco_3b,
    "phi4flash": phi4flash,
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MAKERS, default="yoco-3b", help="(default: %(default)s)")
    parser.add_argument(
        "--lengths", type=lengths, default="64k,1m", help="in tokens (default: %(default)s)"
    )
    parser.add_argument("--chunk", type=count, help="tokens fed at a time (default: as the engine)")
    parser.add_argument(
        "--turns", type=count, default=3, help="of each; their median counts (default: 3)"
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    device = require_gpu()
    model, multiplied = MAKERS[args.model](device)
    chunk = args.chunk or chunk_sizes(model.costs, device)[0]
    weights = torch.cuda.memory_allocated()
    rows = []
    for length in args.lengths:
        ids = torch.randint(model.config.vocab_size, (length,), device=device)
        feed(model, ids[: 4 * chunk], length, chunk)  # kernels are compiled and chosen
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        feed(model, ids, length, chunk)
        peak = torch.cuda.max_memory_allocated()
        products = matrix_products(multiplied, chunk)
        alone(products, 4 * chunk)
        forms = {
            "products": partial(alone, products, length),
            "prefill": partial(feed, model, ids, length, chunk),
        }
        times = in_turns(forms, args.turns)
        del products, forms
        cache = model.costs.cache_bytes(torch.bfloat16, length)
        rows.append(
            {
                "tokens": format_length(length),
                "prefill s": times["prefill"],
                "products s": times["products"],
                "ratio": times["prefill"] / times["products"],
                "peak GiB": peak / GIB,
                "beyond weights and cache GiB": (peak - weights - cache) / GIB,
            }
        )
    title = f"Prefill, {args.model}, bfloat16, {chunk} tokens at a time"
    report(title, rows, environment(), args.output)


def feed(model: Model, ids: torch.Tensor, capacity: int, chunk: int) -> None:
    cache = model.new_cache(capacity)
    for part in ids.split(chunk):
        model.prefill(part, cache)


def matrix_products(
    weights: list[torch.Tensor], chunk: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(input, weight, output) of every product that a chunk takes."""
    inputs, outputs = {}, {}
    for weight in weights:
        rows, columns = weight.shape
        if columns not in inputs:
            inputs[columns] = torch.randn(chunk, columns, dtype=weight.dtype, device=weight.device)
        if rows not in outputs:
            outputs[rows] = torch.empty(chunk, rows, dtype=weight.dtype, device=weight.device)
    return [(inputs[w.shape[1]], w.t(), outputs[w.shape[0]]) for w in weights]


def alone(products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], length: int) -> None:
    chunk = max(len(x) for x, _, _ in products)
    for start in range(0, length, chunk):
        tokens = min(chunk, length - start)
        for x, weight, out in products:
            torch.mm(x[:tokens], weight, out=out[:tokens])


if __name__ == "__main__":
    sys.exit(main())
