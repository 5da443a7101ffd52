"""What processes that hold texts together compute, and one alone: for `test_context_parallel`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from predicting import predictions
from toy_self_decoder import MovingAverageSettings

from yoco_eval.context_parallel import own_group
from yoco_eval.engine import Engine
from yoco_eval.kernels.group import Group
from yoco_eval.model import (
    GatedRetentionSettings,
    Sequences,
    SlidingWindowSettings,
    Span,
    Spans,
    Yoco,
    YocoConfig,
)
from yoco_eval.model.mixers import GatedDeltaNetSettings, RetentionSettings
from yoco_eval.requests import GenerateRequest, ScoreRequest
from yoco_eval.sampling import Sampling

KINDS = {
    "gated_retention": GatedRetentionSettings(2, self_rope_theta=500.0),
    "sliding_window": SlidingWindowSettings(4, 12, n_self_kv_heads=2),
    "gated_deltanet": GatedDeltaNetSettings(2, 4, 8, 12),
    "retention": RetentionSettings(4),
    # Which hands nothing on, so that each process feeds all tokens.
    "moving_average": MovingAverageSettings(9),
}
EIGHT_BITS = "retention"  # in float64: where numbers are not as near, some are rounded otherwise
VOCABULARY = 50
CPU = torch.device("cpu")
GPU_BLOCK = 64  # which kernels count on
# Of a text, fed one after the other: fewer tokens than processes, parts shorter than a window or a
# convolution, and lengths that no number of processes divides.
CHUNKS = (3, 1, 9, 2, 23, 40)


def model_of(kind: str, where: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Yoco:
    """With all weights away from what they are made with."""
    torch.manual_seed(0)
    config = YocoConfig(
        dim=32,
        n_layers=3,
        n_self_layers=2,
        hidden_dim=40,
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=VOCABULARY,
        self_decoder=KINDS[kind],
    )
    model = Yoco(config).double().requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.add_(0.3 * torch.randn_like(weight) - 5 * name.endswith("dt_bias"))
    model.eight_bits = kind == EIGHT_BITS and dtype == torch.float64
    return model.to(where, dtype)


def texts(unit: int, seed: int = 0) -> list[list[int]]:
    """Some share long and short beginnings, as needles in a haystack do; some nothing. Lengths are
    about so many times a few tokens."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    stem, branch = tokens(70 * unit), tokens(21 * unit)
    beginnings = [[], [], stem[: 18 * unit], stem[: 50 * unit]]
    beginnings += [stem, stem, stem + branch, stem + branch]
    return [beginning + tokens(rng.choice([1, 2, 5, 33 * unit])) for beginning in beginnings]


def scored(unit: int) -> list[ScoreRequest]:
    rng = random.Random(1)
    return [
        ScoreRequest(text, [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 4, 45]))])
        for text in texts(unit)
    ]


def prompts(unit: int, rank: int) -> list[GenerateRequest]:
    """Greedy ones, and some that are drawn; of some an end token shortens the answers.

    Each process would draw otherwise, as it would on a processor of another kind.
    """
    rng = random.Random(2)
    requests = []
    for i, text in enumerate(texts(unit, 3)):
        drawn = Sampling(0.8, 0.9, 0, seed=i + 100 * rank) if i % 3 == 2 else Sampling()
        ends = {7, 8, 9} if i % 2 else set()
        requests.append(GenerateRequest(text, rng.choice([1, 5, 11]), ends, sampling=drawn))
    return [*requests, replace(requests[4], max_tokens=9)]


def collected(method: Any, requests: Any) -> list[Any]:
    found = dict(method(requests, begin=lambda tokens: None, progress=lambda done, spared=0: None))
    return [found[index] for index in range(len(requests))]


def fed_in_chunks(model: Yoco, unit: int) -> torch.Tensor:
    """Logits of a text's every token, twice, the second time from a snapshot on."""
    lengths = [unit * tokens for tokens in CHUNKS]
    length = sum(lengths)
    ids = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))
    cache, logits = model.new_cache(length + 5), []
    parts = ids.to(model.device).split(lengths)
    for part in parts[:3]:
        logits.append(predictions(model, model.prefill(part, cache), cache))
    snapshot = cache.state
    for part in (*parts[3:], None, *parts[3:]):
        if part is None:
            cache.restore(snapshot)
        else:
            logits.append(predictions(model, model.prefill(part, cache), cache))
    return torch.cat(logits)


