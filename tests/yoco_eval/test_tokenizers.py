import base64
import json
import os
import random
import shutil
import sys

import pytest
import regex
import sentencepiece
import tiktoken
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from yoco_eval import tokenizers as module
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT
from yoco_eval.tokenizers import (
    TokenizerError,
    check_ends,
    check_vocabulary,
    checkpoint_tokenizer,
    from_sentencepiece,
    from_tiktoken,
    load_tokenizer,
    save_tokenizer,
)

# cl100k_base's split as tiktoken itself writes it today. At the end of a text it leaves a newline
# and the blanks after it in one piece; no token of cl100k_base joins them, so ids are the same.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    "<fim_prefix>": 100264,
    "<fim_middle>": 100265,
    "<fim_suffix>": 100266,
    "<fim_pad>": 100267,
    "<reponame>": 100268,
    "<filename>": 100269,
    "<gh_stars>": 100270,
    "<issue_start>": 100271,
    "<issue_comment>": 100272,
    "<issue_closed>": 100273,
    "<jupyter_start>": 100274,
    "<jupyter_text>": 100275,
    "<jupyter_code>": 100276,
    "<jupyter_output>": 100277,
    "<empty_output>": 100278,
    "<commit_before>": 100279,
    "<commit_msg>": 100280,
    "<commit_after>": 100281,
}
CORPUS = [
    "The special number of Lisbon is 48213; nobody's told, they'd say, WE'LL see.",
    "Pack my box with five dozen liquor jugs (quick brown fox, lazy dog) {};:=+-*/#",
    "def f(x):\n    if x / 2 < 10:\n\n        return [x ** 2 for _ in range(100)]\n\t\t# ===  --->",
    "Nur ein Wörtchen, été naïve, Привет мир, 漢字仮名 😀👩‍👩‍👧  <s></s><unk>   \r\n\r\n   .",
    "aaaa abab ababab aaaaaaa bbbaaab banana bananas aabbaabb        1234567 000 1 22 Saba Saba",
] * 4
POOLS = [
    " \n\t\r",
    "etaoin shrdlu",
    "TheE'sSLlVv ",
    "0123456789",
    "éüÖñçа́бв",
    "漢字仮名",
    "😀👩‍👧🏽",
    "{}()<>;:=+-*/#\"'",
    "ab",
    "ab ",
    "\u00a0\u2003\u3000\u200b\x00\x85",
    "ſK½Ⅷ",
]


def random_texts(count, pools=POOLS, seed=0):
    rng = random.Random(seed)
    words = " ".join(CORPUS).split(" ")
    for i in range(count):
        if i % 3 == 0:
            spaced = (rng.choice(["", " ", " ", "  "]) + rng.choice(words) for _ in range(8))
            yield "".join(spaced)
        else:
            pool = "".join(rng.sample(pools, rng.randint(1, 3)))
            yield "".join(rng.choice(pool) for _ in range(rng.choice([0, 1, 3, 30, 200])))


@pytest.fixture(scope="session")
def ranks():
    tokenizer = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = letters
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=letters.alphabet()
    )
    pieces = (piece for text in CORPUS for piece in regex.findall(PATTERN, text))
    tokenizer.train_from_iterator(pieces, trainer)
    byte = {letter: b for b, letter in module.bytes_to_unicode().items()}
    return {bytes(byte[c] for c in token): i for token, i in tokenizer.get_vocab().items()}


