"""Memory, speeds and numbers of cards, as people write them."""

import pytest

from yoco_eval.sizes import parse_count, parse_memory, parse_speeds


@pytest.mark.parametrize("text", ["80g", "80G", "80gb", "80GB", "80GiB", " 80 GiB ", "80.0g"])
def test_memory(text):
    assert parse_memory(text) == 80 * 2**30
    assert parse_memory("23.5g") == 47 * 2**29


@pytest.mark.parametrize(
    "text", ["80", "", "g", "80m", "-1g", "0g", "1e3g", "80gbit", "9" * 40 + "g"]
)
def test_what_is_no_memory(text):
    with pytest.raises(ValueError, match=r"is not a card's memory; write 80g, for 80 GiB$"):
        parse_memory(text)


def test_speeds():
    assert parse_speeds("700, 2900.5") == (7e14, 2.9005e12)
    for text in ("700", "700,", "0,1", "1,0", "700,2900,1", "a,b", "1," + "9" * 40):
        with pytest.raises(ValueError, match="is not a card's speeds; write 700,2900, for "):
            parse_speeds(text)


def test_counts():
    assert [parse_count(text) for text in ("1", " 8 ", "65536")] == [1, 8, 65536]
    for text in ("0", "-1", "65537", "1.5", "8k", "", "9" * 400):
        with pytest.raises(ValueError, match="is no number from 1 to 65536; write 8$"):
            parse_count(text)
