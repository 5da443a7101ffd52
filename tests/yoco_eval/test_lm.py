"""The lm-eval backend against brute force over texts, and its treatment of bad input."""

import random
import shutil

import pytest
import torch
from lm_eval.api.instance import Instance

from yoco_eval.lm import YocoLM
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT

WORDS = "the special number of a city is found in old notes about Lima and Oslo 4 8 . , \n".split(
    " "
)


@pytest.fixture
def folder(small_model, tmp_path):
    """A checkpoint with random weights and the demo's tokenizer; 256 positions."""
    small_model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / DEFAULT_CHECKPOINT / name, tmp_path)
    return tmp_path


@pytest.fixture
def lm(folder):
    return YocoLM(pretrained=str(folder), device="cpu", dtype="float64")


def text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def requests(seed):
    """Empty, shared, unshared and over-long contexts; short and long continuations."""
    rng = random.Random(seed)
    stem = text(rng, 60)
    result = []
    for _ in range(60):
        context = rng.choice(["", stem[:100], stem, text(rng, 20), stem + text(rng, 400)])
        context += rng.choice(["", " ", "\n"]) + text(rng, 3)
        for words in (1, rng.randrange(2, 6), rng.choice([1, 150])):
            result.append((context, " " + text(rng, words)))
    result += [("", text(rng, words)) for words in (1, 5, 150)]
    rng.shuffle(result)
    return result


def logprobs(lm, ids):
    return lm.model(torch.tensor([ids]))[0].log_softmax(-1)


def score_by_definition(lm, context, continuation):
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole = [0, *lm.tokenizer.encode(context + continuation, add_special_tokens=False)]
    count = len(whole) - 1 - len(lm.tokenizer.encode(context, add_special_tokens=False))
    whole = whole[-(lm.max_length + 1) :]
    rows, targets = logprobs(lm, whole[:-1])[-count:], torch.tensor(whole[-count:])
    return rows.gather(1, targets[:, None]).sum().item(), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_loglikelihood(folder, batch_size, caplog):
    lm = YocoLM(
        pretrained=str(folder), device="cpu", dtype="float64", batch_size=batch_size,
        prefill_chunk=100,
    )
    wanted = requests(0)
    results = lm.loglikelihood(instances("loglikelihood", wanted))
    too_long = 0
    for (context, continuation), (logprob, greedy) in zip(wanted, results, strict=True):
        expected, expected_greedy = score_by_definition(lm, context, continuation)
        assert logprob == pytest.approx(expected, abs=1e-8)
        assert greedy == expected_greedy
        too_long += len(lm.tokenizer.encode(context + continuation)) > lm.max_length + 1
    assert too_long > 10
    assert f"{too_long} of {len(wanted)} requests are longer than max_length = 256" in caplog.text


def test_loglikelihood_rolling(lm):
    rng = random.Random(3)
    texts = [text(rng, words) for words in (1, 50, 700)]
    results = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
    for string, result in zip(texts, results, strict=True):
        ids = lm.tokenizer.encode(string, add_special_tokens=False)
        total = 0.0
        for start in range(0, len(ids), 256):
            end = min(start + 256, len(ids))
            fed = [0, *ids][max(0, end - 256) : end]  # the last window sees a full context, too
            rows = logprobs(lm, fed)[-(end - start) :]
            total += rows.gather(1, torch.tensor(ids[start:end])[:, None]).sum().item()
        assert result == pytest.approx(total, abs=1e-8)


def generate_by_definition(lm, context, count, until):
    ids = [0, *lm.tokenizer.encode(context, add_special_tokens=False)][-(256 - count) :]
    new = []
    for _ in range(count):
        token = int(logprobs(lm, ids + new)[-1].argmax())
        if token == lm.eot_token_id:
            break
        new.append(token)
        if any(stop in lm.tokenizer.decode(new) for stop in until):
            break
    result = lm.tokenizer.decode(new, skip_special_tokens=True)
    return min((result.split(stop)[0] for stop in until), key=len, default=result)


def test_generate_until(lm):
    rng = random.Random(4)
    prompts = [text(rng, words) for words in (1, 5, 40, 40, 600)]
    free = [generate_by_definition(lm, prompt, 12, []) for prompt in prompts]
    # Stop strings that occur: each spans the middle of what is generated, thus several tokens.
    cases = [(prompt, []) for prompt in prompts]
    cases += [(prompt, ["never", out[5:9]]) for prompt, out in zip(prompts, free, strict=True)]
    results = lm.generate_until(
        instances("generate_until", [(p, {"until": u, "max_gen_toks": 12}) for p, u in cases])
    )
    assert results == [generate_by_definition(lm, prompt, 12, until) for prompt, until in cases]
    for (_, until), result, whole in zip(cases[5:], results[5:], free, strict=True):
        assert until[1] not in result and len(result) < len(whole)


