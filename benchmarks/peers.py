"""Models of other libraries: this project against the library's own class, same weights.

    python benchmarks/peers.py [--kinds gated_retention gated_deltanet gemma4]
        [--lengths 64k,256k] [--questions 500] [--output peers.json]

gated_retention and gated_deltanet are YOCO-3B's shape in flash-linear-attention, whose prefill
leaves the cross-decoder out of all tokens but the last, as its `generate` has it. gemma4 is the
shape of Gemma 4 E2B in transformers, to be given lengths up to 128k, which it is fed in chunks of
8192 tokens. All run on one card in bfloat16, with random weights.

Multiple choice goes through lm-eval's `hf` for the peer, with the batch size that is fastest on a
few questions, and through the engine here. flash-linear-attention decodes one text, after the first
of the lengths; transformers generates 128 tokens after each of 256 prompts of 900, with the fastest
of a few batch sizes. Figures are those of the second run, when kernels are chosen.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common import clear, count, environment, lengths, report, require_gpu, seconds
from early_exit import GEMMA4
from generation import Case, faster_and_faster, prompts, run_here, run_peer
from scoring import TRIAL, make_questions, score, time_hf
from torch import Tensor
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedModel

from yoco_eval.engine import Engine
from yoco_eval.lengths import format_length
from yoco_eval.memory import chunk_sizes
from yoco_eval.model import Model, Span, Spans, Yoco
from yoco_eval.model.fla import fla_config, fla_weights
from yoco_eval.model.gemma4 import Gemma4
from yoco_eval.model.gemma4_config import Gemma4Config
from yoco_eval.model.gemma_folder import turned
from yoco_eval.model.interface import take
from yoco_eval.model.linear import set_weights
from yoco_eval.model.shapes import SHAPES

GIB = 2**30
STEPS = 32  # decoded under the clock
PEER_CHUNK = 8192  # tokens that transformers is fed at a time
# As wide as flash-linear-attention recommends: the keys of all heads together have 3/4 of the
# width.
SELF_DECODERS = {
    "gated_retention": {"type": "gated_retention", "num_heads": 24},
    "gated_deltanet": {"type": "gated_deltanet", "num_heads": 9, "head_dim": 256},
}
KINDS = [*SELF_DECODERS, "gemma4"]
PROMPTS = Case("gemma4", 256, 0, 900, 128)
E2B = GEMMA4["E2B"] | {"final_logit_softcapping": 30.0}


class Pair(NamedTuple):
    """A peer's model, the same here, and how the peer is fed a text, up to its last logits."""

    library: str
    peer: PreTrainedModel
    ours: Model
    feed: Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=[*SELF_DECODERS],
        help="(default: those of fla)",
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
        ratio = figures["here"] / figures["peer"]
        better = ratio if faster else 1 / ratio
        rows.append({"model": kind, "": name, **figures, "times better": better})
        print(*rows[-1].values(), file=sys.stderr, flush=True)

    libraries = set()
    for kind in args.kinds:
        pair = gemma4_pair(device) if kind == "gemma4" else fla_pair(kind, device)
        libraries.add(pair.library)
        for length in args.lengths:
            ids = torch.randint(pair.ours.config.vocab_size, (length,), device=device)
            forms = {"here": partial(prefill, pair.ours, ids), "peer": partial(pair.feed, ids)}
            times, peaks = compare(forms)
            name = f"prefill {format_length(length)}"
            keep(kind, f"{name}, s", times, faster=False)
            keep(kind, f"{name}, GiB beside the weights", peaks, faster=False)
        if kind == "gemma4":
            name = f"generation, {PROMPTS.texts} prompts, tokens/s"
            keep(kind, name, generation_speeds(pair), faster=True)
        else:
            ids = torch.randint(pair.ours.config.vocab_size, (args.lengths[0],), device=device)
            speeds = {"here": decode_speed(pair.ours, ids), "peer": peer_decode_speed(pair, ids)}
            after = format_length(args.lengths[0])
            keep(kind, f"decoding after {after}, tokens/s", speeds, faster=True)
        engine = Engine(pair.ours, batch_size=None)
        score(engine, questions[:TRIAL])  # kernels are compiled and chosen
        time = seconds(partial(score, engine, questions))
        peer_time, _ = time_hf(pair.peer, questions)
        speeds = {"here": len(questions) / time, "peer": len(questions) / peer_time}
        keep(kind, "multiple choice, questions/s", speeds, faster=True)
        del pair, engine
        clear()
    versions = environment(*sorted(libraries), "lm_eval")
    report("Beside the library's own class", rows, versions, args.output)


