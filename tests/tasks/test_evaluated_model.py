"""Whose tokenizer and whose positions a task takes, from the arguments of any backend."""

import json
import logging
import shutil
import warnings
from functools import partial

import lm_eval
import pytest
from hub_tokenizers import gemma, phi
from lm_eval import simple_evaluate
from lm_eval.models import api_models
from lm_eval.models.gguf import GGUFLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from transformers import BloomConfig, BloomForCausalLM

import yoco_eval.tasks
from yoco_eval import registration
from yoco_eval.lm import YocoLM
from yoco_eval.tasks import evaluated_model
from yoco_eval.tasks.evaluated_model import load_tokenizer, max_positions
from yoco_eval.tasks.prompts import TokenCounter
from yoco_eval.tokenizers import load_tokenizer as load_any_tokenizer


@pytest.fixture
def folder(tmp_path, tokenizers):
    """A model folder of a GPT-2-like model, with a tokenizer of its own."""
    tokenizers["byte-level"].save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2", "n_positions": 777}')
    return tmp_path / "model"


def test_nothing_is_taken_for_a_model_that_nobody_named():
    assert max_positions({}) is None
    with pytest.raises(ValueError, match="is not known here.*--metadata tokenizer=NAME"):
        load_tokenizer({})


def test_bundled_by_name():
    assert max_positions({"pretrained": "demo-64k"}) == 65536
    assert load_tokenizer({"pretrained": "demo-64k"}).vocab_size == 2048


def test_bundled_tokenizer_loads_silently(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer({"pretrained": "demo-64k"})
        TokenCounter(tokenizer).count("word " * 70_000)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_tokenizer_comes_before_pretrained_before_model(folder, tokenizers):
    own, vocab_size = str(folder), tokenizers["byte-level"].vocab_size
    assert load_tokenizer({"tokenizer": own, "pretrained": "demo-64k"}).vocab_size == vocab_size
    assert load_tokenizer({"pretrained": own, "model": "demo-64k"}).vocab_size == vocab_size
    assert load_tokenizer({"model": own}).vocab_size == vocab_size
    # A file in a folder stands for the folder, as a training checkpoint does.
    assert load_tokenizer({"pretrained": f"{own}/config.json"}).vocab_size == vocab_size


def test_published_layout(tmp_path, folder):
    """The tokenizers that the yoco backend takes for it: beside it, or a file given by name."""
    (tmp_path / "params.json").write_text('{"vocab_size": 2048}')
    shutil.copy(folder / "tokenizer.json", tmp_path / "own.json")
    with pytest.raises(ValueError, match="no tokenizer in this folder"):
        load_tokenizer({"pretrained": str(tmp_path)})
    arguments = {"pretrained": str(tmp_path), "tokenizer": str(tmp_path / "own.json")}
    own = load_tokenizer({"pretrained": str(folder)})
    assert load_tokenizer(arguments).get_vocab() == own.get_vocab()
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert load_tokenizer({"pretrained": str(tmp_path)}).get_vocab() == own.get_vocab()
    (tmp_path / "params.json").write_text('{"vocab_size": 9}')
    with pytest.raises(ValueError, match="exceed the model's vocabulary of 9"):
        load_tokenizer({"pretrained": str(tmp_path)})


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"n_positions": 777}, 777),
        ({"n_ctx": 4096}, 4096),
        ({"seq_length": 131072}, 131072),
        ({"text_config": {"max_position_embeddings": 123}}, 123),
        # As lm-eval's rule: what stands above may be an encoder's of sounds or images.
        ({"max_position_embeddings": 5, "text_config": {"max_position_embeddings": 6}}, 6),
        ({"max_position_embeddings": 5, "text_config": None}, 5),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 40960, "rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {**YARN, "type": "llama3"}}, 32768),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4}}, 32768),
        ({"vocab_size": 10}, None),
    ],
)
def test_positions_that_configurations_state(folder, config, positions):
    (folder / "config.json").write_text(json.dumps(config))
    assert max_positions({"pretrained": str(folder)}) == positions


def test_positions_of_the_published_layout(tmp_path, folder):
    for params, positions in [({"dim": 1, "max_seq_len": 99}, 99), ({"max_seq_len": -1}, None)]:
        (tmp_path / "params.json").write_text(json.dumps(params))
        assert max_positions({"pretrained": str(tmp_path)}) == positions
    assert max_positions({"tokenizer": str(folder)}) is None
    assert max_positions({"model": "some-api"}) is None


