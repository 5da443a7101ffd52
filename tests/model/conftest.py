"""A kind of self-decoder that the product does not have; Triton kernels, where a test asks for them
without a GPU, run in Triton's interpreter."""

import os

import pytest
import torch
from toy_self_decoder import MovingAverageSettings

from yoco_eval.model.mixers import KINDS

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


@pytest.fixture
def toy_kind(monkeypatch) -> type[MovingAverageSettings]:
    """The toy, in the table of kinds."""
    monkeypatch.setitem(KINDS, MovingAverageSettings.kind, MovingAverageSettings)
    return MovingAverageSettings
