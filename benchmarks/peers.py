"""Models of flash-linear-attention: this project against that library's own class, same weights.

    python benchmarks/peers.py [--kinds gated_retention gated_deltanet] [--lengths 64k,256k]
        [--questions 500] [--output peers.json]

Both run YOCO-3B's shape on one card in bfloat16, with random weights of that library's class. Its
prefill leaves the cross-decoder out of all tokens but the last, as its `generate` has it. Multiple
choice goes through lm-eval's `hf` for it, with the batch size that is fastest on a few questions,
and through the engine here; decoding is of one text, after the first of the lengths. The peer's
figures are those of the second run, when its kernels are chosen.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import count, environment, lengths, report, require_gpu, seconds
from fla.models.yoco import YOCOConfig, YOCOForCausalLM
from scoring import TRIAL, make_questions, score, time_hf

from yoco_eval.engine import Engine
from yoco_eval.lengths import format_length
from yoco_eval.memory import chunk_sizes
from yoco_eval.model import Span, Spans, Yoco
from yoco_eval.model.fla import fla_config, fla_weights
from yoco_eval.model.shapes import SHAPES

GIB = 2**30
STEPS = 32  # decoded under the clock
# As wide as that library recommends: the keys of all heads together have 3/4 of the width.
SELF_DECODERS = {
    "gated_retention": {"type": "gated_retention", "num_heads": 24},
    "gated_deltanet": {"type": "gated_deltanet", "num_heads": 9, "head_dim": 256},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kinds", nargs="+", choices=SELF_DECODERS, default=[*SELF_DECODERS], help="(default: all)"
    )
    parser.add_argument(
        "--lengths", type=lengths, default="64k,256k", help="in tokens (default: %(default)s)"
    )
    parser.add_argument("--questions", type=count, default=500, help="(default: 500)")
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    device = require_gpu()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the peer is not loaded by lm-eval
    questions = make_questions(args.questions)
    rows: list[dict[str, str | float | None]] = []

    def keep(kind: str, name: str, figures: dict[str, float], faster: bool) -> None:
        """Adds a row, and tells it; `faster`: whether more is better."""
        ratio = figures["here"] / figures["fla"]
        better = ratio if faster else 1 / ratio
        rows.append({"self-decoder": kind, "": name, **figures, "times better": better})
        print(*rows[-1].values(), file=sys.stderr, flush=True)

    for kind in args.kinds:
        peer = make_peer(kind, device)
        settings = peer.config.to_dict()
        config = fla_config(settings)
        ours = Yoco.of_weights(
            config, fla_weights(config, peer.state_dict()), device, torch.bfloat16
        )
        for length in args.lengths:
            ids = torch.randint(config.vocab_size, (length,), device=device)
            forms = {"here": partial(prefill, ours, ids), "fla": partial(peer_prefill, peer, ids)}
            times, peaks = compare(forms)
            name = f"prefill {format_length(length)}"
            keep(kind, f"{name}, s", times, faster=False)
            keep(kind, f"{name}, GiB beside the weights", peaks, faster=False)
        ids = torch.randint(config.vocab_size, (args.lengths[0],), device=device)
        speeds = {"here": decode_speed(ours, ids), "fla": peer_decode_speed(peer, ids)}
        after = format_length(args.lengths[0])
        keep(kind, f"decoding after {after}, tokens/s", speeds, faster=True)
        engine = Engine(ours, batch_size=None)
        score(engine, questions[:TRIAL])  # kernels are compiled and chosen
        time = seconds(partial(score, engine, questions))
        peer_time, _ = time_hf(peer, questions)
        speeds = {"here": len(questions) / time, "fla": len(questions) / peer_time}
        keep(kind, "multiple choice, questions/s", speeds, faster=True)
        del peer, ours, engine
        clear()
    versions = environment("flash-linear-attention", "transformers", "lm_eval")
    report("YOCO-3B's shape beside flash-linear-attention", rows, versions, args.output)


def make_peer(kind: str, device: torch.device) -> YOCOForCausalLM:
    shape = SHAPES["3b"]
    cross = {"num_heads": shape.n_attn_heads, "num_kv_heads": shape.n_attn_kv_heads}
    config = YOCOConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_self_decoder_layers=shape.self_layers,
        intermediate_size=shape.hidden_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=1 << 18,
        self_decoder_attn=SELF_DECODERS[kind],
        cross_decoder_attn=cross,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = YOCOForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16)


@torch.inference_mode()
def prefill(model: Yoco, ids: torch.Tensor) -> torch.Tensor:
    """Logits after the text."""
    cache = model.new_cache(len(ids))
    for part in ids.split(chunk_sizes(ids.device)[0]):
        rows = model.prefill(part, cache)
    position = torch.tensor([len(ids) - 1], device=ids.device)
    spans = Spans((Span(0, 1, 0, len(ids), causal=True),))
    return model.logits(model.predict(rows[-1:], position, cache, spans))


@torch.inference_mode()
def peer_prefill(model: YOCOForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(
        input_ids=ids[None], use_cache=True, skip_cross_decoder=True, logits_to_keep=1
    ).logits


def compare(forms: dict[str, Callable[[], object]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each form the seconds, and the GiB at the peak beside both models' weights."""
    times, peaks = {}, {}
    for who, form in forms.items():
        clear()
        before = torch.cuda.memory_allocated()
        form()
        torch.cuda.reset_peak_memory_stats()
        times[who] = min(seconds(form) for _ in range(3))
        peaks[who] = (torch.cuda.max_memory_allocated() - before) / GIB
        clear()
    return times, peaks


@torch.inference_mode()
def decode_speed(model: Yoco, ids: torch.Tensor) -> float:
    """Tokens per second."""
    cache = model.new_cache(len(ids) + 2 * STEPS)
    for part in ids.split(chunk_sizes(ids.device)[0]):
        model.prefill(part, cache)
    decoder = model.decoder(cache)
    decoder.start(0)
    for _ in range(3):  # kernels are compiled, and a graph is captured
        decoder.step()
    return STEPS / seconds(lambda: [decoder.step() for _ in range(STEPS)])


@torch.inference_mode()
def peer_decode_speed(model: YOCOForCausalLM, ids: torch.Tensor) -> float:
    made = model(input_ids=ids[None], use_cache=True, skip_cross_decoder=True, logits_to_keep=1)
    past, token = made.past_key_values, made.logits[:, -1:].argmax(-1)

    def steps() -> None:
        nonlocal past, token
        for _ in range(STEPS):
            made = model(input_ids=token, past_key_values=past, use_cache=True)
            past, token = made.past_key_values, made.logits[:, -1:].argmax(-1)

    steps()
    return STEPS / seconds(steps)


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
