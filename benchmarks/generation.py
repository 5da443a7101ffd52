"""Generation of many prompts side by side, YOCO-3B's shape in bfloat16, beside limit and peer.

    python benchmarks/generation.py [--cases shared distinct alone contexts questions]
        [--sides here peer] [--turns 2] [--no-check] [--output generation.json]

- shared: 256 prompts of 900 tokens, the first 800 of which are the same, 128 new tokens each;
- distinct: 512 prompts of 900 tokens that share nothing, 128 new tokens each;
- alone: 4 such prompts, one after the other (`batch_size=1`);
- contexts: 32 contexts of 64K tokens that share nothing, 128 new tokens each;
- questions: 64 of 16 tokens about one context of 1M, 256 new tokens each, and one of them alone.

Each case is generated with a few new tokens, then with all, in turns, of which the fastest count.
Its first row is of all, prompts included; the one of decoding is of the difference between the two.
Of questions, that row also says how often the time of the one question it takes.

The limit is what `limit` adds up, at the speeds of a large copy and of a large matrix product in
the same run. The peer, for the cases of 900 tokens, is `transformers` generating greedily with a
LlamaForCausalLM of the same width and depth (6 % fewer parameters) and the batch size that is
fastest in a trial of one batch. No answer ends early: tokens are counted in full for both.

Last, a small model in float32 answers 24 prompts of mixed lengths, shared and not, all at once, 7
at a time, and one after the other. Answers must be the same, or part where two tokens are equally
likely, or the script fails.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import clear, copy_bandwidth, count, environment, report, require_gpu, seconds, shown
from delta_rule import product_rate
from scoring import make_llama
from transformers import LlamaForCausalLM

from yoco_eval.engine import Engine
from yoco_eval.model import Yoco
from yoco_eval.model.costs import YocoCosts
from yoco_eval.model.mixers import GatedRetentionSettings
from yoco_eval.model.shapes import SHAPES, set_random_weights
from yoco_eval.requests import GenerateRequest, ScoreRequest, TokenIds

DTYPE = torch.bfloat16
FEW = 16  # new tokens, where all are compared with few
WARM_UP = 4096  # tokens of each prompt that kernels are compiled and chosen with
PEER_BATCHES = (64, 128, 256, 512)  # tried in this order as long as that is faster
SIDES = ("here", "peer")
CHECKED, AT_A_TIME = 24, 7  # answers, and how many of them are in flight in the second round
TIE = 1e-4  # difference of log-likelihoods that float32 leaves open

Row = dict[str, "str | float | None"]


@dataclass(frozen=True)
class Case:
    """`texts` prompts of `own` tokens after `shared` ones; `new` tokens are generated of each.

    Attributes:
        alone: whether one is generated after the other.
        peer: whether the peer generates them, too.
    """

    name: str
    texts: int
    shared: int
    own: int
    new: int
    alone: bool = False
    peer: bool = False


ONE = Case("one question", 1, 1 << 20, 16, 256)
MANY = Case("64 questions", 64, 1 << 20, 16, 256)
CASES = {
    "shared": (Case("shared", 256, 800, 100, 128, peer=True),),
    "distinct": (Case("distinct", 512, 0, 900, 128, peer=True),),
    "alone": (Case("alone", 4, 0, 900, 128, alone=True, peer=True),),
    "contexts": (Case("contexts", 32, 0, 1 << 16, 128),),
    "questions": (ONE, MANY),
}


class Rates(NamedTuple):
    """Bytes per second of a copy, operations per second of a matrix product."""

    copy: float
    product: float


class Times(NamedTuple):
    """Seconds for a case with FEW new tokens, and for the whole of it."""

    few: float
    whole: float

    @property
    def decoding(self) -> float:
        """For the tokens that the one has more than the other."""
        return self.whole - self.few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[*CASES], help="(default: all)"
    )
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[*SIDES], help="(default: both)"
    )
    parser.add_argument("--turns", type=count, default=2, help="of each case here (default: 2)")
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="compare answers"
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    device = require_gpu()
    cases = [case for name in CASES if name in args.cases for case in CASES[name]]
    rates = Rates(copy_bandwidth(), product_rate())
    title = f"Generation, YOCO-3B shape, bfloat16; copy {rates.copy / 1e12:.2f} TB/s, "
    title += f"products {rates.product / 1e12:.0f} TFLOP/s"
    tell(title)
    costs = Yoco.costs_of(SHAPES["3b"])
    here: dict[Case, Times] = {}
    peer: dict[Case, tuple[Times, int]] = {}

    def rows(case: Case) -> list[Row]:
        one = here.get(ONE) if case is MANY else None
        return case_rows(case, limit(case, costs, rates), here.get(case), peer.get(case), one)

    def tell_rows(case: Case) -> None:
        for row in rows(case):
            figures = [f"{shown(x)} {name}" for name, x in row.items() if isinstance(x, float)]
            tell(f"{row['case']}: {', '.join(figures)}")

    if "here" in args.sides:
        for case, times in time_here(cases, args.turns, device):
            here[case] = times
            tell_rows(case)
    if "peer" in args.sides and any(case.peer for case in cases):
        for case, times, batch_size in time_peer([case for case in cases if case.peer], device):
            peer[case] = times, batch_size
            tell_rows(case)
    table = [row for case in cases for row in rows(case)]
    report(title, table, environment("transformers"), args.output)
    if args.check:
        print(check(device))


def limit(case: Case, costs: YocoCosts, rates: Rates) -> Times:
    """The least time that a case takes on this card.

    Prompts: the products that feed their tokens, shared ones once. A prompt's last token is fed by
    the first step of decoding.

    A step, with all texts in flight (or one, if alone), takes the longer of two times. One is that
    of its bytes:
    - every weight once (but the embedding);
    - each text's states, read, and written where they change as a whole;
    - the cached keys and values, once for each layer of the cross-decoder: of shared tokens once
      for all texts, of a text's own tokens once.
    The other is that of its matrix products: 2 operations for each of these weights and each text;
    and in attention, for each layer of the cross-decoder, each token that a text reads and each
    channel of the queries, 2 for the score and 2 for the output.
    """
    config = costs.config
    flight = 1 if case.alone else case.texts
    states = costs.state_bytes(DTYPE) * config.self_decoder.moves
    weights = costs.decode_bytes(DTYPE, 0) - states
    token = costs.cache_bytes(DTYPE, 1) * config.cross_layers
    reading = 4 * config.dim * config.cross_layers

    def step(done: int) -> float:
        own = case.own + done
        moved = weights + case.shared * token + flight * (states + own * token)
        multiplied = 2 * weights // DTYPE.itemsize + (case.shared + own) * reading
        return max(moved / rates.copy, flight * multiplied / rates.product)

    fed = case.shared + case.texts * (case.own - 1)
    feeding = costs.prefill_operations(fed) / rates.product
    steps = [case.texts / flight * step(done) for done in range(case.new)]
    return Times(feeding + sum(steps[:FEW]), feeding + sum(steps))


def time_here(
    cases: Sequence[Case], turns: int, device: torch.device
) -> Iterator[tuple[Case, Times]]:
    model = Yoco.empty(SHAPES["3b"], device, DTYPE)
    set_random_weights(model, 0)
    for case in cases:
        engine = Engine(model, batch_size=1 if case.alone else None)
        contexts = prompts(case)
        run_here(engine, contexts[:, -WARM_UP:], FEW)
        yield case, timed(partial(run_here, engine, contexts), case.new, turns)
        del engine
        clear()


def run_here(engine: Engine, contexts: np.ndarray, new: int) -> None:
    answers = generate(engine, [GenerateRequest(context, new) for context in contexts])
    if any(len(answer) != new for answer in answers):
        sys.exit("error: answers end early")


def time_peer(cases: Sequence[Case], device: torch.device) -> Iterator[tuple[Case, Times, int]]:
    """Yields each case, its times, and the batch size of these."""
    model = make_llama(device)
    model.generation_config.eos_token_id = None
    run_peer(model, prompts(cases[0])[:1], 1, FEW)  # warms up
    together = [case for case in cases if not case.alone]
    sizes = faster_and_faster(model, max(together, key=lambda c: c.texts)) if together else []
    for case in cases:
        size = 1 if case.alone else max(size for size in sizes if size <= case.texts)
        yield case, timed(partial(run_peer, model, prompts(case), size), case.new, 1), size
        clear()


def faster_and_faster(model: LlamaForCausalLM, case: Case) -> list[int]:
    """Batch sizes, up to the first of PEER_BATCHES that is not faster than the one before it.

    Tried on the case with the most texts; the others' prompts are as long.
    """
    sizes, best = [], 0.0
    for size in PEER_BATCHES:
        if size > case.texts:
            break
        clear()
        try:
            time = seconds(partial(run_peer, model, prompts(case)[:size], size, case.new))
        except torch.OutOfMemoryError:
            break
        speed = size * case.new / time
        tell(f"peer, a batch of {size}: {speed:.4g} tokens/s")
        if speed <= best:
            break
        sizes.append(size)
        best = speed
    if not sizes:
        sys.exit(f"error: the peer does not fit with batches of {PEER_BATCHES[0]}")
    return sizes


def run_peer(model: LlamaForCausalLM, contexts: np.ndarray, batch_size: int, new: int) -> None:
    ids = torch.from_numpy(contexts).to(model.device, torch.int64)
    for part in ids.split(batch_size):
        mask = torch.ones_like(part)
        out = model.generate(part, attention_mask=mask, max_new_tokens=new, do_sample=False)
        if out.shape[1] != part.shape[1] + new:
            sys.exit("error: the peer's answers end early")


def timed(run: Callable[[int], object], new: int, turns: int) -> Times:
    """The fastest of so many runs with few new tokens, and of as many with all."""
    taken = [[seconds(partial(run, tokens)) for tokens in (FEW, new)] for _ in range(turns)]
    return Times(*map(min, zip(*taken, strict=True)))


def prompts(case: Case) -> np.ndarray:
    """Random tokens int32 [texts, shared + own]."""
    random = np.random.default_rng(0)
    draw = partial(random.integers, SHAPES["3b"].vocab_size, dtype=np.int32)
    shared = np.broadcast_to(draw(size=case.shared), (case.texts, case.shared))
    return np.concatenate((shared, draw(size=(case.texts, case.own))), axis=1)


def generate(engine: Engine, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """The requests' answers, in their order."""
    answers: list[list[int]] = [[] for _ in requests]
    for index, answer in engine.generate(requests, ignore, ignore):
        answers[index] = answer
    return answers