@pytest.fixture(scope="session")
def rank_file(ranks, tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    write_ranks(file, ranks)
    return file


def write_ranks(file, ranks):
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture
def small_cl100k(ranks, monkeypatch):
    """tiktoken with `ranks` in the place of cl100k_base's, and the published models' tokens."""
    few = module._ENCODINGS["cl100k_base"]._replace(ranks=len(ranks))
    monkeypatch.setitem(module._ENCODINGS, "cl100k_base", few)
    encoding = tiktoken.Encoding(
        "cl100k_base", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


def train_sentencepiece(path, **options):
    text = [line for text in CORPUS for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(path.with_suffix("")),
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    processor = train_sentencepiece(
        path,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    )
    return path, processor


def test_tiktoken_ids_are_shifted_by_four_after_bos(ranks, rank_file):
    reference = tiktoken.Encoding(
        "small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = from_tiktoken(rank_file)
    for text in ["IT'Saba", *random_texts(600)]:
        ids = tokenizer.encode(text)
        assert ids == [0] + [i + 4 for i in reference.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_piece_that_is_a_token_needs_no_merges(ranks, tmp_path):
    rank = {**ranks, b"qzqzqzq": len(ranks)}  # no two tokens make it up
    write_ranks(tmp_path / "odd.tiktoken", rank)
    assert from_tiktoken(tmp_path / "odd.tiktoken").encode("qzqzqzq") == [0, len(ranks) + 4]


def test_published_special_tokens(rank_file):
    tokenizer = from_tiktoken(rank_file)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (2, 3)
    text = "<s>a</s><unk> <pad>"
    assert not {1, 2, 3} & set(tokenizer.encode(text))
    assert tokenizer.encode(text).count(0) == 1
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)[1:]


def test_cl100k_by_name_with_the_published_special_tokens(small_cl100k, rank_file, tmp_path):
    tokenizer = load_tokenizer("cl100k_base")
    assert tokenizer.get_vocab() == from_tiktoken(rank_file).get_vocab()
    check_vocabulary(tokenizer, 100288)
    save_tokenizer(tokenizer, tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in [*SPECIAL, "a <filename> b<|fim_prefix|>\n <gh_stars", "x".join(SPECIAL)]:
            expected = small_cl100k.encode(text, allowed_special="all")
            assert loaded.encode(text) == [0] + [i + 4 for i in expected]
            # One id is two tokens', and decodes to the latter.
            decoded = text.replace("<|endofprompt|>", "<jupyter_code>")
            assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == decoded
    assert tokenizer.encode("<filename>") == [0, 100273]
    assert tokenizer.encode("<|endofprompt|>") == tokenizer.encode("<jupyter_code>") == [0, 100280]


def test_o200k_by_name_and_as_a_file(ranks, rank_file, monkeypatch):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
    reference = tiktoken.Encoding(**openai_public.o200k_base())
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: reference)
    few = module._ENCODINGS["o200k_base"]._replace(ranks=len(ranks))
    monkeypatch.setitem(module._ENCODINGS, "o200k_base", few)
    for tokenizer in (load_tokenizer("o200k_base"), load_tokenizer(rank_file)):
        for text in ["camelCase ÉTÉ'LL a/\n/b <|endofprompt|><|endoftext|>", *random_texts(300)]:
            expected = reference.encode(text, allowed_special="all")
            assert tokenizer.encode(text) == [0] + [i + 4 for i in expected], text


def test_an_encoding_that_cannot_be_had_names_the_file(monkeypatch):
    def offline(name):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name in ("cl100k_base", "o200k_base"):
        with pytest.raises(TokenizerError, match=rf"^{name}: .* {name}\.tiktoken") as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match=r"yoco-eval\[tiktoken\].*cl100k_base\.tiktoken"):
        from_tiktoken("cl100k_base")


def tekken(ranks, **changes):
    """The contents of Mistral's file: four special tokens, of two spare ones, before `ranks`."""
    names = ["<unk>", "<s>", "</s>", "[INST]"]
    content = {
        "config": {
            "pattern": module._CL100K_PATTERN,
            "default_num_special_tokens": 6,
            "version": "v11",
            "default_vocab_size": len(ranks) + 6 - 2,  # two are padding
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
            for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        ],
        "special_tokens": [
            {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)
        ],
    }
    return json.dumps(content | changes)


def test_tekken_alone(ranks, tmp_path):
    (tmp_path / "tekken.json").write_text(tekken(ranks))
    kept = {token: rank for token, rank in ranks.items() if rank < len(ranks) - 2}
    reference = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=kept, special_tokens={})
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "saved")
    tokenizers = [load_tokenizer(tmp_path / name) for name in (".", "tekken.json", "saved")]
    for text in ["", *random_texts(100)]:
        text = text.replace("<s>", "").replace("</s>", "").replace("<unk>", "")
        for tokenizer in tokenizers:
            assert tokenizer.encode(text) == [1] + [i + 6 for i in reference.encode(text)], text
    assert tokenizers[0].encode("[INST]") == [1, 3] and tokenizers[0].eos_token_id == 2
    assert str(tmp_path) not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_tekken_files_that_cannot_be_used(ranks, tmp_path):
    file = tmp_path / "tekken_240911.json"
    for content, message in [
        ("{", "damaged"),
        ("{}", "damaged"),
        (tekken(ranks, vocab=[{"rank": 0}]), "damaged"),
        (tekken({}), "finds no token"),
        (tekken(ranks, special_tokens=None), "pip install"),
    ]:
        file.write_text(content)
        with pytest.raises(TokenizerError, match=f"^{file}: .*{message}") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)


