"""Named shapes, and random weights for them."""

import pytest
import torch

from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig
from yoco_eval.model.shapes import SHAPES, find_shape, set_random_weights


def test_the_published_size():
    model = Yoco.empty(SHAPES["3b"], torch.device("meta"), torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(3.4e9, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights(dtype):
    config = YocoConfig(64, 2, 32, 2, 1, 128, GatedRetentionSettings(2))
    models = [Yoco.empty(config, torch.device("cpu"), dtype) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        set_random_weights(model, seed)
    for (name, weight), same, other in zip(
        models[0].named_parameters(), models[1].parameters(), models[2].parameters(), strict=True
    ):
        assert weight.equal(same) and weight.dtype == dtype
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            assert not weight.equal(other)
            assert weight.float().std() == pytest.approx(0.02, rel=0.1), name


def test_find_shape():
    assert find_shape("3b") is SHAPES["3b"]
    with pytest.raises(ValueError, match="shape '7b' is unknown; choose from 3b"):
        find_shape("7b")
