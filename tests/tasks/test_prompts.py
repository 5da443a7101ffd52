"""Prompts have exactly the tokens they say, and needles stand where the depth says."""

import random
from functools import partial

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from yoco_eval.encoding import Encoder
from yoco_eval.tasks.evaluated_model import load_tokenizer
from yoco_eval.tasks.haystack import SyntheticHaystack, TextHaystack
from yoco_eval.tasks.prompts import SLACK, Notes, TokenCounter
from yoco_eval.tasks.wording import CITIES, INTRODUCTION, NEEDLE, QUESTION

KINDS = ["demo", "byte-level", "unigram", "sentencepiece", "tiktoken"]
DEPTHS = [0, 0.03, 0.5, 0.97, 1]
ROUGH = ["word", "Don't ", "  ", "\n", "\n\n", "\t", ". ", "! ", ", ", "123", "4", "é", "日本語"]
ROUGH += ["。", "🙂", "\r\n", "a", "B", "http://x.y/z?", "</b>", " ", " ", " "]


def rough_text():
    draw = random.Random(1)
    return "".join(draw.choice(ROUGH) for _ in range(60_000))


HAYSTACKS = {
    "synthetic": SyntheticHaystack(0),
    "rough": TextHaystack("rough", rough_text()),
    "one word": TextHaystack("word", "x1y2z3" * 20_000),
}


def needle_and_question(city, number=48213):
    return NEEDLE.format(city=city, number=number), QUESTION.format(city=city)


def tokens(tokenizer, text):
    return len(tokenizer(text, verbose=False).input_ids)


def test_a_tokenizer_with_an_empty_vocabulary_is_refused():
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({}, [])), name_or_path="dir/t")
    with pytest.raises(ValueError, match="^dir/t: finds no token in a plain text"):
        TokenCounter(empty)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", HAYSTACKS)
def test_every_prompt_has_the_tokens_it_says(tokenizers, kind, source):
    tokenizer = tokenizers[kind]
    counter = TokenCounter(tokenizer)
    notes = Notes(counter, INTRODUCTION, lambda n: HAYSTACKS[source].text(1, n), 16384)
    reserve = max(sum(map(counter.count, needle_and_question(city))) for city in CITIES)
    for city in ("Rome", "Johannesburg"):
        needle, question = needle_and_question(city)
        shortest = tokens(tokenizer, INTRODUCTION + needle + question)
        sizes = [*range(shortest, shortest + 20), 777, 2048, 16384 if city == "Rome" else 5001]
        for size in sizes:
            for depth in DEPTHS:
                prompt = notes.prompt(size, [(depth, needle)], [question], reserve)
                assert tokens(tokenizer, prompt.text) == prompt.tokens
                assert size - SLACK <= prompt.tokens <= size


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("source", "own_lines"),
    [(source, False) for source in HAYSTACKS] + [("synthetic", True), ("rough", True)],
)
def test_several_needles_and_questions(tokenizers, kind, source, own_lines):
    """Some at one place, some near each other or the end."""
    tokenizer = tokenizers[kind]
    counter = TokenCounter(tokenizer)
    text = partial(HAYSTACKS[source].text, 1)
    notes = Notes(counter, INTRODUCTION, text, 4096, own_lines=own_lines)
    pairs = [needle_and_question(city, number=10000 + i) for i, city in enumerate(CITIES[:8])]
    needles = list(zip([0.4, 1, 0, 0.41, 0.98, 0, 0.7, 1], [n for n, _ in pairs], strict=True))
    questions = [question for _, question in pairs]
    for size in (500, 4000):
        prompt = notes.prompt(size, needles, questions, 300)
        assert prompt.text.endswith(questions[0])
        body = prompt.text.removesuffix(questions[0])
        counts = [tokens(tokenizer, body + question) for question in questions]
        assert counts[0] == prompt.tokens
        assert size - SLACK <= max(counts) <= size
        places = [body.index(needle) for _, needle in needles]
        by_depth = sorted(range(8), key=lambda i: needles[i][0])
        assert places == [sorted(places)[by_depth.index(i)] for i in range(8)]
        for place, (_, needle) in zip(places, needles, strict=True):
            after = prompt.text[place + len(needle) :]
            assert after.startswith("\n" if own_lines else (" ", "\n\nQuestion"))
            if own_lines or source == "synthetic":
                assert body[place - 1] in ("\n" if own_lines else " \n")
        before = body[: places[0]].rstrip(" ")
        assert abs(tokens(tokenizer, before) - prompt.needle_position) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte-level", "unigram", "wordpiece"])
def test_prompts_are_full_whichever_of_many_needles_is_asked_for(tokenizers, kind):
    tokenizer = tokenizers[kind]
    counter = TokenCounter(tokenizer)
    notes = Notes(counter, INTRODUCTION, partial(HAYSTACKS["synthetic"].text, 2), 5000)
    by_length = sorted(CITIES, key=len)
    draw = random.Random(kind)
    for cities in ([*by_length[:3], *by_length[-9:]], [*by_length[-3:], *by_length[:9]]):
        pairs = [needle_and_question(city, draw.randrange(10000, 99999)) for city in cities]
        sentences, questions = zip(*pairs, strict=True)
        needles = [(draw.random(), sentence) for sentence in sentences]
        size = draw.randrange(4000, 5000)
        reserve = sum(map(counter.count, sentences)) + counter.count(questions[0])
        prompt = notes.prompt(size, needles, questions, reserve)
        body = prompt.text.removesuffix(questions[0])
        counts = [tokens(tokenizer, body + question) for question in questions]
        assert size - SLACK <= min(counts) and max(counts) <= size