def test_damaged_rank_files(ranks, rank_file, tmp_path):
    file = tmp_path / "bad.tiktoken"
    with pytest.raises(TokenizerError, match="cannot be read"):
        from_tiktoken(file)
    for damage in ("!!! 3", "YWI=", "YWI= x"):
        file.write_text(f"YQ== 0\n{damage}\n")
        with pytest.raises(TokenizerError, match="line 2"):
            from_tiktoken(file)
    for lost in (b"a", next(token for token in ranks if len(token) > 1)):
        write_ranks(file, {token: rank for token, rank in ranks.items() if token != lost})
        with pytest.raises(TokenizerError, match="missing"):
            from_tiktoken(file)


def test_saved_tokenizer_is_found_by_auto_tokenizer(rank_file, tmp_path):
    tokenizer = from_tiktoken(rank_file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yoco", "dim": 64}))
    save_tokenizer(tokenizer, tmp_path, max_length=65536)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded.is_fast
        assert loaded.model_max_length == 65536
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.get_vocab() == tokenizer.get_vocab()
        for text in ["a </s> , b . don 't", *random_texts(60)]:
            ids = tokenizer.encode(text)
            assert loaded.encode(text) == ids
            assert loaded.decode(ids, skip_special_tokens=True) == text
        assert loaded("a", "b").input_ids == tokenizer("a", "b").input_ids


def test_saved_tokenizer_has_a_padding_token_and_no_code(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "<e>": 1}, [])),
        eos_token="<e>",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
    )
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["pad_token"] == "<e>"
    assert "auto_map" not in config


def test_loading_runs_no_code(rank_file, tmp_path):
    save_tokenizer(from_tiktoken(rank_file), tmp_path)
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    file.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("a") == from_tiktoken(rank_file).encode("a")
    assert not marker.exists()


