"""The account of a cache's slots: nobody has another's, and all are given back."""

import random

import numpy as np
import pytest

from yoco_eval.pages import Pages, rounded

SLOTS = 64 * 1000


@pytest.mark.slow
@pytest.mark.parametrize("page", [1, 64])
def test_twenty_thousand_texts_of_mixed_lengths(page):
    """As long as there are enough free slots they serve, however they are scattered."""
    rng = random.Random(0)
    account, held, taken, given = Pages(SLOTS, page), [], 0, np.zeros(SLOTS, dtype=bool)
    while taken < 20_000:
        tokens = min(rng.choice([1, 5, 70, 300, 900]) + rng.randrange(300), account.free)
        if tokens and rng.random() < 0.6:
            before = account.free
            held.append(account.take(tokens))
            for first, end in held[-1]:
                assert not given[first:end].any()
                given[first:end] = True
            assert before - account.free == rounded(tokens, page)
            taken += 1
        elif held:
            mine = held.pop(rng.randrange(len(held)))
            for first, end in mine:
                given[first:end] = False
            account.give_back(mine)
    assert account.free == SLOTS - given.sum()
    for mine in held:
        account.give_back(mine)
    assert account.take(SLOTS) == ((0, SLOTS),)


def test_a_run_is_given_where_there_is_one():
    account = Pages(64 * 10, 64)
    texts = [account.take(128) for _ in range(5)]
    for text in texts[::2]:
        account.give_back(text)
    assert account.take(65) == texts[0]
    account.give_back(texts[1])
    assert account.take(250) == ((128, 384),)
    assert account.take(100) == texts[4]
    with pytest.raises(ValueError, match="64 slots .* and 0 are free"):
        account.take(1)
