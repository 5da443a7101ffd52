"""Pieces put together equal the encoding of the whole, whatever the tokenizer and the text."""

import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

from yoco_eval import encoding
from yoco_eval.encoding import Encoder
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT
from yoco_eval.tokenizers import _CL100K_PATTERN, load_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = """The special number of Lisbon is 48213; nobody's told, they'd say: "WE'LL see." Pack my
box with five dozen liquor jugs (quick brown fox, lazy dog) {}:=+-*/# banana bananas ab abab aaaa
naïve été Привет мир 漢字仮名 漢字 😀👩‍👩‍👧 don't 1234567 007 http://x.y/z?q=1""".split()


def words(rng, size):
    return "".join(rng.choice([" ", " ", " ", "\n"]) + rng.choice(WORDS) for _ in range(size // 6))


def runs(rng, size):
    """Of one character each, some longer than what a piece is encoded with."""
    lengths = (1, 2, 3, 30, 90, 400)
    return "".join(rng.choice(" \n\t7a字😀-") * rng.choice(lengths) for _ in range(size // 80))


TEXTS = {
    "words": words,
    "no spaces": lambda rng, size: words(rng, size).replace(" ", "").replace("\n", ""),
    "no words": lambda rng, size: "".join(rng.choices("😀👩‍👧🏽-…!? ", k=size)),
    "one letter": lambda rng, size: "a" * size,
    "letters": lambda rng, size: "".join(rng.choices("ab", k=size)),
    "digits": lambda rng, size: "".join(rng.choices("0123456789", k=size)),
    "japanese": lambda rng, size: "".join(rng.choices("漢字仮名漢字仮名。、", k=size)),
    "line ends": lambda rng, size: words(rng, size).replace("\n", "\r\n" * 3),
    "blanks": lambda rng, size: words(rng, size).replace("\n", " " * rng.choice([3, 50, 300])),
    "runs": runs,
    "special tokens": lambda rng, size: "".join(
        rng.choice(["</s>", "<s>", "<unk>", " ", "a", "</", " word", "\n", "s>"])
        for _ in range(size // 3)
    ),
}


def byte_level(split):
    """GPT-2's, cl100k's, or with the whole text as one word."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    train(trained, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    if split == "cl100k":
        trained.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_CL100K_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif split == "nowhere":
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        trained.post_processor = ByteLevel(trim_offsets=True)
    return trained


def metaspace():
    """As Llama's: the whole text is one word, behind a blank of its own."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    train(trained, trainers.BpeTrainer)
    trained.pre_tokenizer = None
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return trained


def unigram(pre_tokenizer):
    """As T5's; or, without words, as SentencePiece's: where words end depends on all before."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    train(trained, trainers.UnigramTrainer, unk_token="<unk>")
    trained.pre_tokenizer = pre_tokenizer
    return trained


def wordpiece():
    """As BERT's: no blanks in the tokens, and a long word as a whole is unknown."""
    trained = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=40))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    train(trained, trainers.WordPieceTrainer)
    return trained


def train(tokenizer, trainer, **options):
    corpus = [words(random.Random(seed), 2000) for seed in range(30)]
    special = list(SPECIAL.values())
    options |= {"vocab_size": 600, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(corpus, trainer(**options))


@pytest.fixture(scope="module")
def tokenizers():
    own = {
        "gpt-2": byte_level("at words"),
        "cl100k": byte_level("cl100k"),
        "byte-level": byte_level("nowhere"),
        "metaspace": metaspace(),
        "unigram": unigram(pre_tokenizers.Metaspace()),
        "unigram without words": unigram(None),
        "wordpiece": wordpiece(),
    }
    return {
        "demo": load_tokenizer(BUNDLED / DEFAULT_CHECKPOINT),
        **{
            kind: PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
            for kind, tokenizer in own.items()
        },
    }


KINDS = [
    "demo",
    "gpt-2",
    "cl100k",
    "byte-level",
    "metaspace",
    "unigram",
    "unigram without words",
    "wordpiece",
]


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(encoding, "_memory", encoding._Memory(1 << 20))


@pytest.fixture
def small_pieces(monkeypatch):
    for name, value in {"_SHORTEST": 300, "_LONGEST": 600, "_RARITY": 8, "_BATCH": 2000}.items():
        monkeypatch.setattr(encoding, name, value)


@pytest.fixture
def encoded(monkeypatch):
    """The characters that are given to the tokenizer, one number for each of its calls."""
    sizes = []
    backend = Encoder._backend

    class Counting:
        def __init__(self, encoder):
            self._tokenizer = backend(encoder)

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def encode_batch(self, texts, **options):
            sizes.append(sum(map(len, texts)))
            return self._tokenizer.encode_batch(texts, **options)

        def encode_batch_fast(self, texts, **options):
            sizes.append(sum(map(len, texts)))
            return self._tokenizer.encode_batch_fast(texts, **options)

    monkeypatch.setattr(Encoder, "_backend", lambda encoder: Counting(encoder))
    return sizes


def check(tokenizer, text):
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encoder = Encoder(tokenizer)
    ids, ends = encoder.encode(text), encoder.ends(text)
    assert ids.dtype == np.int32 and ends.dtype == np.int64
    assert ids.tolist() == whole.input_ids
    expected = np.array([end for _, end in whole.offset_mapping], dtype=np.int64)
    assert ends.tolist() == np.maximum.accumulate(expected).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", TEXTS)
def test_any_text(tokenizers, small_pieces, kind, form):
    rng = random.Random(f"{kind} {form}")
    for size in (0, 1, 599, 700, 5_000):
        text = TEXTS[form](rng, size)
        check(tokenizers[kind], text)
        place = rng.randrange(len(text) + 1)
        check(tokenizers[kind], f"{text[:place]} needle.{text[place:]}\n\nQuestion?")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_in_pieces_of_the_usual_size(tokenizers, kind):
    rng = random.Random(kind)
    check(tokenizers[kind], "".join(rng.choice(list(TEXTS.values()))(rng, 9000) for _ in range(20)))


def test_special_tokens_in_a_text_are_found_or_not_as_the_tokenizer_says(tokenizers, small_pieces):
    tokenizer = tokenizers["demo"]
    text = words(random.Random(0), 3000).replace("\n", "</s>")
    lengths = []
    for tokenizer.split_special_tokens in (True, False):
        check(tokenizer, text)
        lengths.append(len(Encoder(tokenizer).encode(text)))
    assert lengths[0] > lengths[1]


def test_texts_share_what_is_encoded(tokenizers, small_pieces, encoded):
    tokenizer, text = tokenizers["demo"], words(random.Random(0), 100_000)
    Encoder(tokenizer).ends(text)
    assert len(encoded) > 10 and sum(encoded) > len(text)
    encoded.clear()
    again = load_tokenizer(BUNDLED / DEFAULT_CHECKPOINT)  # such as the backend's
    Encoder(again).encode(text)
    assert not encoded
    for place in (0, 30_000, 77_777):
        Encoder(again).encode(f"{text[:place]}A needle.{text[place:]}")
    assert 0 < sum(encoded) < 15_000
    encoded.clear()
    Encoder(tokenizers["gpt-2"]).encode(text)
    assert sum(encoded) > len(text)


def test_texts_are_encoded_together(tokenizers, encoded):
    encoder = Encoder(tokenizers["demo"])
    texts = [words(random.Random(i % 50), 600) for i in range(100)]
    together = encoder.encode_all(texts)
    assert len(encoded) == 1 and encoded[0] < 50 * 1000  # each text once
    for text, ids in zip(texts, together, strict=True):
        assert ids.tolist() == tokenizers["demo"].encode(text, add_special_tokens=False)
    assert encoder.encode_all([]) == []


def test_memory_keeps_the_last_used(tokenizers, small_pieces, encoded, monkeypatch):
    monkeypatch.setattr(encoding, "_memory", encoding._Memory(25_000))
    encoder = Encoder(tokenizers["demo"])
    texts = [words(random.Random(i), 5_000) for i in range(3)]
    for text in [*texts[:2], texts[0], texts[2]]:
        encoder.encode(text)
    encoded.clear()
    encoder.encode(texts[0])
    encoder.encode(texts[2])
    assert not encoded
    encoder.encode(texts[1])
    assert encoded
