"""The lm-eval backend against brute force over texts, and its treatment of bad input."""

import gc
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM, TemplateLM
from lm_eval.api.task import ConfigurableTask

from yoco_eval.lm import YocoLM
from yoco_eval.model import Yoco, save
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT

WORDS = "the special number of a city is found in old notes about Lima and Oslo 4 8 . , \n".split(
    " "
)


@pytest.fixture
def folder(small_model, tmp_path):
    """A checkpoint with random weights and the demo's tokenizer; 512 positions."""
    save(small_model, tmp_path)
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
    for _ in range(70):
        context = rng.choice(["", " ", stem[:100], stem, text(rng, 20), stem + text(rng, 600)])
        context += rng.choice(["", " ", "\n"]) + rng.choice(["", text(rng, 3)])
        for words in (1, rng.randrange(2, 6), rng.choice([1, 1, 1, 240]), 1):
            result.append((context, " " + text(rng, words)))
    result += [("", text(rng, words)) for words in (1, 5, 150)] * 8
    rng.shuffle(result)
    return result


def logprobs(lm, ids):
    return lm.model(torch.tensor([ids]))[0].log_softmax(-1)


def score_by_definition(lm, context, continuation):
    """With <s> in front, which stands for an empty context where it is not added to texts."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole = lm.tokenizer.encode(context + continuation, add_special_tokens=False)
    count = len(whole) - len(lm.tokenizer.encode(context, add_special_tokens=False))
    whole = [0] * (lm.add_bos_token or not context) + whole
    whole = whole[-(lm.max_length + 1) :]
    rows, targets = logprobs(lm, whole[:-1])[-count:], torch.tensor(whole[-count:])
    return rows.gather(1, targets[:, None]).sum().item(), bool((rows.argmax(-1) == targets).all())


@pytest.fixture(scope="module")
def defined():
    """What scores are by definition, worked out once with and without a BOS before every text."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "bos"), [(1, None), (4, False), ("auto", None)])
def test_loglikelihood(folder, defined, batch_size, bos, caplog):
    lm = YocoLM(
        pretrained=str(folder),
        device="cpu",
        dtype="float64",
        batch_size=batch_size,
        prefill_chunk=100,
        add_bos_token=bos,
    )
    wanted = requests(0)
    lengths = [len(lm.tok_encode(continuation)) for _, continuation in wanted]
    assert len(wanted) > 300 and max(lengths) >= 300 and lengths.count(2 - (bos is False)) > 50
    assert sum(not context.strip() for context, _ in wanted) > 50
    results = lm.loglikelihood(instances("loglikelihood", wanted))
    if bos not in defined:
        defined[bos] = [score_by_definition(lm, *request) for request in wanted]
    too_long = 0
    for (context, continuation), (logprob, greedy), (expected, expected_greedy) in zip(
        wanted, results, defined[bos], strict=True
    ):
        assert logprob == pytest.approx(expected, abs=1e-8)
        assert greedy == expected_greedy
        too_long += len(lm.tok_encode(context + continuation)) > lm.max_length + 1
    assert too_long > 10
    assert f"{too_long} of {len(wanted)} requests are longer than max_length = 512" in caplog.text


@pytest.mark.parametrize("bos", [True, False])
def test_all_requests_are_encoded_at_once_and_as_in_lm_eval(folder, bos, monkeypatch):
    lm = YocoLM(pretrained=str(folder), device="cpu", add_bos_token=bos)
    wanted = [(c, t) for c, t in requests(1) if c]
    wanted += [("<s>Oslo", " is"), ("<s>", "Oslo"), ("Os", "lo"), ("Oslo\n \t", " is old")]
    expected = [TemplateLM._encode_pair(lm, *pair) for pair in wanted]
    encoded, received = [], []
    encode_all = lm._encoder.encode_all
    monkeypatch.setattr(lm._encoder, "encode_all", lambda t: encoded.append(t) or encode_all(t))
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda r, **kwargs: received.extend(r))
    lm.loglikelihood(instances("loglikelihood", [*wanted, ("", "Oslo")]))
    assert len(encoded) == 1 and len(set(encoded[0])) == len(encoded[0]) < 2 * len(wanted)
    *pairs, (_, context, continuation) = received
    for request, pair, ids in zip(wanted, pairs, expected, strict=True):
        assert (pair[0], *(part.tolist() for part in pair[1:])) == (request, *map(list, ids))
    assert [*context, *continuation] == [0, *lm.tokenizer.encode("Oslo", add_special_tokens=False)]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_encoding_does_not_wait_for_garbage_from_before(lm, kind, monkeypatch):
    gc.freeze()  # as Python 3.12 does with some objects
    before, frozen, encode_all = gc.get_freeze_count(), [], lm._encoder.encode_all

    def watched(texts):
        frozen.append(gc.get_freeze_count() > before)
        return encode_all(texts)

    monkeypatch.setattr(lm._encoder, "encode_all", watched)
    second = {"loglikelihood": (" Oslo",), "generate_until": ({"max_gen_toks": 2},)}.get(kind, ())
    getattr(lm, kind)(instances(kind, [("notes about Lima", *second)]), disable_tqdm=True)
    assert frozen == [True] and not gc.get_freeze_count()


