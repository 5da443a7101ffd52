"""Plans of shared prefixes: every item is fed once, whole, from a snapshot of its own prefix."""

import random

import pytest

from yoco_eval.prefixes import Limits, Size, merge, nest, plan


def run(steps, limits):
    """Follows a plan the way the engine does, checking each step.

    Returns the items fed and the largest number of snapshots, but the first, held at a time.
    """
    snapshots, done, held = [(0, [])], [], 0
    for step in steps:
        while snapshots[-1][0] > step.resume:
            snapshots.pop()
        length, fed = snapshots[-1]
        assert length == step.resume
        if step.last:
            snapshots.pop()
        if step.snapshot:
            (node,) = step.nodes
            assert node.children and not limits.allow(node.size)
            snapshots.append((node.end, follow(node, fed)))
            held = max(held, sum(length > 0 for length, _ in snapshots))
        else:
            size = sum((node.size for node in step.nodes), Size())
            assert limits.allow(size) or not step.nodes[0].children
            for node in step.nodes:
                done += complete(node, fed)
    return done, held


def follow(node, fed):
    assert node.start == len(fed) < node.end
    return fed + list(node.item.tokens[node.start : node.end])


def complete(node, fed):
    fed = follow(node, fed)
    if not node.children:
        assert fed == list(node.item.tokens) and node.start <= node.item.first
        return [node.item]
    assert len(node.children) > 1
    return [item for child in node.children for item in complete(child, fed)]


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


@pytest.mark.parametrize(
    "limits",
    [Limits(), Limits(4, 64, 1, 1), Limits(1000, 1000), Limits(1000, 10**6, room=30, state=9)],
)
@pytest.mark.parametrize("seed", range(5))
def test_plans_are_sound_and_complete(seed, limits):
    wanted = sequences(seed)
    items = merge(*zip(*wanted, strict=True))
    steps = plan(items, limits)
    done, held = run(steps, limits)
    assert max(step.kept for step in steps) == held
    assert len(done) == len(items)
    fed = {index: item for item in done for index in item.requests}
    for index, (tokens, first) in enumerate(wanted):
        assert list(fed[index].tokens) == tokens and fed[index].first == first


@pytest.mark.parametrize("limits", [Limits(), Limits(1000, 1000)])
@pytest.mark.parametrize("seed", range(20))
def test_nested_items_ask_for_the_same_positions(seed, limits):
    """Every request has an item that begins with its tokens; nobody's positions are anyone's."""
    wanted = sequences(seed) + buckets(seed)
    apart = merge(*zip(*wanted, strict=True))
    items = nest(apart)
    done, _ = run(plan(items, limits), limits)
    assert len(done) == len(items) < len(apart)
    assert sorted(i for item in items for i in item.requests) == list(range(len(wanted)))
    for item in items:
        asked = set()
        for tokens, first in map(wanted.__getitem__, item.requests):
            assert list(item.tokens[: len(tokens)]) == tokens
            asked |= set(range(first, len(tokens)))
        assert asked == set(range(item.first, len(item.tokens)))
    assert sum(step.tokens for step in plan(items, Limits())) <= sum(
        step.tokens for step in plan(apart, Limits())
    )


def buckets(seed):
    """Texts cut into buckets, each a request that continues the one before; some are missing."""
    rng = random.Random(f"buckets/{seed}")
    result = []
    for _ in range(4):
        text = [rng.randrange(3) for _ in range(300)]
        cuts = sorted(rng.sample(range(1, 300), 6))
        pairs = [(text[: end - 1], begin - 1) for begin, end in zip(cuts, cuts[1:], strict=False)]
        result += rng.sample(pairs, rng.choice([3, 5]))
    return result


def test_buckets_of_a_text_are_one_item():
    text = list(range(1000))
    cuts = [5, 100, 101, 400, 1000]
    pairs = [(text[: end - 1], begin - 1) for begin, end in zip(cuts, cuts[1:], strict=False)]
    (item,) = nest(merge(*zip(*reversed(pairs), strict=True)))
    assert list(item.tokens) == text[:-1] and item.first == 4
    assert sorted(item.requests) == [0, 1, 2, 3]