def test_revisions_of_a_name_on_the_hub(folder, hub_cache, tokenizers):
    hub_cache("org/model", folder, "1" * 40, branch="main")
    (folder / "config.json").write_text('{"model_type": "yoco", "max_position_embeddings": 4096}')
    tokenizers["unigram"].save_pretrained(folder)
    hub_cache("org/model", folder, "2" * 40, branch="v2")
    first, second = {"pretrained": "org/model"}, {"pretrained": "org/model", "revision": "v2"}
    assert [max_positions(first), max_positions(second)] == [777, 4096]
    assert load_tokenizer(first).get_vocab() == tokenizers["byte-level"].get_vocab()
    assert load_tokenizer(second).get_vocab() == tokenizers["unigram"].get_vocab()
    assert max_positions({"pretrained": "org/other"}) is None


def test_what_the_user_says_comes_before_the_configuration():
    assert max_positions({"pretrained": "demo-64k", "max_length": 1000}) == 1000
    assert max_positions({"pretrained": "demo-64k", "max_model_len": "1m"}) == 1048576
    with pytest.raises(ValueError, match="^max_length: 'long' is not a length"):
        max_positions({"max_length": "long"})


@pytest.mark.parametrize("key", ["tokenizer", "pretrained"])
@pytest.mark.parametrize("name", ["params.json", "config.json"])
def test_no_tokenizer_to_be_had(tmp_path, key, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer .* tokenizer=") as caught:
        load_tokenizer({key: str(tmp_path)})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_slow_tokenizers_are_refused(monkeypatch, tmp_path):
    class Slow:
        is_fast = False

    monkeypatch.setattr(
        evaluated_model.AutoTokenizer, "from_pretrained", lambda *args, **options: Slow()
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="^tokenizer: .*no fast tokenizer"):
        load_tokenizer({"pretrained": str(tmp_path)})


def test_no_code_of_a_tokenizer_is_run(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'run')!r}, 'w').close()\nclass Evil: ...")
    try:
        load_tokenizer({"pretrained": str(folder)})
    except ValueError:
        pass
    assert not (folder / "run").exists()


@pytest.mark.parametrize("kind", [gemma, phi])
def test_models_of_the_hub(tmp_path, hub_cache, kind):
    """By path and by name: the tokenizer that the backend has, no code run."""
    own = load_any_tokenizer(kind(tmp_path / "own"))
    config = {"model_type": "gemma4", "text_config": {"max_position_embeddings": 4096}}
    if kind is phi:
        config = {"model_type": "phi4flash", "max_position_embeddings": 4096}
        config["auto_map"] = {"AutoConfig": "configuration_phi4flash.Phi4FlashConfig"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    hub_cache("org/model", tmp_path / "own", "1" * 40, branch="main")
    text = "The special number of Oslo is 48213.\n\nWhat? Ünknown<turn|> <|end|>"
    for name in (str(tmp_path / "own"), "org/model"):
        loaded = load_tokenizer({"pretrained": name})
        assert loaded(text).input_ids == own(text).input_ids
        assert max_positions({"pretrained": name}) == 4096
        counter = TokenCounter(loaded, add_bos_token=kind is gemma)
        assert counter.special + counter.count(text) == len(own(text).input_ids)


def test_a_tokenizer_in_a_subfolder(tmp_path, folder):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_positions": 777}')
    named = {"pretrained": str(tmp_path), "subfolder": "model"}
    assert load_tokenizer(named).get_vocab() == load_tokenizer({"model": str(folder)}).get_vocab()
    assert max_positions(named) == 777


def test_code_of_a_tokenizer_is_run_for_those_who_trust_it(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): ...\n"
    )
    trusting = {"pretrained": str(folder), "trust_remote_code": True}
    assert type(load_tokenizer(trusting)).__name__ == "Own"


# While lm-eval evaluates


SHORT = {"context_lengths": 512, "depths": 1, "samples": 1}


def task_manager(**metadata):
    [folder] = yoco_eval.tasks.__path__
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


def evaluate(model, metadata=SHORT, **options):
    """lm-eval's function for users, where they have not said which tokenizer it is."""
    return simple_evaluate(
        model, tasks=["yoco_needle"], task_manager=task_manager(**metadata), **options
    )


@pytest.fixture
def hf(hf_model):
    return HFLM(pretrained=hf_model, device="cpu")


@pytest.fixture
def server(monkeypatch, hf_model):
    """A server that nobody asks anything: the packages that this takes need not be there."""
    monkeypatch.setattr(api_models, "find_spec", lambda package: True)
    return LocalCompletionsAPI(base_url="http://127.0.0.1:9", model="m", tokenizer=hf_model)