@pytest.mark.parametrize("kind", ["demo", "byte-level", "tiktoken"])
def test_text_comes_back_from_its_tokens(tokenizers, kind):
    tokenizer, text = tokenizers[kind], partial(HAYSTACKS["rough"].text, 1)
    notes = Notes(TokenCounter(tokenizer), INTRODUCTION, text, 4096)
    needle, question = needle_and_question("Lima")
    prompt = notes.prompt(4096, [(0.3, needle), (0.6, needle)], [question], 60).text
    ids = tokenizer(prompt, verbose=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_needle_stands_at_its_depth(tokenizers, kind):
    tokenizer = tokenizers[kind]
    counter = TokenCounter(tokenizer)
    haystack = SyntheticHaystack(0)
    notes = Notes(counter, INTRODUCTION, lambda size: haystack.text(0, size), 8192)
    needle, question = needle_and_question("Lima")
    reserve = counter.count(needle) + counter.count(question)
    introduction = counter.count(INTRODUCTION)
    for depth in DEPTHS:
        prompt = notes.prompt(8192, [(depth, needle)], [question], reserve)
        begin = prompt.text.index(needle)
        before, after = prompt.text[:begin], prompt.text[begin + len(needle) :]
        # The position is that of the needle in the tokens of the prompt ...
        assert abs(tokens(tokenizer, before.rstrip(" ")) - prompt.needle_position) <= 2
        # ... which is the start of the sentence nearest to the depth,
        notes_before = counter.count(before) - introduction
        all_notes = notes_before + counter.count(after[: -len(question)])
        assert abs(notes_before - depth * all_notes) < 60
        assert before == INTRODUCTION or before.endswith((". ", ".\n"))
        # and the sentence follows.
        assert after.startswith(" ") and after[1].isupper()
    assert notes.prompt(8192, [(0, needle)], [question], reserve).text.startswith(
        INTRODUCTION + needle
    )
    last = notes.prompt(8192, [(1, needle)], [question], reserve).text
    assert "." not in last[last.index(needle) + len(needle) : -len(question) - 1]


def test_text_without_sentences_has_needles_between_words(tokenizers):
    counter = TokenCounter(tokenizers["demo"])
    text = " ".join(random.Random(0).choices(SyntheticHaystack(0).text(0, 9000).split(), k=9000))
    text = text.replace(".", "").lower()
    notes = Notes(counter, INTRODUCTION, lambda _: text, 4096)
    needle, question = needle_and_question("Lima")
    for depth in DEPTHS:
        prompt = notes.prompt(4096, [(depth, needle)], [question], 30)
        before, after = prompt.text.split(needle)
        assert abs(prompt.needle_position / 4050 - depth) < 0.02
        assert before[-1].isspace() and after[0] == " "
        assert after[1 : -len(question)].split()[0] in text.split()


def test_prompts_of_a_sample_share_their_notes(tokenizers):
    haystack = SyntheticHaystack(0)
    counter = TokenCounter(tokenizers["demo"])
    notes = Notes(counter, INTRODUCTION, lambda size: haystack.text(0, size), 4096)
    texts = []
    for size, depth in [(2000, 0.2), (4000, 0.2), (4000, 0.9)]:
        needle, question = needle_and_question("Lima", number=round(10000 + size * depth))
        text = notes.prompt(size, [(depth, needle)], [question], 34).text
        assert text.endswith(question)
        texts.append(text.removesuffix(question).replace(needle + " ", ""))
    shorter, longer, deeper = texts
    assert longer == deeper
    assert longer.startswith(shorter)
    # A longer context elsewhere in the grid changes nothing here.
    more = Notes(counter, INTRODUCTION, lambda size: haystack.text(0, size), 9000)
    needle, question = needle_and_question("Lima")
    assert more.prompt(4000, [(0.5, needle)], [question], 34) == notes.prompt(
        4000, [(0.5, needle)], [question], 34
    )


def test_prompts_are_mostly_encoded_when_their_notes_are(tokenizers, monkeypatch):
    encoded = []
    encode_piece = Encoder._piece

    def counting(self, cutout, *arguments):
        encoded.append(len(cutout.text))
        return encode_piece(self, cutout, *arguments)

    monkeypatch.setattr(Encoder, "_piece", counting)
    haystack = SyntheticHaystack("encoded once")
    counter = TokenCounter(tokenizers["demo"])
    notes = Notes(counter, INTRODUCTION, lambda size: haystack.text(0, size), 1 << 16)
    needle, question = needle_and_question("Lima")
    for depth in (0.2, 0.8):
        prompt = notes.prompt(1 << 16, [(depth, needle)], [question], 34)
        encoded.clear()
        backend = Encoder(load_tokenizer({"pretrained": "demo-1m"}))
        assert len(backend.encode(prompt.text)) + counter.special == prompt.tokens
        assert sum(encoded) < len(prompt.text) // 2  # about the needle, and at the end


def test_special_tokens_are_counted(tokenizers):
    expected = {kind: (1, 1) for kind in KINDS} | {"byte-level": (0, 0), "unigram": (1, 2)}
    for kind, counts in expected.items():
        counter = TokenCounter(tokenizers[kind])
        assert (counter.front, counter.special) == counts
    forced = TokenCounter(tokenizers["byte-level"], add_bos_token=True)
    assert (forced.front, forced.special) == (1, 1)
    already = TokenCounter(tokenizers["demo"], add_bos_token=True)
    assert (already.front, already.special) == (1, 1)
