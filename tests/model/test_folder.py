"""Which tokens end a text, as Hugging Face folders say it."""

import json

import pytest
from transformers import GenerationConfig

from yoco_eval.model.checkpoint import CheckpointError
from yoco_eval.model.folder import CONFIG, GENERATION, end_tokens

NESTED = {"text_config": {"eos_token_id": 7}}


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, []),
        ({GENERATION: {"eos_token_id": [1, 106, 50], "top_k": 64}}, [1, 50, 106]),
        ({GENERATION: {"eos_token_id": 5}, CONFIG: {"eos_token_id": 6}}, [5]),
        ({GENERATION: {"eos_token_id": None}, CONFIG: {"eos_token_id": 6}}, []),
        ({GENERATION: {}, CONFIG: {"eos_token_id": 6}}, []),
        ({CONFIG: {"eos_token_id": [6, 0], **NESTED}}, [0, 6]),
        ({CONFIG: {"eos_token_id": None, **NESTED}}, [7]),
        ({CONFIG: {"text_config": None}}, []),
    ],
)
def test_end_tokens_as_transformers_reads_them(tmp_path, files, ends):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert sorted(end_tokens(tmp_path, 128)) == ends
    if GENERATION in files:
        theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    else:
        theirs = GenerationConfig.from_model_config(files.get(CONFIG, {})).eos_token_id
    theirs = [] if theirs is None else theirs
    assert sorted(theirs if isinstance(theirs, list) else [theirs]) == ends


@pytest.mark.parametrize("name", [GENERATION, CONFIG])
@pytest.mark.parametrize("given", ["1", -1, 1.0, True, [1, 128], [[1]], {"id": 1}])
def test_what_is_no_token_is_refused(tmp_path, name, given):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(CheckpointError) as caught:
        end_tokens(tmp_path, 128)
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / name}: eos_token_id must be the id of a token, 0 to 127"
    )
    assert repr(given) in message and "\n" not in message


@pytest.mark.parametrize("content", ["{", "[1]", "\0"])
def test_a_damaged_file(tmp_path, content):
    (tmp_path / GENERATION).write_text(content)
    with pytest.raises(CheckpointError, match=f"{GENERATION}: (not valid JSON|holds a list)"):
        end_tokens(tmp_path, 128)
