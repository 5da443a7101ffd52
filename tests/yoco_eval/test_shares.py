"""Requests divided among processes: all of them, each once, shared tokens fed once, fair loads."""

import random

import numpy as np
import pytest

from yoco_eval.prefixes import Limits, merge, nest, plan
from yoco_eval.shares import divide


def fed(items):
    return sum(step.tokens for step in plan(items, Limits()))


def shared_out(sequences, firsts, count, costs=None, feeding=float):
    """Requests of each process, and the tokens that it feeds as the engine does."""
    costs = costs or [0] * len(sequences)
    items = nest(merge(sequences, firsts))
    shares = divide(items, count, feeding, costs.__getitem__)
    assert len(shares) == count
    assert sorted(index for share in shares for index in share) == list(range(len(sequences)))
    loads = []
    for share in shares:
        own = nest(merge([sequences[i] for i in share], [firsts[i] for i in share]))
        loads.append(fed(own) + sum(costs[i] for i in share))
    return shares, loads, fed(items) + sum(costs)


def grid(lengths, depths, samples, introduction=0, question=12):
    """Prompts of needles, as lm-eval deals them out: by length, sample and depth."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 1000, introduction)
    texts = [rng.integers(0, 1000, max(lengths)) for _ in range(samples)]
    return [
        np.concatenate(
            (
                before,
                text[: int(depth * length)],
                1000 + rng.integers(0, 1000, question),
                text[int(depth * length) : length],
                1000 + rng.integers(0, 1000, question),
            )
        )
        for length in lengths
        for text in texts
        for depth in np.linspace(0, 1, depths)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_needle_grids(count):
    """Haystacks stay whole where that is fair; else few tokens are fed twice."""
    for introduction in (0, 40):
        prompts = grid([256, 512, 1024], 6, 24, introduction)
        firsts = [len(prompt) - 1 for prompt in prompts]
        _, loads, total = shared_out(prompts, firsts, count, [4 * 16] * len(prompts))
        assert sum(loads) == total + (count - 1) * introduction
        assert max(loads) <= 1.15 * sum(loads) / count
    prompts = grid([1024, 4096], 11, 2)
    firsts = [len(prompt) - 1 for prompt in prompts]
    _, loads, total = shared_out(prompts, firsts, count)
    assert sum(loads) <= 1.12 * total and max(loads) <= 1.2 * total / count


@pytest.mark.parametrize("seed", range(6))
def test_any_forest(seed):
    rng = random.Random(seed)

    def tokens(n):
        return [rng.randrange(50) for _ in range(n)]

    stems = [tokens(rng.choice([10, 100, 900])) for _ in range(rng.choice([1, 3, 9]))]
    sequences, firsts, costs = [], [], []
    for _ in range(60):
        stem = rng.choice(stems)
        context = stem[: rng.randrange(len(stem) + 1)] + tokens(rng.choice([1, 30, 300]))
        sequences.append(context + tokens(rng.choice([0, 1, 40])))
        firsts.append(len(context) - 1)
        costs.append(rng.choice([0, 3, 200]))
    for count in (2, 3, 7):
        shares, loads, total = shared_out(sequences, firsts, count, costs)
        heaviest = max(len(s) + c for s, c in zip(sequences, costs, strict=True))
        assert max(loads) <= max(1.4 * total / count, heaviest)
        assert shares == shared_out(sequences, firsts, count, costs)[0]


def test_a_tree_is_cut_where_it_pays_alone():
    stem = list(range(1000, 2000))
    # What is shared is all that there is to feed.
    few = [[*stem, i] for i in range(8)]
    shares, loads, total = shared_out(few, [1000] * 8, 4)
    assert sum(map(bool, shares)) == 1 and max(loads) == total
    # Questions of 500 tokens: feeding the text twice is better than waiting.
    many = [stem + [i] * 500 for i in range(8)]
    shares, loads, total = shared_out(many, [1499] * 8, 2)
    assert [len(share) for share in shares] == [4, 4] and sum(loads) == total + 1000
    # As many texts as processes: nothing is fed twice, though one text is somewhat longer.
    texts = [[i] * (1000 + 50 * (i == 2)) + [j] for i in range(4) for j in range(3)]
    shares, loads, total = shared_out(texts, [len(text) - 1 for text in texts], 4)
    assert sum(loads) == total and {len(share) for share in shares} == {3}


@pytest.mark.parametrize("count", [40, 60, 100, 200])
def test_examples_that_many_questions_share(count):
    """Each of many processes feeds one text's examples, and about as many questions as others."""
    rng = np.random.default_rng(0)
    examples = [rng.integers(0, 1000, rng.integers(60, 240)) for _ in range(7)]
    texts = [np.append(e, 1000 + rng.integers(0, 1000, 20)) for e in examples for _ in range(200)]
    _, loads, total = shared_out(texts, [len(text) - 1 for text in texts], count)

    def needed(most):
        """Processes, if each may have so much."""
        return sum(-(-200 // ((most - len(e)) // 20)) for e in examples)

    least = next(most for most in range(260, total) if needed(most) <= count)
    assert max(loads) <= 1.03 * least


def test_loads_are_close_where_that_is_free():
    """Of a few heavy trees, parts go to where there is room."""
    rng = random.Random(0)
    trees = [[i] * 40 for i in range(5)]
    texts = [tree + [rng.randrange(50) for _ in range(200)] for tree in trees for _ in range(60)]
    for count in (3, 4, 7):
        _, loads, total = shared_out(texts, [len(text) - 1 for text in texts], count)
        assert max(loads) <= 1.03 * total / count


def test_answers_count():
    """A text that is asked many times goes to many; so do texts with long answers."""
    shares, loads, total = shared_out([[1, 2, 3]] * 64, [2] * 64, 4, [1000] * 64)
    assert max(map(len, shares)) <= 17
    texts = [[i] * 20 for i in range(12)]
    costs = [900] * 3 + [100] * 9
    shares, loads, total = shared_out(texts, [19] * 12, 3, costs)
    assert max(loads) <= 1.01 * total / 3


def test_attention_counts():
    """Of a model whose costs grow with the square, one long text weighs as four of half."""
    texts = [[0] * 800, *([i] * 400 for i in range(1, 5))]
    shares, _, _ = shared_out(texts, [len(t) - 1 for t in texts], 2, feeding=lambda n: n * n)
    assert sorted(map(sorted, shares)) == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize("sequences", [[], [[1]]])
def test_fewer_requests_than_processes(sequences):
    shares, _, _ = shared_out(sequences, [0] * len(sequences), 3)
    assert sum(map(len, shares)) == len(sequences)
