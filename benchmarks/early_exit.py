"""What early exit saves of prefill, counted from the shapes of published models; nothing is run.

    python benchmarks/early_exit.py [--lengths 4k,32k,128k] [--output FILE.json]

Counted are the matrix products with weights and those of attention, two operations for each
multiplication, of all tokens of a prompt: in the layers before the exit, and for its keys and
values; against all layers. Logits are left out of both, and so are scans, convolutions and norms.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import lengths, report
from torch import nn

from yoco_eval.lengths import format_length
from yoco_eval.model import YocoConfig
from yoco_eval.model.families import model_class
from yoco_eval.model.gemma3n_config import Gemma3nConfig
from yoco_eval.model.gemma4_config import Gemma4Config
from yoco_eval.model.phi4flash_config import Phi4FlashConfig
from yoco_eval.model.shapes import SHAPES

KIB, MIB = 2**10, 2**20
BFLOAT16 = torch.bfloat16
SLIDING, FULL = "sliding_attention", "full_attention"
# As their configurations have them; what these share is the default.
GEMMA4 = {
    "E2B": {
        "num_hidden_layers": 35, "layer_types": [*[SLIDING] * 4, FULL] * 7,
        "num_kv_shared_layers": 20, "hidden_size": 1536, "intermediate_size": 6144,
        "use_double_wide_mlp": True, "num_key_value_heads": 1,
    },
    "E4B": {
        "num_hidden_layers": 42, "layer_types": [*[SLIDING] * 5, FULL] * 7,
        "num_kv_shared_layers": 18, "hidden_size": 2560, "intermediate_size": 10240,
        "num_key_value_heads": 2,
    },
}  # fmt: skip
GEMMA3N = {
    "E2B": {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": 8192},
    "E4B": {"num_hidden_layers": 35, "num_kv_shared_layers": 15, "intermediate_size": 16384},
}
MODELS: dict[str, Any] = {
    "YOCO-3B": SHAPES["3b"],
    **{f"Gemma 4 {size}": Gemma4Config.from_dict(own) for size, own in GEMMA4.items()},
    **{f"Gemma 3n {size}": Gemma3nConfig.from_dict(own) for size, own in GEMMA3N.items()},
    "Phi-4-mini-flash": Phi4FlashConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=40,
        num_key_value_heads=20, sliding_window=512, vocab_size=200064,
        max_position_embeddings=262144,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=lengths, default="4k,32k,128k")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    rows = [row(name, args.lengths) for name in MODELS]
    report("What early exit saves of prefill", rows, {}, args.output)


def row(name: str, prompts: list[int]) -> dict[str, Any]:
    """Of a model: layers, the share saved by prompt length, bytes in bfloat16."""
    config = MODELS[name]
    costs, context = model_class(config).costs_of(config), config.max_position_embeddings
    before, behind = layers(config)
    shares = {
        format_length(length): f"{100 * saved(config, length):.0f} %" if length <= context else None
        for length in prompts
    }
    return {
        "model": name,
        "parameters": f"{costs.weight_bytes(BFLOAT16) / 2e9:.1f}e9",
        "context": format_length(context),
        "layers": f"{before} + {behind}",
        **shares,
        "cache, KiB/token": f"{costs.cache_bytes(BFLOAT16, 1) / KIB:.0f}",
        "snapshot, MiB": f"{costs.state_bytes(BFLOAT16) / MIB:.0f}",
    }


def layers(config: Any) -> tuple[int, int]:
    """How many make keys and values or states that are kept, and how many only read them."""
    if isinstance(config, YocoConfig):
        return config.self_layers, config.cross_layers
    if isinstance(config, Phi4FlashConfig):
        before = config.memory_layer + 2
        return before, config.num_hidden_layers - before
    return config.layout.exit + 1, config.layout.shared


def saved(config: Any, length: int) -> float:
    """The share of operations that early exit leaves out of `length` tokens."""
    kind = model_class(config)
    with torch.device("meta"):
        model = kind(config)
    done = kind.costs_of(config).prefill_operations(length)
    if isinstance(config, YocoConfig):
        left = 2 * length * maps(model.cross_decoder.layers)
        left += config.cross_layers * 4 * config.dim * pairs(length)
        return left / (done + left)
    if isinstance(config, Phi4FlashConfig):
        # A score has head_dim channels, and what it weighs twice as many.
        each = 6 * config.hidden_size
        windows = config.memory_layer // 2 * each * pairs(length, config.sliding_window)
        done += windows
        attended = windows + config.num_hidden_layers // 4 * each * pairs(length)
    else:
        layout, heads = config.layout, config.num_attention_heads
        attended = sum(
            4 * heads * layout.heads(layer).dim * layout.pairs(layer, length)
            for layer in range(len(layout.kinds))
        )
    return 1 - done / (2 * length * maps(model) + attended)


def maps(module: nn.Module) -> int:
    """Numbers of its linear maps."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def pairs(length: int, window: int | None = None) -> int:
    """Of tokens with those that they attend to."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


if __name__ == "__main__":
    main()
