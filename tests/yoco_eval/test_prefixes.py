"""Plans of shared prefixes: every item is fed once, whole, from a snapshot of its own prefix."""

import random

import pytest

from yoco_eval.prefixes import merge, plan


def run(steps, max_items, max_tokens):
    """Follows a plan the way the engine does; returns the items in order, checking each step."""
    path, done = [], []
    for step in steps:
        first = step.items[0]
        assert step.resume in [0, *path]
        path = [length for length in path if length <= step.resume]
        assert list(step.snapshots) == sorted(set(step.snapshots))
        assert all(step.resume < length <= first.first for length in step.snapshots)
        for item in step.items:
            assert list(item.tokens[: step.shared]) == list(first.tokens[: step.shared])
            assert step.shared <= item.first
        if done:
            before = done[-1].tokens  # what the snapshot was taken of
            assert list(before[: step.resume]) == list(first.tokens[: step.resume])
        if len(step.items) > 1:
            assert len(step.items) <= max_items
            longest = max(len(item.tokens) - step.shared for item in step.items)
            assert longest * len(step.items) <= max_tokens
            assert step.shared in (step.resume, *step.snapshots)
        path += step.snapshots
        done += step.items
    return done


def sequences(seed):
    rng = random.Random(seed)

    def tokens(n):
        return [rng.randrange(3) for _ in range(n)]

    stem = tokens(200)
    result = []
    for _ in range(40):
        context = stem[: rng.choice([0, 20, 100, 101, 200])] + tokens(rng.choice([1, 5, 60]))
        for _ in range(rng.choice([1, 4])):
            result.append((context + tokens(rng.choice([0, 1, 9])), len(context) - 1))
    return result


@pytest.mark.parametrize("limits", [(1, 0), (4, 64), (1000, 1000)])
@pytest.mark.parametrize("seed", range(5))
def test_plans_are_sound_and_complete(seed, limits):
    wanted = sequences(seed)
    items = merge(*zip(*wanted, strict=True))
    done = run(plan(items, *limits), *limits)
    assert len(done) == len(items)
    fed = {index: item for item in done for index in item.requests}
    for index, (tokens, first) in enumerate(wanted):
        assert list(fed[index].tokens) == tokens and fed[index].first == first


def cost(pairs, *limits):
    return sum(step.tokens for step in plan(merge(*zip(*pairs, strict=True)), *limits))


def test_four_answers_cost_one_context():
    context = list(range(100))
    answers = [(context + [200 + a, 7], 99) for a in range(4)]
    assert cost(answers) == 99 + 4 * 3
    assert cost(answers, 4, 100) == 99 + 4 * 3
    assert len(plan(merge(*zip(*answers, strict=True)), 4, 100)) == 1


def test_equal_inputs_are_fed_once():
    """Answers of one token each ask for different predictions of the same input."""
    assert cost([(list(range(50)), 49)] * 4) == 50


def test_few_shot_prefix_is_fed_once():
    shots = list(range(1000))
    questions = [(shots + [5000 + q] * 30 + [a], 1029) for q in range(10) for a in range(4)]
    assert cost(questions) == 1000 + 10 * (29 + 4 * 2)


def test_needles_at_all_depths_share_what_is_before_them():
    """Prompts that differ from some depth on: the haystack's start is fed once."""
    haystack = list(range(1000))
    prompts = [
        (haystack[:depth] + [9999] + haystack[depth:], 1000) for depth in range(0, 1001, 100)
    ]
    assert cost(prompts) == 1001 + sum(1001 - depth for depth in range(0, 1000, 100))


def test_deep_trees():
    """Ten thousand sequences, each a prefix of the next."""
    pairs = [(list(range(n)), n - 1) for n in range(1, 100_000, 500)]
    assert cost(pairs) < 100_000 + 200 * 20


def test_snapshots_are_few_and_far_between():
    """Branches at every token of a long stem: a snapshot is megabytes of a real model."""
    stem = list(range(3000))
    pairs = [(stem[:n] + [9999, n], n + 1) for n in range(1, 3000)]
    steps = plan(merge(*zip(*pairs, strict=True)))
    run(steps, 1, 0)
    longest = max(steps, key=lambda step: len(step.snapshots)).snapshots
    gaps = [b - a for a, b in zip(longest, longest[1:], strict=False)]
    assert min(gaps) >= 16 and len(longest) <= 65
    assert sum(step.tokens for step in steps) < 3000 * 50
