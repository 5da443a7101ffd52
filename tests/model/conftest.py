"""A kind of self-decoder that the product does not have."""

import pytest
from toy_self_decoder import MovingAverageSettings

from yoco_eval.model.mixers import KINDS


@pytest.fixture
def toy_kind(monkeypatch) -> type[MovingAverageSettings]:
    """The toy, in the table of kinds."""
    monkeypatch.setitem(KINDS, MovingAverageSettings.kind, MovingAverageSettings)
    return MovingAverageSettings
