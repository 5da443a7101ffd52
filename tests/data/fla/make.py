"""Makes the folders beside it that MODELS names: small YOCO models of flash-linear-attention.

    python tests/data/fla/make.py [FOLDER]

They are as that library writes them, with random weights moved away from what they are made with,
and with the logits of its class: `expected.pt` has `input_ids` [2, T] and `logits` [2, T,
vocabulary], in float32 without TF32, of its recurrent mode. It needs a GPU and version 0.6.0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

os.environ["TRITON_F32_DEFAULT"] = "ieee"  # when its kernels are compiled, not TF32 either
from fla.models.yoco import YOCOConfig, YOCOForCausalLM  # noqa: E402

TOKENS = 100
MODE = {"mode": "fused_recurrent"}
MODELS = {
    # Another rotary embedding and gate, a norm of the queries, one matrix for both embeddings.
    "retention_tied": {
        "self_decoder_attn": {
            **MODE, "type": "gated_retention", "num_heads": 2, "rope_inv_freq": "fla",
            "gate_logit_normalizer": 8.0,
        },
        "cross_decoder_attn": {
            "num_heads": 2, "num_kv_heads": 1, "qk_norm": True, "rope_inv_freq": "yoco",
        },
        "tie_word_embeddings": True, "norm_eps": 1e-6,
    },
    # More heads of values than of keys, and biases.
    "deltanet_value_heads": {
        "self_decoder_attn": {
            **MODE, "type": "gated_deltanet", "num_heads": 1, "num_v_heads": 2, "head_dim": 16,
            "expand_v": 1.5, "conv_size": 3,
        },
        "cross_decoder_attn": {"num_heads": 2, "qkv_bias": True, "rope_inv_freq": "fla"},
    },
    # Neither convolution nor gate, negative eigenvalues; weights in shards.
    "deltanet_bare": {
        "self_decoder_attn": {
            **MODE, "type": "gated_deltanet", "num_heads": 2, "head_dim": 16, "expand_v": 1.0,
            "use_short_conv": False, "use_gate": False, "allow_neg_eigval": True,
        },
        "cross_decoder_attn": {"num_heads": 2, "num_kv_heads": 1, "qk_norm": True},
    },
}  # fmt: skip
SHARD = {"deltanet_bare": "30KB"}


def main(folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, settings in MODELS.items():
        torch.manual_seed(len(name))
        config = YOCOConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_self_decoder_layers=2,
            intermediate_size=48,
            vocab_size=64,
            max_position_embeddings=512,
            **settings,
        )
        model = YOCOForCausalLM(config).cuda().eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.15 * torch.randn_like(weight)
            ids = torch.randint(64, (2, TOKENS), device="cuda")
            logits = model(input_ids=ids).logits
        model.save_pretrained(folder / name, max_shard_size=SHARD.get(name, "5GB"))
        expected = {"input_ids": ids.cpu(), "logits": logits.float().cpu()}
        torch.save(expected, folder / name / "expected.pt")
        (folder / name / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
