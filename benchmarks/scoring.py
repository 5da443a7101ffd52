"""lm-eval's multiple-choice requests: this project's engine against lm-eval's own `hf` backend.

    python benchmarks/scoring.py [--questions 2000] [--output scoring.json]

Both get the same token ids on the same card: contexts of 150 tokens with 4 answers of 20 tokens
each. The models have random weights and the same width and depth; the peer, a LlamaForCausalLM, has
6 % fewer parameters, and gets the batch size that is fastest on a few questions.

For the first questions, packed batches are also compared with one request at a time: how many
choices are alike, and by how much log-likelihoods differ on average, the noise. In float32 all
choices must be alike, or the script fails. In bfloat16 the order of additions and roundings moves
log-likelihoods of random weights by some tenths, and with them choices between answers that are
closer than that.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import clear, count, environment, report, require_gpu, seconds
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from yoco_eval.engine import Engine
from yoco_eval.model import Yoco
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT
from yoco_eval.model.shapes import SHAPES, set_random_weights
from yoco_eval.requests import ScoreRequest

CONTEXT, ANSWERS, ANSWER = 150, 4, 20
SMALLEST_BATCH = 32  # of the peer; doubled as long as that is faster
TRIAL = 200  # questions on which batch sizes are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=count, default=2000, help="(default: 2000)")
    parser.add_argument(
        "--checked", type=count, default=200, help="questions also scored one by one"
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    device = require_gpu()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the peer is not loaded by lm-eval
    if args.checked > args.questions:
        parser.error(f"--checked {args.checked}: more than --questions {args.questions}")
    questions = make_questions(args.questions)

    yoco, choices = time_yoco(questions, args.checked, device)
    clear()
    llama, batch_size = time_hf(make_llama(device), questions)
    rows = [
        {
            "backend": "yoco, packed",
            "dtype": kind,
            "questions/s": len(questions) / yoco if kind == "bfloat16" else None,
            "times the peer": llama / yoco if kind == "bfloat16" else None,
            "checked": args.checked,
            "alike": same,
            "noise": noise,
        }
        for kind, (same, noise) in choices.items()
    ]
    peer = {"backend": f"hf, batches of {batch_size}", "dtype": "bfloat16"}
    peer |= {"questions/s": len(questions) / llama, "times the peer": 1.0}
    rows.append(dict.fromkeys(rows[0]) | peer)
    report("Multiple choice, YOCO-3B's size", rows, environment("lm_eval"), args.output)
    if choices["float32"][0] < args.checked:
        sys.exit("error: packed batches and single requests choose differently in float32")


def make_questions(count: int) -> list[tuple[list[int], list[list[int]]]]:
    random = np.random.default_rng(0)
    vocabulary = SHAPES["3b"].vocab_size

    def tokens(length: int) -> list[int]:
        return random.integers(vocabulary, size=length).tolist()

    return [(tokens(CONTEXT), [tokens(ANSWER) for _ in range(ANSWERS)]) for _ in range(count)]


def time_yoco(
    questions: Sequence[tuple[list[int], list[list[int]]]], checked: int, device: torch.device
) -> tuple[float, dict[str, tuple[int, float]]]:
    """Seconds for all questions in bfloat16; and `compare` in bfloat16 and in float32."""
    time, choices = 0.0, {}
    for dtype in (torch.bfloat16, torch.float32):
        model = Yoco.empty(SHAPES["3b"], device, dtype)
        set_random_weights(model, 0)
        packed, single = Engine(model, batch_size=None), Engine(model, batch_size=1)
        score(packed, questions[:TRIAL])  # kernels are compiled and chosen
        if dtype == torch.bfloat16:
            time = seconds(partial(score, packed, questions))
        name = str(dtype).removeprefix("torch.")
        choices[name] = compare(packed, single, questions[:checked])
    return time, choices


def compare(
    packed: Engine, single: Engine, questions: Sequence[tuple[list[int], list[list[int]]]]
) -> tuple[int, float]:
    """How many answers both choose alike, and the mean difference of their log-likelihoods."""
    a, b = score(packed, questions), score(single, questions)
    return int((a.argmax(1) == b.argmax(1)).sum()), float(np.abs(a - b).mean())


def score(engine: Engine, questions: Sequence[tuple[list[int], list[list[int]]]]) -> np.ndarray:
    """Log-likelihoods [questions, ANSWERS]."""
    requests = [
        ScoreRequest(context, answer) for context, answers in questions for answer in answers
    ]
    scores = np.empty(len(requests))
    for index, result in engine.score(requests, begin=lambda n: None, progress=lambda n: None):
        scores[index] = result.logprob
    return scores.reshape(-1, ANSWERS)


def make_llama(device: torch.device) -> LlamaForCausalLM:
    """With random weights, in bfloat16."""
    shape = SHAPES["3b"]
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_attn_heads,
        num_key_value_heads=shape.n_attn_kv_heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def time_hf(
    model: PreTrainedModel, questions: Sequence[tuple[list[int], list[list[int]]]]
) -> tuple[float, int]:
    """Seconds for all questions, and the batch size that was fastest on a few."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / DEFAULT_CHECKPOINT)

    def run(batch_size: int, count: int) -> float:
        clear()  # what another batch size has left in pieces
        backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        requests = [
            (("", ""), context, answer)
            for context, answers in questions[:count]
            for answer in answers
        ]
        return seconds(lambda: backend._loglikelihood_tokens(requests, disable_tqdm=True))

    fastest, best = 0, float("inf")
    batch_size = SMALLEST_BATCH
    while True:
        try:
            run(batch_size, 2 * batch_size // ANSWERS)  # warms up
            time = run(batch_size, TRIAL)
        except torch.OutOfMemoryError:
            break
        if time >= best:
            break
        fastest, best = batch_size, time
        batch_size *= 2
    if not fastest:
        sys.exit(f"error: the peer does not fit with batches of {SMALLEST_BATCH}")
    return run(fastest, len(questions)), fastest


if __name__ == "__main__":
    sys.exit(main())
