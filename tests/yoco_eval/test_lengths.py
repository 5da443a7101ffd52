"""Lengths read and written."""

import pytest

from yoco_eval.lengths import format_length, parse_length


@pytest.mark.parametrize(
    ("text", "tokens"), [("65536", 65536), ("64k", 65536), ("64K", 65536), ("1m", 2**20)]
)
def test_parse_length(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5k", "1g", "many", "k"])
def test_refused_lengths(text):
    with pytest.raises(ValueError, match="write 65536, 64k or 1m"):
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
