"""Generation side by side against its definition: each text alone, one token after the other.

An answer is checked by one full pass over its prompt and itself, which knows nothing of batches and
decoders: each token has to be the likeliest one there, and the answer has to end where it should.
"""

import gc
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from predicting import predictions
from scipy.stats import chi2
from torch.overrides import TorchFunctionMode

from yoco_eval import engine as engine_module
from yoco_eval import generation, memory
from yoco_eval.engine import Engine
from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig
from yoco_eval.model.mixers import (
    KINDS,
    GatedDeltaNetSettings,
    RetentionSettings,
    SlidingWindowSettings,
)
from yoco_eval.model.shapes import set_random_weights
from yoco_eval.model.transformer import Transformer, TransformerConfig
from yoco_eval.requests import GenerateRequest
from yoco_eval.sampling import Sampling

VOCABULARY = 61
SELF_DECODERS = (
    GatedRetentionSettings(2),
    RetentionSettings(3),
    SlidingWindowSettings(3, 11),
    GatedDeltaNetSettings(2, 4, 8, 6),
)


class Ahead(Engine):
    """Does as on a GPU: each step is launched before the tokens of the last one are read, rows of
    texts that have ended go on until others need them, and slots are given in pages."""

    def _generation(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            for module in (engine_module, generation):
                patch.setattr(module, "page_size", lambda device, block: 64)
            run = super()._generation(*args)
        run._on_gpu = True
        return run


# Some prompts are longer than the chunks.
def one(model):
    return Engine(model, batch_size=1, prefill_chunk=19)


def seven(model):
    return Engine(model, batch_size=7, prefill_chunk=64)


def auto(model):
    return Engine(model, batch_size=None)


def ahead(model):
    return Ahead(model, batch_size=13, prefill_chunk=100)


each_engine = pytest.mark.parametrize("engine", (one, seven, auto, ahead))


def make(settings):
    """A small model in float64: a Transformer where there are no `settings` of a self-decoder.

    Its weights are so large that a token far back in the prompt makes a difference to the answer.
    """
    if settings is None:
        config = TransformerConfig(24, 2, 32, n_heads=4, n_kv_heads=2, vocab_size=VOCABULARY)
        model = Transformer.empty(config, torch.device("cpu"), torch.float64)
    else:
        config = YocoConfig(24, 3, 32, 4, 2, VOCABULARY, settings, n_self_layers=2)
        model = Yoco.empty(config, torch.device("cpu"), torch.float64)
    set_random_weights(model, seed=0)
    for weight in model.parameters():
        weight.mul_(20 if weight.dim() > 1 else 1)
    return model


@pytest.fixture(params=(*SELF_DECODERS, None), ids=lambda kind: kind.kind if kind else "plain")
def model(request):
    return make(request.param)


@pytest.fixture
def one_model():
    return make(GatedRetentionSettings(2))


def test_every_kind_is_tested():
    assert {settings.kind for settings in SELF_DECODERS} == set(KINDS)


@dataclass
class Bar:
    """A progress bar."""

    totals: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    spared: list[int] = field(default_factory=list)

    def begin(self, total):
        self.totals.append(total)

    def progress(self, done, spared=0):
        assert done >= 0 and spared >= 0
        self.done.append(done)
        self.spared.append(spared)


def generate(engine, requests, bar=None):
    """All answers, in the order of the requests."""
    bar = bar or Bar()
    answers = list(engine.generate(requests, bar.begin, bar.progress))
    assert sorted(index for index, _ in answers) == list(range(len(requests)))
    assert bar.totals == [sum(bar.done) + sum(bar.spared)]
    return [answer for _, answer in sorted(answers)]


def tokens(rng, count):
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def prompts(rng, count):
    """Trees of prompts, some of which are what others begin with, or others once more."""
    made = [[0], [1]]
    while len(made) < count:
        stem = rng.choice(made) if rng.random() < 0.7 else []
        if rng.random() < 0.4:
            stem = stem[: rng.randrange(len(stem) + 1)]
        prompt = stem + tokens(rng, rng.choice([0, 1, 2, 17, 40]))
        if 0 < len(prompt) < 180:
            made.append(prompt)
    rng.shuffle(made)
    return made


@dataclass
class Stop:
    """Looks for tokens with the remainders `pattern`, as if they spelled a stop string.

    It holds the engine to what that says of the tokens that are known.
    """

    pattern: tuple[int, ...]
    searched: list[int] = field(default_factory=list)

    def find(self, tokens, known=0):
        for end in range(known + 1, len(tokens) + 1):
            stretch = tokens[max(0, end - len(self.pattern)) : end]
            if tuple(token % 5 for token in stretch) == self.pattern:
                return end
        return None

    def __call__(self, tokens, known):
        assert known < len(tokens) and tokens[:known] == self.searched[:known]
        found = self.find(tokens, known)
        self.searched = [] if found else list(tokens)
        return found


NOWHERE = (5,)


def random_request(rng, prompt, sampling=None):
    pattern = rng.choice([NOWHERE, NOWHERE, (rng.randrange(5),), (rng.randrange(5),) * 2])
    return GenerateRequest(
        rng.choice([list, tuple, np.array])(prompt),
        rng.randrange(301) if rng.random() < 0.02 else rng.choice([0, 1, 1, 2, 3, 5, 8, 12, 25]),
        frozenset(tokens(rng, rng.choice([0, 0, 1, 4]))),
        Stop(pattern),
        sampling or Sampling(),
    )


def full_passes(model, requests, answers):
    """Of each request, logits [n + 1, vocabulary] of its answer's n tokens and of what follows."""
    texts = [
        torch.tensor([*request.context, *answer])
        for request, answer in zip(requests, answers, strict=True)
    ]
    logits = [None] * len(texts)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), 16):
        batch = by_length[start : start + 16]
        longest = len(texts[batch[-1]])
        if isinstance(model, Yoco):  # what stands behind a text does not matter to it
            rows = model(
                torch.stack([F.pad(texts[i], (0, longest - len(texts[i]))) for i in batch])
            )
        else:
            caches = [model.new_cache(longest) for _ in batch]
            fed = [model.prefill(texts[i], cache) for i, cache in zip(batch, caches, strict=True)]
            rows = list(map(predictions, [model] * len(batch), fed, caches))
        for i, row in zip(batch, rows, strict=True):
            logits[i] = row[len(requests[i].context) - 1 : len(texts[i])]
    return logits