def ignore(*counts: int) -> None:
    """Progress that nobody watches."""


def check(device: torch.device) -> str:
    """How many answers are the same, however many are in flight; ends the program where one is
    not, unless for a tie."""
    config = replace(
        SHAPES["3b"],
        dim=1024,
        n_layers=8,
        hidden_dim=2816,
        n_attn_heads=8,
        n_attn_kv_heads=2,
        self_decoder=GatedRetentionSettings(n_self_heads=8),
    )
    model = Yoco.empty(config, device, torch.float32)
    set_random_weights(model, 0)
    requests = mixed_requests(config.vocab_size)
    one_by_one = generate(Engine(model, batch_size=1), requests)
    ties = 0
    for batch_size in (None, AT_A_TIME):
        answers = generate(Engine(model, batch_size=batch_size), requests)
        for request, answer, expected in zip(requests, answers, one_by_one, strict=True):
            if answer == expected:
                continue
            gap = parting(model, request.context, answer, expected)
            if not gap < TIE:  # NaN is no tie
                sys.exit(
                    f"error: with batch_size={batch_size} an answer is another one, and not for a "
                    f"tie: log-likelihoods where they part differ by {gap:.2g}"
                )
            ties += 1
    return (
        f"float32, {CHECKED} at once and {AT_A_TIME} at a time, beside one after the other: "
        f"{2 * CHECKED - ties} answers are the same, {ties} part where two tokens are as likely"
    )


