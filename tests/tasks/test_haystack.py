"""Haystacks: what the synthetic text holds and does not hold, and how given texts are read."""

import hashlib
import re

import pytest

from yoco_eval.tasks import haystack
from yoco_eval.tasks.haystack import SyntheticHaystack, load_haystack, sentence_starts
from yoco_eval.tasks.wording import CITIES


@pytest.fixture(scope="module")
def long_text():
    """About 5 million tokens of a tokenizer made for this text, more of most others."""
    return SyntheticHaystack(0).text(0, 25_000_000)


def test_millions_of_tokens_without_a_repeated_paragraph(long_text):
    paragraphs = long_text.split("\n")
    assert len(long_text) >= 25_000_000
    assert len(set(paragraphs)) == len(paragraphs)


@pytest.mark.slow
def test_nothing_in_it_is_taken_for_a_needle(long_text):
    words = set(re.findall(r"\w+", long_text))
    assert not words & set(" ".join(CITIES).split())
    needle_words = {"special", "number", "city", "question", "answer"}
    number_words = set("one two three four five six seven eight nine ten hundred thousand".split())
    assert not {word.lower() for word in words} & (needle_words | number_words)
    assert not any(re.search(r"\d", word) for word in words)


def test_sentences_are_well_formed_and_varied(long_text):
    sentences = re.split(r"(?<=\.) |\n", long_text[:1_000_000])[:-1]
    assert all(re.fullmatch(r"[A-Z][a-z ,A-Z]+\.", sentence) for sentence in sentences)
    assert len(set(sentences)) > 0.999 * len(sentences)
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", long_text[:1_000_000])
    # No word for two people or things of one sentence.
    names = re.compile(rf"\b(?:{'|'.join(haystack._NAMES)})\b")
    assert all(len(found) == len(set(found)) for found in map(names.findall, sentences))
    lengths = [len(paragraph.split(". ")) for paragraph in long_text[:100_000].split("\n")[:-1]]
    assert set(lengths) == {4, 5, 6, 7}


def test_same_text_on_every_machine():
    text = SyntheticHaystack(7).text(3, 10_000)[:10_000]
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "3b4855aa121dd06808c00edeb3389f49231724f2b596405d014b39bd3cc5f8ac"


def test_longer_text_continues_the_shorter_one():
    source = SyntheticHaystack(0)
    short, long = source.text(1, 1_000), source.text(1, 300_000)
    assert len(short) >= 1_000 and len(long) >= 300_000
    assert long.startswith(short)


def test_every_sample_and_seed_is_another_text():
    texts = {
        SyntheticHaystack(seed).text(sample, 1000)[:200] for seed in (0, 1) for sample in range(5)
    }
    assert len(texts) == 10


def test_sentence_starts():
    text = 'One. "Two!" Three? (Four.) Five\n\n  Six 1.5 seven. 八。九！'
    starts = sentence_starts(text)
    assert [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)] == [
        "One. ", '"Two!" ', "Three? ", "(Four.) ", "Five\n\n  ", "Six 1.5 seven. ", "八。", "九！",
    ]  # fmt: skip
    assert sentence_starts("no end") == [0]


def test_given_text_is_rotated_per_sample(tmp_path):
    sentences = [f"This is sentence {i}." for i in range(50)]
    (tmp_path / "notes.txt").write_text(" ".join(sentences) + "\n")
    source = load_haystack(str(tmp_path / "notes.txt"))
    texts = [source.text(sample, 10) for sample in range(4)]
    assert source.name == "notes.txt" and texts[0].startswith("This is sentence 0. This")
    for text in texts:
        assert sorted(re.findall(r"This is sentence \d+\.", text)) == sorted(sentences)
    assert len({text[:30] for text in texts}) == 4


def test_folder_of_texts(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("Second.")
    (tmp_path / "a.txt").write_text("First.\n")
    (tmp_path / "sub" / "c.txt").write_text("Third.")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert load_haystack(str(tmp_path)).text(0, 100) == "First.\nSecond.\nThird.\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "neither 'synthetic'"), (b" \n", "is empty"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_unusable_texts(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_haystack(str(path))
    assert "text.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        load_haystack(str(tmp_path))


def test_essays_without_network(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="haystack 'essays' could not be loaded"):
        load_haystack("essays")


def test_essays(monkeypatch):
    import datasets

    essays = datasets.Dataset.from_dict({"text": ["One\n\nessay. ", "Another\tone."]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: essays)
    assert load_haystack("essays").text(0, 10) == "One essay. Another one.\n"