def test_loglikelihood_rolling(lm):
    rng = random.Random(3)
    texts = [text(rng, words) for words in (1, 50, 700)]
    results = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
    for string, result in zip(texts, results, strict=True):
        ids = lm.tokenizer.encode(string, add_special_tokens=False)
        total = 0.0
        for start in range(0, len(ids), 512):
            end = min(start + 512, len(ids))
            fed = [0, *ids][max(0, end - 512) : end]  # the last window sees a full context, too
            rows = logprobs(lm, fed)[-(end - start) :]
            total += rows.gather(1, torch.tensor(ids[start:end])[:, None]).sum().item()
        assert result == pytest.approx(total, abs=1e-8)


def test_an_empty_text_has_nothing_to_predict(lm):
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("",)])) == [0.0]


def generate_by_definition(lm, context, count, until):
    ids = [0, *lm.tokenizer.encode(context, add_special_tokens=False)][-(512 - count) :]
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


@pytest.mark.slow
def test_generate_until(lm):
    rng = random.Random(4)
    prompts = [text(rng, words) for words in (1, 5, 40, 40, 900)]
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


def test_answers_depend_on_nothing_beside_them(folder):
    """Greedy ones and sampled ones, with stop strings, one by one and side by side."""
    rng = random.Random(5)
    stem = text(rng, 50)
    settings = [
        {"until": ["\n", " a"], "max_gen_toks": 20},
        {"until": ["o"], "max_gen_toks": 7, "do_sample": True, "temperature": 1.0, "top_k": 50},
        {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
    ]
    prompts = [rng.choice(["", stem]) + text(rng, rng.randrange(1, 30)) for _ in range(12)]
    asked = [(prompt, dict(rng.choice(settings))) for prompt in prompts] * 2  # repeats, too
    answers = {}
    for batch_size in (1, 5, "auto"):
        lm = YocoLM(pretrained=str(folder), device="cpu", dtype="float64", batch_size=batch_size)
        torch.manual_seed(3)
        answers[batch_size] = lm.generate_until(instances("generate_until", asked))
    assert answers[1] == answers[5] == answers["auto"]
    again = list(zip(answers[1][:12], answers[1][12:], asked, strict=False))
    assert all(a == b for a, b, (_, how) in again if "temperature" not in how)
    assert any(a != b for a, b, (_, how) in again if "temperature" in how)


def test_generation_settings(lm):
    def generate(seed, **settings):
        torch.manual_seed(seed)
        return lm.generate_until(
            instances("generate_until", [("Oslo", {"max_gen_toks": 8, "until": [], **settings})])
        )[0]

    greedy = generate(0)
    assert generate(0, do_sample=False, temperature=0.0) == greedy
    assert generate(0, do_sample=True, temperature=1.0, top_p=1e-6) == greedy
    assert generate(0, do_sample=True, temperature=0.0) == greedy
    assert generate(1, do_sample=True) == generate(1, do_sample=True, temperature=1.0)
    sampled = {generate(seed, do_sample=True, temperature=1.0) for seed in (1, 1, 2)}
    assert len(sampled) == 2
    assert generate(0, until="\n") == generate(0, until=["\n"])
    assert generate(0, num_beams=1, repetition_penalty=1.0) == greedy
    with pytest.raises(ValueError, match="setting num_beams=4 is not supported; --model yoco"):
        generate(0, num_beams=4)
    for bad in (
        {"temperature": "hot"},
        {"temperature": None},
        {"top_k": "x", "do_sample": True},
        {"max_gen_toks": float("inf")},
        {"until": [5]},
    ):
        with pytest.raises(ValueError, match="^generation setting") as error:
            generate(0, **bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="max_gen_toks = 600 leaves no room"):
        generate(0, max_gen_toks=600)
    with pytest.raises(ValueError, match="top_p 2.0 is outside 0..1"):
        generate(0, do_sample=True, top_p=2)


def test_a_setting_of_any_task_is_refused_before_the_first_request(lm, monkeypatch):
    def task(name, **config):
        data = {"test": Dataset.from_list([{"text": "Oslo is old."}])}
        return ConfigurableTask(
            config={
                "task": name,
                "custom_dataset": lambda **_: data,
                "test_split": "test",
                "doc_to_text": "{{text}}",
                "doc_to_target": "{{text}}",
                **config,
            }
        )

    scored = []
    monkeypatch.setattr(lm.engine, "score", lambda *args, **kwargs: scored.append(args) or [])
    beams = {"generation_kwargs": {"num_beams": 4}, "output_type": "generate_until"}
    tasks = {"text": task("text", output_type="loglikelihood_rolling"), "beams": task("b", **beams)}
    for given in ({"tasks": tasks, "groups": {}}, {"group": tasks}):
        with pytest.raises(ValueError, match="^beams: generation setting num_beams=4 is not"):
            evaluator.evaluate(lm=lm, task_dict=given)
    assert not scored


SETTINGS = {"max_gen_toks": 3, "until": []}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", [(city, " is old") for city in ("Lima", "Oslo", "Rome", "Cairo")]),
        ("loglikelihood_rolling", [(f"{city} is old",) for city in ("Lima", "Oslo", "Rome")]),
        ("generate_until", [(city, SETTINGS) for city in ("Lima", "Oslo", "Rome", "Cairo")]),
    ],
)
def test_responses_reach_the_cache_as_soon_as_they_exist(lm, kind, arguments):
    class Interrupting(CacheHook):
        def add_partial(self, kind, arguments, response):
            saved.append((kind, arguments, response))
            if len(saved) == 2:
                raise KeyboardInterrupt

    saved = []
    expected = dict(
        zip(arguments_key(arguments), getattr(lm, kind)(instances(kind, arguments)), strict=True)
    )
    lm.set_cache_hook(Interrupting(None))
    with pytest.raises(KeyboardInterrupt):
        getattr(lm, kind)(instances(kind, arguments))
    assert len(saved) == 2
    for saved_kind, request, response in saved:
        assert saved_kind == kind and request in arguments
        assert response == expected[arguments_key([request])[0]]


