"""Texts as they are shown: harmless, and with what was left out of them counted."""

import pytest

from yoco_eval.printable import (
    PLAIN,
    SCREENFUL,
    listed,
    message,
    one_line,
    printable,
    shortened,
    shown,
)


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x9b31m", "\r", "\x07", "\u202egnp.exe", "\ud800", "a\udcff", "\ue000"]
)
def test_nothing_moves_the_cursor_or_hides_letters(text):
    shown = printable(f"a {text}")
    assert shown.isprintable() and shown.encode() and text not in shown
    assert shown != "a "  # the reader sees that something was there


def test_blanks_stay_blanks():
    assert printable("a\tb\u00a0c\nd") == "a b c\nd"
    assert one_line(" a\n\n b  c ") == "a b c"
    assert message("a:\nb\r\nc") == "a:; b; c"


def test_what_is_left_out_is_counted():
    text = "x" * 10_000
    assert shortened(text, 10_000) == text
    cut = shortened(text, 200)
    assert len(cut) <= 200 and " … 9840 characters left out … " in cut
    assert cut.count("x") == 10_000 - 9840
    assert shortened("abcdefgh", 5) == "ab…gh"  # no room to tell
    assert len(printable(text)) <= SCREENFUL
    assert listed("abc") == "a, b, c" and listed("abcdef", 2, "; ") == "a; b and 4 more"


def test_values_are_cut():
    assert shown({"a": 1}) == "{'a': 1}"
    assert len(shown(list(range(10_000)))) <= 200
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "a list too large to be shown"
    assert shown(10**5000) == "a int too large to be shown"


def test_encodings_that_lack_letters():
    assert "0.92–1.00 ±0.1 ≥3 日".encode("ascii", PLAIN) == b"0.92-1.00 ~0.1 >=3 ?"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", PLAIN)