def ending(request, drawn):
    """The answer that tokens make which are drawn one after the other, and what ended it."""
    answer = []
    for token in drawn[: request.max_tokens]:
        if token in request.end_tokens:
            return answer, "end token"
        answer.append(token)
        if request.stop.find(answer):
            return answer, "stop"
    return answer, "budget" if len(answer) == request.max_tokens else "nothing"


def check_greedy(model, requests, answers):
    """Returns how many answers ended in which way."""
    ends = Counter()
    for request, answer, logits in zip(
        requests, answers, full_passes(model, requests, answers), strict=True
    ):
        best = logits.topk(2)
        # A tie, which rounding decides, would show nothing.
        assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-9
        expected, end = ending(request, best.indices[:, 0].tolist())
        assert answer == expected and all(type(token) is int for token in answer)
        ends[end] += 1
    return ends


@pytest.mark.slow
def test_greedy_answers_are_the_likeliest_tokens_of_each_text_alone(model):
    rng = random.Random(0)
    requests = [random_request(rng, prompt) for prompt in prompts(rng, 200)]
    answers = generate(auto(model), requests)
    ends = check_greedy(model, requests, answers)
    assert min(ends["end token"], ends["stop"], ends["budget"]) > 3
    for engine, some in ((seven, slice(0, None, 3)), (ahead, slice(1, None, 3)), (one, slice(50))):
        assert generate(engine(model), requests[some]) == answers[some]


def random_sampling(rng):
    return Sampling(
        temperature=rng.choice([0.0, 0.5, 1.0, 2.0]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        top_k=rng.choice([0, 3, 20]),
        seed=rng.randrange(2**63),
    )


def chances(logits, sampling):
    """Of each token [vocabulary], the probability to be drawn."""
    ordered, order = (logits / sampling.temperature).sort(descending=True)
    ordered = ordered[: sampling.top_k or None].softmax(-1)
    kept = 1 + int((ordered.cumsum(-1) < sampling.top_p)[:-1].sum())
    result = torch.zeros_like(logits)
    result[order[:kept]] = ordered[:kept] / ordered[:kept].sum()
    return result


@pytest.mark.slow
def test_a_sampled_answer_depends_on_its_seed_alone(model):
    """Neither on its neighbours nor on how many they are; nor on other draws of the process."""
    rng = random.Random(1)
    requests = [random_request(rng, prompt, random_sampling(rng)) for prompt in prompts(rng, 50)]
    answers = generate(auto(model), requests)
    assert generate(seven(model), requests[::-1]) == answers[::-1]
    assert generate(ahead(model), requests[::2]) == answers[::2]
    assert generate(one(model), requests[::4]) == answers[::4]
    for request, answer, logits in zip(
        requests, answers, full_passes(model, requests, answers), strict=True
    ):
        assert ending(request, answer)[0] == answer
        if request.sampling.temperature:
            for token, row in zip(answer, logits, strict=False):
                assert chances(row, request.sampling)[token] > 0


def test_seeds_make_different_answers(one_model):
    def answers(*seeds):
        drawn = [Sampling(temperature=1.0, seed=seed) for seed in seeds]
        requests = [GenerateRequest([1, 2, 3], 12, sampling=sampling) for sampling in drawn]
        return list(map(tuple, generate(auto(one_model), requests)))

    seeds = [0, 1, 2, 3, 2**63 - 1]
    first = answers(*seeds)
    assert len(set(first)) == len(seeds)
    assert answers(*seeds, 0) == [*first, first[0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 3.0, "top_k": 3},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.0},
    ],
    ids=str,
)
def test_pairs_of_tokens_are_drawn_as_often_as_they_should(one_model, sampling):
    """Each from the tempered nucleus, the second one independently of the first."""
    count, prompt = 1500, [5, 8, 13]
    requests = [
        GenerateRequest(prompt, 2, sampling=Sampling(**sampling, seed=seed))
        for seed in range(count)
    ]
    drawn = Counter(map(tuple, generate(auto(one_model), requests)))
    logits = one_model(torch.tensor([[*prompt, token] for token in range(VOCABULARY)]))
    first = chances(logits[0, -2], requests[0].sampling)
    second = torch.stack([chances(row, requests[0].sampling) for row in logits[:, -1]])
    expected = count * first[:, None] * second
    assert all(expected[pair] > 0 for pair in drawn)
    # Chi-squared, of the pairs that are frequent enough for it.
    pairs = list(map(tuple, (expected > 4).nonzero().tolist()))
    statistic = sum((drawn[pair] - expected[pair]) ** 2 / expected[pair] for pair in pairs)
    assert chi2.sf(float(statistic), len(pairs)) > 0.001


