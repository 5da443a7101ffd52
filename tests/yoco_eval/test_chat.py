"""Templates of chats: what they write is tokens, and they come to an end."""

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from yoco_eval.chat import ChatTemplate

CHAT = [{"role": "system", "content": "<|x|> Be brief."}, {"role": "user", "content": "Oslo?"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def chats(template, converted=False, tokens=()):
    """With every character a token, and `tokens`."""
    letters = {chr(c): c - 10 for c in range(10, 127)}
    tokenizer = Tokenizer(models.BPE({**letters, "<s>": 200, "</s>": 201}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(list(tokens))
    return ChatTemplate(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            name_or_path="dir/t",
            split_special_tokens=converted,
            chat_template=template,
        )
    )


def test_a_chat_is_rendered():
    text = "<|im_start|>system\n<|x|> Be brief.<|im_end|>\n<|im_start|>user\nOslo?<|im_end|>\n"
    rendered = chats(CHATML, converted=True, tokens=["<|im_start|>", "<|im_end|>"])
    assert rendered.render(CHAT) == text + "<|im_start|>assistant\n"
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    assert rendered.render(begun, False) == text + "<|im_start|>assistant\nIt is"


def test_a_long_template_is_no_endless_one():
    """Some published ones have 16 thousand characters, most of them about tools."""
    tools = "{% if tools %}{% for t in tools %}{{ t.name ~ ': ' ~ t.text }}{% endfor %}{% endif %}"
    assert chats(tools * 100 + CHATML).render(CHAT).startswith("<|im_start|>system")


def test_markers_that_a_converted_tokenizer_splits_are_refused(caplog):
    with pytest.raises(ValueError, match=r"^dir/t: .*<\|im_start\|>, <\|im_end\|>, which") as error:
        chats(CHATML, converted=True).render(CHAT)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"its chat template writes <s>, which"):
        chats(LLAMA, converted=True).render(CHAT)
    assert not caplog.text
    # Elsewhere special tokens are found in texts, and models are trained with markers as text.
    assert chats(LLAMA).render(CHAT).startswith("<s>[INST] ") and not caplog.text
    assert chats(CHATML).render(CHAT).startswith("<|im_start|>system")
    assert "dir/t: its chat template writes <|im_start|>, <|im_end|>, which are no" in caplog.text
    assert "<|x|>" not in caplog.text
    chats("<|turn>user\n{{ messages[1].content }} <b><turn|>", tokens=["<turn|>"]).render(CHAT)
    assert "its chat template writes <|turn>, which are no" in caplog.text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(64) }}",
    ],
)
def test_a_template_that_loops_is_stopped(template):
    with pytest.raises(ValueError, match="^dir/t: its chat template fails .it is not") as error:
        chats(template).render(CHAT)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="memory cannot be limited here")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x * 2 %}{% endfor %}",
    ],
)
def test_a_template_that_fills_the_memory_is_stopped(template):
    before = psutil.Process().rlimit(psutil.RLIMIT_AS)
    with pytest.raises(ValueError, match="^dir/t: its chat template fails .MemoryError"):
        chats(template).render(CHAT)
    assert psutil.Process().rlimit(psutil.RLIMIT_AS) == before


@pytest.mark.parametrize("template", [
    "{% for %}", "{{ raise_exception('no system\nrole') }}", "{{ messages[7].role.name }}",
    "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ raise_exception('no ' * 999) }}",
])  # fmt: skip
def test_a_template_that_fails(template):
    with pytest.raises(ValueError, match="^dir/t: its chat template fails .*; mend it,") as error:
        chats(template).render(CHAT)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_template():
    with pytest.raises(ValueError, match="dir/t: this tokenizer has no chat template; leave out"):
        chats(None).render(CHAT)