def branched(model: Yoco) -> torch.Tensor:
    """Logits of packed branches behind a text that was fed in parts, the slots out of order."""
    ids = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(2))
    ids, cache = ids.to(model.device), model.new_cache(90)
    cache.room = ((40, 63), (5, 22))
    model.prefill(ids[:40], cache)
    packed = Sequences((9, 1, 10), (40, 40, 40), ids.device, (0, 0, 0))
    cache.room = ((80, 90), (22, 32))
    rows, _ = model.feed(ids[40:], packed, cache.state, cache)
    own = ((0, 9, 80, 89), (9, 10, 89, 90), (10, 20, 22, 32))
    spans = [Span(*one, causal=True) for one in own]
    spans += [Span(0, 20, 40, 63, causal=False), Span(0, 20, 5, 22, causal=False)]
    return model.logits(model.predict(rows, packed.positions, cache, Spans(tuple(spans))))


def decoded(model: Yoco, unit: int) -> torch.Tensor:
    """Logits of a text that is decoded alone, from its first token on and from a prompt's end."""
    logits = []
    for prompt in (0, 31 * unit):
        cache = model.new_cache(prompt + 19)
        if prompt:
            model.prefill(torch.arange(prompt, device=model.device) % VOCABULARY, cache)
        decoder = model.decoder(cache)
        decoder.start(3)
        for _ in range(6):
            decoder.step()
            logits.append(decoder.logits[0].clone())
    return torch.stack(logits)


def everything(
    kind: str,
    group: Group | None,
    where: torch.device = CPU,
    dtype: torch.dtype = torch.float64,
    unit: int = 1,
) -> dict[str, Any]:
    """All that is compared, of texts of about so many times a few tokens."""
    model = model_of(kind, where, dtype)
    model.group = group
    with torch.inference_mode():
        found: dict[str, Any] = {
            "chunks": fed_in_chunks(model, unit).cpu(),
            "branches": branched(model).cpu(),
            "decoded": decoded(model, unit).cpu(),
        }
    asked = prompts(unit, 0 if group is None else group.rank)
    found["answers"] = collected(Engine(model, 5, 30 * unit).generate, asked)
    # Greedy answers are continuations, too: of which each token is the likeliest.
    greedy = [
        ScoreRequest(prompt.context, answer)
        for prompt, answer in zip(asked, found["answers"], strict=True)
        if answer and not prompt.sampling.temperature
    ]
    for batch, chunk in ((1, 16), (None, 40)):
        engine = Engine(model, batch, chunk * unit)
        scores = collected(engine.score, [*scored(unit), *greedy])
        found[f"scores, {chunk}"] = torch.tensor([score.logprob for score in scores]).double()
        found[f"greedy, {chunk}"] = [score.greedy for score in scores]
    return found


def cases(size: int, gpus: bool = False) -> Iterator[tuple[str, int, int]]:
    """Kinds, slots of a block, and how many of `size` processes hold texts together."""
    if gpus:
        yield from ((kind, GPU_BLOCK, size) for kind in KINDS)
        return
    for kind in KINDS if size > 1 else ():
        if size < 4 or kind != "moving_average":
            yield kind, 1, size
    if size == 4:
        yield "gated_retention", 4, 2
    else:
        yield "sliding_window", 16, size


def process(rank: int, size: int, folder: Path, dtype: torch.dtype, gpus: bool) -> None:
    """One of `size`, which leaves what it has found in the folder; on `gpus`, each has its own."""
    torch.set_num_threads(1)
    where = torch.device("cuda", rank) if gpus else CPU
    if gpus:
        torch.cuda.set_device(where)
    meeting, patience = f"file://{folder / 'meeting'}", timedelta(minutes=5)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=patience
    )

    def collect(own: Any) -> list[Any]:
        every = [None] * size
        dist.all_gather_object(every, own)
        return every

    ranks: Any = SimpleNamespace(
        rank=rank, size=size, collect=collect, unless_lost=lambda call: call()
    )
    found: dict[Any, Any] = {}
    unit = GPU_BLOCK if gpus else 1
    for kind, block, count in cases(size, gpus):
        if count > 1:
            group = own_group(count, ranks, where)
            assert group is not None and group.size == count
        else:
            group = Group(dist.group.WORLD)
        group.block = block
        found[kind, block, count] = everything(kind, group, where, dtype, unit)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