def test_a_gap_keeps_items_apart():
    """What lies between two requests' positions is not asked for, and would cost a prediction."""
    text = list(range(1000))
    far, near = (text, 501), (text, 500)
    assert len(nest(merge(*zip((text[:500], 10), far, strict=True)))) == 2
    assert len(nest(merge(*zip((text[:500], 10), near, strict=True)))) == 1
    assert len(nest(merge(*zip((text[:499] + [0], 10), near, strict=True)))) == 2


def cost(pairs, limits=Limits()):  # noqa: B008, it is immutable
    return sum(step.tokens for step in plan(merge(*zip(*pairs, strict=True)), limits))


def test_four_answers_cost_one_context():
    context = list(range(100))
    answers = [(context + [200 + a, 7], 99) for a in range(4)]
    assert cost(answers) == 99 + 4 * 3
    assert cost(answers, Limits(4, 200)) == 99 + 4 * 3


def test_unlike_questions_are_fed_together():
    questions = [([q] * 50 + [a, 1], 49) for q in range(10) for a in range(4)]
    items = merge(*zip(*questions, strict=True))
    (step,) = plan(items, Limits(40, 1000, room=60, state=1, passing=1))
    assert len(step.nodes) == 10 and step.tokens == 10 * (49 + 4 * 3)
    assert len(plan(items, Limits(39, 1000))) == 2
    assert len(plan(items, Limits(40, 609))) == 2
    assert len(plan(items, Limits(40, 1000, room=59, state=1, passing=1))) == 2


def test_equal_inputs_are_fed_once():
    """Answers of one token each ask for different predictions of the same input."""
    assert cost([(list(range(50)), 49)] * 4) == 50


def test_few_shot_prefix_is_fed_once():
    shots = list(range(1000))
    questions = [(shots + [5000 + q] * 30 + [a], 1029) for q in range(10) for a in range(4)]
    assert cost(questions) == 1000 + 10 * (29 + 4 * 2)
    assert cost(questions, Limits(40, 400)) == 1000 + 10 * (29 + 4 * 2)
    assert len(plan(merge(*zip(*questions, strict=True)), Limits(40, 400))) == 2


def test_needles_at_all_depths_share_what_is_before_them():
    """Prompts that differ from some depth on: the haystack's start is fed once."""
    haystack = list(range(1000))
    prompts = [
        (haystack[:depth] + [9999] + haystack[depth:], 1000) for depth in range(0, 1001, 100)
    ]
    assert cost(prompts) == 1001 + sum(1001 - depth for depth in range(0, 1000, 100))


@pytest.mark.slow
def test_deep_trees_need_few_snapshots():
    """Sequences each of which continues the one before: a snapshot is megabytes of a real model."""
    pairs = [(list(range(n)), n - 1) for n in range(1, 100_000, 500)]
    steps = plan(merge(*zip(*pairs, strict=True)), Limits())
    assert sum(step.tokens for step in steps) < 100_000 + 200 * 20
    done, held = run(steps, Limits())
    assert len(done) == 200 and held <= 2


@pytest.mark.slow
def test_trees_deeper_than_the_call_stack():
    pairs = [(list(range(n)), n - 1) for n in range(1, 20_000, 20)]
    for limits in (Limits(), Limits(1000, 300), Limits(1000, 10**9)):
        done, _ = run(plan(merge(*zip(*pairs, strict=True)), limits), limits)
        assert len(done) == 1000


def test_branches_are_far_between():
    """Sequences that leave a long stem at every token."""
    stem = list(range(3000))
    pairs = [(stem[:n] + [9999, n], n + 1) for n in range(1, 3000)]
    steps = plan(merge(*zip(*pairs, strict=True)), Limits())
    done, held = run(steps, Limits())
    assert len(done) == 2999 and held <= 12
    lengths = [step.tokens for step in steps if step.snapshot]
    assert min(lengths) >= 16
    assert sum(step.tokens for step in steps) < 3000 * 50