def gemma4_pair(device: torch.device) -> Pair:
    peer = drawn(lambda: Gemma4ForCausalLM(Gemma4TextConfig(**E2B)), device)
    peer.generation_config.eos_token_id = None
    config = Gemma4Config.from_dict(E2B)
    weights = {name.removeprefix("model."): w for name, w in peer.state_dict().items()}
    ours = Gemma4.empty(config, device, torch.bfloat16)
    set_weights(ours, turned(weights, config.layout))

    @torch.inference_mode()
    def feed(ids: Tensor) -> Tensor:
        past = DynamicCache(config=peer.config)
        for part in ids[None].split(PEER_CHUNK, 1):
            made = peer(input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=1)
        return made.logits

    return Pair("transformers", peer, ours, feed)


def fla_pair(kind: str, device: torch.device) -> Pair:
    from fla.models.yoco import YOCOConfig, YOCOForCausalLM

    shape = SHAPES["3b"]
    cross = {"num_heads": shape.n_attn_heads, "num_kv_heads": shape.n_attn_kv_heads}
    settings = YOCOConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_self_decoder_layers=shape.self_layers,
        intermediate_size=shape.hidden_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=1 << 18,
        self_decoder_attn=SELF_DECODERS[kind],
        cross_decoder_attn=cross,
    )
    peer = drawn(lambda: YOCOForCausalLM(settings), device)
    config = fla_config(peer.config.to_dict())
    ours = Yoco.of_weights(config, fla_weights(config, peer.state_dict()), device, torch.bfloat16)

    @torch.inference_mode()
    def feed(ids: Tensor) -> Tensor:
        return peer(
            input_ids=ids[None], use_cache=True, skip_cross_decoder=True, logits_to_keep=1
        ).logits

    return Pair("flash-linear-attention", peer, ours, feed)


def drawn(make: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
    """With random weights, in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = make().eval()
    torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16)


@torch.inference_mode()
def prefill(model: Model, ids: Tensor) -> Tensor:
    """Logits after the text."""
    cache = model.new_cache(len(ids))
    for part in ids.split(chunk_sizes(model.costs, ids.device)[0]):
        rows = model.prefill(part, cache)
    position = torch.tensor([len(ids) - 1], device=ids.device)
    spans = Spans((Span(0, 1, 0, len(ids), causal=True, start=0),))
    return model.logits(model.predict(take(rows, slice(-1, None)), position, cache, spans))


def generation_speeds(pair: Pair) -> dict[str, float]:
    """Tokens per second, prompts included, with the peer's fastest batch size."""
    contexts, tokens = prompts(PROMPTS), PROMPTS.texts * PROMPTS.new
    engine = Engine(pair.ours, batch_size=None)
    run = partial(run_here, engine, contexts, PROMPTS.new)
    run()  # kernels are compiled and chosen
    here = seconds(run)
    del engine
    size = faster_and_faster(pair.peer, PROMPTS)[-1]
    clear()
    peer = seconds(partial(run_peer, pair.peer, contexts, size, PROMPTS.new))
    return {"here": tokens / here, "peer": tokens / peer}


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
def decode_speed(model: Model, ids: Tensor) -> float:
    """Tokens per second."""
    cache = model.new_cache(len(ids) + 2 * STEPS)
    for part in ids.split(chunk_sizes(model.costs, ids.device)[0]):
        model.prefill(part, cache)
    decoder = model.decoder(cache)
    decoder.start(0)
    for _ in range(3):  # kernels are compiled, and a graph is captured
        decoder.step()
    return STEPS / seconds(lambda: [decoder.step() for _ in range(STEPS)])


@torch.inference_mode()
def peer_decode_speed(pair: Pair, ids: Tensor) -> float:
    model = pair.peer
    made = model(input_ids=ids[None], use_cache=True, skip_cross_decoder=True, logits_to_keep=1)
    past, token = made.past_key_values, made.logits[:, -1:].argmax(-1)

    def steps() -> None:
        nonlocal past, token
        for _ in range(STEPS):
            made = model(input_ids=token, past_key_values=past, use_cache=True)
            past, token = made.past_key_values, made.logits[:, -1:].argmax(-1)

    steps()
    return STEPS / seconds(steps)


if __name__ == "__main__":
    sys.exit(main())
