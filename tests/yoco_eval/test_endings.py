"""Where answers end, against the definition: whole texts, cut again with every token."""

import random

import pytest
from hub_tokenizers import GEMMA_TOKENS, gemma

from yoco_eval.endings import Endings
from yoco_eval.model.checkpoint import BUNDLED
from yoco_eval.tokenizers import load_tokenizer

WORDS = "the special number of a city is found in old notes about Lima and Oslo 4 8 . , \n".split(
    " "
)
CHANNEL_END = GEMMA_TOKENS.index("<channel|>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "demo": load_tokenizer(BUNDLED / "demo-1m"),
        "gemma": load_tokenizer(gemma(tmp_path_factory.mktemp("gemma"))),
    }


def some_tokens(rng, tokenizer, words):
    """Of a text, and others, among them parts of characters."""
    text = " ".join(rng.choice(WORDS) for _ in range(words))
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    tokens += [rng.randrange(4, 300) for _ in range(words // 3)]
    rng.shuffle(tokens)
    return [token for token in tokens if token != CHANNEL_END]


def ends_found(stopper, tokens):
    """What is said of an answer that is looked at after each token, or after many."""
    for every in (1, 5, len(tokens)):
        stop, found = stopper(), None
        for seen in range(0, len(tokens), every):
            found = found or stop(tokens[: seen + every], seen)
        yield found


@pytest.mark.parametrize("clean_up", [False, True])
def test_a_stop_string_is_found_where_it_is_complete(tokenizers, clean_up, monkeypatch):
    tokenizer, rng = tokenizers["demo"], random.Random(6)
    monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", clean_up)
    endings = Endings(tokenizer)
    for _ in range(30):
        tokens = some_tokens(rng, tokenizer, 25)
        whole = tokenizer.decode(tokens)
        begin = rng.randrange(len(whole) - 3)
        until = [whole[begin : begin + rng.choice([1, 2, 6])], "never said"]
        first, *others = ends_found(lambda until=until: endings.stopper(until), tokens)
        assert others == [first, first]
        assert first is None or any(s in tokenizer.decode(tokens[:first]) for s in until)


@pytest.mark.parametrize(
    ("kind", "end"), [("gemma", CHANNEL_END), ("gemma", "Oslo"), ("demo", "</t>")]
)
def test_a_stop_string_counts_after_thinking_and_the_blanks_behind_it(tokenizers, kind, end):
    tokenizer, rng = tokenizers[kind], random.Random(7)
    endings = Endings(tokenizer, end)
    mark = [end] if end == CHANNEL_END else tokenizer(end, add_special_tokens=False).input_ids
    blank = tokenizer("\n", add_special_tokens=False).input_ids

    def said(tokens):
        if end == CHANNEL_END:
            tokens = tokens[tokens.index(end) + 1 :] if end in tokens else []
            return tokenizer.decode(tokens).lstrip()
        return tokenizer.decode(tokens).partition(end)[2].lstrip()

    completed = 0
    for _ in range(60):
        thoughts, words = (some_tokens(rng, tokenizer, n) for n in (12, 18))
        tokens = [*thoughts, *mark, *blank * rng.choice([0, 1, 1, 30]), *words]
        whole = tokenizer.decode(words)
        begin = rng.randrange(len(whole) - 3)
        until = [whole[begin : begin + rng.choice([1, 2, 6])], rng.choice(["\n", "never said"])]
        complete = (any(s in said(tokens[:n]) for s in until) for n in range(1 + len(tokens)))
        first = next((n for n, done in enumerate(complete) if done), None)
        assert list(ends_found(lambda until=until: endings.stopper(until), tokens)) == [first] * 3
        completed += first is not None
    assert completed > 30


def test_marks_between_the_thinking_and_the_answer_are_no_part_of_it(tokenizers):
    tokenizer = tokenizers["gemma"]
    endings = Endings(tokenizer, "<channel|>")
    tokens = tokenizer(
        "<bos>thought<channel|>\n<|channel> \n7\n", add_special_tokens=False
    ).input_ids
    stop = endings.stopper(["\n"])
    ends = [stop(tokens[:end], end - 1) for end in range(1, len(tokens) + 1)]
    assert ends == [None] * (len(tokens) - 1) + [len(tokens)]
    assert endings.answer(tokens, ["\n"]) == "7"
    assert not endings.thinks(tokens) and endings.thinks(tokens[:2])
    assert endings.stopper([]) is None and not Endings(tokenizer).thinks([])


def test_an_end_within_a_token(tmp_path):
    """The answer begins in the token that ends the thinking."""
    tokenizer = load_tokenizer(gemma(tmp_path))
    tokens = [tokenizer.convert_tokens_to_ids(t) for t in ("▁Notes", "▁say", "▁nobody", "▁at")]
    stop = Endings(tokenizer, "Notes s").stopper(["ay"])
    assert [stop(tokens[:end], end - 1) for end in (1, 2)] == [None, 2]
    stop = Endings(tokenizer, "Notes s").stopper(["ay nob"])
    assert [stop(tokens[:end], end - 1) for end in (1, 2, 3)] == [None, None, 3]