def test_nothing_is_made_of_no_requests(one_model):
    assert generate(auto(one_model), []) == []


@each_engine
def test_progress_counts_prompts_and_answers(one_model, engine):
    rng = random.Random(2)
    distinct = [[i, *tokens(rng, rng.randrange(40))] for i in range(20)]
    stem = tokens(rng, 150)
    shared = [stem + tokens(rng, 3) for _ in range(20)]
    for contexts, fed in ((distinct, sum(map(len, distinct))), (shared, 150 + 20 * 3)):
        bar = Bar()
        requests = [random_request(rng, context) for context in contexts]
        requests = [replace(request, max_tokens=request.max_tokens + 1) for request in requests]
        answers = generate(engine(one_model), requests, bar)
        asked = sum(request.max_tokens for request in requests)
        assert bar.totals == [fed + asked]
        assert 0 < sum(bar.spared) <= asked - sum(map(len, answers))


def test_progress_comes_while_an_answer_grows(one_model):
    bar = Bar()
    generate(seven(one_model), [GenerateRequest([3] * 150, 150)], bar)
    assert max(bar.done) <= 64  # a chunk


def ignore(*args, **kwargs):
    """What is told."""


@dataclass
class Until:
    """Ends an answer after so many tokens; knows how far it has come, and tells `told` first."""

    length: int
    told: Callable[[], object] = ignore
    seen: int = 0

    def __call__(self, tokens, known):
        self.told()
        self.seen = len(tokens)
        return self.length if self.complete else None

    @property
    def complete(self):
        return self.seen >= self.length


@pytest.mark.parametrize("engine", (seven, auto))
def test_a_short_answer_does_not_wait_for_a_long_one(one_model, engine):
    long = Until(60)
    requests = [GenerateRequest([3] * 20, 60, stop=long)]
    requests += [GenerateRequest([i] * 20, 2) for i in range(5)]
    answers = engine(one_model).generate(requests, ignore, ignore)
    *short, (last, _) = [(index, long.seen) for index, _ in answers]
    assert last == 0
    assert max(seen for _, seen in short) < 20


