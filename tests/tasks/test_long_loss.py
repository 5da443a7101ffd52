"""yoco_long_loss_book and yoco_long_loss_code: documents, cuts, and the losses of both backends."""

import hashlib
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import LlamaConfig, LlamaForCausalLM

import yoco_eval.tasks
from yoco_eval.encoding import Encoder
from yoco_eval.engine import Engine
from yoco_eval.lm import YocoLM
from yoco_eval.tasks import documents
from yoco_eval.tasks.evaluated_model import load_tokenizer
from yoco_eval.tasks.haystack import SyntheticHaystack
from yoco_eval.tasks.long_loss import Document, LongLoss, bucket_ends, cut
from yoco_eval.tasks.prompts import TokenCounter

BOOK, CODE = "yoco_long_loss_book", "yoco_long_loss_code"
LENGTHS = [128, 256, 512]


def task_manager(**metadata):
    named = {"pretrained": "demo-1m", **metadata}  # unless a test names another
    (folder,) = yoco_eval.tasks.__path__
    return TaskManager(include_path=folder, include_defaults=False, metadata=named)


def load(name=BOOK, **metadata) -> LongLoss:
    return task_manager(**metadata).load([name])["tasks"][name]


def evaluate(model, name=BOOK, metadata=None, **options):
    results = simple_evaluate(
        model=model, tasks=[name], task_manager=task_manager(**metadata), **options
    )
    scores = {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if key.endswith(",none") and "_stderr" not in key
    }
    return scores, results


def requests(task):
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.fixture
def library(tmp_path):
    """Three books of some thousand tokens, and one of fewer than 512."""
    folder = tmp_path / "library"
    (folder / "shelf").mkdir(parents=True)
    sizes = {"a.txt": 6000, "b.md": 900, "shelf/c.txt": 7000, "shelf/d.rst": 9000}
    for name, size in sizes.items():
        (folder / name).write_text(SyntheticHaystack(name).text(0, size)[:size])
    (folder / "index.html").write_text("not a book")
    (folder / ".hidden.txt").write_text("not a book")
    return folder


@pytest.fixture
def settings(library):
    return {"data": str(library), "context_lengths": LENGTHS, "samples": 2}


# Settings


@pytest.mark.parametrize(
    ("positions", "ends"),
    [
        (None, [1024, 2048, 4096, 8192, 16384]),
        (5000, [1024, 2048, 4096]),
        (512, [512]),
        (2**20, [1024 << i for i in range(8)]),
    ],
)
def test_default_context_lengths(positions, ends):
    assert bucket_ends(None, positions) == ends


