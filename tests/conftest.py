"""Small models, and a count of live memory, that several tests share."""

import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        dim=32,
        n_layers=4,
        hidden_dim=48,
        n_self_heads=2,
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=2048,
        max_position_embeddings=512,
    )
    return Yoco(config).requires_grad_(False).eval()


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at a time, but for those in `besides`."""

    def __init__(self, besides: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in besides}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.fixture
def live_bytes() -> type[Live]:
    """A context in which `peak` becomes the most bytes that were alive at a time."""
    return Live
