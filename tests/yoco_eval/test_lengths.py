"""Lengths read and written."""

import pytest

from yoco_eval.lengths import format_length, parse_length, parse_lengths


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("65536", 65536), ("64k", 65536), ("64K", 65536), ("1m", 2**20), ("1.5M", 3 * 2**19)],
)
def test_parse_length(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "0.3k", "1g", "many", "k", "9" * 400, "0." + "9" * 5000, 10**400]
)
def test_refused_lengths(text):
    with pytest.raises(ValueError, match="write 65536, 64k or 1m") as caught:
        parse_length(text)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("text", [2**30 + 1, "1025m", "9" * 20])
def test_lengths_that_no_memory_holds(text):
    assert parse_length("1024m") == 2**30
    with pytest.raises(ValueError, match="too long; 1024m, 2.30 tokens, is the longest"):
        parse_length(text)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (1024, "1K"),
        (4096, "4K"),
        (3072, "3K"),
        (524288, "512K"),
        (2**20, "1M"),
        (3 * 2**19, "1.5M"),
        (2**20 + 1024, "1025K"),
        (2**23, "8M"),
        (500, "500"),
        (3000, "3000"),
        (10000, "10000"),
        (128000, "128000"),
        (1000000, "1000000"),
        (1025, "1025"),
    ],
)
def test_format_length(tokens, text):
    assert format_length(tokens) == text


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("64k", [2**16]),
        ("1k, 3k,10000", [1024, 3072, 10000]),
        ("32k,64k,...,1m", [2**n for n in range(15, 21)]),
        ("1k,...,4k,...,10k", [1024, 2048, 4096, 8192, 10240]),
        ("1k,...,2k", [1024, 2048]),
    ],
)
def test_parse_lengths(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a length"),
        ("1k,many", "'many' is not a length"),
        ("...,1m", "stands between two lengths"),
        ("1k,...", "stands between two lengths"),
        ("1k,...,...,1m", "stands between two lengths"),
        ("2k,1k", "ascending"),
        ("1k,1k", "ascending"),
        ("4k,...,1k", "ascending"),
    ],
)
def test_refused_lists_of_lengths(text, said):
    with pytest.raises(ValueError, match=said):
        parse_lengths(text)