def test_load_tokenizer_by_kind_of_file(rank_file, llama_like, tmp_path):
    expected = from_tiktoken(rank_file).get_vocab()
    assert load_tokenizer(rank_file).get_vocab() == expected
    assert load_tokenizer(rank_file.parent).get_vocab() == expected
    model, processor = llama_like
    assert len(load_tokenizer(model.parent)) == len(load_tokenizer(model)) == len(processor)
    save_tokenizer(from_tiktoken(rank_file), tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").model_max_length > 0
    (tmp_path / "tokenizer_config.json").unlink()
    bare = load_tokenizer(tmp_path)
    assert (bare.get_vocab(), bare.eos_token_id) == (expected, 2)


def test_load_tokenizer_errors(tmp_path, monkeypatch):
    with pytest.raises(TokenizerError, match=f"{tmp_path}.*yoco-eval convert.*tokenizer="):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(TokenizerError, match="vocab.txt: unknown kind"):
        load_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(TokenizerError, match="name is empty"):
        load_tokenizer("")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(TokenizerError, match="tokenizer.json: damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer.json: damaged"):
        load_tokenizer(tmp_path)

    def no_hub(name, **options):
        assert options["trust_remote_code"] is False
        raise OSError(f"{name} is not there\nsecond line")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", no_hub)
    with pytest.raises(TokenizerError, match="^some/name: .*is not there") as error:
        load_tokenizer("some/name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({}, []),
        models.BPE({"x": 0}, []),
        models.WordLevel({"a": 0}),
    ],
)
def test_a_vocabulary_that_has_nothing_for_a_text(model, tmp_path):
    file = tmp_path / "tokenizer.json"
    Tokenizer(model).save(str(file))
    with pytest.raises(TokenizerError, match=f"^{file}: (finds no token|damaged)") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_files_that_the_libraries_would_panic_of_or_count_forever_in(rank_file, tmp_path):
    save_tokenizer(from_tiktoken(rank_file), tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    unknown = whole.replace('"id": "<s>"', '"id": "<x>"', 1)
    beyond = json.loads(whole)
    beyond["model"]["vocab"]["far"] = 2**31
    (tmp_path / "tokenizer_config.json").unlink()
    for content, message in [(unknown, "damaged"), (json.dumps(beyond), "2147483648 is no id")]:
        assert content != whole
        file.write_text(content)
        with pytest.raises(TokenizerError, match=f"^{file}: {message}"):
            load_tokenizer(tmp_path)


def test_a_template_that_no_file_can_hold(rank_file, tmp_path):
    tokenizer = from_tiktoken(rank_file)
    tokenizer.chat_template = "\ud800"
    with pytest.raises(TokenizerError, match=f"^{rank_file}: damaged .*surrogates"):
        save_tokenizer(tokenizer, tmp_path)


def test_a_tokenizer_without_an_end_token_counts(tmp_path):
    Tokenizer(models.BPE({"N": 0, "o": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Noon") == [0, 1, 1]
    with pytest.raises(TokenizerError, match=f"^{tmp_path}.*does not say which token begins"):
        check_ends(tokenizer)


def test_check_vocabulary(rank_file):
    tokenizer = from_tiktoken(rank_file)
    largest = max(tokenizer.get_vocab().values())
    check_vocabulary(tokenizer, largest + 1)
    with pytest.raises(TokenizerError, match=rf"small\.tiktoken.*{largest + 1}.*{largest}"):
        check_vocabulary(tokenizer, largest)


def test_checkpoint_tokenizer(small_cl100k, rank_file, tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer in this folder"):
        checkpoint_tokenizer(tmp_path, 5000)
    assert checkpoint_tokenizer(tmp_path, 100288).name_or_path == "cl100k_base"
    own = checkpoint_tokenizer(rank_file.parent, 100288)
    assert own.name_or_path == str(rank_file)
    beside = rank_file.with_name("checkpoint_last.pt")
    beside.touch()
    assert checkpoint_tokenizer(beside, 100288).name_or_path == str(rank_file)
    with pytest.raises(TokenizerError, match="exceed"):
        checkpoint_tokenizer(rank_file.parent, 100)


def test_sentencepiece_ids_are_kept_after_bos(llama_like, tmp_path):
    path, processor = llama_like
    tokenizer = from_sentencepiece(path)
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    special = ["<s>", "</s> <s>x", "<unk>", "<0x41>", "", " ", "   ", "\n", " a", "  a  b  ", "▁a"]
    for text in [*special, *random_texts(500)]:
        expected = [processor.bos_id(), *processor.encode(text)]
        assert tokenizer.encode(text) == loaded.encode(text) == expected, text
        assert loaded.decode(expected, skip_special_tokens=True) == processor.decode(expected)
    assert loaded.eos_token_id == loaded.pad_token_id == processor.eos_id()
    assert loaded.unk_token_id == processor.unk_id()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "add_dummy_prefix": False, "pad_id": 3},
        {"model_type": "unigram", "character_coverage": 1.0},
    ],
)
def test_sentencepiece_with_normalisation(options, tmp_path):
    processor = train_sentencepiece(tmp_path / "m.model", vocab_size=200, **options)
    tokenizer = from_sentencepiece(tmp_path / "m.model")
    texts = ["", "  ", " The  special\tnumber \n", "ﬁ ½ Ａ", "</s>", "1 22 日本 banana  "]
    for text in [*texts, *random_texts(200, pools=[" \n\t", "TheE ", "Öé", "{}()<>;", "ÿ"])]:
        ids, expected = tokenizer.encode(text), [processor.bos_id(), *processor.encode(text)]
        if options["model_type"] == "unigram" and ids != expected:  # cuts of equal score
            assert sum(map(processor.get_score, ids)) == pytest.approx(
                sum(map(processor.get_score, expected))
            ), text
            assert processor.decode(ids) == processor.decode(expected)
        else:
            assert ids == expected, text
    assert tokenizer.pad_token == ("<pad>" if "pad_id" in options else None)


def test_sentencepiece_that_cannot_be_converted(llama_like, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(TokenizerError, match="cannot be read"):
        from_sentencepiece(path)
    for content in (b"", b"YQ== 0\n", llama_like[0].read_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match="not a SentencePiece model, or damaged"):
            from_sentencepiece(path)
    train_sentencepiece(path, model_type="bpe", vocab_size=200)
    proto = module.import_protobuf().ModelProto.FromString(path.read_bytes())
    proto.normalizer_spec.precompiled_charsmap = b"cut"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=f"^{path}: damaged"):
        from_sentencepiece(path)
    train_sentencepiece(path, model_type="bpe", vocab_size=200, user_defined_symbols=["<call>"])
    with pytest.raises(TokenizerError, match="user-defined"):
        from_sentencepiece(path)
    train_sentencepiece(path, model_type="char")
    with pytest.raises(TokenizerError, match="neither a BPE nor a unigram"):
        from_sentencepiece(path)

    def missing():
        raise ImportError("protobuf")

    monkeypatch.setattr(module, "import_protobuf", missing)
    with pytest.raises(TokenizerError, match=r"pip install 'yoco-eval\[sentencepiece\]'"):
        from_sentencepiece(path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "a.jinja"])
def test_files_without_end_are_not_read(tmp_path, name):
    """Neither those that the libraries read beside a tokenizer.json."""
    for file in (BUNDLED / DEFAULT_CHECKPOINT).glob("token*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match=f"{tmp_path / name}: not an ordinary file"):
        load_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TokenizerError, match=f"{tmp_path / name}: far larger"):
        load_tokenizer(tmp_path)
