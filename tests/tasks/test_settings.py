"""Settings of tasks: how they are read, what is refused, which names there are."""

import importlib
import pkgutil
from dataclasses import dataclass, fields, is_dataclass

import pytest

import yoco_eval.tasks
from yoco_eval import registration
from yoco_eval.tasks import settings
from yoco_eval.tasks.settings import NAMES, read_settings, setting


@dataclass(frozen=True)
class Example:
    context_lengths: list[int] = setting(settings.lengths, [4096])
    depths: list[float] = setting(settings.depths, [0.5])
    samples: int = setting(settings.count, 2)
    seed: int = setting(settings.whole, 0)
    haystack: str = setting(settings.text, "synthetic")
    ask_all: bool = setting(settings.flag, True)


def read(**metadata):
    return read_settings(Example, metadata)


def test_defaults():
    assert read() == Example([4096], [0.5], 2, 0, "synthetic", True)
    assert read(pretrained="x", batch_size=1, version=1, seed=None) == read()
    # No two objects share a list.
    assert read().depths is not read().depths


@pytest.mark.parametrize(
    ("value", "lengths"),
    [
        (4096, [4096]),
        ("64k", [65536]),
        (["1m", "64K", "4096", 8192, 4096], [4096, 8192, 65536, 1048576]),
        ("[4k,64k]", [4096, 65536]),
        ((1, 2), [1, 2]),
    ],
)
@pytest.mark.parametrize("name", ["context_lengths", "max_seq_lengths"])
def test_context_lengths(name, value, lengths):
    assert read(**{name: value}).context_lengths == lengths


@pytest.mark.parametrize(
    ("value", "depths"),
    [
        (1, [0.5]),
        (2, [0, 1]),
        ("3", [0, 0.5, 1]),
        ("0,0.5,1", [0, 0.5, 1]),
        ("[0.25]", [0.25]),
        (0.25, [0.25]),
        ([1, 0, "0.5", 0.5], [0, 0.5, 1]),
        ([1], [1]),
    ],
)
def test_depths(value, depths):
    assert read(depths=value).depths == depths


@pytest.mark.parametrize(
    ("value", "flag"), [(True, True), ("False", False), (0, False), ("1", True), ("true", True)]
)
def test_flags(value, flag):
    assert read(ask_all=value).ask_all is flag


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"context_lengths": "long"}, "context_lengths: 'long' is not a length"),
        ({"context_lengths": [4096, 0]}, "context_lengths: 0 is not a length"),
        ({"context_lengths": -5}, "context_lengths: -5 is not a length"),
        ({"context_lengths": 1.5}, "context_lengths: 1.5 is not a length"),
        ({"context_lengths": True}, "context_lengths: True is not a length"),
        ({"context_lengths": []}, "context_lengths: the list is empty"),
        ({"max_seq_lengths": ["4x"]}, "max_seq_lengths: '4x' is not a length"),
        ({"context_lengths": 1, "max_seq_lengths": 1}, "two names of one setting"),
        ({"depths": [0.5, 1.5]}, "depths: 1.5 is not within 0 and 1"),
        ({"depths": [-0.1]}, "depths: -0.1 is not within 0 and 1"),
        ({"depths": ["nan"]}, "depths: nan is not within 0 and 1"),
        ({"depths": 0}, "depths: a count of 0 is below 1"),
        ({"depths": "deep"}, "depths: 'deep' is not a number"),
        ({"depths": []}, "depths: the list is empty"),
        ({"depths": "[]"}, "depths: the list is empty"),
        ({"context_lengths": "[]"}, "context_lengths: the list is empty"),
        ({"samples": 0}, "samples: 0 is below 1"),
        ({"samples": 2.5}, "samples: 2.5 is not a whole number"),
        ({"samples": True}, "samples: True is not a number"),
        ({"seed": "x"}, "seed: 'x' is not a number"),
        ({"seed": "9" * 5000}, "is not a whole number"),
        ({"depths": 10**9}, "depths: a count of 1000000000 is above 100000; give fewer"),
        ({"depths": "1" * 400}, "is above 100000; give fewer"),
        ({"depths": "9" * 5000}, "depths: inf is not within 0 and 1"),
        ({"samples": 10**12}, "samples: 1000000000000 is above 100000; give fewer"),
        ({"context_lengths": "2048m"}, "'2048m' is too long; 1024m, 2^30 tokens, is the longest"),
        ({"context_lengths": 10**400}, "is not a length"),
        ({"context_lengths": "4" * 5000}, "is not a length"),
        ({"ask_all": "y" * 5000}, "is neither true nor false"),
        ({"ask_all": "maybe"}, "ask_all: 'maybe' is neither true nor false"),
        ({"sample": 3}, "'sample' is unknown; did you mean 'samples'"),
        ({"context_length": 3}, "'context_length' is unknown; did you mean 'context_lengths'"),
        ({"depth": 3}, "'depth' is unknown; did you mean 'depths'"),
        ({"need1es": 3}, "'need1es' is unknown; did you mean 'needles'"),
    ],
)
def test_bad_settings_are_told_in_one_line(metadata, message):
    with pytest.raises(ValueError) as caught:
        read(**metadata)
    assert message in str(caught.value) and str(caught.value).count("context_lengths: ") < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_settings_of_other_tasks_and_arguments_of_any_backend_are_left_alone():
    assert read(needles=3, max_length=600, dtype="auto", colour="blue") == read()


def test_unknown_keys_of_metadata_are_refused(monkeypatch):
    monkeypatch.setattr(registration, "given_metadata", frozenset({"colour"}))
    with pytest.raises(ValueError, match="'colour' is unknown; this task's settings are ask_all"):
        read(colour="blue")


def test_a_task_knows_its_own_settings(monkeypatch):
    monkeypatch.setattr(settings, "NAMES", frozenset())
    monkeypatch.setattr(registration, "given_metadata", frozenset({"seed"}))
    assert read(seed=3).seed == 3


def test_arguments_of_the_model_are_not_taken_for_settings(monkeypatch):
    """`seed` is one of vLLM's, `context_length` one of SGLang's."""
    monkeypatch.setattr(registration, "given_model_args", frozenset({"seed", "context_length"}))
    assert read(seed=1234, context_length=131072) == read()
    monkeypatch.setattr(registration, "given_metadata", frozenset({"seed"}))
    monkeypatch.setattr(registration, "given_model_args", frozenset({"context_length"}))
    assert read(seed=1234, context_length=131072) == read(seed=1234)


def test_settings_of_other_tasks_are_told(caplog):
    settings._tell_ignored.cache_clear()
    read(needles=3)
    read(needles=4)
    assert caplog.messages == [
        "metadata 'needles' is ignored by a task whose settings are ask_all, context_lengths, "
        "depths, haystack, samples, seed"
    ]


def test_the_names_are_those_of_all_tasks():
    """Else a setting of one task would be taken for a slip by the others."""
    names = {"max_seq_lengths"}  # stands for context_lengths
    for module in pkgutil.iter_modules(yoco_eval.tasks.__path__, "yoco_eval.tasks."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and is_dataclass(kind):
                names |= {field.name for field in fields(kind) if "read" in field.metadata}
    assert names == NAMES


def test_the_results_file_tells_what_the_task_takes():
    given = {"version": 2, "needles": 3, "max_seq_lengths": "2k", "pretrained": "x"}
    told = settings.told(given, read(**given))
    assert told["context_lengths"] == [2048] and told["seed"] == 0
    assert told.keys() == {"version", "pretrained", *(field.name for field in fields(Example))}