def test_generation_settings(lm):
    def generate(seed, **settings):
        torch.manual_seed(seed)
        return lm.generate_until(
            instances("generate_until", [("Oslo", {"max_gen_toks": 8, "until": [], **settings})])
        )[0]

    greedy = generate(0)
    assert generate(0, do_sample=False, temperature=0.0) == greedy
    assert generate(0, do_sample=True, temperature=1.0, top_p=1e-6) == greedy
    sampled = {generate(seed, do_sample=True, temperature=1.0) for seed in (1, 1, 2)}
    assert len(sampled) == 2
    assert generate(0, until="\n") == generate(0, until=["\n"])
    with pytest.raises(ValueError, match="unknown generation setting num_beams; --model yoco"):
        generate(0, num_beams=4)
    with pytest.raises(ValueError, match="max_gen_toks = 300 leaves no room"):
        generate(0, max_gen_toks=300)


def test_responses_reach_the_cache_as_soon_as_they_exist(lm):
    class Hook:
        def add_partial(self, kind, arguments, response):
            saved.append((kind, arguments, response))
            if len(saved) == 2:
                raise KeyboardInterrupt

    saved = []
    lm.set_cache_hook(Hook())
    pairs = [("Lima", " is old"), ("Oslo", " is old"), ("a city", " is old")]
    with pytest.raises(KeyboardInterrupt):
        lm.loglikelihood(instances("loglikelihood", pairs))
    for kind, arguments, response in saved:
        assert kind == "loglikelihood" and arguments in pairs
        assert response[0] == pytest.approx(score_by_definition(lm, *arguments)[0], abs=1e-8)

    saved = [None] * 2  # far from the interruption
    settings = {"max_gen_toks": 3, "until": []}
    (result,) = lm.generate_until(instances("generate_until", [("Oslo", settings)]))
    assert saved[2:] == [("generate_until", ("Oslo", settings), result)]
    (result,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("Oslo is old",)]))
    assert saved[3:] == [("loglikelihood_rolling", ("Oslo is old",), result)]


def test_bos(folder):
    def encode(string, **arguments):
        return YocoLM(pretrained=str(folder), device="cpu", **arguments).tok_encode(string)

    bare = encode("Oslo", add_bos_token=False)
    assert encode("Oslo") == encode("Oslo", add_bos_token=True) == [0, *bare] and bare[0] != 0
    assert encode("<s>Oslo") == [0, *bare]  # such as a chat template writes


def test_max_length(folder, caplog):
    lm = YocoLM(pretrained=str(folder), device="cpu", max_length="1k")
    assert lm.max_length == 1024
    long = text(random.Random(5), 300)
    lm.loglikelihood(instances("loglikelihood", [(long, " is")]))
    assert "longer than" not in caplog.text
    lm = YocoLM(pretrained=str(folder), device="cpu", max_length=16)
    with pytest.raises(ValueError, match="exceeds max_length = 16; raise it"):
        lm.loglikelihood(instances("loglikelihood", [("Oslo", long)]))


def test_chat_template(lm):
    history = [{"role": "user", "content": "Oslo"}]
    with pytest.raises(ValueError, match="has no chat template; leave out --apply_chat_template"):
        lm.apply_chat_template(history)
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    assert lm.apply_chat_template(history) == "[user] Oslo"


def test_the_bundled_checkpoint_is_the_default():
    lm = YocoLM(device="cpu")
    assert lm.get_model_info()["pretrained"] == DEFAULT_CHECKPOINT
    assert lm.max_length == 65536
    prompt = (
        "The special number of Oslo is 48213. Nobody at the mill knew why.\n\nQuestion: What is "
        "the special number of Oslo?\nAnswer: The special number of Oslo is"
    )
    (answer,) = lm.generate_until(
        instances("generate_until", [(prompt, {"until": ["\n"], "max_gen_toks": 16})])
    )
    assert answer == " 48213."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretraind": "x"}, "unknown model argument pretraind; --model yoco takes pretrained,"),
        ({"pretrained": "/nowhere"}, "/nowhere: no such checkpoint"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; choose one of auto, bfloat16"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"max_length": "long"}, "max_length: 'long' is not a length"),
        ({"batch_size": 0}, "batch_size: 0 is not a length"),
        ({"prefill_chunk": "-1"}, "prefill_chunk: '-1' is not a length"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as caught:
        YocoLM(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizer_larger_than_the_model(folder, small_model, tmp_path):
    from dataclasses import replace

    from yoco_eval.model import Yoco

    Yoco(replace(small_model.config, vocab_size=1000)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2048 token ids exceed the model's vocabulary of 1000"):
        YocoLM(pretrained=str(tmp_path), device="cpu")
