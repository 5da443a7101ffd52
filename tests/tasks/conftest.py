"""Tokenizers of the kinds in use, trained on a little text, and models that answer."""

import base64
import json
import random

import pytest
from lm_eval import evaluator
from lm_eval.api.model import LM
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from yoco_eval.tasks.evaluated_model import load_tokenizer
from yoco_eval.tasks.haystack import SyntheticHaystack
from yoco_eval.tasks.wording import CITIES, QUESTION
from yoco_eval.tokenizers import from_tiktoken

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(corpus):
    """As GPT-2's: no special tokens around a text, offsets without the blank before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def unigram(corpus):
    """As T5's: normalised text, scored pieces of words, tokens before and after the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL.values()),
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def wordpiece(corpus):
    """As BERT's, of so few pieces that the names of cities come apart into letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    roles = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def sentencepiece(corpus):
    """As Llama's: the whole text is one word to it, behind a blank of its own."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*SPECIAL.values(), *bytes_], show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def tiktoken(corpus, file):
    """As the published models': ranks in a file, texts split as cl100k_base does."""
    trained = byte_level(corpus).backend_tokenizer
    byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = sorted((rank, token) for token, rank in trained.get_vocab(False).items())
    tokens = (bytes(byte[letter] for letter in token) for _, token in ranks)
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    file.write_text("\n".join(lines))
    return from_tiktoken(file)


@pytest.fixture(scope="session", autouse=True)
def no_env_info():
    """lm-eval takes seconds to describe the machine, at each evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Tokenizers by kind."""
    text = SyntheticHaystack("tests").text(0, 100_000)[:100_000]
    numbers = random.Random(0).choices(range(100_000), k=500)
    corpus = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    corpus += [f"Number {number}.{QUESTION}\n\n" for number in numbers] + CITIES
    return {
        "demo": load_tokenizer({"pretrained": "demo-1m"}),
        "byte-level": byte_level(corpus),
        "unigram": unigram(corpus),
        "wordpiece": wordpiece(corpus),
        "sentencepiece": sentencepiece(corpus),
        "tiktoken": tiktoken(corpus, tmp_path_factory.mktemp("ranks") / "small.tiktoken"),
    }


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory, tokenizers):
    """Folder of a small random Llama with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizers["sentencepiece"].save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizers["sentencepiece"]),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=600,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


class Answerer(LM):
    """Answers each prompt by a function, and keeps what it was asked."""

    tokenizer_name = "answerer"

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.asked = []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        turns = [f"<{turn['role']}>\n{turn['content']}\n" for turn in chat_history]
        return "".join(turns) + "<assistant>\n" * add_generation_prompt

    def chat_template(self, chat_template=False):
        return "answerer's"


@pytest.fixture(scope="session")
def answerer():
    return Answerer