def arguments_key(arguments):
    return [request[0] for request in arguments]


def test_a_cache_of_another_model_is_refused(folder, small_model, tmp_path):
    """lm-eval's own key is the prompt alone."""

    def cached(**changes):
        lm = YocoLM(**{"pretrained": str(folder), "device": "cpu", **changes})
        return CachingLM(lm, str(tmp_path / "cache.db"))

    first = cached().loglikelihood(instances("loglikelihood", [("Oslo", " is old")]))
    assert cached().loglikelihood(instances("loglikelihood", [("Oslo", " is old")])) == first
    with pytest.raises(ValueError, match="other settings .dtype was float32, and is float64.,"):
        cached(dtype="float64")
    small_model.cross_decoder.layers[0].ffn.fc1.weight.mul_(1.1)
    save(small_model, folder)
    with pytest.raises(ValueError, match="cache.db: holds responses of another model"):
        cached()


def test_sampled_responses_are_not_kept(folder, tmp_path):
    """Also where only a temperature says that they are sampled."""
    lm = YocoLM(pretrained=str(folder), device="cpu")
    cached = CachingLM(lm, str(tmp_path / "cache.db"))

    def generate(seed, **settings):
        torch.manual_seed(seed)
        settings = {"max_gen_toks": 6, "until": [], **settings}
        return cached.generate_until(instances("generate_until", [("Oslo", settings)] * 2))

    first = generate(0, temperature=1.0)
    assert first[0] != first[1] and generate(0, temperature=1.0) == first
    assert not set(generate(1, temperature=1.0)) & set(first)
    greedy = generate(0)
    lm.engine = None
    assert generate(0) == greedy


@pytest.mark.parametrize("change", ["merges", "added token", "flag"])
def test_a_cache_is_of_one_tokenizer(folder, tmp_path, change):
    """Also where its vocabulary is the same."""
    CachingLM(YocoLM(pretrained=str(folder), device="cpu"), str(tmp_path / "cache.db"))
    file = folder / ("tokenizer_config.json" if change == "flag" else "tokenizer.json")
    content = json.loads(file.read_text())
    if change == "merges":
        content["model"]["merges"].reverse()
    elif change == "added token":
        content["added_tokens"][0]["lstrip"] = True
    else:
        content["split_special_tokens"] = True
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cache.db: holds responses of another model"):
        CachingLM(YocoLM(pretrained=str(folder), device="cpu"), str(tmp_path / "cache.db"))


def test_a_tokenizer_without_an_end_token(folder, caplog):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"eos_token": None}))
    lm = YocoLM(pretrained=str(folder), device="cpu")
    assert "does not say which token ends a text" in caplog.text
    assert lm.generate_until(instances("generate_until", [("Oslo", SETTINGS)]))[0]
    file.write_text(json.dumps(config | {"eos_token": None, "bos_token": None}))
    with pytest.raises(ValueError, match="does not say which token begins or ends a text"):
        YocoLM(pretrained=str(folder), device="cpu")


