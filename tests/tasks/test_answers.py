"""Answers: the thinking before them, and their first number as people and models write it."""

import pytest

from yoco_eval.tasks.answers import after_thinking, first_number


@pytest.mark.parametrize(
    "text",
    [
        "12345",
        " 12345.",
        "12345. It is stated once.",
        "is **12345**, I think",
        "12345.0",
        "$12{,}345$",
        "12\\,345",
        "12,345",
        "12 345",
        "12\u00a0345",
        "12\u2009345",
        "12\u202f345 in all",
        "12.345",
        "12'345",
        "12’345",
        "12_345",
        "12,345.67",
        "12.345,67",
        "12345,54321",
        "12345, 54321",
        "12345 678",
        "12,345,54321",
        "１２３４５",
        "１２，３４５",
        "١٢٣٤٥",
        "١٢٬٣٤٥",
        "۱۲۳۴۵",
        "१२३४५",
        "12345\n678",
        "#12345 or 7",
    ],
)
def test_one_number_however_it_is_written(text):
    assert first_number(text) == "12345"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("123456", "123456"),
        ("012345", "012345"),
        ("3 12345", "3"),
        ("12 34567", "12"),
        ("12,34567", "12"),
        ("12, 345", "12"),
        ("12\n345", "12"),
        ("1,2,3", "1"),
        ("1.12345", "1"),
        ("1,234,567", "1234567"),
        ("123,456", "123456"),
        ("12,345 678", "12345"),
        ("12,345.678", "12345"),
        ("5 of 12345", "5"),
        ("2024-05-17: 12345", "2024"),
        ("none", None),
        ("twelve²", None),
        ("", None),
    ],
)
def test_other_first_numbers(text, number):
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("12345", "12345"),
        ("<think>\n\n</think>\n\n12345", "\n\n12345"),
        ("Was it 7?</think> No, 12345", " No, 12345"),  # templates may begin the thinking
        ("<think>7</think> 8 <think>9</think> 12345", " 12345"),
        ("<think>It may be 12345", ""),  # there was no room for the answer
        ("12345 <think>or 7", "12345 "),
        ("<|channel>thought\n7 or 8<channel|>12345", "12345"),
        ("<|channel>thought\n12345", ""),
        (None, ""),
    ],
)
def test_what_is_said_after_the_thinking(answer, said):
    assert after_thinking(answer) == said
