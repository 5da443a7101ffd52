"""Models of the hub as texts see them: the same prompts and the same answers as lm-eval's `hf`.

Both backends get models whose next token depends on the last one alone, so that a test can have
them say what it likes, as long as no token comes twice.
"""

import json

import pytest
from hub_tokenizers import GEMMA_TOKENS, PHI_TOKENS, gemma, phi
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from yoco_eval.lm import YocoLM
from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig, save
from yoco_eval.model.checkpoint import CheckpointError

WIDTH, VOCABULARY, LONGEST = 32, 512, 2048
KINDS = {"gemma": gemma, "gemma-it": lambda folder: gemma(folder, bos=False), "phi": phi}
CHATS = [
    [{"role": "user", "content": " Oslo? "}],
    [{"role": "system", "content": "It is old."}, {"role": "user", "content": "7\n\nor 48213?"}],
]
BEGUN = [*CHATS[0], {"role": "assistant", "content": "The special number is"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind of tokenizer, the folders of a YOCO model and of one of transformers with it."""
    mixer = GatedRetentionSettings(n_self_heads=2)
    heads = {"n_attn_heads": 2, "n_attn_kv_heads": 1, "max_position_embeddings": LONGEST}
    sizes = {"dim": WIDTH, "n_layers": 2, "hidden_dim": WIDTH, "vocab_size": VOCABULARY}
    yoco = Yoco(YocoConfig(self_decoder=mixer, **sizes, **heads))
    heads = {"num_attention_heads": 2, "max_position_embeddings": LONGEST, "num_hidden_layers": 1}
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": VOCABULARY}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    made = {}
    for kind, write in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        save(yoco, made[kind] / "yoco")
        llama.save_pretrained(made[kind] / "hf")
        for folder in made[kind].iterdir():
            write(folder)
            added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
            ids = {token["content"]: token["id"] for token in added}
            ends = PHI_TOKENS[:2] if kind == "phi" else ["<eos>", "<turn|>"]
            content = {"eos_token_id": [ids[end] for end in ends]}
            (folder / "generation_config.json").write_text(json.dumps(content))
    return made


@pytest.fixture
def both(folders):
    """Makes both backends with a kind of tokenizer and the same arguments."""

    def make(kind, **arguments):
        return (
            YocoLM(pretrained=str(folders[kind] / "yoco"), device="cpu", **arguments),
            HFLM(pretrained=str(folders[kind] / "hf"), device="cpu", **arguments),
        )

    return make


def say(lm, text):
    """Has a model say this text, and end, after its first token, which is returned."""
    ids = [*lm.tok_encode(text, add_special_tokens=False), lm.eot_token_id]
    assert len(set(ids)) == len(ids) <= WIDTH
    for name, weight in lm.model.named_parameters():
        weight.data.fill_(float("norm" in name))
        if name.endswith("embed_tokens.weight"):
            weight.data[ids, range(len(ids))] = 1.0
        if name.startswith(("lm_head", "output_projection")):
            weight.data[ids[1:], range(len(ids) - 1)] = 1.0
    return lm.tokenizer.decode(ids[:1])


def answer(lm, text, until=(), room=40):
    """What a backend makes of a text that its model says."""
    settings = {"until": list(until), "max_gen_toks": room}
    return lm.generate_until([Instance("generate_until", {}, (say(lm, text), settings), 0)])[0]


# Prompts


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompts(both, kind):
    yoco, hf = both(kind)
    chats = [hf.apply_chat_template(chat) for chat in CHATS]
    assert [yoco.apply_chat_template(chat) for chat in CHATS] == chats
    texts = ["Oslo", " The  answer;\n\n", "<bos>Oslo", "Ünknown 48213 Oslo<|end|>", "a<turn|>\n"]
    for text in [*texts, "<|endoftext|>a user", *chats]:
        ids = hf.tok_batch_encode([text])[0][0].tolist()
        assert yoco.tok_encode(text) == hf.tok_encode(text) == ids
    assert (yoco.tok_encode("Oslo")[0] == yoco.tokenizer.bos_token_id) == (kind == "gemma")
    first = yoco.tokenizer.convert_ids_to_tokens(yoco.tok_encode(chats[0])[:2])
    assert first == (["<|user|>", "ĠOslo"] if kind == "phi" else ["<bos>", "<|turn>"])
    for context, continuation in [("Oslo", " is"), ("Oslo is ", "7"), (chats[0], "48213")]:
        pair = yoco._encode_pair(context, continuation)
        assert [ids.tolist() for ids in pair] == list(hf._encode_pair(context, continuation))
    requests = []
    for lm in (yoco, hf):
        lm._loglikelihood_tokens = lambda given, **_: requests.append(given)
        lm.loglikelihood([Instance("loglikelihood", {}, ("", "Oslo is"), 0)], disable_tqdm=True)
    (_, *ours), (_, *theirs) = (given for [given] in requests)
    assert list(map(list, ours)) == theirs


def test_the_same_prompts_with_a_bos_that_is_asked_for(both, caplog):
    for bos in (True, False):
        yoco, hf = both("gemma-it", add_bos_token=bos)
        for text in ("Oslo", "<bos>Oslo", hf.apply_chat_template(CHATS[0])):
            assert yoco.tok_encode(text) == hf.tok_encode(text)
    both("gemma"), both("phi")
    assert "no BOS token" not in caplog.text
    both("gemma-it")
    assert "puts no BOS token ('<bos>') before texts, with --model hf neither" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "thinks"),
    [
        ({"enable_thinking": True, "think_end_token": "</think>"}, True),
        ({"enable_thinking": False, "chat_template_args": {"enable_thinking": True}}, False),
        ({"chat_template_args": {"enable_thinking": True, "brief": True}}, True),
    ],
)
def test_the_same_chats(both, arguments, thinks):
    yoco, hf = both("gemma-it", **arguments)
    for chat in CHATS:
        assert yoco.apply_chat_template(chat) == hf.apply_chat_template(chat)
    begun = yoco.apply_chat_template(BEGUN, add_generation_prompt=False)
    assert begun == hf.apply_chat_template(BEGUN, add_generation_prompt=False)
    assert begun.endswith("<|turn>model\nThe special number is")
    assert ("<|turn>system\n<|think|>\n" in begun) == thinks
    assert ("Be brief." in begun) == ("brief" in arguments.get("chat_template_args", {}))


# Answers


@pytest.mark.parametrize(
    ("kind", "end"), [("gemma", "<eos>"), ("gemma", "<turn|>"), ("phi", "<|end|>")]
)
def test_all_end_tokens_end_an_answer(both, kind, end):
    yoco, hf = both(kind)
    text = f"What is 48213{end} not"
    if end == "<eos>":  # which ends what is said anyway
        text = "What is 48213"
    assert answer(yoco, text) == answer(hf, text) == " is 48213"


SAID = {
    "gemma": "What<|channel> thought? nobody at Lima,<channel|>\nThe answer; is 48213! not.",
    "phi": "What thought? nobody at Lima,</think>\nThe answer; is 48213! not.",
}
ENDS = {"gemma": GEMMA_TOKENS.index("<channel|>"), "phi": "</think>"}


@pytest.mark.parametrize("kind", SAID)
def test_the_same_answers_after_thinking(both, kind):
    def answers(until, **arguments):
        ours, theirs = (answer(lm, SAID[kind], until) for lm in both(kind, **arguments))
        assert ours == theirs
        return ours

    end = ENDS[kind]
    assert answers("", think_end_token=end) == "The answer; is 48213! not."
    assert answers("!", think_end_token=end) == "The answer; is 48213"
    assert answers([".", " is"], think_end_token=str(end)) == "The answer;"
    # Without it, or where it does not come, the thinking is a part of the answer.
    thought = f" thought? nobody at Lima,{'</think>' if kind == 'phi' else ''}\n"
    assert answers("!") == f"{thought}The answer; is 48213"
    assert answers("!", think_end_token=" number") == f"{thought[1:]}The answer; is 48213"
    assert answers("!", think_end_token=" at").startswith("Lima,")


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("until", [["?"], ["\n"], [",", "\nThe", "!"]])
def test_stop_strings_in_the_thinking_end_no_answer(folders, kind, until):
    """Nor do blanks after it. With `hf` they end the generation, which has no answer then; with
    lm-eval's `vllm` none ends it, and the text is cut afterwards."""
    end = "</think>" if kind == "phi" else "<channel|>"  # a special token by its name
    lm = YocoLM(pretrained=str(folders[kind] / "yoco"), device="cpu", think_end_token=end)
    whole = "The answer; is 48213! not."
    assert answer(lm, SAID[kind], until) == (whole.partition("!")[0] if "!" in until else whole)


def test_thinking_without_room_is_told(folders, caplog):
    arguments = {"pretrained": str(folders["phi"] / "yoco"), "device": "cpu"}
    lm = YocoLM(**arguments, think_end_token="</think>")
    assert answer(lm, SAID["phi"], room=30) and answer(lm, SAID["phi"], room=20)
    assert not caplog.text
    assert answer(lm, SAID["phi"], ["nobody"], room=5) == "thought? "
    assert "1 of 1 answers took all of max_gen_toks and have no think_end_token" in caplog.text
    assert "if '</think>' is what ends this model's thinking" in caplog.text


def test_responses_of_other_endings_are_not_kept(folders, tmp_path):
    def cached(kind="yoco", **arguments):
        lm = YocoLM(pretrained=str(folders["phi"] / kind), device="cpu", **arguments)
        return CachingLM(lm, str(tmp_path / "cache.db"))

    cached()
    cached()
    with pytest.raises(ValueError, match="think_end_token was not set, and is </think>"):
        cached(think_end_token="</think>")
    with pytest.raises(ValueError, match="think_end_token was not set, and is 0"):
        cached(think_end_token=0)
    settings = folders["phi"] / "yoco" / "generation_config.json"
    before = settings.read_text()
    settings.write_text('{"eos_token_id": 7}')
    with pytest.raises(ValueError, match="cache.db: holds responses of other settings .end token"):
        cached()
    settings.write_text(before)


# Refusals


THINKING = {"enable_thinking": True, "think_end_token": "</think>"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinking": "yes"}, "enable_thinking: 'yes' is neither True nor False"),
        ({"enable_thinking": True}, "enable_thinking=True needs think_end_token, what ends the"),
        ({"think_end_token": " "}, "think_end_token= is empty; give a value"),
        ({"think_end_token": 999}, "think_end_token: 999 is the id of no token of"),
        ({"think_end_token": 0.5}, "think_end_token: 0.5 is neither a text nor the id of a token"),
        ({"chat_template_args": "brief"}, "chat_template_args: 'brief' is no mapping of names to"),
        ({"chat_template_args": {"tokenize": True}}, "tokenize: no variable that a chat template"),
    ],
)
def test_bad_arguments(folders, arguments, message):
    with pytest.raises(ValueError) as caught:
        YocoLM(pretrained=str(folders["phi"] / "yoco"), device="cpu", **arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_scored_after_thoughts(folders):
    """As with lm-eval's backends; here before anything is computed."""
    lm = YocoLM(pretrained=str(folders["phi"] / "yoco"), device="cpu", **THINKING)
    with pytest.raises(ValueError, match="^enable_thinking=True is for tasks whose"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", " user"), 0)])

    class Task:
        OUTPUT_TYPE = "multiple_choice"

    with pytest.raises(ValueError, match="^choices: enable_thinking=True is for tasks whose"):
        evaluator.evaluate(lm, {"choices": Task()})


def test_end_tokens_that_are_none(folders):
    settings = folders["gemma"] / "yoco" / "generation_config.json"
    before = settings.read_text()
    settings.write_text('{"eos_token_id": [1, 512]}')
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id must be the"):
        YocoLM(pretrained=str(folders["gemma"] / "yoco"), device="cpu")
    settings.write_text(before)
