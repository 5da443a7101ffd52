"""flash-linear-attention's YOCO: its folders as they are, against the logits of its own class."""

from pathlib import Path

import pytest
import torch

from yoco_eval.model import load

FOLDERS = sorted(Path(__file__).parents[1].glob("data/fla/*/"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def expected(folder):
    found = torch.load(folder / "expected.pt", weights_only=True)
    return found["input_ids"], found["logits"]


def test_logits(folder):
    ids, logits = expected(folder)
    model = load(folder, "cpu", torch.float32)
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=2e-4)
    assert logits.std() > 0.1  # else the comparison says little


def test_the_first_token_matters_to_the_last_logits(folder):
    """Else equality would pass without a state."""
    ids, _ = expected(folder)
    model = load(folder, "cpu", torch.float64)
    other = ids[:1].clone()
    other[0, 0] = (other[0, 0] + 1) % model.config.vocab_size
    assert (model(ids[:1])[:, -1] - model(other)[:, -1]).abs().max() > 1e-6