def fits(results, tokenizer):
    """Whether prompts are sized by this tokenizer."""
    [arguments] = [sample["arguments"][0] for sample in results["samples"]["yoco_needle"]][:1]
    return 512 - 16 <= len(tokenizer(arguments[0]).input_ids) + 16 <= 512


def test_prompts_are_sized_by_the_model_itself(hf, hf_model, tokenizers):
    for model, options in [(hf, {}), ("hf", {"model_args": {"pretrained": hf_model}})]:
        results = evaluate(model, device="cpu", **options)
        assert fits(results, tokenizers["sentencepiece"])
    assert fits(evaluate(YocoLM("demo-4k", device="cpu")), tokenizers["demo"])
    assert registration.evaluated is None  # and forgotten


def test_a_tokenizer_that_the_user_names_for_the_tasks_comes_first(hf, tokenizers):
    results = evaluate(hf, {**SHORT, "tokenizer": "demo-1m"})
    assert fits(results, tokenizers["demo"])


def test_another_model_is_not_taken_for_it(hf_model, answerer):
    HFLM(pretrained=hf_model, device="cpu")
    with pytest.raises(ValueError, match="--metadata tokenizer=NAME"):
        evaluate(answerer(str))


def test_a_backend_that_does_not_say_when_it_is_made(monkeypatch, hf):
    """As one that leaves out `LM.__init__`: it is known from `evaluate` on."""

    class Own(type(hf)):
        def __init__(self):
            self.__dict__.update(hf.__dict__)

        @classmethod
        def create_from_arg_string(cls, *arguments):
            return cls()

    monkeypatch.setattr(lm_eval.api.registry, "get_model", lambda name: Own)
    hf._max_length = 256
    with pytest.raises(ValueError, match="512 exceeds 256 tokens"):
        evaluate("own", {**SHORT, "tokenizer": "demo-1m"})


def test_contexts_that_a_backend_would_cut_are_refused(hf, server, tokenizers):
    long = {**SHORT, "context_lengths": [512, 4096]}
    message = "^context_lengths: 4096 exceeds {} tokens, beyond which .*--model_args {}$"
    with pytest.raises(ValueError, match=message.format(600, "max_length=4096")):
        evaluate(hf, long)
    # Servers get one less than they are given.
    with pytest.raises(ValueError, match=message.format(2047, "max_length=4097")):
        evaluate(server, long)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=2048, hidden_size=16, n_layer=1, n_head=2))
    unstated = HFLM(pretrained=bloom, tokenizer=tokenizers["sentencepiece"])
    with pytest.raises(ValueError, match=message.format(2048, "max_length=4096")):
        evaluate(unstated, long)
    # Also where the tasks were there before the model.
    tasks = task_manager(**SHORT, tokenizer="demo-1m").load(["yoco_needle"])
    hf._max_length = 256
    with pytest.raises(ValueError, match="512 exceeds 256 tokens"):
        lm_eval.evaluate(hf, tasks)


def test_contexts_of_backends_that_cut_nothing(monkeypatch, server):
    monkeypatch.setattr(registration, "evaluated", [server])
    assert max_positions({}) == 2047
    server.tokenized_requests = False  # as all servers of chats have it
    assert max_positions({}) is None
    assert max_positions({}, scored=True) == 2047
    monkeypatch.setattr(registration, "evaluated", [GGUFLM("http://127.0.0.1:9")])
    assert max_positions({}, scored=True) is None


@pytest.mark.parametrize("own", [True, False])
def test_unknown_settings_from_python_are_refused(monkeypatch, hf, hf_model, own):
    """In a manager of tasks of the user's own as in what lm-eval makes one of."""
    paths = {"include_path": yoco_eval.tasks.__path__[0], "include_defaults": False}
    monkeypatch.setattr(lm_eval.evaluator, "TaskManager", partial(TaskManager, **paths))

    def evaluate(model, metadata, **options):
        given = {"task_manager": task_manager(**metadata)} if own else {"metadata": metadata}
        return simple_evaluate(model, tasks=["yoco_needle"], limit=1, **given, **options)

    with pytest.raises(ValueError, match="'colour' is unknown; this task's settings are"):
        evaluate(hf, {**SHORT, "colour": "blue"})
    # An argument of the backend is none of the tasks' business, wherever it stands.
    arguments = {"pretrained": hf_model, "dtype": "float32"}
    metadata = {**SHORT, **arguments} if own else SHORT
    assert evaluate("hf", metadata, model_args=arguments, device="cpu")
    assert registration.given_metadata == registration.given_model_args == frozenset()
