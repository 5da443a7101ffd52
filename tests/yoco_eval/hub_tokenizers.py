"""Stand-ins for tokenizers of models on the hub, trained on a little text, with chat templates in
the style of theirs."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing

TEXT = (
    "The special number of Oslo is 48213, I thought. Notes say: nobody at the mill in Lima knew\n"
    "why 7 is not it!\n\nWhat is the special number of Oslo? The answer; a model of a user"
)
GEMMA_TOKENS = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<|think|>", "<|channel>", "<channel|>", "<|turn>",
    "<turn|>",
]  # fmt: skip
# Gemma 4's asks for thoughts in the system's turn; the model opens the channel for them.
GEMMA_TEMPLATE = """\
{{ bos_token }}{% set turns = messages %}
{% if enable_thinking or turns[0].role == 'system' %}
{{ '<|turn>system\\n' }}{% if enable_thinking %}{{ '<|think|>\\n' }}{% endif %}
{% if turns[0].role == 'system' %}{{ turns[0].content | trim }}
{% set turns = turns[1:] %}{% endif %}
{% if brief %} Be brief.{% endif %}
{{ '<turn|>\\n' }}{% endif %}
{% for turn in turns %}
{{ '<|turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\\n' }}
{{ turn.content | trim }}{{ '<turn|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}""".replace("}\n", "}")
PHI_TOKENS = ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PHI_TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _trained(tokenizer, special, **options):
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, show_progress=False, **options
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer


def _write(folder, tokenizer, **config):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gemma(folder, bos=True):
    """As Gemma 4's: BPE over the whole text with bytes to fall back on, marks of turns and thoughts
    that are special tokens; `bos`, before every text, or by the chat template alone."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    words = Regex(r"▁?\p{L}+|▁?\p{N}+|\n+|.")
    trained.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    model = json.loads(_trained(trained, [*GEMMA_TOKENS, *bytes_]).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, **options))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(GEMMA_TOKENS)
    begin = "<bos> " if bos else ""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin}$A", pair=f"{begin}$A $B", special_tokens=[("<bos>", 2)]
    )
    marks = {"sot_token": "<|turn>", "eot_token": "<turn|>", "think_token": "<|think|>"}
    marks |= {"soc_token": "<|channel>", "eoc_token": "<channel|>"}
    return _write(
        folder,
        tokenizer,
        tokenizer_class="GemmaTokenizer",
        chat_template=GEMMA_TEMPLATE,
        padding_side="left",
        model_specific_special_tokens=marks,
        **marks,
        **{f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk")},
    )


def phi(folder):
    """As Phi-4-mini's: bytes of words, one token that pads, begins and ends, and thoughts in plain
    text, between <think> and </think>."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(tokenizer, [], initial_alphabet=alphabet).add_special_tokens(PHI_TOKENS)
    return _write(
        folder,
        tokenizer,
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template=PHI_TEMPLATE,
        add_bos_token=False,
        **{f"{role}_token": PHI_TOKENS[0] for role in ("bos", "eos", "pad", "unk")},
    )
