"""Which results are of one model, and what models are called."""

import pytest
from lm_eval.utils import sanitize_model_name

from yoco_eval.reports.models import identify, name_folders, name_models, settle

SNAPSHOT = "/root/.cache/huggingface/hub/models--org--small-1b/snapshots/"


def model(args, backend="hf", **config):
    return identify({"config": {"model": backend, "model_args": args, **config}})


def names(*models):
    found = name_models(settle(models))
    return [found[one] for one in settle(models)]


@pytest.mark.parametrize(
    "more",
    """batch_size=8 max_batch_size=64 device=cuda:1 num_concurrent=4 tensor_parallel_size=2
    gpu_memory_utilization=0.8 prefill_chunk=4k max_length=64k max_model_len=65536 revision=main
    dtype=auto auth_token=secret""".split(),
)
def test_arguments_that_change_no_answer_make_no_other_model(more):
    assert model(f"pretrained=org/small,{more}") == model({"pretrained": "org/small"})


@pytest.mark.parametrize(
    "more",
    """revision=step1 peft=a/b delta=a/b lora_local_path=x/last gguf_file=q4.gguf subfolder=ema
    load_in_4bit=True hf_overrides={"rope":4} base_url=http://one/v1 dtype=bfloat16
    tokenizer=other/one enable_thinking=False any_other=1""".split(),
)
def test_any_other_argument_makes_another_model_that_is_named(more):
    plain, other = model("pretrained=org/small,device=cpu"), model(f"pretrained=org/small,{more}")
    assert names(plain, other) == ["small", f"small {more}"]


def test_arguments_as_a_text_and_as_a_mapping_are_the_same():
    args = {"pretrained": "ckpts", "load_in_4bit": True, "batch_size": 8}
    assert model("load_in_4bit=True,pretrained=./ckpts/") == model(args)
    assert model('{"pretrained": "ckpts", "load_in_4bit": true}') == model(args)
    assert model("trust_remote_code=True,pretrained=a", "yoco") == model("pretrained=a", "yoco")


def test_adapters_and_revisions_are_named_in_any_case():
    assert names(model("pretrained=org/ckpts,revision=step1000")) == ["ckpts revision=step1000"]
    assert names(model("pretrained=org/small,dtype=bfloat16")) == ["small"]


def test_what_is_read_of_a_cache_is_named_in_any_case_as_plans_do():
    args = "cache_dtype=fp8,dtype=bfloat16,pretrained=org/small,revision=step1,sparse=64"
    told = "small revision=step1 sparse=64 cache_dtype=fp8"
    assert names(model(args, "yoco", sparse=64, cache_dtype="fp8")) == [told]
    assert names(model("pretrained=org/small", "yoco", sparse=64)) == ["small sparse=64"]
    found = names(model("pretrained=org/small"), model("pretrained=org/small,sparse=8"))
    assert found == ["small", "small sparse=8"]


def test_snapshots_of_the_hub_are_called_as_their_repository():
    first, second = (model({"pretrained": SNAPSHOT + digit * 40}) for digit in "ab")
    assert names(first) == ["org/small-1b"]
    assert names(first, second) == ["org/small-1b aaaaaaaa", "org/small-1b bbbbbbbb"]
    folders = [sanitize_model_name(SNAPSHOT + digit * 40) for digit in "ab"]
    assert name_folders([folders[0], "mine"]) == ["org/small-1b", "mine"]
    assert name_folders(folders) == ["org/small-1b aaaaaaaa", "org/small-1b bbbbbbbb"]
    by_name = model("pretrained=org/small-1b", model_sha="a" * 40)
    assert settle([by_name, first])[0] == first


def test_a_branch_that_moved_is_another_model():
    old, new = (model("pretrained=org/small", model_sha=digit * 40) for digit in "ab")
    untold = model("pretrained=org/small", "vllm")
    assert names(old, new) == ["small aaaaaaaa", "small bbbbbbbb"]
    assert settle([old, new, untold])[2] == new
    assert settle([untold]) == [untold]


def test_equal_names_are_told_apart_by_their_folders():
    assert names(*map(model, ("pretrained=/r/4k/last", "pretrained=/r/64k/last"))) == [
        "4k/last", "64k/last",
    ]  # fmt: skip
