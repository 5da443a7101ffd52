"""Folders of other families than YOCO: each prediction is that of lm-eval's `hf` backend; and their
costs are known from a `config.json` alone."""

import json
import math
import re
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from early_exit import MODELS, row
from lm_eval import evaluator, simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from phi4flash_equations import by_equations
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

import yoco_eval.tasks
from yoco_eval import speeds
from yoco_eval.cli import main
from yoco_eval.lm import YocoLM
from yoco_eval.model.phi4flash_config import Phi4FlashConfig
from yoco_eval.model.phi4flash_weights import weight_shapes
from yoco_eval.profiling import ProfileError, run_profile
from yoco_eval.reports.profile import load_profile
from yoco_eval.reports.profile_files import save_profile
from yoco_eval.tasks.haystack import SyntheticHaystack

TASKS = Path(yoco_eval.tasks.__file__).parent
SLIDING, FULL = "sliding_attention", "full_attention"
TEXT = {
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 8,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "num_hidden_layers": 7,
    "num_kv_shared_layers": 2,
    "sliding_window": 40,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PHI = json.loads((Path(__file__).parents[1] / "data" / "phi4flash" / "config.json").read_text())


def gemma4(folder, vocabulary):
    """The multimodal model, as published ones are."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    own = {"num_key_value_heads": 1, "global_head_dim": 16, "use_double_wide_mlp": True}
    text = TEXT | own | vocabulary | {"final_logit_softcapping": 30.0}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "position_embedding_size": 8}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    saved(transformers.Gemma4ForConditionalGeneration(config), folder)
    return str(folder)


def gemma3n(folder, vocabulary):
    """The text model: that of images would need another library."""
    transformers = pytest.importorskip("transformers", minversion="4.53")
    own = {"num_key_value_heads": 2, "laurel_rank": 4}
    own["activation_sparsity_pattern"] = [0.9, 0.9, *[0.0] * 5]
    config = transformers.Gemma3nTextConfig(**TEXT | own | vocabulary)
    saved(transformers.Gemma3nForCausalLM(config), folder)
    return str(folder)


def saved(model, folder):
    with torch.no_grad():
        for weight in model.parameters():  # large enough that attention is far from uniform
            if weight.dim() > 1:
                weight.normal_(0, 1.5 / math.sqrt(weight.shape[-1]))
            else:
                weight.uniform_(0.7, 1.4)
    model.save_pretrained(folder)


def phi4flash(folder, vocabulary):
    """The equations, for want of a class."""
    own = {"num_hidden_layers": 4, "hidden_size": 32, "sliding_window": 40}
    settings = PHI | own | {"vocab_size": vocabulary["vocab_size"]}
    settings |= {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 1024}
    config = Phi4FlashConfig.from_dict(settings)
    weights = {
        name: torch.randn(size) * (2 / math.sqrt(size[-1]) if len(size) > 1 else 0.5)
        for name, size in weight_shapes(config).items()
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "model.safetensors")
    return Equations(config, weights)


class Equations(PreTrainedModel):
    """A Phi-4-mini-flash as one of transformers': a full pass for each token, nothing kept."""

    config_class = PretrainedConfig

    def __init__(self, config, weights):
        settings = {"vocab_size": config.vocab_size, "max_position_embeddings": 1024}
        super().__init__(PretrainedConfig(**settings))
        self.shape, self.weights = config, weights
        self.own = torch.nn.Parameter(torch.zeros(1))  # which says where the model is

    def forward(self, input_ids, **options):
        (ids,) = input_ids
        return CausalLMOutput(logits=by_equations(self.shape, self.weights, ids)[None])

    def generate(self, input_ids, max_length, stopping_criteria, **options):
        while input_ids.shape[1] < max_length and not stopping_criteria(input_ids, None).all():
            likeliest = self(input_ids).logits[:, -1:].argmax(-1)
            input_ids = torch.cat((input_ids, likeliest), 1)
            if likeliest == 1:
                break
        return input_ids


FAMILIES = {"gemma4": gemma4, "gemma3n": gemma3n, "phi4flash": phi4flash}
SAMPLES = {"chosen": 6, "continued": 6, "yoco_needle": 4}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, with a BOS token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SyntheticHaystack("tests").text(0, 20_000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """Knows `yoco_needle`, and two tasks of questions about notes, some of which share theirs."""
    folder = tmp_path_factory.mktemp("tasks")
    rng, haystack = Random(0), SyntheticHaystack("questions")
    notes = [haystack.text(0, 700)[:700], haystack.text(5000, 5300)[:300]]
    words = sorted({word.strip(".,") for word in " ".join(notes).split()})
    rows = []
    for i in range(6):
        choices = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(4)]
        shortest = choices.index(min(choices, key=len))  # which is often the likeliest
        gold = (shortest + i % 2) % 4
        question = f"{notes[i % 2]}\nWhat is next after note {i}?"
        rows.append(json.dumps({"question": question, "choices": choices, "gold": gold}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    tasks = {
        "chosen": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "continued": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        },
    }
    for name, own in tasks.items():
        text = yaml.safe_dump({"task": name, **common, **own})
        (folder / f"{name}.yaml").write_text(text)
    grid = {"context_lengths": [240, 360], "depths": 2, "samples": 1}
    paths = [str(TASKS), str(folder)]
    return TaskManager(include_path=paths, include_defaults=False, metadata=grid)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory, tokenizer, manager):
    """What this project's backend and lm-eval's give of one folder, in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    sizes = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), len(tokenizer))
    model = FAMILIES[request.param](folder, sizes)
    tokenizer.save_pretrained(folder)
    ours = YocoLM(pretrained=str(folder), device="cpu", batch_size="auto", prefill_chunk=100)
    theirs = HFLM(model, "causal", tokenizer=str(folder), device="cpu", dtype="float32")
    assert ours.max_length == theirs.max_length == TEXT["max_position_embeddings"]
    run = partial(simple_evaluate, task_manager=manager, log_samples=True, bootstrap_iters=0)
    with pytest.MonkeyPatch.context() as patch:  # describing the machine takes seconds
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        return [run(model=lm, tasks=list(SAMPLES)) for lm in (ours, theirs)]


@pytest.mark.parametrize("task", SAMPLES)
def test_predictions_are_those_of_the_hugging_face_backend(both, task):
    ours, theirs = (results["samples"][task] for results in both)
    assert len(ours) == len(theirs) == SAMPLES[task]
    for sample, other in zip(ours, theirs, strict=True):
        assert sample["arguments"] == other["arguments"]
        for metric in sample["metrics"]:
            assert sample[metric] == other[metric]
        answers, expected = sample["filtered_resps"], other["filtered_resps"]
        if task == "chosen":
            answers, expected = torch.tensor(answers), torch.tensor(expected)
            assert torch.equal(answers[:, 1], expected[:, 1])  # whether it is the greedy answer
            torch.testing.assert_close(answers[:, 0], expected[:, 0], rtol=1e-4, atol=0)
        else:
            assert answers == expected
    said = {str(sample["filtered_resps"]) for sample in ours}
    assert len(said) == SAMPLES[task]  # else equality says little


def test_figures_are_those_of_the_hugging_face_backend(both):
    ours, theirs = (results["results"] for results in both)
    assert ours == theirs
    assert 0 < ours["chosen"]["acc,none"] < 1


SMALL = TEXT | {"vocab_size": 50, "vocab_size_per_layer_input": 50}
ALONE = {
    "Gemma 4": {"model_type": "gemma4", "text_config": SMALL | {"num_key_value_heads": 1}},
    "Gemma 3n": {"model_type": "gemma3n_text"} | SMALL,
    "Phi-4-mini-flash": PHI,
}


@pytest.fixture(params=ALONE)
def family(request, tmp_path):
    """Its name, and a folder of it with nothing but a configuration."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text(json.dumps(ALONE[request.param]))
    return request.param, tmp_path / "alone"


def test_plans_need_no_weights(family, hub_cache, monkeypatch, capsys):
    """For a file, a folder, and a name on the hub."""
    monkeypatch.setattr(speeds, "_product_rate", lambda *args: 1e12)
    monkeypatch.setattr(speeds, "_copy_rate", lambda *args: 1e10)
    _, folder = family
    hub_cache("org/name", folder, "1" * 40, branch="main")
    plans = set()
    for what in (
        ["--shape", str(folder)],
        ["--shape", str(folder / "config.json")],
        ["--pretrained", str(folder)],
        ["--pretrained", "org/name"],
    ):
        assert main(["plan", *what, "--length", "1k", "--device", "cpu"]) == 0
        heading, _, plan = capsys.readouterr().out.partition("\n\n")
        assert "1K tokens on cpu in float32" in " ".join(heading.split())
        plans.add(re.sub("available .*", "", plan))
    (plan,) = plans
    assert "It fits" in plan and "of prefill" in plan


def test_profiles_name_the_family(family, tmp_path):
    name, folder = family
    profile = run_profile([50], shape=str(folder), device="cpu")
    assert [(each.model, each.outcome) for each in profile.rows] == [(name, "measured")]
    save_profile(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile
    with pytest.raises(ProfileError, match="--against transformer is for YOCO models"):
        run_profile([50], shape=str(folder), against="transformer", device="cpu")


def test_nothing_is_to_be_converted(family, tmp_path, capsys):
    name, folder = family
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    told = (
        f"{folder}: needs no conversion; folders of {name} are evaluated as they are, with lm_eval"
    )
    assert told in line and not (tmp_path / "new").exists()


def test_figures_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for name in MODELS:
        cells = row(name, [4096, 32768, 131072]).values()
        assert f"| {' | '.join(cell or '' for cell in cells)} |\n" in text