def test_model_args_come_before_options():
    """lm_eval passes its defaults of --device and --batch_size as well."""
    options = {"batch_size": 1, "max_batch_size": None, "device": "cuda:99"}
    arguments = {"batch_size": 4, "device": "cpu", "pretrained": DEFAULT_CHECKPOINT}
    lm = YocoLM.create_from_arg_obj(arguments, options)
    assert lm.engine.batch_size == 4 and lm.device.type == "cpu"
    lm = YocoLM.create_from_arg_string("device=cpu,batch_size=auto", options)
    assert lm.engine.batch_size is None


def test_bos(folder):
    def encode(string, **arguments):
        return YocoLM(pretrained=str(folder), device="cpu", **arguments).tok_encode(string)

    with pytest.raises(ValueError, match="add_bos_token: 'no' is neither True nor False"):
        encode("Oslo", add_bos_token="no")
    bare = encode("Oslo", add_bos_token=False)
    assert encode("Oslo") == encode("Oslo", add_bos_token=True) == [0, *bare] and bare[0] != 0
    assert encode("<s>Oslo") == [0, *bare]  # such as a chat template writes
    # Elsewhere the same three characters may be plain text.
    lm = YocoLM(pretrained=str(folder), device="cpu")
    lm.tokenizer.split_special_tokens = True
    plain = lm.tok_encode("<s>Oslo")
    assert plain[0] == 0 and lm.tokenizer.decode(plain[1:]) == "<s>Oslo"


def test_encodings_are_the_callers_own(lm):
    lm.tok_encode("Oslo", add_special_tokens=False).append(7)
    assert 7 not in lm.tok_encode("Oslo")


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


@pytest.mark.parametrize("given", ["pretrained=,device=cpu", "device=cpu,pretrained=None"])
def test_the_demo_is_never_taken_for_somebodys_model(given):
    """As a script writes it whose variable is not set."""
    with pytest.raises(ValueError, match="^pretrained=(None| is empty)"):
        YocoLM.create_from_arg_string(given)


def test_revisions_of_a_name_on_the_hub(folder, small_model, tmp_path, hub_cache):
    hub_cache("org/model", folder, "1" * 40, branch="main")
    small_model.cross_decoder.layers[0].ffn.fc1.weight.mul_(1.1)
    save(small_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<unk>"}))
    hub_cache("org/model", folder, "2" * 40, branch="v2")
    first = YocoLM(pretrained="org/model", device="cpu")
    second = YocoLM(pretrained="org/model", revision="v2", device="cpu")
    assert [lm.tokenizer.eos_token for lm in (first, second)] == ["</s>", "<unk>"]
    told, of_branch = first.get_model_info(), second.get_model_info()
    assert told["model_sha"] == "1" * 40 and "model_revision" not in told
    assert of_branch["model_sha"] == "2" * 40 and of_branch["model_revision"] == "v2"
    assert told["pretrained"] == of_branch["pretrained"] == "org/model"
    CachingLM(first, str(tmp_path / "cache.db"))
    with pytest.raises(ValueError, match="cache.db: holds responses of another model"):
        CachingLM(second, str(tmp_path / "cache.db"))


def test_trust_remote_code_has_no_effect_and_says_so(folder, caplog):
    YocoLM(pretrained=str(folder), device="cpu", trust_remote_code=True)
    assert "trust_remote_code has no effect" in caplog.text


def test_the_bundled_checkpoint_is_the_default():
    lm = YocoLM(device="cpu")
    assert lm.get_model_info()["pretrained"] == DEFAULT_CHECKPOINT
    assert lm.max_length == 1048576
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
        ({"pretrained": ""}, "pretrained= is empty; give a value, or leave it out"),
        ({"tokenizer": " "}, "tokenizer= is empty; give a value, or leave it out"),
        ({"pretrained": 7}, "7: no such checkpoint"),
        ({"device": "mps"}, "device 'mps' cannot be used: models run on cuda and cpu alone"),
        ({"device": "meta"}, "device 'meta' cannot be used: models run on cuda and cpu alone"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"max_length": "long"}, "max_length: 'long' is not a length"),
        ({"batch_size": 0}, "batch_size: 0 is not a whole number from 1 on; give one"),
        ({"prefill_chunk": "-1"}, "prefill_chunk: '-1' is not a length"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as caught:
        YocoLM(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizer_larger_than_the_model(folder, small_model, tmp_path):
    save(Yoco(replace(small_model.config, vocab_size=1000)), tmp_path)
    with pytest.raises(ValueError, match="2048 token ids exceed the model's vocabulary of 1000"):
        YocoLM(pretrained=str(tmp_path), device="cpu")
