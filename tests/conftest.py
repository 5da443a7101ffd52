"""Small models and tokenizers that several tests share."""

from pathlib import Path

import pytest
import torch

from yoco_eval.model import Yoco, YocoConfig

PUBLISHED = Path(__file__).parent / "data" / "published"


@pytest.fixture(params=["gated_retention", "sliding_window"])
def published(request) -> Path:
    """Folder of a reference model in the published layout, with its logits in expected.pt."""
    return PUBLISHED / request.param


@pytest.fixture
def exact(published) -> Yoco:
    """The same model in float64, where two ways to the same number agree almost to the last bit."""
    return Yoco.from_pretrained(published, device="cpu", dtype=torch.float64)


@pytest.fixture
def small_model() -> Yoco:
    """A model with random weights for the vocabulary of the demo tokenizer."""
    torch.manual_seed(0)
    config = YocoConfig(
        dim=32, n_layers=4, hidden_dim=48, n_self_heads=2, n_attn_heads=4, n_attn_kv_heads=2,
        vocab_size=2048, max_position_embeddings=512,
    )
    return Yoco(config).requires_grad_(False).eval()