class Calls(TorchFunctionMode):
    """Tells of each call of one of PyTorch's functions, with what arguments."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.told(*args)
        return function(*args, **(kwargs or {}))


def test_what_has_ended_makes_room_at_once(one_model):
    """Batches that wait for their longest answer would take half as many steps again."""
    weight, products = one_model.output_projection.weight, Counter()
    rng = random.Random(3)
    requests = [GenerateRequest([i, 7], rng.randrange(1, 31)) for i in range(40)]
    budgets = [request.max_tokens for request in requests]
    with Calls(lambda *args: products.update(arg is weight for arg in args[1:])):
        generate(seven(one_model), requests)
    assert sum(budgets) / 7 <= products[True] <= (sum(budgets) + len(budgets)) / 7 + max(budgets)


@dataclass
class Fuse:
    """Raises `error` when it is told something for the `number`-th time."""

    number: int = 0
    error: type[BaseException] = KeyboardInterrupt
    count: int = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count == self.number:
            raise self.error


def tensors():
    """How many are alive."""
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
@each_engine
@pytest.mark.parametrize(
    ("place", "error"),
    [("call", KeyboardInterrupt), ("progress", KeyboardInterrupt), ("stop", ZeroDivisionError)],
)
def test_a_run_may_break_anywhere(one_model, engine, place, error):
    """What is complete is handed over, no memory is kept, and the engine can be used further."""
    engine = engine(one_model)
    contexts = prompts(random.Random(4), 9)

    def run(fuse):
        stops = [Until(1 + 5 * (i % 4), fuse if place == "stop" else ignore) for i in range(9)]
        requests = [
            GenerateRequest(context, 20, stop=stop)
            for context, stop in zip(contexts, stops, strict=True)
        ]
        answers = {}
        with Calls(fuse if place == "call" else ignore), suppress(fuse.error):
            told = fuse if place == "progress" else ignore
            for index, answer in engine.generate(requests, ignore, told):
                answers[index] = answer
        assert set(answers) == {i for i, stop in enumerate(stops) if stop.complete}
        return answers

    whole = run(Fuse())
    counted = Fuse()
    assert run(counted) == whole
    gc.collect()
    kept, counts = tensors(), set()
    for quarter in (1, 2, 3):
        fuse = Fuse(quarter * counted.count // 4, error)
        answers = run(fuse)
        assert fuse.count >= fuse.number
        assert tensors() == kept
        assert answers == {index: whole[index] for index in answers}
        counts.add(len(answers))
    assert len(counts) > 1


@each_engine
def test_a_run_that_is_left_keeps_no_memory(one_model, engine):
    requests = [GenerateRequest(context, 5) for context in prompts(random.Random(5), 8)]
    generate(engine(one_model), requests)
    gc.collect()
    kept = tensors()
    answers = engine(one_model).generate(requests, ignore, ignore)
    next(answers)
    gc.unfreeze()  # what a run has frozen is not counted
    assert tensors() > kept
    answers.close()
    assert tensors() == kept


@pytest.mark.slow
@pytest.mark.parametrize("engine", (seven, auto, ahead))
def test_answers_are_the_same_where_memory_is_scarce(one_model, engine, monkeypatch):
    """From what is just enough for a run on; the fewer texts fit, the more wait for others."""
    rng = random.Random(7)
    requests = [random_request(rng, prompt) for prompt in prompts(rng, 40)]
    answers = generate(engine(one_model), requests)

    def accepts(free):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        begun = Fuse(1)
        with suppress(KeyboardInterrupt, ValueError):
            list(engine(one_model).generate(requests, begun, ignore))
        return begun.count

    least = bisect_left(range(2**30), True, key=accepts)
    for more in (0, 2**15, 2**17):
        assert accepts(least + more)
        assert generate(engine(one_model), requests) == answers


@pytest.fixture
def overflowing(one_model):
    """A model whose prediction of token 7 is infinite after some texts, as a sign decides."""
    one_model.layer_norm.weight[0] = 100
    one_model.output_projection.weight[7] = 0
    one_model.output_projection.weight[7, 0] = 1e308
    return one_model


@each_engine
def test_an_overflow_is_told_beside_sound_answers(overflowing, engine):
    """Unless it lies behind the end of an answer, where some tokens may have been decoded."""
    starts = torch.arange(VOCABULARY)
    first = overflowing(starts[:, None])[:, -1].max(-1)
    second = overflowing(torch.stack((starts, first.indices), -1))[:, -1].max(-1)
    at_once = first.values.isinf()
    at_once, late, never = (
        [(start, int(first.indices[start])) for start in kind.nonzero()[:, 0].tolist()]
        for kind in (at_once, ~at_once & second.values.isinf(), ~at_once & ~second.values.isinf())
    )
    assert min(len(at_once), len(late), len(never)) > 5
    sound = [GenerateRequest([start], 2) for start, _ in never]
    for start, token in late:
        sound.append(GenerateRequest([start], 1))
        sound.append(GenerateRequest([start], 9, stop=Until(1)))
        sound.append(GenerateRequest([start], 9, frozenset([token])))
    expected = [[token, int(second.indices[start])] for start, token in never]
    for _, token in late:
        expected += [token], [token], []
    assert generate(engine(overflowing), sound) == expected

    drawn = Sampling(temperature=1.0)
    for unsound in (
        GenerateRequest([at_once[0][0]], 1),
        GenerateRequest([at_once[-1][0]], 3, sampling=drawn),
        GenerateRequest([late[0][0]], 2),
        GenerateRequest([late[-1][0]], 9, stop=Until(2)),
    ):
        run = engine(overflowing).generate([*sound, unsound], ignore, ignore)
        with pytest.raises(ValueError, match="predictions are inf: .* overflow in float64"):
            for index, answer in run:
                assert answer == expected[index]