@pytest.mark.parametrize("name", [BOOK, CODE])
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"context_lengths": ["2m"]}, "2097152 exceeds the model's 1048576 positions; give"),
        ({"context_lengths": [50, 512]}, "50 is less than 64 tokens after 0; give lengths further"),
        ({"context_lengths": [512, 520]}, "520 is less than 64 tokens after 512"),
        ({"samples": 0}, "samples: 0 is below 1"),
        ({"sample": 3}, "'sample' is unknown; did you mean 'samples'"),
        ({"data": "no/where"}, "data: no/where does not exist; name a folder"),
        ({}, "FOLDER/{name}/SPLIT.jsonl), or a folder with texts of your own"),
    ],
)
def test_bad_settings_are_told_in_one_line_while_the_task_loads(
    monkeypatch, name, metadata, message
):
    def offline(*args, **options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(documents.hub_data.datasets, "load_dataset", offline)
    with pytest.raises(ValueError) as caught:
        load(name, **metadata)
    assert message.format(name=name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blanks_before_a_document_are_left_out(tokenizers):
    text = "A note on otters and the rivers that they live in. " * 100
    for tokenizer in tokenizers.values():
        counter = TokenCounter(tokenizer)
        bare = cut("bare", text, [256, 512], counter)
        assert bare.tokens
        assert cut("blank", "\r\n" * 10 + " " * 30 + text, [256, 512], counter)[1:] == bare[1:]


def test_too_few_long_documents(settings):
    with pytest.raises(ValueError) as caught:
        load(**settings | {"samples": 4})
    assert re.fullmatch(
        r"4 documents of 512 tokens are needed, and .*/library holds 3 and 1 too short to be "
        r"cut, the longest of \d{3} tokens; give shorter context_lengths, fewer samples, or longer "
        r"texts .*",
        str(caught.value),
    )
    with pytest.raises(ValueError, match="holds 0 and 4 too short to be cut, the longest of [1-9]"):
        load(**settings | {"context_lengths": "32k"})


def test_folders_without_documents(tmp_path):
    with pytest.raises(ValueError, match="holds no text files"):
        load(BOOK, data=str(tmp_path))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no code")
    with pytest.raises(ValueError, match="has no folders with source code"):
        load(CODE, data=str(tmp_path))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="bad.txt is not UTF-8 text"):
        load(BOOK, data=str(tmp_path), context_lengths=64)


# Documents


def test_local_books(settings, library):
    docs = load(**settings).eval_docs
    assert docs["name"] == ["a.txt", "c.txt"]
    (one,) = load(**settings | {"data": str(library / "shelf" / "d.rst"), "samples": 1}).eval_docs
    assert one["name"] == "d.rst"


def test_books_in_the_schema_of_the_hub(tmp_path, settings):
    (tmp_path / BOOK).mkdir()
    rows = [
        {"short_book_title": f"Book {i}", "publication_date": 1900, "url": "", "text": text}
        for i, text in enumerate(["Too short.", SyntheticHaystack(1).text(0, 9000)])
    ]
    (tmp_path / BOOK / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load(**settings | {"data": str(tmp_path), "samples": 1})
    assert task.eval_docs["name"] == ["Book 1"]
    (tmp_path / BOOK / "test.jsonl").rename(tmp_path / BOOK / "train.jsonl")
    with pytest.raises(ValueError, match="has no split 'test'"):
        load(**settings | {"data": str(tmp_path)})


def code_files(seed, size=3000):
    text = SyntheticHaystack(seed).text(0, size)[:size].replace("\n", "\n# ")
    return {
        "app/main.py": f"from app.tools import run\n\nrun()\n# {text}",
        "app/tools.py": "def run():\n\treturn 'ünïcödé'\n",
        "data.json": "{}",
    }


def test_local_repositories(tmp_path, settings):
    for repository in ("one", "two", ".git"):
        for path, text in code_files(repository).items():
            file = tmp_path / repository / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    (tmp_path / "one" / "app" / "latin.py").write_bytes("x = 'é'".encode("latin-1"))
    task = load(CODE, **settings | {"data": str(tmp_path)})
    assert task.eval_docs["name"] == ["one", "two"]
    context, continuation = requests(task)[0]
    first = "# app/tools.py\ndef run():\n\treturn 'ünïcödé'\n\n# app/main.py\n"
    assert (context + continuation).startswith(first)


def test_repositories_in_the_schema_of_the_hub(tmp_path, settings):
    (tmp_path / CODE).mkdir()
    rows = []
    for repository, commit in (("a", 1), ("a", 2), ("b", 1)):
        files = code_files(repository)
        snapshot = {"filename": list(files), "content": list(files.values())}
        rows.append({"repo": repository, "commit_hash": str(commit), "repo_snapshot": snapshot})
    (tmp_path / CODE / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load(CODE, **settings | {"data": str(tmp_path)})
    assert task.eval_docs["name"] == ["a", "b"]


@pytest.mark.parametrize(
    ("lengths", "size"), [(["64k"], "large_context"), (["64k", "128k"], "huge_context")]
)
def test_what_is_asked_of_the_hub(monkeypatch, lengths, size):
    asked = []

    def no_rows(*args, **options):
        asked.append((args, options))
        return []

    monkeypatch.setattr(documents.hub_data.datasets, "load_dataset", no_rows)
    for name in (BOOK, CODE):
        with pytest.raises(ValueError, match="needed, and the data set holds 0; give"):
            load(name, context_lengths=lengths, max_length="1m")
    assert asked == [
        ((documents.BOOKS, None), {"split": "test"}),
        ((documents.REPOSITORIES, size), {"split": "test", "streaming": True}),
    ]


# Cuts

TEXTS = {
    "prose": SyntheticHaystack(7).text(0, 1 << 15),
    "code": "def f(x):\n    return {'a':[x+1,\t(2)]}\n\n\n# ----------\n" * 400,
    "blanks": "  lead" + ("x" + " " * 7 + "\n" * 5) * 600,
    "unbroken": "".join(chr(97 + i * i % 149 % 26) for i in range(6000)),
}


@pytest.mark.parametrize("kind", ["demo", "byte-level", "unigram", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_cuts_leave_the_tokens_alone(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    counter, ends = TokenCounter(tokenizer), [100, 300, 1000]
    document = cut("", TEXTS[text], ends, counter)
    assert isinstance(document, Document)
    assert TEXTS[text].lstrip().startswith(document.text)
    assert len(document.text) == document.cuts[-1]
    parts = [Encoder(tokenizer).encode(document.text[:end]) for end in document.cuts]
    for part, longer in pairwise(parts):
        assert np.array_equal(part, longer[: len(part)])
    sizes = [len(part) for part in parts]
    assert [b - a for a, b in pairwise(sizes)] == document.tokens
    assert 0 < sizes[0] <= 8
    for size, end in zip(sizes[1:], ends, strict=True):
        assert end - 32 < size + counter.special <= end
    for begin in document.cuts:  # lm-eval moves blanks at a context's end to the continuation
        assert not document.text[begin - 1].isspace()


def test_texts_that_cannot_be_cut(tokenizers):
    counter = TokenCounter(tokenizers["demo"])
    count = counter.special + counter.count(TEXTS["prose"][:500])
    assert cut("", TEXTS["prose"][:500], [64, count + 1], counter) == count
    assert isinstance(cut("", TEXTS["prose"][:500], [64, count], counter), Document)
    assert cut("", "", [64], counter) == counter.special
    assert isinstance(cut("", "\n" * 1000 + "a", [64], counter), int)


def test_same_requests_on_every_machine(settings):
    texts = [text for pair in requests(load(**settings)) for text in pair]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert digest == "9e050b1c2f1465217029151cbd554a372e7643ea0c6da0c2ba7b41f7280ed1c7"
    assert len(texts) == 2 * 2 * len(LENGTHS)


# Losses


def check(scores, task, logits_of, encode):
    """The scores of a run are those of one full pass over each of its documents."""
    pooled = {}
    for document in task._documents:
        ids = torch.tensor([encode(document.text)])
        logprobs = logits_of(ids).double().log_softmax(-1)[0, :-1]
        losses = -logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
        begin = first = len(losses) - sum(document.tokens)
        for end, tokens in zip(LENGTHS, document.tokens, strict=True):
            pooled.setdefault(f"loss@{end:07d}", []).extend(losses[begin : begin + tokens])
            begin += tokens
            pooled.setdefault(f"loss_to@{end:07d}", []).extend(losses[first:begin])
        pooled.setdefault("loss", []).extend(losses[first:])
    for metric, losses in pooled.items():
        assert scores[metric] == pytest.approx(np.mean(losses), abs=1e-9), metric
    size = sum(len(d.text[d.cuts[0] :].encode()) for d in task._documents)
    assert scores["bits_per_byte"] == pytest.approx(sum(pooled["loss"]) / np.log(2) / size)
    assert scores.keys() == {*pooled, "bits_per_byte"}


@pytest.mark.slow
def test_losses_are_those_of_one_pass(settings, monkeypatch):
    """And cost it: no token of a document is fed twice."""
    model = YocoLM(dtype="float64", device="cpu")
    score, fed = Engine.score, []

    def counting(self, requests, begin, progress):
        return score(self, requests, lambda tokens: (fed.append(tokens), begin(tokens)), progress)

    monkeypatch.setattr(Engine, "score", counting)
    scores, results = evaluate(model, metadata=settings)
    task = load(**settings)
    check(scores, task, model.model, model.tok_encode)
    assert fed == [sum(len(model.tok_encode(d.text)) - 1 for d in task._documents)]
    rows = [line.split("|")[5].strip() for line in make_table(results).splitlines()[2:]]
    names = ["loss@0000128", "loss@0000256", "loss@0000512"]
    assert rows == ["bits_per_byte", "loss", *names, *(n.replace("@", "_to@") for n in names)]
    recorded = results["configs"][BOOK]["metadata"]
    assert recorded["context_lengths"] == LENGTHS and recorded["samples"] == 2
    assert recorded["by_length"] == ["loss", "loss_to"]
    assert list(recorded["prompts"]) == ["128", "256", "512"]


def test_hugging_face_model(tmp_path, settings):
    tokenizer = load_tokenizer({"pretrained": "demo-1m"})
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=512,
        )
    ).double()  # fmt: skip
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    model = HFLM(pretrained=str(tmp_path / "llama"), device="cpu", dtype="float64")
    settings["pretrained"] = str(tmp_path / "llama")
    scores, _ = evaluate(model, metadata=settings)
    with torch.inference_mode():
        check(scores, load(**settings), lambda ids: llama(ids).logits, model.tok_encode)


def test_digests_tell_where_buckets_are_the_same(settings):
    """A bucket is a request: what it begins with counts, too."""

    def digests(**others):
        task = load(**{**settings, **others})
        task.build_all_requests()
        return task.config.metadata["prompts"]

    known = digests()
    assert known == digests(context_lengths=LENGTHS)
    fewer = digests(context_lengths=[128, 512])
    assert fewer["128"] == known["128"] and fewer["512"] != known["512"]
    assert not known.items() & digests(samples=1).items()


@pytest.mark.slow
def test_lm_eval_options(settings):
    model = YocoLM(device="cpu")
    scores, _ = evaluate(model, metadata=settings)
    # Nothing comes before a document.
    others, results = evaluate(
        model, metadata=settings, num_fewshot=2, system_instruction="Be brief.", log_samples=True
    )
    assert others == scores
    whole = results["configs"][BOOK]["metadata"]["prompts"]
    few, results = evaluate(model, metadata=settings, limit=1)
    assert few["loss"] != scores["loss"] and results["n-samples"][BOOK]["effective"] == 1
    some = results["configs"][BOOK]["metadata"]["prompts"]
    assert not whole.items() & some.items()
    none, results = evaluate(model, metadata=settings, predict_only=True)
    assert "loss" not in none and len(results["samples"][BOOK][0]["resps"]) == len(LENGTHS)