def mixed_requests(vocabulary: int) -> list[GenerateRequest]:
    """Every other one behind what these share; prompts and answers of any length."""
    random = np.random.default_rng(0)
    shared = random.integers(vocabulary, size=800)
    requests = []
    for index in range(CHECKED):
        own = random.integers(vocabulary, size=random.integers(1, 300))
        context = np.concatenate((shared, own)) if index % 2 else own
        requests.append(GenerateRequest(context, int(random.integers(1, 65))))
    return requests


def parting(
    model: Yoco, context: TokenIds, answer: Sequence[int], expected: Sequence[int]
) -> float:
    """The difference of log-likelihoods of the first tokens that differ; infinite if one answer is
    longer than the other."""
    if len(answer) != len(expected):
        return math.inf
    place = next(i for i, token in enumerate(answer) if token != expected[i])
    before = np.concatenate((context, np.asarray(expected[:place], dtype=np.int64)))
    pair = [ScoreRequest(before, [tokens[place]]) for tokens in (answer, expected)]
    scores = [score.logprob for _, score in Engine(model).score(pair, ignore, ignore)]
    return abs(scores[0] - scores[1])


def case_rows(
    case: Case,
    least: Times,
    here: Times | None,
    peer: tuple[Times, int] | None,
    one: Times | None,
) -> list[Row]:
    """A row of the whole and one of decoding; `one` is what the latter is compared with."""

    def row(name: str, new: int, part: Callable[[Times], float]) -> Row:
        def speed(times: Times | None) -> float | None:
            return None if times is None else case.texts * new / part(times)

        ours, theirs, most = speed(here), speed(peer and peer[0]), speed(least)
        return {
            "case": name,
            "texts": case.texts,
            "tokens/s": ours,
            "peer tokens/s": theirs,
            "peer's batch": peer and peer[1],
            "times the peer": ratio(ours, theirs),
            "limit tokens/s": most,
            "share of limit": ratio(ours, most),
        }

    whole = row(case.name, case.new, lambda times: times.whole)
    decoding = row(f"{case.name}, decoding", case.new - FEW, lambda times: times.decoding)
    times_one = ratio(here and here.decoding, one and one.decoding)
    return [whole | {"times one question": None}, decoding | {"times one question": times_one}]


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
